/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: pods of this node, and who has which address: exactly, or by
 * prefix.
 */
#pragma once

/*
 * endpoints[id]: a pod of this node. The host side of its veth has the address
 * ENDPOINT_MAC_PREFIX:<id, big endian>, so from_pod knows the endpoint from the
 * frame's destination without a hash lookup, and checks ifindex.
 * One cache line. The writer stores everything but epoch first, then epoch.
 * Programs read epoch and policy as one word: nobody has a new epoch with an old
 * policy, on any processor.
 */
struct endpoint {
	__u32 epoch;	/* raised by every change of policy */
	__u32 policy;	/* policy id | POLICY_ENFORCE_* */
	struct addr ipv4; /* all zero: has none */
	struct addr ipv6;
	__u32 ifindex;	/* host side of the veth; 0: no such endpoint */
	__u32 identity;	/* the pod's cluster identity; goes into the tunnel header */
	__u8 mac[6];	/* of the pod's interface */
	__u16 flags;	/* enum endpoint_flags */
};
_Static_assert(sizeof(struct endpoint) == 56, "endpoint");
_Static_assert(__builtin_offsetof(struct endpoint, epoch) == 0 &&
		       __builtin_offsetof(struct endpoint, policy) == 4,
	       "one aligned word of 8 bytes");

/* The row of the node itself: a policy and an epoch, and no device. */
#define HOST_ENDPOINT 0

enum endpoint_flags {
	ENDPOINT_READY = 1 << 0, /* policy is enforced; else all is dropped, 203 */
	ENDPOINT_EGRESS = 1 << 1, /* some of what it sends leaves by a gateway: egress_rules */
	ENDPOINT_LIMITED = 1 << 2, /* what it receives passes a queue (lib/limit.h) */
	ENDPOINT_PRIORITY = 1 << 8, /* times skb->priority of what it sends to other nodes and the world */
};

enum policy_bits {
	POLICY_ID_MASK = 0x0fffffff,
	/* What it denies at egress is answered, not only dropped. */
	POLICY_REJECT = 1 << 28,
	/* Some peer gets less than class 0: at ingress a sender that no row of
	 * `addresses` names is never judged by class 0. */
	POLICY_REFUSE_STRANGERS = 1 << 29,
	POLICY_ENFORCE_EGRESS = 1 << 30,
	POLICY_ENFORCE_INGRESS = 1U << 31,
};

/* First four bytes of the host side's MAC address; the id follows. */
enum endpoint_mac {
	ENDPOINT_MAC_0 = 0x02,
	ENDPOINT_MAC_1 = 0x57,
	ENDPOINT_MAC_2 = 0x65,
	ENDPOINT_MAC_3 = 0x69,
};

/* addresses[addr]: who has exactly this address: pods and nodes. */
struct address {
	struct addr node;	/* underlay address of its node; zero when local */
	__u32 identity;		/* what policy sees; may be a local number */
	__u16 endpoint_id;	/* local pod, else 0 */
	__u16 flags;		/* enum address_flags */
};
_Static_assert(sizeof(struct address) == 24, "address");

enum address_flags {
	ADDRESS_POD = 1 << 0,
	ADDRESS_NODE = 1 << 1,	/* an address of a node of the cluster */
	ADDRESS_LOCAL = 1 << 2,	/* on this node */
	ADDRESS_INTERNAL = 1 << 3, /* a node's address inside the pod network: reached by tunnel */
	ADDRESS_ENCRYPT = 1 << 4, /* its node is never spoken to in plain (lib/encrypt.h) */
};

/* prefixes: CIDRs of rules, and the cluster's pod CIDRs; LPM over addr, IPv4 at 96 + n. */
struct prefix_key {
	__u32 prefix_length;
	struct addr addr;
};

struct prefix {
	struct addr node; /* POD_CIDR: underlay address of the node that has it; zero: this one */
	__u32 identity;
	__u32 flags;	  /* enum prefix_flags */
};

enum prefix_flags {
	PREFIX_POD_CIDR = 1 << 0, /* cluster pods live here: never masqueraded; unknown = unroutable */
	PREFIX_ENCRYPT = 1 << 2,  /* as ADDRESS_ENCRYPT, for addresses without a row */
	PREFIX_GUARDED = 1 << 1,  /* pods go there through the node's netfilter, and hear from there through it */
};
