/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The verdict on a packet. A running flow has it in its row (flow_continue.h).
 * Any other packet needs the tables: who its ends are, and what policy says at
 * the initiator's pod (egress) and at the responder's (ingress), or an earlier
 * verdict on a flow like this one (verdict_cache.h). Then the flow gets a row
 * (flow_insert.h).
 *
 * Replies need no rule of their own. A stale verdict is looked up again whoever
 * sends next, so that a tightened policy stops a running flow both ways.
 */
#pragma once

#include "flow_continue.h"
#include "flow_insert.h"
#include "flow_socket.h"
#include "identity.h"
#include "policy.h"
#include "route.h"
#include "verdict_cache.h"

/*
 * The source of what a pod sends is its own (endpoint_has). The row of its
 * address may be missing yet, or be that of who had it before.
 */
static __always_inline int flow_resolve_pod(const struct packet *packet,
					    struct peer *source)
{
	struct endpoint *endpoint;

	if (source->endpoint != packet->source_endpoint) {
		endpoint = endpoint_by_id(packet->source_endpoint);
		if (!endpoint)
			return -DROP_INVALID_SOURCE_IP;
		source->identity = endpoint->identity;
		source->endpoint = packet->source_endpoint;
	}
	source->route = ROUTE_ENDPOINT;
	return 0;
}

/*
 * An address of this node or of its pods in what the stack forwards to a pod:
 * the node's NAT put it there (masquerade), or led the pod's packet here
 * (DNAT). Behind the node's own address is anybody, whom no rule for nodes lets
 * in. Answers pass the stack, whose NAT has to see them.
 */
static __always_inline int flow_resolve_translated(struct __sk_buff *ctx,
						   struct peer *source)
{
	struct endpoint *endpoint;

	if (source->endpoint) {
		endpoint = endpoint_by_id(source->endpoint);
		if (!endpoint || endpoint->ifindex != ctx->ingress_ifindex)
			return -DROP_INVALID_SOURCE_IP;
		source->endpoint = 0;
	} else if (source->identity < IDENTITY_FIRST_LOCAL) {
		source->identity = IDENTITY_WORLD;
	}
	source->route = ROUTE_STACK;
	return 0;
}

/* By the tunnel: tunnel_check_sender has said whether the sender may have the
 * source, and who that is. */
static __always_inline void flow_resolve_tunnel(struct packet *packet,
						struct peer *source)
{
	__u32 identity = packet->source_identity;

	if (!source->flags) {
		/* 0: forwarded for who is no pod. */
		if (!identity)
			return;
		source->identity = identity;
		packet->flags |= PACKET_STRANGER;
	} else if (identity == IDENTITY_WORLD &&
		   !(source->flags & ADDRESS_POD) &&
		   source->identity < IDENTITY_FIRST_LOCAL) {
		/* A node says so of what bears its own address by its NAT. */
		source->identity = IDENTITY_WORLD;
	}
	source->route = ROUTE_NODE;
}

/* Who has sent the packet, by the way it came: 0, or a drop if he may not. */
static __always_inline int flow_resolve_source(struct __sk_buff *ctx,
					       struct packet *packet,
					       struct peer *source)
{
	if (packet->flags & PACKET_FROM_POD)
		return flow_resolve_pod(packet, source);
	if (packet->flags & PACKET_FROM_HOST) {
		source->identity = IDENTITY_HOST;
		return 0;
	}
	if (identity_is_nobody(&packet->source))
		return -DROP_INVALID_SOURCE_IP;
	if (source->flags & ADDRESS_LOCAL)
		/* Ours do not come in from outside. */
		return packet->flags & PACKET_FROM_STACK
			       ? flow_resolve_translated(ctx, source)
			       : -DROP_INVALID_SOURCE_IP;
	if (packet->flags & PACKET_FROM_OVERLAY) {
		flow_resolve_tunnel(packet, source);
		return 0;
	}
	/* Pods of other nodes come by the tunnel. */
	if (settings.tunnel_ifindex && (source->route == ROUTE_NODE ||
					source->route == ROUTE_NOWHERE))
		return -DROP_INVALID_SOURCE_IP;
	/* A pod that this node has not heard of yet: by the route to its pod
	 * CIDR the answers reach it. */
	if (source->route == ROUTE_NOWHERE) {
		source->route = ROUTE_NODE;
		packet->flags |= PACKET_STRANGER;
	}
	return 0;
}

