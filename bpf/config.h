/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The settings of a node: one read-only struct, filled before load, so that the
 * verifier removes the branches that are off. Weak: every file includes it, the
 * linker merges it. Facts that change while the agent runs belong in a map.
 */
#pragma once

#include "abi.h"

struct settings {
	struct addr loopback_ipv4;   /* stands for a pod that reaches itself through a service */
	struct addr loopback_ipv6;
	__u64 secret[2];	     /* of this node: for hashes that pods must not compute */
	__u64 netns_cookie;	     /* of the node's own network namespace; 0: unknown */
	__u32 jiffies_per_second;    /* CONFIG_HZ, found at start */
	__u32 tunnel_ifindex;	     /* the VXLAN device; 0: native routing */
	__u32 overlay_ifindex;	     /* the VXLAN device, also if it leads to egress gateways alone; 0: there is none */
	__u32 flow_report_seconds;   /* a running flow is reported this often */
	__u32 tcp_timeout_seconds;   /* established */
	__u32 tcp_opening_seconds;   /* SYN seen, no answer */
	__u32 tcp_closing_seconds;
	__u32 other_timeout_seconds; /* UDP, ICMP, the rest */
	__u32 mark_mask;	     /* Weir's bits of skb->mark, adjacent ones */
	__u32 encrypt_ifindex;	     /* encrypts what is sent to it (lib/encrypt.h); 0: nothing is encrypted */
	__u32 encrypt_second;	     /* the same while NODE_ENCRYPT_SECOND is set: the device with the other key */
	__u32 path_mtu;		     /* of the way to other nodes' pods, bytes; 0: TCP is not told of it */
	__u32 wait_ifindex;	     /* where fragments wait for their packet's first one; 0: they do not */
	__u32 limit_ifindex;	     /* the queue for pods with a limit on what they receive; 0: there is none */
	__u32 quota_limit[QUOTA_KINDS];    /* of one endpoint */
	__u32 quota_capacity[QUOTA_KINDS]; /* of all together; 0: not bounded together */
	__u32 drop_record_cost;	     /* of an endpoint, in 1/1024 jiffies between two; 0: not bounded */
	__u32 maglev_size;	     /* of a table; prime */
	__u32 event_buffer_half;     /* bytes of events: when so many wait, records of flows are bounded, too */
	__u16 nat_port_min;	     /* host order, inclusive */
	__u16 nat_port_max;
	__u16 nat_known_min;	     /* of rows in nat: those of a former setting, too */
	__u16 nat_known_max;
	__u16 tunnel_port;	     /* host order: 8472 */
	__u8 masquerade_ipv4;
	__u8 masquerade_ipv6;
	__u8 flow_events;	     /* 0: only counters */
	__u8 socket_lb;
	__u8 tunnel_direct;	     /* put on and take off the tunnel's headers, past the VXLAN device */
	__u8 encrypt_strict;	     /* what has to be encrypted is dropped where it comes in plain */
	__u8 dns_denied;	     /* the response code of a question that no rule allows */
	__u8 pad[3];
};

extern const volatile struct settings settings;
const volatile struct settings settings __attribute__((weak)) = {};

/* Types that no map reaches: anchored here so that BTF, and so Rust, has them. */
struct exported_types {
	struct event event;
	struct stale_socket stale_socket;
	struct collect_request collect_request;
	struct recount_request recount_request;
	struct share share;
	struct share_key share_key;
	struct connection connection;
	struct gone_backend gone_backend;
	enum drop_reason drop_reason;
	enum reserved_identity reserved_identity;
	enum event_type event_type;
	enum event_flags event_flags;
	enum direction direction;
	enum endpoint_flags endpoint_flags;
	enum policy_bits policy_bits;
	enum address_flags address_flags;
	enum node_flags node_flags;
	enum prefix_flags prefix_flags;
	enum egress_flags egress_flags;
	enum policy_rule_prefix policy_rule_prefix;
	enum policy_verdict policy_verdict;
	enum service_scope service_scope;
	enum service_flags service_flags;
	enum service_kind service_kind;
	enum service_algorithm service_algorithm;
	enum maglev_size maglev_size;
	enum affinity_kind affinity_kind;
	enum socket_slots socket_slots;
	enum connection_kind connection_kind;
	enum connection_flags connection_flags;
	enum route route;
	enum packet_mark packet_mark;
	enum l7_listener l7_listener;
	enum dns_size dns_size;
	enum dns_class dns_class;
	struct dns_record dns_record;
	enum ip_protocol ip_protocol;
	enum abi_version abi_version;
	enum metric_size metric_size;
	enum usage_size usage_size;
	enum quota_kind quota_kind;
	enum nat_search_index nat_search_index;
	enum round_trip round_trip;
	enum endpoint_mac endpoint_mac;
};

const volatile struct exported_types exported_types __attribute__((weak)) = {};
