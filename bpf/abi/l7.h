/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what the programs share with the proxy.
 */
#pragma once

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
	__u16 listener_set; /* whose listener took the flow; 0: one of all rules */
	__u16 pad;
	__u32 alias; /* of the client, in l7_aliases; 0: none */
	__u32 asked_jiffies; /* DNS: when the proxy last got a query of it; 0: never */
};
_Static_assert(sizeof(struct l7_flow) == 28, "l7_flow");

/* l7_rule_listeners: the socket of a rule set that has one of its own. */
struct l7_rule_listener_key {
	__u16 set;
	__u8 is_ipv6;
	__u8 pad;
};
_Static_assert(sizeof(struct l7_rule_listener_key) == 4,
	       "l7_rule_listener_key");

/* proxy[0]: the veth pair whose other end is in the proxy's namespace. */
struct proxy_device {
	__u64 netns_cookie; /* of the proxy's namespace; 0: unknown */
	__u32 ifindex;	    /* of the node's end; 0: there is no proxy */
	__u8 mac[6];	    /* of the other end */
	__u8 pad[6];
};
_Static_assert(sizeof(struct proxy_device) == 24, "proxy_device");

/* The rows of l7_listeners. */
enum l7_listener {
	L7_LISTENER_TCP_IPV4 = 0,
	L7_LISTENER_TCP_IPV6 = 1,
	L7_LISTENER_UDP_IPV4 = 2,
	L7_LISTENER_UDP_IPV6 = 3,
	L7_LISTENERS = 4,
};

enum dns_size {
	DNS_STATES = 16384,    /* of all automata together */
	DNS_CLASSES = 40,      /* letters, digits, '-', '_', enum dns_class */
	DNS_ENDPOINTS = 4096,  /* as many as endpoints */
	DNS_SLOTS = 32,	       /* of dns_pending: questions of an endpoint */
	DNS_PAYLOAD_MAX = 1232, /* who takes longer answers, may get fragments */
	DNS_RECORD_BYTES = 512, /* of a message, in its record */
};

enum dns_class {
	DNS_CLASS_DIGIT = 26, /* the first one; letters are 0 to 25 */
	DNS_CLASS_HYPHEN = 36,
	DNS_CLASS_UNDERSCORE = 37,
	DNS_CLASS_DOT = 38,   /* between labels */
	DNS_CLASS_OTHER = 39, /* a byte that no pattern has */
};

/*
 * dns_states: the automata of rules of names. A name is fed byte by byte, its
 * labels with DNS_CLASS_DOT between them. Numbers of states count from the
 * automaton's first one; of that no name is allowed any more. The next one is
 * where a name begins.
 */
struct dns_state {
	__u16 next[DNS_CLASSES];
	__u8 accepts;
	__u8 pad[3];
};
_Static_assert(sizeof(struct dns_state) == 84, "dns_state");

/*
 * dns_rules, by number of a rule set; dns_names, by endpoint: the names of which
 * it must have the answers from the proxy, since rules name their addresses.
 */
struct dns_automaton {
	__u32 first; /* in dns_states; 0: none. Of dns_names 1: it has every name */
	__u32 count; /* of its states */
};
_Static_assert(sizeof(struct dns_automaton) == 8, "dns_automaton");

/* dns_pending: a question that waits for its answer. */
struct dns_pending {
	__u64 flow;	/* hash of the flow and of the query's id */
	__u64 question; /* hash of name, type and class */
	__u64 asked_ns; /* bpf_ktime_get_ns; 0: an empty slot */
};
_Static_assert(sizeof(struct dns_pending) == 24, "dns_pending");

/* dns_records: DNS_RECORD_BYTES of the message follow. */
struct dns_record {
	__u64 timestamp_ns;
	__u64 asked_ns; /* of an answer, when it was asked; 0: this is the question */
	struct l7_flow_key key;
	struct l7_flow flow;
	__u32 length;	 /* of the message; more may be cut off */
	__u16 denied_by; /* the rule set; 0: it passed */
	__u8 pad[6];
};
_Static_assert(sizeof(struct dns_record) == 96, "dns_record");
