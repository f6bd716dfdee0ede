/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The verdict on a packet: of a running flow by its entry, of any other by the
 * tables. Egress is judged at the initiator's pod, ingress at the responder's;
 * replies need no rule of their own, but a stale entry is judged again whoever
 * sends next, so that a tightened policy stops a running flow both ways.
 */
#pragma once

#include "connection.h"
#include "identity.h"
#include "policy.h"

/* A local end's pod is still the one that was judged, by the policy in force. */
static __always_inline bool flow_end_is_current(const struct connection *of,
						const struct packet *packet,
						const struct addr *addr,
						__u32 end)
{
	struct endpoint *endpoint = endpoint_by_id(of->endpoint[end]);

	return endpoint &&
	       endpoint_epoch(endpoint) ==
		       (end ? of->ingress_epoch : of->egress_epoch) &&
	       endpoint->flags & ENDPOINT_READY &&
	       (of->flags & CONNECTION_LOOPBACK ||
		endpoint_has(endpoint, addr, packet));
}

/*
 * Whoever knows a flow's tuple must not be able to put packets into it: a pod's
 * come from its own device, those of other nodes' pods by the tunnel, the
 * node's own from its stack. What comes another way is judged, and refused.
 */
static __always_inline bool flow_came_by_its_way(const struct connection *of,
						 const struct packet *packet,
						 __u32 side)
{
	if (of->endpoint[side] != packet->source_endpoint)
		return false;
	if (packet->flags & PACKET_FROM_POD)
		return true;
	if (of->identity[side] == IDENTITY_HOST)
		return packet->flags & PACKET_FROM_HOST;
	return !settings.tunnel_ifindex || of->route[side] != ROUTE_NODE ||
	       packet->flags & PACKET_FROM_OVERLAY;
}

/* Answers come from where the question was sent to. */
static __always_inline void
flow_restore_service(struct packet *packet, const struct connection *connection)
{
	if (!(packet->flags & PACKET_REPLY))
		return;
	/* The loopback address stands for the pod itself. */
	if (connection->flags & CONNECTION_LOOPBACK) {
		packet->destination = packet->source;
		packet->flags |= PACKET_NEW_DESTINATION;
	}
	packet->source = connection->service;
	packet->source_port = connection->service_port;
	packet->flags |= PACKET_NEW_SOURCE;
}

/*
 * True if the packet belongs to a flow whose verdict stands. Counts it and
 * fills what forwarding needs.
 */
static __always_inline bool flow_established(struct __sk_buff *ctx,
					     struct packet *packet)
{
	struct connection_key key __attribute__((aligned(8)));
	struct connection *connection;
	__u64 now = bpf_jiffies64();
	__u32 high, side, event;

	high = connection_key_of(packet, &key);
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection)
		return false;
	side = high ^ (connection->flags & CONNECTION_INITIATOR_HIGH);
	if (connection_begins_anew(connection, packet, side, now))
		return false;

	packet->route = connection->route[side ^ 1];
	if (!packet->route)
		return false;
	if (!flow_came_by_its_way(connection, packet, side))
		return false;
	if (connection->endpoint[side] &&
	    !flow_end_is_current(connection, packet, &packet->source, side))
		return false;
	packet->destination_endpoint = connection->endpoint[side ^ 1];
	if (packet->destination_endpoint &&
	    !flow_end_is_current(connection, packet, &packet->destination,
				 side ^ 1))
		return false;

	if (side)
		packet->flags |= PACKET_REPLY;
	event = connection_account(connection, packet, side, now);
	if (event)
		event_flow(ctx, packet, connection, event);
	if (connection->flags & (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK))
		flow_restore_service(packet, connection);
	return true;
}

/* The service that the socket hook translated, so that records name it. */
static __noinline void flow_find_socket(struct __sk_buff *ctx,
					struct packet *packet)
{
	struct socket_key key = {
		.backend = packet->destination,
		.port = packet->destination_port,
		.protocol = packet->protocol,
	};
	struct socket_origin *origin;

	if (!settings.socket_lb || packet->flags & PACKET_HAS_SERVICE)
		return;
	key.cookie = bpf_get_socket_cookie(ctx);
	if (!key.cookie)
		return;
	origin = bpf_map_lookup_elem(&sockets, &key);
	if (!origin)
		return;
	packet->service = origin->service;
	packet->service_port = origin->port;
	packet->flags |= PACKET_HAS_SERVICE | PACKET_AT_SOCKET;
}

