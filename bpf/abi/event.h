/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what the programs count and report.
 */
#pragma once

/* metrics[reason * 4 + direction], per CPU. */
struct metric {
	__u64 packets;
	__u64 bytes;
};

enum metric_size {
	METRIC_ENTRIES = 1024,
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
	__u8 round_trip;      /* enum round_trip: from the SYN to its answer, seen here */
	__u8 pad;
};
_Static_assert(sizeof(struct event) == 128, "event");
