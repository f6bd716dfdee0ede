/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: flows, their translations, fragments, and what a packet
 * carries from program to program.
 */
#pragma once

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
	MARK_LIMITED = 4, /* has its verdict, and passes the queue of a pod's limit */
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
	__u8 merged_jiffies;	/* low bits: when the last merged packet (GSO) came by the tunnel */
	__u8 round_trip;	/* TCP: enum round_trip; until the SYN is answered both bytes are when it came */
};
_Static_assert(sizeof(struct connection) == 104, "connection");

/*
 * A time in one byte: 0 is none, 1 + 8 * e + m is (8 + m) * 2^e / 8 microseconds
 * or up to an eighth more.
 */
enum round_trip {
	ROUND_TRIP_NONE = 0,
	ROUND_TRIP_STEPS = 8, /* from one power of two to the next */
	ROUND_TRIP_EXPONENT_MAX = 30,
};

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