/* Who the two ends are; a drop if one of them may not be. */
static __always_inline int flow_resolve(struct packet *packet,
					struct peer *source,
					struct peer *destination)
{
	if (packet->flags & PACKET_LOOPBACK) {
		destination->endpoint = packet->source_endpoint;
		destination->route = ROUTE_ENDPOINT;
		*source = *destination;
	} else {
		identity_resolve(&packet->source, source);
		identity_resolve(&packet->destination, destination);
	}
	if (packet->flags & PACKET_FROM_HOST) {
		source->identity = IDENTITY_HOST;
	} else if (packet->flags & PACKET_FROM_POD) {
		source->endpoint = packet->source_endpoint;
		source->route = ROUTE_ENDPOINT;
	} else if (source->flags & ADDRESS_LOCAL) {
		/* Ours do not come in from outside. */
		return -DROP_INVALID_SOURCE_IP;
	} else if (packet->flags & PACKET_FROM_OVERLAY) {
		/* The sender's word counts only where we know nothing. */
		if (!source->flags)
			source->identity = packet->source_identity;
		source->route = ROUTE_NODE;
		/* What came by the tunnel does not go on by it. */
		if (destination->route == ROUTE_NODE)
			return -DROP_UNROUTABLE_IP;
	} else if (settings.tunnel_ifindex &&
		   (source->route == ROUTE_NODE ||
		    source->route == ROUTE_NOWHERE)) {
		/* Pods of other nodes come by the tunnel. */
		return -DROP_INVALID_SOURCE_IP;
	}
	packet->source_identity = source->identity;
	packet->source_endpoint = source->endpoint;
	packet->destination_identity = destination->identity;
	packet->destination_endpoint = destination->endpoint;
	packet->route = destination->route;
	return destination->route == ROUTE_NOWHERE ? -DROP_UNROUTABLE_IP : 0;
}

struct flow_verdict {
	__u32 direction;
	__u32 epoch;
	__u32 rule_id;
};

/*
 * Judges a flow at one local end: 0 or a drop. The epoch is read before the
 * policy, so that an old verdict is never kept as a new one.
 */
static __noinline int flow_judge_end(struct packet *packet, __u32 id,
				     const struct addr *addr,
				     __u32 remote_identity,
				     struct flow_verdict *verdict)
{
	struct endpoint *endpoint = endpoint_by_id(id);

	packet->direction = verdict->direction;
	if (!endpoint || !endpoint->ifindex)
		return -DROP_UNROUTABLE_IP;
	verdict->epoch = endpoint_epoch(endpoint);
	barrier();
	if (!(endpoint->flags & ENDPOINT_READY))
		return -DROP_ENDPOINT_NOT_READY;
	/* To itself a pod may always speak, and its node to it (probes). */
	if (packet->flags & PACKET_LOOPBACK)
		return 0;
	if (!endpoint_has(endpoint, addr, packet))
		return -DROP_UNROUTABLE_IP;
	if (remote_identity == IDENTITY_HOST &&
	    verdict->direction == DIRECTION_INGRESS)
		return 0;
	return policy_check(endpoint, verdict->direction, remote_identity,
			    packet, &verdict->rule_id);
}

/* Kept with the flow; what may change without notice is asked every time. */
static __always_inline __u8 flow_route(const struct peer *peer)
{
	return peer->route == ROUTE_NOWHERE ? ROUTE_NONE : peer->route;
}

/*
 * Judges a packet of a flow that is new, or whose verdict is stale, and keeps
 * the verdict; 0 or a drop. A denied flow leaves no entry; a running one that
 * is denied now keeps its stale entry, or its other side could begin it anew.
 */
