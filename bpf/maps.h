/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every map. Each is pinned by its name in the ABI version's directory and has
 * exactly one writer. Sizes here are defaults; the agent may set others before
 * load. Weak: every file includes this, the linker merges it.
 */
#pragma once

#include <bpf/bpf_helpers.h>

#include "abi.h"

/* Written by datapath::endpoints; index is the endpoint id, 0 unused. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct endpoint);
} endpoints SEC(".maps") __weak;

/* Written by datapath::addresses: one entry an address of a pod or node. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct address);
} addresses SEC(".maps") __weak;

/* Written by datapath::addresses: prefixes of rules, the cluster's pod CIDRs. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix_key);
	__type(value, struct prefix);
} prefixes SEC(".maps") __weak;

/* Written by datapath::egress: which set of egress_rules a pod has. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, __u32);
} egress_pods SEC(".maps") __weak;

/* Written by datapath::egress: by which gateway packets leave, of each set. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct egress_rule_key);
	__type(value, struct egress_rule);
} egress_rules SEC(".maps") __weak;

/* Written by datapath::policies: identity -> class, per policy. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct policy_peer_key);
	__type(value, struct policy_peer);
} policy_peers SEC(".maps") __weak;

/* Written by datapath::policies: class x protocol x port -> verdict. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct policy_rule_key);
	__type(value, struct policy_rule);
} policy_rules SEC(".maps") __weak;

/* Written by datapath::services: frontends. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps") __weak;

/* Written by datapath::services: the backends of a frontend, by slot. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct slot_key);
	__type(value, struct slot);
} slots SEC(".maps") __weak;

/* Written by datapath::services: backends by id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct backend);
} backends SEC(".maps") __weak;

/* Written by datapath::services: tables of Maglev, in pieces. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct maglev_key);
	__type(value, struct maglev_piece);
} maglev SEC(".maps") __weak;

/* Written by datapath::services: who may use a service from outside. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct source_range_key);
	__type(value, __u32);
} source_ranges SEC(".maps") __weak;

/* Written by datapath::announced; the programs set is_yielded. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct announced_key);
	__type(value, struct announced);
} announced SEC(".maps") __weak;

/* Written by datapath::announced. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct announcing);
} announcing SEC(".maps") __weak;

/* Written by the programs; evicts the oldest. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinity SEC(".maps") __weak;

/* Written by the socket hooks: of connected sockets. Goes with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_service);
} socket_service SEC(".maps") __weak;

/* Written by the socket hooks: of sockets that send datagrams without being
 * connected. Goes with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_services);
} socket_services SEC(".maps") __weak;

/* Written by datapath::gc: whose TCP sockets are to be ended; never pinned. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct gone_backend);
	__type(value, __u32);
} gone_backends SEC(".maps") __weak;

/*
 * Written by the programs: verdicts on flows to pods, for the flows that follow
 * from and to the same. One slot for a pair and port, the last one has it; never
 * read outside.
 */
#define VERDICT_SLOTS 1024

struct cached_verdict {
	struct addr source;
	struct addr destination;
	__u32 claimed_identity; /* that came with the packet */
	__u32 epoch[2]; /* of the initiator's end, of the responder's */
	__u32 identity[2];
	__u32 rule[2];
	__u32 arrival; /* how the packet came: enum packet_flags, PACKET_ARRIVAL */
	__u16 endpoint[2];
	__be16 port; /* of ICMP the type */
	__u8 protocol;
	__u8 route[2]; /* enum route; that of the destination is never 0 */
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, VERDICT_SLOTS);
	__type(key, __u32);
	__type(value, struct cached_verdict);
} verdict_cache SEC(".maps") __weak;

/*
 * Written by the programs: the node's routes to pods of other nodes, for what
 * the same pod sends there in the same tick. The last one has a slot; never
 * pinned, never read outside.
 */
#define ROUTE_SLOTS 64

struct known_route {
	struct addr destination;
	__u64 found_jiffies;
	__u32 from_ifindex; /* the pod's device; 0: an empty slot */
	__u32 ifindex;
	__u32 family;	    /* of the next hop */
	__u32 next_hop[4];
	__u32 mtu;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, ROUTE_SLOTS);
	__type(key, __u32);
	__type(value, struct known_route);
} routes SEC(".maps") __weak;

/*
 * Written by the programs: connections that have ended, each in the slot that
 * its key says until another one takes that. What was still on its way brings
 * one back (connection_recall): between pods of this node within microseconds,
 * few slots that stay in the cache; elsewhere a FIN or its acknowledgement may
 * get lost and come again. At 10,000 a second one stays for about 1.6 s.
 */
#define ENDED_LOCAL 32
#define ENDED_REMOTE 16384

struct ended {
	struct connection_key key;
	struct connection connection;
	__u64 check; /* of all before it: two CPUs may write a slot at once */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ENDED_LOCAL + ENDED_REMOTE);
	__type(key, __u32);
	__type(value, struct ended);
} ended SEC(".maps") __weak;

