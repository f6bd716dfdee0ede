/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what pods may do, and by which gateway they leave.
 */
#pragma once

/*
 * egress_pods[addr]: the set of rules of a pod. egress_rules: by which gateway
 * and with which address packets of pods with this set leave the cluster. The set
 * is always exact; the longest destination counts, IPv4 at 128 + n. Pods with the
 * same rules share a set, a set never changes under its number, and it has a rule
 * for every destination: of a pod that a policy selects what has no row, here or
 * there, leaves by no way.
 */
struct egress_rule_key {
	__u32 prefix_length;
	__u32 set;
	struct addr destination;
};

struct egress_rule {
	struct addr node;    /* the gateway's, by which tunnels reach it; zero: this node, or none */
	struct addr address; /* HERE: that packets leave with; zero: there is none */
	__u32 ifindex;	     /* HERE: the device that they leave by; 0: as the node's routes say */
	__u32 flags;	     /* enum egress_flags */
};

/* Neither, and no node: there is no gateway, and nothing leaves. */
enum egress_flags {
	EGRESS_HERE = 1 << 0,	  /* this node is the gateway */
	EGRESS_ORDINARY = 1 << 1, /* as if no policy selected the pod */
	EGRESS_OF_DEVICE = 1 << 2, /* HERE: with the address of the device that they leave by */
};

struct policy_peer_key {
	__u32 policy_id;
	__u32 identity;
	__u32 direction; /* enum direction */
};

struct policy_peer {
	__u32 class;
};

/*
 * Longest match over (policy, class, direction) + protocol + port. The first
 * three are always exact, so a shorter entry means: any port, or any protocol.
 * The port of ICMP is the type of what asks.
 */
struct policy_rule_key {
	__u32 prefix_length; /* 72 any protocol, 80 any port, 80 + n port prefix */
	__be32 policy_id;
	__be32 class;
	__u8 direction;
	__u8 protocol;
	__be16 port;
};

enum policy_rule_prefix {
	POLICY_RULE_PREFIX_ANY = 72,
	POLICY_RULE_PREFIX_PROTOCOL = 80,
	POLICY_RULE_PREFIX_PORT = 96,
};

struct policy_rule {
	__u32 rule_id;	   /* names the rule in flows; 0: none */
	__u16 l7_set;	   /* the rules by which the proxy judges what is allowed; 0: none */
	__u8 verdict;	   /* enum policy_verdict */
	__u8 reserved;
};

enum policy_verdict {
	POLICY_ALLOW = 1,
	POLICY_DENY = 2,
};
