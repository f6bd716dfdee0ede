/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every struct and enum that crosses between the kernel and the agent, and
 * nothing else. With maps.h this is the whole contract: Rust takes these types
 * from the skeleton. Fixed-width fields, widest first, padding written out.
 *
 * ABI_VERSION names the pin directory. bpf/abi.layout lists what a version
 * means; a test compares, and says when a change must raise the version.
 */
#pragma once

#include "kernel.h"

enum abi_version {
	ABI_VERSION = 2,
};

/* 16 bytes, network order; IPv4 is v4-mapped (::ffff:a.b.c.d). */
struct addr {
	__be32 w[4];
};

/* Seen from the endpoint; the numbers are Hubble's TrafficDirection. */
enum direction {
	DIRECTION_UNKNOWN = 0,
	DIRECTION_INGRESS = 1,
	DIRECTION_EGRESS = 2,
};

/* Reserved identities, with the numbers that Hubble's clients know. */
enum reserved_identity {
	IDENTITY_UNKNOWN = 0,
	IDENTITY_HOST = 1,
	IDENTITY_WORLD = 2,
	IDENTITY_UNMANAGED = 3,
	IDENTITY_HEALTH = 4,
	IDENTITY_INIT = 5,
	IDENTITY_REMOTE_NODE = 6,
	IDENTITY_KUBE_APISERVER = 7,
	IDENTITY_INGRESS = 8,
	IDENTITY_FIRST_CLUSTER = 256,
	IDENTITY_LAST_CLUSTER = 0xffffff,
	/* Node-local numbers (prefixes, pods covered by prefixes): never on the wire. */
	IDENTITY_FIRST_LOCAL = 0x1000000,
	IDENTITY_LAST_LOCAL = 0x1ffffff,
};

/*
 * Why a packet was dropped; the numbers are Hubble's DropReason, from 240 on our
 * own, which Hubble does not use. Functions return them negated. 0 is
 * "forwarded" in metrics and events.
 */
enum drop_reason {
	DROP_NONE = 0,
	DROP_INVALID_SOURCE_IP = 132,
	DROP_POLICY_DENIED = 133,
	DROP_INVALID_PACKET = 134,
	DROP_CONNECTION_TRUNCATED = 135,
	DROP_UNSUPPORTED_L3 = 139,
	DROP_WRITE_ERROR = 141,
	DROP_UNKNOWN_L4 = 142,
	DROP_UNSUPPORTED_ICMP = 143,
	DROP_UNROUTABLE_IP = 151,
	DROP_CONNECTION_INSERT = 155,
	DROP_INVALID_EXTENSION_HEADER = 156,
	DROP_FRAGMENT_UNSUPPORTED = 157,
	DROP_NO_SERVICE_BACKEND = 158,
	DROP_NO_TUNNEL_ENDPOINT = 160,
	DROP_UNSUPPORTED_L2 = 166,
	DROP_NO_NAT_MAPPING = 167,
	DROP_FIB_LOOKUP_FAILED = 169,
	DROP_ENCAPSULATION_PROHIBITED = 170,
	DROP_INVALID_IDENTITY = 171,
	DROP_UNKNOWN_SENDER = 172,
	DROP_IS_CLUSTER_IP = 174,
	DROP_FRAGMENT_NOT_FOUND = 175,
	DROP_FORBIDDEN_ICMPV6 = 176,
	DROP_SOURCE_RANGE = 177,
	DROP_POLICY_DENY_RULE = 181,
	DROP_INVALID_VNI = 183,
	DROP_NO_EGRESS_GATEWAY = 194,
	DROP_UNENCRYPTED = 195,
	DROP_TTL_EXCEEDED = 196,
	DROP_QUOTA_CONNECTIONS = 198,
	DROP_ENDPOINT_NOT_READY = 203,
	DROP_NO_EGRESS_IP = 204,
	DROP_QUOTA_NAT_PORTS = 240,
	DROP_NO_PROXY = 244,
};

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

/*
 * egress_rules: by which gateway and with which address a pod's packets leave
 * the cluster. The source is always exact; the longest destination counts, IPv4
 * at 224 + n. Of an endpoint with ENDPOINT_EGRESS what has no row goes the
 * ordinary way.
 */
