/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Counting and reporting: the metrics of every packet, the records of flows
 * and of drops. No wake-up per record: the reader comes by itself every
 * few milliseconds. What does not fit is counted as lost.
 */
#pragma once

#include "connection_key.h"
#include "quota.h"

static __always_inline void metric_count(__u32 reason, __u32 direction,
					 __u32 bytes)
{
	__u32 index = (reason & 0xff) * 4 + (direction & 3);
	struct metric *metric = bpf_map_lookup_elem(&metrics, &index);

	if (metric) {
		metric->packets++;
		metric->bytes += bytes;
	}
}

/*
 * Room for one record at this endpoint's expense, or NULL. Counts the record as
 * offered, and as lost or suppressed if it gets none. An endpoint's drops never
 * get more than its share; the records of its flows do while there is room.
 */
static __always_inline struct event *event_reserve(__u32 endpoint, bool is_drop)
{
	struct event_count *count;
	struct event *event;
	__u32 zero = 0;

	count = bpf_map_lookup_elem(&event_counts, &zero);
	if (!count)
		return NULL;
	/* A program of another hook may interrupt this one on the same CPU. */
	__sync_fetch_and_add(&count->offered, 1);
	if ((is_drop || bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) >
				settings.event_buffer_half) &&
	    !quota_take_record(endpoint)) {
		__sync_fetch_and_add(&count->suppressed, 1);
		return NULL;
	}
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		__sync_fetch_and_add(&count->lost, 1);
	return event;
}

static __always_inline void
event_from_connection(struct event *event, const struct connection *from,
		      const struct connection_key *key)
{
	__u32 first = from->flags & CONNECTION_INITIATOR_HIGH ? 1 : 0;

	event->timestamp_ns = bpf_ktime_get_ns();
	event->packets[0] = from->packets[0];
	event->packets[1] = from->packets[1];
	event->bytes[0] = from->bytes[0];
	event->bytes[1] = from->bytes[1];
	event->source = first ? key->addr[1] : key->addr[0];
	event->destination = first ? key->addr[0] : key->addr[1];
	event->service = from->service;
	event->source_identity = from->identity[0];
	event->destination_identity = from->identity[1];
	/* Seen from the initiator, unless only the responder's rule decided. */
	if (from->endpoint[0] && (from->egress_rule || !from->ingress_rule)) {
		event->rule_id = from->egress_rule;
		event->direction = DIRECTION_EGRESS;
	} else {
		event->rule_id = from->ingress_rule;
		event->direction = DIRECTION_INGRESS;
	}
	event->ingress_rule_id = from->ingress_rule;
	event->source_port = first ? key->port[1] : key->port[0];
	event->destination_port = first ? key->port[0] : key->port[1];
	event->service_port = from->service_port;
	event->source_endpoint = from->endpoint[0];
	event->destination_endpoint = from->endpoint[1];
	event->protocol = key->protocol;
	event->reason = 0;
	event->tcp_flags = from->tcp_flags[0] | from->tcp_flags[1];
	event->icmp_type = 0;
	event->icmp_code = 0;
	event->flags = (addr_is_ipv4(&key->addr[0]) ? 0 : EVENT_IPV6) |
		       (from->service_port ? EVENT_SERVICE : 0);
	event->round_trip = from->tcp_flags[0] & from->tcp_flags[1] & TCP_SYN ?
				    from->round_trip :
				    ROUND_TRIP_NONE;
	event->pad = 0;
}

/*
 * The endpoint whose share a connection is of: the pod that began it. What
 * begins elsewhere is the share of the pod that it goes to, what the node's own
 * stack begins is the node's (0).
 */
static __always_inline __u32 connection_owner(const struct connection *of)
{
	if (of->endpoint[0] || of->identity[0] == IDENTITY_HOST)
		return of->endpoint[0];
	return of->endpoint[1];
}

/*
 * The record of a flow, which is to be submitted, or NULL. What its entry
 * cannot say: the device of its last packet (0: there was none), and enum
 * event_flags.
 */
