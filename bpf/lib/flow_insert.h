/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The row of a new flow: its verdict, its record, and the row that it replaces.
 */
#pragma once

#include "flow_continue.h"

/* Kept with the flow; what may change without notice is asked every time. */
static __always_inline __u8 flow_route(const struct peer *peer)
{
	return peer->route == ROUTE_NOWHERE ? ROUTE_NONE : peer->route;
}

static __always_inline void flow_keep_verdict(struct connection *connection,
					      const struct flow *flow)
{
	__u32 sender = index_of_two(flow->side);

	connection->egress_rule = flow->egress.rule_id;
	connection->ingress_rule = flow->ingress.rule_id;
	connection->identity[sender] = flow->source.identity;
	connection->identity[sender ^ 1] = flow->destination.identity;
	connection->endpoint[sender] = flow->source.endpoint;
	connection->endpoint[sender ^ 1] = flow->destination.endpoint;
	connection->route[sender] = flow_route(&flow->source);
	connection->route[sender ^ 1] = flow_route(&flow->destination);
	connection->egress_epoch = flow->egress.epoch;
	connection->ingress_epoch = flow->ingress.epoch;
}

/*
 * A backend speaks to the client of a flow that is over for want of packets:
 * the client still knows it by the service's address only.
 */
static __always_inline void flow_reverse(const struct connection *over,
					 const struct packet *packet,
					 const struct flow *flow,
					 struct connection *fresh)
{
	__u32 sender = flow->source_index ^
		       (over->flags & CONNECTION_INITIATOR_HIGH);

	if (!(over->flags & CONNECTION_TRANSLATED) ||
	    over->flags & CONNECTION_LOOPBACK ||
	    sender == connection_client_side(over) ||
	    packet->flags & PACKET_HAS_SERVICE || packet->tcp_flags & TCP_SYN)
		return;
	fresh->service = over->service;
	fresh->service_port = over->service_port;
	fresh->other_port = over->other_port;
	fresh->flags |= CONNECTION_TRANSLATED | CONNECTION_REVERSED;
}

/* Reports the end of the flow that had the key of a new one until now. */
static __always_inline void flow_end_replaced(struct __sk_buff *ctx,
					      const struct connection *over,
					      const struct flow *flow)
{
	struct event *event;

	if (!settings.flow_events || over->flags & CONNECTION_ENDED)
		return;
	event = event_of_flow(over, &flow->key, EVENT_FLOW_END, ctx->ifindex,
			      0);
	if (event)
		bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

/* The entry of a flow that begins with this packet: 0 or a drop. */
static __noinline int flow_insert(struct __sk_buff *ctx,
				  const struct packet *packet,
				  struct flow *flow)
{
	struct scratch *room = scratch_get();
	struct connection *fresh, *over;
	__u64 now = bpf_jiffies64();

	if (!room)
		return -DROP_CONNECTION_INSERT;
	fresh = &room->connection;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	flow_keep_verdict(fresh, flow);
	fresh->last_seen_jiffies = now;
	fresh->last_report_jiffies = now;
	fresh->packets[0] = 1;
	fresh->bytes[0] = packet->bytes;
	fresh->service = packet->service;
	fresh->service_port = packet->service_port;
	fresh->other_port = packet->own_port;
	fresh->tcp_flags[0] = packet->tcp_flags;
	fresh->flags = CONNECTION_OPENING;
	if (packet->tcp_flags & TCP_SYN)
		round_trip_begin(fresh);
	if (flow->source_index)
		fresh->flags |= CONNECTION_INITIATOR_HIGH;
	if (packet->flags & PACKET_LOOPBACK)
		fresh->flags |= CONNECTION_LOOPBACK;
	if (packet->flags & PACKET_AT_SOCKET)
		fresh->flags |= CONNECTION_SOCKET;
	else if (packet->flags & PACKET_HAS_SERVICE)
		fresh->flags |= CONNECTION_TRANSLATED;
	if (packet->flags & PACKET_DIRECT)
		fresh->flags |= CONNECTION_DIRECT;
	if (packet->flags & PACKET_TO_PROXY)
		fresh->flags |= CONNECTION_PROXY;
	if (packet->tcp_flags & TCP_RST)
		fresh->flags |= CONNECTION_RESET;
	if (packet->tcp_flags & TCP_SYN &&
	    !connection_knows_sender(packet, flow->source.route))
		fresh->sequence = packet_sequence(ctx, packet);
	if (packet->flags & PACKET_REPLACES) {
		over = bpf_map_lookup_elem(&connections, &flow->key);
		if (over) {
			flow_end_replaced(ctx, over, flow);
			flow_reverse(over, packet, flow, fresh);
		}
	}
	return connection_insert(&flow->key, fresh,
				 packet->flags & PACKET_REPLACES);
}

/* Begins a flow with this packet: 0 or a drop. */
static __always_inline int flow_begin(struct __sk_buff *ctx,
				      struct packet *packet, struct flow *flow)
{
	struct scratch *room = scratch_get();
	int ret = flow_insert(ctx, packet, flow);

	if (ret || !room)
		return ret;
	if (settings.flow_events)
		event_flow(ctx, packet, &room->connection, EVENT_FLOW_NEW);
	flow_restore_service(packet, &room->connection);
	return 0;
}