/* Where the packet goes, by the way it came: 0, or a drop if it may not. */
static __always_inline int
flow_check_destination(const struct packet *packet,
		       const struct peer *destination)
{
	bool is_node = destination->flags & (ADDRESS_NODE | ADDRESS_INTERNAL);

	if (destination->route == ROUTE_NOWHERE)
		return -DROP_UNROUTABLE_IP;
	/* What came by the tunnel is for this node's pods; what is for the node
	 * itself is not judged here. */
	if (packet->flags & PACKET_FROM_OVERLAY &&
	    destination->route != ROUTE_ENDPOINT)
		return -DROP_UNROUTABLE_IP;
	/* Only nodes make tunnel packets, and any address may be a node's. */
	if (packet->flags & PACKET_FROM_POD && packet_is_tunnel(packet) &&
	    (is_node || route_is_stack(destination->route)))
		return -DROP_ENCAPSULATION_PROHIBITED;
	return 0;
}

/* Who the two ends are; a drop if one of them may not be. */
static __always_inline int flow_resolve(struct __sk_buff *ctx,
					struct packet *packet,
					struct peer *source,
					struct peer *destination)
{
	int ret;

	if (packet->flags & PACKET_LOOPBACK) {
		destination->endpoint = packet->source_endpoint;
		destination->route = ROUTE_ENDPOINT;
		*source = *destination;
	} else {
		identity_resolve(&packet->source, source);
		identity_resolve(&packet->destination, destination);
	}
	ret = flow_resolve_source(ctx, packet, source);
	packet->source_identity = source->identity;
	packet->source_endpoint = source->endpoint;
	packet->source_route = source->route;
	packet->destination_identity = destination->identity;
	packet->destination_endpoint = destination->endpoint;
	packet->route = destination->route;
	return ret;
}

/*
 * The flow was begun by another node's pod whose address this node has not heard
 * of yet. Policy let the flow in, so its answers go back to the node that has
 * the pod CIDR, as whom the flow was begun.
 */
static __always_inline void
flow_keep_newcomer(struct packet *packet, const struct connection *connection,
		   struct peer *destination)
{
	if (!connection || !(packet->flags & PACKET_REPLY) ||
	    destination->flags || destination->route != ROUTE_NOWHERE ||
	    connection->route[0] != ROUTE_NODE)
		return;
	destination->identity = connection->identity[0];
	packet->flags |= PACKET_STRANGER;
	destination->route = ROUTE_NODE;
	packet->destination_identity = destination->identity;
	packet->route = ROUTE_NODE;
}

/*
 * The node speaks from addresses that no row knows as its own: who its own
 * packets began the flow as, that it remains when the answer is judged.
 */
static __always_inline void flow_keep_host(struct packet *packet,
					   const struct connection *connection,
					   struct peer *destination)
{
	if (!connection || !(packet->flags & PACKET_REPLY) ||
	    connection->identity[0] != IDENTITY_HOST ||
	    !route_is_stack(destination->route) ||
	    (destination->flags && !(destination->flags & ADDRESS_LOCAL)))
		return;
	destination->identity = IDENTITY_HOST;
	packet->destination_identity = IDENTITY_HOST;
}

/* Judges a flow at one local end: 0 or a drop. */
static __noinline int flow_judge_end(struct packet *packet,
				     const struct peer *local,
				     const struct addr *addr,
				     __u32 remote_identity,
				     struct flow_verdict *verdict)
{
	struct endpoint *endpoint = endpoint_by_id(local->endpoint);
	struct endpoint_policy of;