/* Written and deleted by the programs, then by collect_connections; evicts the oldest. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct connection_key);
	__type(value, struct connection);
} connections SEC(".maps") __weak;

/* Written by to_network, deleted by collect_nat; evicts the oldest. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct nat_key);
	__type(value, struct nat);
} nat SEC(".maps") __weak;

/* Written by the programs that masquerade. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, NAT_SEARCH_ENTRIES);
	__type(key, __u32);
	__type(value, struct nat_search);
} nat_searches SEC(".maps") __weak;

/*
 * Written by the programs: when a client outside last spoke to a backend that is
 * the node itself. Only then the node's answers are looked for. Never pinned,
 * never read outside.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} node_served SEC(".maps") __weak;

/*
 * Written by the programs: first fragments. A packet has one row, which its
 * share, addresses and id say, until another packet of that share takes it. A
 * share is one pod's (as many pods as half the shares have one to themselves),
 * or of senders elsewhere with one hash of their address.
 */
#define FRAGMENT_SHARES 512
#define FRAGMENT_SLOTS 32

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FRAGMENT_SHARES * FRAGMENT_SLOTS);
	__type(key, __u32);
	__type(value, struct fragment);
} fragments SEC(".maps") __weak;

/*
 * Written by the programs: how many fragments of a share have begun to wait for
 * their first one lately. Never pinned, never read outside.
 */
struct waiting {
	__u32 since_jiffies; /* low bits */
	__u32 count;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FRAGMENT_SHARES);
	__type(key, __u32);
	__type(value, struct waiting);
} waiting SEC(".maps") __weak;

/* Written by the programs, corrected by collect_usage. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, USAGE_ENTRIES);
	__type(key, __u32);
	__type(value, struct usage);
} usage SEC(".maps") __weak;

/* Written by the programs, corrected by collect_usage. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, QUOTA_KINDS);
	__type(key, __u32);
	__type(value, struct quota_total);
} quota_totals SEC(".maps") __weak;

/* Written by the programs: what quota_totals has not got yet; never pinned. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, QUOTA_KINDS);
	__type(key, __u32);
	__type(value, __u32);
} quota_pending SEC(".maps") __weak;

/* Written by the programs; evicts the oldest; never pinned, never read outside. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct share_key);
	__type(value, struct share);
} shares SEC(".maps") __weak;

/*
 * Written by the programs: what the node's policy lets through that is no TCP;
 * evicts the oldest; never pinned, never read outside.
 */
struct host_flow {
	__u64 seen_jiffies;
	__u32 epoch;
	__u32 direction; /* of the packet that began it */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct connection_key);
	__type(value, struct host_flow);
} host_flows SEC(".maps") __weak;

/* Written by the collecting programs while they count; never pinned, never read outside. */
struct recount {
	__u32 found[QUOTA_KINDS];
	__u32 in_use[QUOTA_KINDS]; /* usage, when the count began */
	__u32 taken[QUOTA_KINDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, USAGE_ENTRIES);
	__type(key, __u32);
	__type(value, struct recount);
} recounts SEC(".maps") __weak;

/* Written by the programs: packets and bytes by reason and direction. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, METRIC_ENTRIES);
	__type(key, __u32);
	__type(value, struct metric);
} metrics SEC(".maps") __weak;

/* Written by datapath::addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node_state);
} node_state SEC(".maps") __weak;

/* Written by datapath::devices. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct own_addresses);
} devices SEC(".maps") __weak;

/* Written by datapath::devices. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct own_addresses);
} this_node SEC(".maps") __weak;

/* Written by the programs, read by the proxy; the agent collects rows whose
 * connection is gone. As many as connections, so that the share of those that a
 * pod may have bounds these, too. When it is full, no more flows go to the proxy. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct l7_flow_key);
	__type(value, struct l7_flow);
} l7_flows SEC(".maps") __weak;

/* Written by datapath::proxy. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct proxy_device);
} proxy SEC(".maps") __weak;

/* Written by datapath::proxy: the sockets where the proxy's new flows come in. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, L7_LISTENERS);
	__type(key, __u32);
	__type(value, __u64);
} l7_listeners SEC(".maps") __weak;

/* Written by datapath::dns: automata of rules of names. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DNS_STATES);
	__type(key, __u32);
	__type(value, struct dns_state);
} dns_states SEC(".maps") __weak;

/* Written by datapath::dns: the rule sets that before_proxy can judge. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct dns_automaton);
} dns_rules SEC(".maps") __weak;

/* Written by datapath::dns: the names whose addresses an endpoint's rules ask for. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DNS_ENDPOINTS);
	__type(key, __u32);
	__type(value, struct dns_automaton);
} dns_names SEC(".maps") __weak;

/*
 * Written by before_proxy: questions that it has let pass. Each endpoint has
 * slots of its own, so none takes another one's; a flow's hash says the slot.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DNS_ENDPOINTS * DNS_SLOTS);
	__type(key, __u32);
	__type(value, struct dns_pending);
} dns_pending SEC(".maps") __weak;

/* Written by before_proxy, read by agent::questions; no wake-ups. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1024 * 1024);
} dns_records SEC(".maps") __weak;

/* Written by before_proxy, per CPU: records of DNS. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct event_count);
} dns_counts SEC(".maps") __weak;

/*
 * Written by datapath::proxy: the sockets of rule sets that have one of their
 * own. A row goes with its socket, so with the process that listens.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4096);
	__type(key, struct l7_rule_listener_key);
	__type(value, __u64);
} l7_rule_listeners SEC(".maps") __weak;

/* Written by the programs: whose an alias is (alias.bpf.c). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct l7_flow_key);
} l7_aliases SEC(".maps") __weak;

/* Written by the programs: offered, lost and suppressed events. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct event_count);
} event_counts SEC(".maps") __weak;

/* Written by the programs, read by flow::reader every few milliseconds; no wake-ups. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 * 1024 * 1024);
} events SEC(".maps") __weak;
