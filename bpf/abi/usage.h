/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what each pod has of what all pods share.
 */
#pragma once

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
 * endpoint answers for, by the device that they came from. The last ones bound
 * the ports of other nodes' pods whose egress gateway this node is: one row for
 * all pods whose addresses have the same hash.
 */
struct usage {
	__u32 in_use[QUOTA_KINDS];
	__u32 taken[QUOTA_KINDS];   /* ever, whether it was given back or not */
	__u64 refused[QUOTA_KINDS]; /* or made room for by the endpoint's oldest */
	__u64 records_due;	    /* time of the next record of a drop, in 1/1024 jiffies */
	__u64 records_suppressed;
	__u64 dns_records_due;	    /* the same of DNS, apart */
};
_Static_assert(sizeof(struct usage) == 72, "usage");

enum usage_size {
	USAGE_ENDPOINTS = 4096,
	USAGE_DEVICES = 64,
	USAGE_STRANGERS = 1024,
	USAGE_ENTRIES = 5184,
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