struct egress_rule_key {
	__u32 prefix_length;
	struct addr source;
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

/*
 * services: frontends. Port 0, protocol 0: the address is a service's; other
 * ports are refused. One address and port may lead elsewhere for who asks from
 * inside than for who asks from outside: two rows.
 */
struct service_key {
	struct addr addr;
	__be16 port;
	__u8 protocol;
	__u8 scope; /* enum service_scope */
};

enum service_scope {
	SCOPE_INTERNAL = 0, /* pods and the node's own sockets ask */
	SCOPE_EXTERNAL = 1, /* packets from the network ask */
};

struct service {
	__u32 service_id;
	__u32 generation;     /* which slots rows are in force */
	__u32 backend_count;  /* that new flows may go to; 0: refused at once */
	__u32 draining_count; /* further slots: running flows alone */
	__u32 affinity_seconds; /* one client stays at one backend; 0: it need not */
	__u16 flags;	      /* enum service_flags */
	__u8 kind;	      /* enum service_kind */
	__u8 algorithm;	      /* enum service_algorithm */
};
_Static_assert(sizeof(struct service) == 24, "service");

enum service_flags {
	SERVICE_WILDCARD = 1 << 0, /* the port 0 entry */
	SERVICE_LOOPBACK = 1 << 1, /* of a loopback address: for sockets of the node's own namespace only */
	SERVICE_HAS_OTHERS = 1 << 2, /* without a backend it is silent: another node may have one */
	SERVICE_RANGES = 1 << 3,   /* only for who is in source_ranges */
	SERVICE_DSR = 1 << 4,	   /* the backend's node answers the client */
};

enum service_kind {
	SERVICE_CLUSTER_IP = 0,
	SERVICE_NODE_PORT = 1,
	SERVICE_LOAD_BALANCER = 2,
	SERVICE_EXTERNAL_IP = 3,
	SERVICE_HOST_PORT = 4, /* a port of this node that is a pod's */
};

enum service_algorithm {
	SERVICE_RANDOM = 0,
	SERVICE_MAGLEV = 1, /* of packets from the network, by the rows of maglev */
};

/*
 * slots: the backends of a service. A new set is written under the next
 * generation, then service.generation flips.
 */
struct slot_key {
	__u32 service_id;
	__u32 generation;
	__u32 slot; /* backends for new flows first; each part in the order of addresses as numbers, then ports */
};

struct slot {
	__u32 backend;
	__u32 service_id; /* the key's: a row that was freed meanwhile may be another's */
};
_Static_assert(sizeof(struct slot) == 8, "read as one word");

/* backends[id], for all services that have it. An id is never 0, and means one
 * backend until no slot and no table says it. */
struct backend {
	struct addr addr;
	__u32 id; /* the key: a row that was freed meanwhile may be another's */
	__be16 port;
	__u8 protocol;
	__u8 pad;
};
_Static_assert(sizeof(struct backend) == 24, "backend");

/* maglev: a service's table of backends, in pieces, under the generation of its
 * set. */
struct maglev_key {
	__u32 service_id;
	__u32 generation;
	__u32 piece;
};

enum maglev_size {
	MAGLEV_PIECE = 984, /* a row takes the kernel 4096 bytes */
};

struct maglev_piece {
	__u32 service_id; /* the key's, as a slot's */
	__u32 backends[MAGLEV_PIECE];
};

/* affinity: the backend that a client has had last. */
struct affinity_key {
	struct addr client; /* from a socket hook: its network namespace's cookie */
	__u32 service_id;
	__u32 kind;	    /* enum affinity_kind */
};

enum affinity_kind {
	AFFINITY_ADDRESS = 0,
	AFFINITY_NAMESPACE = 1,
};

struct affinity {
	__u64 used_jiffies;
	__u32 backend;
	__u32 pad;
};

/* source_ranges: who may use a service from outside; IPv4 at 128 + n. */
struct source_range_key {
	__u32 prefix_length;
	__be32 service_id;
	struct addr addr;
};

/* announced: where the node answers ARP and neighbour discovery for an address. */
struct announced_key {
	struct addr addr;
	__u32 ifindex;
};

struct announced {
	__u8 mac[6];	/* of the device */
	__u8 is_yielded; /* another node has announced the address since */
	__u8 pad;
};

/* announcing: how long the rows of `announced` count, by CLOCK_BOOTTIME. */
struct announcing {
	__u64 until_ns;	    /* the agent lives; behind it nothing is answered */
	__u64 led_until_ns; /* this node leads; behind it another may */
};

/*
 * socket_service: the service that a socket is connected to, and the backend that
 * it got, for getpeername, flows and stale sockets. In the socket's own storage.
 */
struct socket_service {
	struct addr service; /* the address that the application used */
	struct addr backend;
	__u32 service_id;    /* 0: no new question goes to this backend, answers may come */
	__u32 generation;    /* of the service's backends, in which the backend was found last */
	__be16 service_port; /* 0: an empty slot */
	__be16 backend_port;
};

/* socket_services: those that a socket sends datagrams to, for recvmsg and flows. */
enum socket_slots {
	SOCKET_SLOTS = 16,
};

struct socket_services {
	struct socket_service slot[SOCKET_SLOTS];
	__u64 asked_jiffies;
	__u64 order;	/* slots of questions that wait for answers, four bits each, the oldest lowest */
	__u32 order_count;
	__u32 last;	/* the slot that was asked last */
	__u32 next;	/* the slot that the next service gets */
	__u32 pad;
};

/* gone_backends: those that exist no more, while destroy_tcp_sockets runs. */
struct gone_backend {
	struct addr addr;
	__be16 port;
	__u8 pad[6];
};

/*
 * connections: canonical tuple, the lower (addr, port) first as raw memory
 * compares; any fixed order does. ICMP: the asker's port is the identifier, the
 * answerer's 0, and the key says who asks and what, so that a request from either
 * side, and of each type, is a flow of its own, whatever the identifier.
 */
struct connection_key {
	struct addr addr[2];
	__be16 port[2];
	__u8 protocol;
	__u8 kind; /* enum connection_kind */
	__u8 asker; /* ICMP: 1 + the index of who asks; else 0 */
	__u8 icmp_type; /* of what is asked: rules name types */
};
_Static_assert(sizeof(struct connection_key) == 40, "connection_key");

enum connection_kind {
	CONNECTION_FLOW = 0,
	CONNECTION_SERVICE = 1, /* client -> service address; service holds the chosen backend */
	CONNECTION_NODE = 2, /* client -> this node, the backend; service holds the service address */
};

/* Where packets to an address go. */
enum route {
	ROUTE_NONE = 0,	    /* not known yet */
	ROUTE_ENDPOINT = 1, /* a pod of this node */
	ROUTE_NODE = 2,	    /* a pod of another node */
	ROUTE_STACK = 3,    /* this node, other nodes, the world */
	ROUTE_NOWHERE = 4,  /* in a pod CIDR, and nobody has it */
	ROUTE_GUARDED = 5,  /* as ROUTE_STACK, through the node's netfilter */
};

/*
 * Values of Weir's field in skb->mark (lib/mark.h), which packets carry from one
 * of our programs to the next. The field has room for 1 to 7; 4 to 7 are kept
 * for the proxy and for encryption.
 */
enum packet_mark {
	MARK_NONE = 0,
	MARK_LEAVE = 1,	 /* has its verdict and its final addresses: it leaves */
	MARK_ANSWER = 2, /* our own answer to the pod that sent the packet */
	MARK_WAITS = 3,	 /* a fragment that waits for its packet's first one, or has waited */
};

/*
 * One row a flow, kind FLOW, under the addresses and ports that the packets have
 * between the programs and the responder. Index 0 of the arrays: sent by the
 * initiator; 1: by the responder.
 *
 * A flow to a service that is translated per packet has a second row, kind
 * SERVICE, under the addresses and ports that the client knows:
 *
 *   pod 10.1.0.1:40000 --> service 10.96.0.1:80 --> backend 10.1.0.2:8080
 *                                  as 10.1.0.1:33001, since another flow of the
 *                                  pod goes to that backend from port 40000
 *
 *                 SERVICE                          FLOW
 *   key           10.1.0.1:40000, 10.96.0.1:80     10.1.0.1:33001, 10.1.0.2:8080
 *   service       10.1.0.2:8080, the backend       10.96.0.1:80
 *   other_port    33001, the translated one        40000, the original one
 *   identity[1]   the service's id                 whom the verdict is on
 *   egress_epoch  of the backends: in which        of policy and addresses
 *                 generation it was found last
 *
 * The client's packets find SERVICE, then FLOW; the backend's find FLOW alone.
 * A flow by a host port has a SERVICE row only if it needs another source port.
 *
 * A flow from outside to a backend of another node has no FLOW row here: its
 * verdict is the other node's. Its SERVICE row has route[1], where the backend
 * is, and in other_port the port of this node's address, by which it goes there;
 * the row of `nat` for that port leads back. If the backend is this node itself,
 * its SERVICE row has CONNECTION_SOCKET, and a row of the kind NODE leads back.
 * With DSR its SERVICE row has CONNECTION_DIRECT and no other port, and nothing
 * comes back; the FLOW row at the other node has CONNECTION_DIRECT, too.
 */
struct connection {
	__u64 last_seen_jiffies;
	__u64 packets[2];
	__u64 bytes[2];
	struct addr service;	/* FLOW: service address used; SERVICE: backend */
	__u32 egress_epoch;	/* initiator's endpoint epoch + address epoch when the verdict was found */
	__u32 ingress_epoch;	/* the responder's */
	__u32 identity[2];	/* that the verdict is on */
	__u32 egress_rule;	/* the rules that allowed it; 0: not enforced */
	__u32 ingress_rule;
	__u32 last_report_jiffies; /* the low bits */
	__u32 sequence;		/* of the SYN of the end elsewhere, host order */
	__u16 endpoint[2];	/* local endpoint ids; 0: elsewhere */
	__be16 service_port;
	__u16 flags;		/* enum connection_flags */
	__u8 tcp_flags[2];	/* every flag seen, per side */
	__u8 route[2];		/* enum route: to the initiator, to the responder */
	__be16 other_port;	/* FLOW: the initiator's own source port, SERVICE: the one on the way; 0: the same */
	__u16 merged_jiffies;	/* low bits: when the last merged packet (GSO) came by the tunnel */
};
_Static_assert(sizeof(struct connection) == 104, "connection");

enum connection_flags {
	CONNECTION_INITIATOR_HIGH = 1 << 0, /* addr[1] began */
	CONNECTION_TRANSLATED = 1 << 1,	    /* per packet: replies take service as source */
	CONNECTION_LOOPBACK = 1 << 2,	    /* a pod to itself through its service */
	CONNECTION_SOCKET = 1 << 3,	    /* service was translated at the socket */
	CONNECTION_CLOSING = 1 << 4,	    /* FIN from both */
	CONNECTION_REPLIED = 1 << 5,	    /* the responder has answered */
	CONNECTION_ENDED = 1 << 6,	    /* its end was reported, it may go */
	CONNECTION_RESET = 1 << 7,	    /* RST, and nothing else since */
	CONNECTION_REVERSED = 1 << 8,	    /* TRANSLATED, and the backend began it */
	CONNECTION_OPENING = 1 << 9,	    /* unanswered; TCP: the handshake is not complete */
	CONNECTION_DIRECT = 1 << 10, /* the node that the client has asked sends the packets on; the answers go by no other */
	CONNECTION_PROXY = 1 << 11,	    /* both ends speak to the proxy; never taken off */
	CONNECTION_LATE = 1 << 12,	    /* the highest four bits count packets after the end */
};

/*
 * nat: two rows a flow, one for each direction (EGRESS out, INGRESS back). A row
 * back whose address is the node's own keeps a port for the node.
 *
 * A flow from outside to a backend elsewhere has one row here, for the way back,
 * which says both of the client and of the frontend. Its SERVICE row in
 * connections is for the way there.
 */
struct nat_key {
	struct addr local;  /* out: pod; back: node */
	struct addr remote;
	__be16 local_port;
	__be16 remote_port;
	__u8 protocol;
	__u8 direction;
	__u8 pad[2];
};

struct nat {
	struct addr addr; /* out: node; back: pod, or the node, or the client */
	struct addr service; /* back, for a client: the frontend; else zero */
	__u64 last_seen_jiffies; /* within a second */
	__be16 port;
	__be16 service_port; /* 0: not for a client of a service */
	__u8 tcp_flags; /* every flag seen this way; RST until something else is */
	__u8 client_flags; /* for a client: every flag seen the other way */
	__u8 is_answered;  /* for a client: the backend has spoken */
	__u8 pad;
};
_Static_assert(sizeof(struct nat) == 48, "nat");

/*
 * nat_searches: how many searches for a port have found one with at most
 * 2^index tries, per CPU. The last row: those that found none.
 */
struct nat_search {
	__u64 searches;
	__u64 tries; /* of them all */
};

enum nat_search_index {
	NAT_SEARCH_FAILED = 10, /* NAT_STEPS is 2^9 */
	NAT_SEARCH_ENTRIES = 11,
};

/*
 * fragments: the first fragment of a packet, for those that follow it. Addresses
 * and ports are those in the frame.
 */
struct fragment {
	struct addr source;
	struct addr destination;
	__u64 seen_jiffies;
	__u32 id;
	__u32 way; /* 2 * device, 0 for the node's network devices; + 1 if they send it */
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 asks;    /* ICMP: it has PACKET_ASKS */
	__u8 answers; /* ICMP: it has PACKET_ANSWERS */
	__u8 icmp_type; /* connections are kept by the type that asks */
	__u64 check; /* of all before it: two CPUs may write a row at once; 0: empty */
};
_Static_assert(sizeof(struct fragment) == 64, "fragment");

/*
 * l7_flows: a flow that both ends speak to the proxy about, by the addresses and
 * ports that its packets have there; the proxy asks who speaks, and by which
 * rules it judges. The connection has the same key, and CONNECTION_PROXY.
 */
struct l7_flow_key {
	struct addr client;
	struct addr server;
	__be16 client_port;
	__be16 server_port;
	__u8 protocol;
	__u8 pad[3];
};
_Static_assert(sizeof(struct l7_flow_key) == 40, "l7_flow_key");

struct l7_flow {
	__u32 client_identity;
	__u32 server_identity;
	__u16 client_endpoint; /* of this node, else 0 */
	__u16 server_endpoint;
	__u16 egress_set; /* rules of the client's pod; 0: they let everything pass */
	__u16 ingress_set; /* of the server's pod */
};
_Static_assert(sizeof(struct l7_flow) == 16, "l7_flow");

/* proxy[0]: the veth pair whose other end is in the proxy's namespace. */
struct proxy_device {
	__u32 ifindex; /* of the node's end; 0: there is no proxy */
	__u8 mac[6];   /* of the other end */
	__u8 pad[2];
};
_Static_assert(sizeof(struct proxy_device) == 12, "proxy_device");

/* The rows of l7_listeners. */
enum l7_listener {
	L7_LISTENER_TCP_IPV4 = 0,
	L7_LISTENER_TCP_IPV6 = 1,
	L7_LISTENER_UDP_IPV4 = 2,
	L7_LISTENER_UDP_IPV6 = 3,
	L7_LISTENERS = 4,
};

/* What pods share, and usage counts by endpoint. */
enum quota_kind {
	QUOTA_CONNECTIONS = 0, /* rows of connections; over the limit: refused */
	QUOTA_OPENING = 1,     /* those of them that are unanswered; over the limit: the endpoint's oldest goes */
	QUOTA_NAT_PORTS = 2,   /* pods' rows of nat for the way back; over the limit: refused */
	QUOTA_KINDS = 3,
};

/*
 * usage[endpoint id]: what an endpoint has of what pods share. Row 0: the node's
 * own. The rows behind the endpoints' bound the records of drops that no
 * endpoint answers for, by the device that they came from.
 */
struct usage {
	__u32 in_use[QUOTA_KINDS];
	__u32 taken[QUOTA_KINDS];   /* ever, whether it was given back or not */
	__u64 refused[QUOTA_KINDS]; /* or made room for by the endpoint's oldest */
	__u64 records_due;	    /* time of the next record of a drop, in 1/1024 jiffies */
	__u64 records_suppressed;
};
_Static_assert(sizeof(struct usage) == 64, "usage");

enum usage_size {
	USAGE_ENDPOINTS = 4096,
	USAGE_DEVICES = 64,
	USAGE_ENTRIES = 4160,
};

/* quota_totals[kind]: what all endpoints have together; a few short of it per CPU. */
struct quota_total {
	__u64 enforced_until_jiffies; /* limits count while somebody collects what has expired */
	__u32 in_use;
	__u32 pad;
};

/*
 * shares: places for an endpoint's own unanswered connections. Who comes after the last
 * place gets the first one, and the row that had it goes.
 */
struct share_key {
	__u32 endpoint;
	__u32 place;
};

struct share {
	__u64 key[5]; /* of connections */
};

/* What collect_usage is run with, before and after the rows are counted. */
struct recount_request {
	__u32 is_end;	     /* 0: begin */
	__u32 lease_seconds; /* limits count for so long */
};

/* metrics[reason * 4 + direction], per CPU. */
struct metric {
	__u64 packets;
	__u64 bytes;
};

enum metric_size {
	METRIC_ENTRIES = 1024,
};

/* node_state[0]. */
struct node_state {
	__u32 address_epoch; /* raised when the identity of an address changes */
	__u32 flags;	     /* enum node_flags */
};

enum node_flags {
	NODE_PAST_STACK = 1 << 0, /* packets may go past the node's stack: it has no IPsec policies to apply */
};

/*
 * devices[ifindex]: a device that leads out of the node, with the addresses that
 * the node gives to what leaves by it. this_node[0]: the addresses by which the
 * other nodes know this one. Zero: it has none of that family.
 */
struct own_addresses {
	struct addr ipv4;
	struct addr ipv6;
};

/* event_counts[0], per CPU: offered = delivered + lost + suppressed, exactly. */
struct event_count {
	__u64 offered;
	__u64 lost;	  /* there was no room */
	__u64 suppressed; /* its endpoint had its share of records */
};

enum event_type {
	EVENT_FLOW_NEW = 1,
	EVENT_FLOW_UPDATE = 2, /* an RST, a new verdict, or some seconds passed */
	EVENT_FLOW_END = 3,
	EVENT_DROP = 4,
};

enum event_flags {
	EVENT_IPV6 = 1 << 0,
	EVENT_REPLY = 1 << 1,	   /* the packet that caused it came from the responder */
	EVENT_SERVICE = 1 << 2,	   /* service and service_port are set */
	EVENT_FROM_OVERLAY = 1 << 3,
};

/*
 * A record of the ring buffer. Source is the flow's initiator, whoever sent the
 * packet; for drops without a flow it is the packet's sender.
 */
struct event {
	__u64 timestamp_ns;   /* bpf_ktime_get_ns: CLOCK_MONOTONIC */
	__u64 packets[2];     /* of the flow so far: initiator, responder */
	__u64 bytes[2];
	struct addr source;
	struct addr destination;
	struct addr service;  /* the address that the application used */
	__u32 source_identity;
	__u32 destination_identity;
	__u32 rule_id;	      /* that decided at the end of direction; 0: none */
	__u32 ingress_rule_id; /* that let a flow in at its destination; 0: none */
	__u32 ifindex;
	__be16 source_port;
	__be16 destination_port;
	__be16 service_port;
	__u16 source_endpoint;
	__u16 destination_endpoint;
	__u8 protocol;
	__u8 type;	      /* enum event_type */
	__u8 reason;	      /* enum drop_reason; 0: forwarded */
	__u8 direction;	      /* enum direction */
	__u8 tcp_flags;	      /* DROP: of the packet; else of the flow, both sides */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 flags;	      /* enum event_flags */
	__u8 pad[2];
};
_Static_assert(sizeof(struct event) == 128, "event");

/* What destroy_sockets and destroy_tcp_sockets write: a connected socket whose backend is gone. */
struct stale_socket {
	__u64 cookie;
	struct addr local;
	struct addr remote;
	__be16 local_port;
	__be16 remote_port;
	__u32 ifindex; /* that it is bound to, or 0 */
	__u8 protocol;
	__u8 pad[7];
};
_Static_assert(sizeof(struct stale_socket) == 56, "stale_socket");

/* What collect_connections and collect_nat are run with. */
struct collect_request {
	__u64 keys;    /* where they are, in the memory of who runs the program */
	__u32 count;
	__u32 deleted; /* the program's answer */
};