__weak __noinline int flow_open(struct __sk_buff *ctx, struct packet *packet)
{
	struct flow_verdict egress = { .direction = DIRECTION_EGRESS };
	struct flow_verdict ingress = { .direction = DIRECTION_INGRESS };
	struct connection_key key __attribute__((aligned(8)));
	struct peer source = {}, destination = {};
	struct connection *connection, *fresh;
	__u64 now = bpf_jiffies64();
	__u32 high, side = 0, zero = 0;
	bool reply;
	int ret;

	if (!packet)
		return -DROP_INVALID_PACKET;
	ret = flow_resolve(packet, &source, &destination);
	high = connection_key_of(packet, &key);
	connection = bpf_map_lookup_elem(&connections, &key);
	if (connection) {
		side = high ^ (connection->flags & CONNECTION_INITIATOR_HIGH);
		if (connection_begins_anew(connection, packet, side, now)) {
			connection = NULL;
			side = 0;
		}
	}
	if (side)
		packet->flags |= PACKET_REPLY;
	/* Before the verdict: a denial names the service, too. */
	if (!connection && packet->flags & PACKET_FROM_POD)
		flow_find_socket(ctx, packet);
	if (ret)
		return ret;
	/* An answer that nobody asked for must not become a question. */
	if (!connection && (packet->protocol == IPPROTO_ICMP ||
			    packet->protocol == IPPROTO_ICMPV6) &&
	    packet->destination_port && !packet->source_port)
		return -DROP_UNSUPPORTED_ICMP;

	reply = side;
	if (reply ? destination.endpoint : source.endpoint) {
		ret = flow_judge_end(packet,
				     reply ? destination.endpoint :
					     source.endpoint,
				     reply ? &packet->destination :
					     &packet->source,
				     reply ? source.identity :
					     destination.identity,
				     &egress);
		packet->rule_id = egress.rule_id;
		if (ret)
			return ret;
	}
	if (reply ? source.endpoint : destination.endpoint) {
		ret = flow_judge_end(packet,
				     reply ? source.endpoint :
					     destination.endpoint,
				     reply ? &packet->source :
					     &packet->destination,
				     reply ? destination.identity :
					     source.identity,
				     &ingress);
		packet->rule_id = ingress.rule_id;
		if (ret)
			return ret;
	}
	if (packet->flags & PACKET_FROM_POD)
		packet->direction = DIRECTION_EGRESS;

	if (connection) {
		connection->egress_rule = egress.rule_id;
		connection->ingress_rule = ingress.rule_id;
		connection->identity[side] = source.identity;
		connection->identity[side ^ 1] = destination.identity;
		connection->endpoint[side] = source.endpoint;
		connection->endpoint[side ^ 1] = destination.endpoint;
		connection->route[side] = flow_route(&source);
		connection->route[side ^ 1] = flow_route(&destination);
		connection->egress_epoch = egress.epoch;
		connection->ingress_epoch = ingress.epoch;
		if (connection_account(connection, packet, side, now))
			event_flow(ctx, packet, connection, EVENT_FLOW_UPDATE);
		if (connection->flags &
		    (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK))
			flow_restore_service(packet, connection);
		return 0;
	}

	/* Too large for the stack beside the rest; no one preempts us. */
	fresh = bpf_map_lookup_elem(&scratch, &zero);
	if (!fresh)
		return -DROP_CONNECTION_INSERT;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->last_seen_jiffies = now;
	fresh->last_report_jiffies = now;
	fresh->packets[0] = 1;
	fresh->bytes[0] = packet->bytes;
	fresh->service = packet->service;
	fresh->service_port = packet->service_port;
	fresh->egress_epoch = egress.epoch;
	fresh->ingress_epoch = ingress.epoch;
	fresh->identity[0] = source.identity;
	fresh->identity[1] = destination.identity;
	fresh->egress_rule = egress.rule_id;
	fresh->ingress_rule = ingress.rule_id;
	fresh->endpoint[0] = source.endpoint;
	fresh->endpoint[1] = destination.endpoint;
	fresh->route[0] = flow_route(&source);
	fresh->route[1] = flow_route(&destination);
	fresh->tcp_flags[0] = packet->tcp_flags;
	fresh->flags = high ? CONNECTION_INITIATOR_HIGH : 0;
	if (packet->flags & PACKET_LOOPBACK)
		fresh->flags |= CONNECTION_LOOPBACK;
	if (packet->flags & PACKET_AT_SOCKET)
		fresh->flags |= CONNECTION_SOCKET;
	else if (packet->flags & PACKET_HAS_SERVICE)
		fresh->flags |= CONNECTION_TRANSLATED;
	if (packet->tcp_flags & TCP_RST)
		fresh->flags |= CONNECTION_CLOSING;
	/* Kernels before 6.15 may find every free entry busy: not full, ask again. */
	if (bpf_map_update_elem(&connections, &key, fresh, BPF_ANY) &&
	    bpf_map_update_elem(&connections, &key, fresh, BPF_ANY))
		return -DROP_CONNECTION_INSERT;
	if (settings.flow_events)
		event_flow(ctx, packet, fresh, EVENT_FLOW_NEW);
	return 0;
}