static __always_inline struct event *
event_of_flow(const struct connection *connection,
	      const struct connection_key *key, __u32 type, __u32 ifindex,
	      __u32 flags)
{
	struct event *event =
		event_reserve(connection_owner(connection), false);

	if (!event)
		return NULL;
	event_from_connection(event, connection, key);
	event->type = type;
	event->ifindex = ifindex;
	event->flags |= flags;
	return event;
}

/* What a record says of the way of its last packet. */
static __always_inline __u32 event_flags_of(const struct packet *packet)
{
	return (packet->flags & PACKET_REPLY ? EVENT_REPLY : 0) |
	       (packet->flags & PACKET_FROM_OVERLAY ? EVENT_FROM_OVERLAY : 0);
}

/* A flow's record: it began, or something about it is new. */
__weak __noinline int event_flow(struct __sk_buff *ctx, struct packet *packet,
				 struct connection *connection, __u32 type)
{
	struct connection_key key;
	struct event *event;

	if (!packet || !connection)
		return 0;
	connection_key_of(packet, &key);
	event = event_of_flow(connection, &key, type, ctx->ifindex,
			      event_flags_of(packet));
	if (!event)
		return 0;
	event->icmp_type = packet->icmp_type;
	event->icmp_code = packet->icmp_code;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

/* Who answers for a drop: the pod that sent the packet or was to get it, else
 * the device. */
static __always_inline __u32 event_drop_owner(struct __sk_buff *ctx,
					      const struct packet *packet)
{
	if (packet->source_endpoint)
		return packet->source_endpoint;
	if (packet->destination_endpoint)
		return packet->destination_endpoint;
	return usage_of_device(ctx->ifindex);
}

/* A drop's record: source is the flow's initiator, for strangers the sender. */
__weak __noinline int event_drop(struct __sk_buff *ctx, struct packet *packet,
				 __u32 reason)
{
	bool swap;
	struct event *event;

	if (!packet)
		return 0;
	metric_count(reason, packet->direction, packet->bytes);
	if (!settings.flow_events)
		return 0;
	event = event_reserve(event_drop_owner(ctx, packet), true);
	if (!event)
		return 0;
	swap = packet->flags & PACKET_REPLY;
	event->timestamp_ns = bpf_ktime_get_ns();
	event->packets[0] = !swap;
	event->packets[1] = swap;
	event->bytes[0] = swap ? 0 : packet->bytes;
	event->bytes[1] = swap ? packet->bytes : 0;
	event->source = swap ? packet->destination : packet->source;
	event->destination = swap ? packet->source : packet->destination;
	event->service = packet->service;
	event->source_identity =
		swap ? packet->destination_identity : packet->source_identity;
	event->destination_identity =
		swap ? packet->source_identity : packet->destination_identity;
	event->rule_id = packet->rule_id;
	event->ingress_rule_id = 0;
	event->ifindex = ctx->ifindex;
	event->source_port =
		swap ? packet->destination_port : packet->source_port;
	event->destination_port =
		swap ? packet->source_port : packet->destination_port;
	event->service_port = packet->service_port;
	event->source_endpoint =
		swap ? packet->destination_endpoint : packet->source_endpoint;
	event->destination_endpoint =
		swap ? packet->source_endpoint : packet->destination_endpoint;
	event->protocol = packet->protocol;
	event->type = EVENT_DROP;
	event->reason = reason;
	event->direction = packet->direction;
	event->tcp_flags = packet->tcp_flags;
	event->icmp_type = packet->icmp_type;
	event->icmp_code = packet->icmp_code;
	event->flags =
		(packet->flags & PACKET_IPV6 ? EVENT_IPV6 : 0) |
		(swap ? EVENT_REPLY : 0) |
		(packet->flags & PACKET_HAS_SERVICE ? EVENT_SERVICE : 0) |
		(packet->flags & PACKET_FROM_OVERLAY ? EVENT_FROM_OVERLAY : 0);
	event->round_trip = ROUND_TRIP_NONE;
	event->pad = 0;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

/* The one exit: counts, reports drops, gives the tc action. */
static __always_inline int finish(struct __sk_buff *ctx, struct packet *packet,
				  int ret)
{
	if (ret >= 0) {
		metric_count(DROP_NONE, packet->direction, packet->bytes);
		return ret;
	}
	event_drop(ctx, packet, -ret);
	return TC_ACT_SHOT;
}