	packet->direction = verdict->direction;
	packet->rule_id = 0;
	if (!endpoint || !endpoint->ifindex)
		return -DROP_UNROUTABLE_IP;
	/* At once, or an old policy's verdict would be kept as a new one's. */
	of = endpoint_policy(endpoint);
	verdict->epoch += of.epoch;
	if (!(endpoint->flags & ENDPOINT_READY))
		return -DROP_ENDPOINT_NOT_READY;
	/* To itself a pod may always speak. */
	if (packet->flags & PACKET_LOOPBACK)
		return 0;
	if (!endpoint_has(endpoint, addr, packet))
		return -DROP_UNROUTABLE_IP;
	/* And its node to it: probes. */
	if (remote_identity == IDENTITY_HOST &&
	    verdict->direction == DIRECTION_INGRESS)
		return 0;
	return policy_check(of.policy, verdict, remote_identity, packet);
}

/* Egress at the initiator's pod, ingress at the responder's: 0 or a drop. */
static __always_inline int flow_decide(struct packet *packet, struct flow *flow)
{
	bool reply = flow->side;
	const struct peer *first = reply ? &flow->destination : &flow->source;
	const struct peer *second = reply ? &flow->source : &flow->destination;
	int ret = 0;

	if (first->endpoint)
		ret = flow_judge_end(packet, first,
				     reply ? &packet->destination
					   : &packet->source,
				     second->identity, &flow->egress);
	if (!ret && second->endpoint)
		ret = flow_judge_end(packet, second,
				     reply ? &packet->source
					   : &packet->destination,
				     first->identity, &flow->ingress);
	if (!ret && packet->flags & PACKET_FROM_POD)
		packet->direction = DIRECTION_EGRESS;
	return ret;
}

/* The packet is a pod's to its own node, and may be delivered there. */
static __always_inline bool flow_is_to_host(struct __sk_buff *ctx,
					    const struct packet *packet,
					    const struct flow *flow)
{
	const struct peer *to = &flow->destination;

	if (!(packet->flags & PACKET_FROM_POD) || to->endpoint)
		return false;
	if (to->flags & ADDRESS_LOCAL)
		return true;
	return !to->flags && route_is_stack(to->route) &&
	       route_may_end_here(ctx, packet);
}

/* A pod asks its own node: the node's policy, where there is one. */
static __noinline int flow_decide_host(struct __sk_buff *ctx,
				       struct packet *packet, struct flow *flow)
{
	struct endpoint *host = endpoint_by_id(HOST_ENDPOINT);
	int ret;

	if (!host || !(host->policy & POLICY_ENFORCE_INGRESS) ||
	    !flow_is_to_host(ctx, packet, flow))
		return 0;
	packet->direction = DIRECTION_INGRESS;
	ret = policy_check(host->policy, &flow->ingress, flow->source.identity,
			   packet);
	if (ret)
		return ret;
	/* No proxy judges what is for the node. */
	if (flow->ingress.l7_set)
		return -DROP_NO_PROXY;
	packet->direction = DIRECTION_EGRESS;
	return 0;
}

/*
 * A flow that policy leaves for the proxy to judge is the proxy's from its
 * beginning to its end: its two ends speak to two sockets. One that began before
 * the rule did begins anew: the proxy resets what it does not know. 0 or a drop.
 */
static __always_inline int flow_choose_proxy(struct packet *packet,
					     const struct flow *flow,
					     struct connection **connection)
{
	struct connection *running = *connection;

	if (running && running->flags & CONNECTION_PROXY) {
		packet->flags |= PACKET_TO_PROXY | PACKET_TELL_PROXY;
		return 0;
	}
	if (!flow->egress.l7_set && !flow->ingress.l7_set)
		return 0;
	if (running && flow->side)
		return -DROP_NO_PROXY;
	if (running) {
		packet->flags |= PACKET_BEGINS | PACKET_REPLACES;
		*connection = NULL;
	}
	packet->flags |= PACKET_TO_PROXY | PACKET_TELL_PROXY;
	return 0;
}

/*
 * Judges a packet of a flow that is new, or whose verdict is stale, and keeps
 * the verdict; 0 or a drop. A denied flow leaves no entry; a running one that
 * is denied now keeps its stale entry, or its other side could begin it anew.
 */
__weak __noinline int flow_open(struct __sk_buff *ctx, struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection = NULL;
	__u32 side, sender;
	struct flow *flow;
	int ret;

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	flow = &room->flow;
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->egress.direction = DIRECTION_EGRESS;
	flow->ingress.direction = DIRECTION_INGRESS;
	sender = packet->source_identity;
	flow->source_index = connection_key_of(packet, &flow->key);
	if (!(packet->flags & PACKET_BEGINS))
		connection = bpf_map_lookup_elem(&connections, &flow->key);
	if (connection)
		flow->side = flow->source_index ^
			    (connection->flags & CONNECTION_INITIATOR_HIGH);
	if (flow->side)
		packet->flags |= PACKET_REPLY;
	if (connection && connection->flags & CONNECTION_LOOPBACK &&
	    packet->flags & PACKET_FROM_POD)
		packet->flags |= PACKET_LOOPBACK;
	/* Before the verdict: a denial names the service, too. */
	if (!connection && packet->flags & PACKET_FROM_POD)
		flow_find_socket(ctx, packet);

	/* Before the identities, or an old one would be kept as a new one. */
	flow->egress.epoch = address_epoch();
	flow->ingress.epoch = flow->egress.epoch;
	order_reads(&room->fence);
	ret = flow_resolve(ctx, packet, &flow->source, &flow->destination);
	flow_keep_host(packet, connection, &flow->destination);
	flow_keep_newcomer(packet, connection, &flow->destination);
	if (!ret)
		ret = flow_check_destination(packet, &flow->destination);
	/* An answer that nobody asked for must not become a question. */
	if (!ret && !connection && packet->flags & PACKET_ANSWERS)
		ret = -DROP_UNSUPPORTED_ICMP;
	if (!ret)
		ret = flow_decide(packet, flow);
	/* What runs goes on. */
	if (!ret && !connection)
		ret = flow_decide_host(ctx, packet, flow);
	if (!ret)
		ret = flow_choose_proxy(packet, flow, &connection);
	if (ret)
		return ret;
	if (!connection) {
		verdict_cache_insert(packet, sender, flow);
		return flow_begin(ctx, packet, flow);
	}

	flow_keep_verdict(connection, flow);
	side = index_of_two(flow->side);
	if (side && connection->flags & CONNECTION_PROXY)
		return 0;
	if (connection_account(ctx, connection, packet, side,
			       bpf_jiffies64()))
		event_flow(ctx, packet, connection, EVENT_FLOW_UPDATE);
	flow_restore_service(packet, connection);
	return 0;
}

/*
 * Begins a flow as one like it was begun before, while that verdict stands: 1,
 * 0 if there is none, or a drop.
 */
__weak __noinline int flow_open_again(struct __sk_buff *ctx,
				      struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct cached_verdict *cached;
	struct flow *flow;
	int ret;

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	/* TCP begins with a SYN; what does not may bear another name. */
	if (!(packet->flags & PACKET_BEGINS) ||
	    packet->flags & PACKET_ANSWERS ||
	    (packet->protocol == IPPROTO_TCP && !(packet->tcp_flags & TCP_SYN)))
		return 0;
	cached = verdict_cache_find(packet);
	if (!cached)
		return 0;
	flow = &room->flow;
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->egress.epoch = cached->epoch[0];
	flow->ingress.epoch = cached->epoch[1];
	flow->egress.rule_id = cached->rule[0];
	flow->ingress.rule_id = cached->rule[1];
	flow->source.identity = cached->identity[0];
	flow->destination.identity = cached->identity[1];
	flow->source.endpoint = cached->endpoint[0];
	flow->destination.endpoint = cached->endpoint[1];
	flow->source.route = cached->route[0];
	flow->destination.route = cached->route[1];
	packet->source_identity = cached->identity[0];
	packet->destination_identity = cached->identity[1];
	packet->source_endpoint = cached->endpoint[0];
	packet->destination_endpoint = cached->endpoint[1];
	packet->route = cached->route[1];
	packet->source_route = cached->route[0];
	packet->rule_id = cached->rule[1] ? cached->rule[1] : cached->rule[0];
	flow->source_index = connection_key_of(packet, &flow->key);
	if (packet->flags & PACKET_FROM_POD)
		flow_find_socket(ctx, packet);
	ret = flow_begin(ctx, packet, flow);
	return ret ? ret : 1;
}
