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

/* A local end's pod is still the one that was judged, by the policy in force.
 */
static __always_inline bool flow_end_is_current(const struct connection *of,
						const struct packet *packet,
						const struct addr *addr,
						__u32 end)
{
	struct endpoint *endpoint = endpoint_by_id(of->endpoint[end]);

	return endpoint &&
	       endpoint_epoch(endpoint) + address_epoch() ==
		       (end ? of->ingress_epoch : of->egress_epoch) &&
	       endpoint->flags & ENDPOINT_READY &&
	       (of->flags & CONNECTION_LOOPBACK ||
		endpoint_has(endpoint, addr, packet));
}

/*
 * The node's own packets of a running flow. The stack alone makes answers to
 * what a pod asked the node, also of what it forwards: its NAT may have led the
 * question to somebody else. Its packets need no socket here: kernels before
 * 6.13 send IPv6's last acknowledgements and resets without one.
 */
static __always_inline bool flow_is_of_host(const struct packet *packet,
					    __u32 side)
{
	return packet->flags & PACKET_FROM_STACK &&
	       (side || !(packet->flags & PACKET_FORWARDED));
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
		return flow_is_of_host(packet, side);
	return !settings.tunnel_ifindex || of->route[side] != ROUTE_NODE ||
	       packet->flags & PACKET_FROM_OVERLAY;
}

/* What a backend sends comes from where the question was sent to. */
static __always_inline void
flow_restore_service(struct packet *packet, const struct connection *connection)
{
	__u32 side = packet->flags & PACKET_REPLY ? 1 : 0;

	if (side == connection_client_side(connection) ||
	    !(connection->flags &
	      (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK)))
		return;
	/* The loopback address stands for the pod itself. */
	if (connection->flags & CONNECTION_LOOPBACK) {
		packet->destination = packet->source;
		packet->flags |= PACKET_NEW_DESTINATION;
	}
	if (connection->other_port) {
		packet->destination_port = connection->other_port;
		packet->flags |= PACKET_NEW_DESTINATION;
	}
	packet->source = connection->service;
	packet->source_port = connection->service_port;
	packet->flags |= PACKET_NEW_SOURCE;
}

/*
 * The packet was sent to the same frontend (a service, a host port, the pod's
 * own address) as this flow, whose key it has. A backend's is, whatever the
 * frontend; a pod's own flows are kept apart before (from_pod_clashes).
 */
static __always_inline bool flow_has_frontend(const struct connection *of,
					      const struct packet *packet,
					      __u32 side)
{
	bool is_translated = of->flags &
			     (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK);

	if (!(packet->flags & PACKET_HAS_SERVICE))
		return !is_translated || packet->flags & PACKET_FROM_POD ||
		       side != connection_client_side(of);
	return is_translated && side == connection_client_side(of) &&
	       of->service_port == packet->service_port &&
	       addr_equal(&of->service, &packet->service);
}

/*
 * The packet goes to another frontend than the flow that has its key. If that
 * is nothing but what the backend sent of its own accord, after the flow to the
 * frontend was forgotten, the client's packet begins that flow again. Else both
 * run, and the packet needs another source port.
 */
static __always_inline void flow_note_clash(const struct connection *of,
					    struct packet *packet, __u32 side)
{
	if (side && !(of->flags & CONNECTION_REPLIED))
		packet->flags |= PACKET_BEGINS | PACKET_REPLACES;
	else
		packet->flags |= PACKET_CLASHES;
}

/*
 * True if the packet belongs to this flow and its verdict stands. Counts it and
 * fills what forwarding needs.
 */
static __always_inline bool flow_continue(struct __sk_buff *ctx,
					  struct packet *packet,
					  struct connection_key *key,
					  struct connection *connection,
					  __u32 high)
{
	__u32 side = index_of_two(
		high ^ (connection->flags & CONNECTION_INITIATOR_HIGH));
	__u32 event;
	bool ends;

	if (connection_begins_anew(connection, packet, side, bpf_jiffies64())) {
		packet->flags |= PACKET_BEGINS | PACKET_REPLACES;
		return false;
	}

	if (!flow_came_by_its_way(connection, packet, side))
		return false;
	if (!flow_has_frontend(connection, packet, side)) {
		flow_note_clash(connection, packet, side);
		return false;
	}
	packet->route = connection->route[side ^ 1];
	packet->source_route = connection->route[side];
	if (!packet->route)
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
	event = connection_account(ctx, connection, packet, side,
				   bpf_jiffies64());
	ends = connection_ends(connection, packet->tcp_flags);
	if (event && !ends)
		event_flow(ctx, packet, connection, event);
	flow_restore_service(packet, connection);
	/* The entry may be another flow's after this. */
	if (ends)
		connection_end(ctx, connection, key, event_flags_of(packet));
	return true;
}

/* The packet answers a flow that its destination began. */
static __always_inline bool flow_is_reply(const struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection;
	__u32 high;

	if (!room)
		return false;
	high = connection_key_of(packet, &room->flow.key);
	connection = bpf_map_lookup_elem(&connections, &room->flow.key);
	return connection &&
	       high ^ (connection->flags & CONNECTION_INITIATOR_HIGH);
}

/* The flow that has ended when the packet comes, or NULL. */
static __always_inline struct connection *
flow_recall(const struct packet *packet, struct connection_key *key)
{
	/* A SYN begins another one. */
	if (packet->protocol != IPPROTO_TCP || packet->tcp_flags & TCP_SYN ||
	    !connection_recall(key))
		return NULL;
	return bpf_map_lookup_elem(&connections, key);
}

/* The same of whichever flow the packet belongs to. */
static __always_inline bool flow_established(struct __sk_buff *ctx,
					     struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection;
	struct connection_key *key;
	__u32 high;

	if (!room)
		return false;
	key = &room->flow.key;
	high = connection_key_of(packet, key);
	connection = bpf_map_lookup_elem(&connections, key);
	if (!connection)
		connection = flow_recall(packet, key);
	if (connection)
		return flow_continue(ctx, packet, key, connection, high);
	packet->flags |= PACKET_BEGINS;
	return false;
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
	struct bpf_sock *socket;

	if (!settings.socket_lb || packet->flags & PACKET_HAS_SERVICE)
		return;
	socket = ctx->sk;
	if (!socket)
		return;
	socket = bpf_sk_fullsock(socket);
	if (!socket || !bpf_sk_storage_get(&service_sockets, socket, NULL, 0))
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
static __always_inline void flow_resolve_tunnel(const struct packet *packet,
						struct peer *source)
{
	__u32 identity = packet->source_identity;

	if (!source->flags) {
		/* 0: forwarded for who is no pod. */
		if (!identity)
			return;
		source->identity = identity;
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
					       const struct packet *packet,
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
	if (source->route == ROUTE_NOWHERE)
		source->route = ROUTE_NODE;
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
static __always_inline int flow_judge(struct packet *packet, struct flow *flow)
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

/* Kept with the flow; what may change without notice is asked every time. */
static __always_inline __u8 flow_route(const struct peer *peer)
{
	return peer->route == ROUTE_NOWHERE ? ROUTE_NONE : peer->route;
}

static __always_inline void flow_keep_verdict(struct connection *connection,
					      const struct flow *flow)
{
	__u32 side = index_of_two(flow->side);

	connection->egress_rule = flow->egress.rule_id;
	connection->ingress_rule = flow->ingress.rule_id;
	connection->identity[side] = flow->source.identity;
	connection->identity[side ^ 1] = flow->destination.identity;
	connection->endpoint[side] = flow->source.endpoint;
	connection->endpoint[side ^ 1] = flow->destination.endpoint;
	connection->route[side] = flow_route(&flow->source);
	connection->route[side ^ 1] = flow_route(&flow->destination);
	connection->egress_epoch = flow->egress.epoch;
	connection->ingress_epoch = flow->ingress.epoch;
}

/*
 * A backend speaks to the client of a flow that is over for want of packets: the
 * client still knows it by the service's address only.
 */
static __always_inline void flow_reverse(const struct connection *over,
					 const struct packet *packet,
					 const struct flow *flow,
					 struct connection *fresh)
{
	__u32 side = flow->high ^ (over->flags & CONNECTION_INITIATOR_HIGH);

	if (!(over->flags & CONNECTION_TRANSLATED) ||
	    over->flags & CONNECTION_LOOPBACK ||
	    side == connection_client_side(over) ||
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
	if (flow->high)
		fresh->flags |= CONNECTION_INITIATOR_HIGH;
	if (packet->flags & PACKET_LOOPBACK)
		fresh->flags |= CONNECTION_LOOPBACK;
	if (packet->flags & PACKET_AT_SOCKET)
		fresh->flags |= CONNECTION_SOCKET;
	else if (packet->flags & PACKET_HAS_SERVICE)
		fresh->flags |= CONNECTION_TRANSLATED;
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

/* How the packet came here: who may say what depends on it. */
#define PACKET_WAY                                                             \
	(PACKET_FROM_POD | PACKET_FROM_HOST | PACKET_FROM_OVERLAY |            \
	 PACKET_FROM_STACK | PACKET_FORWARDED)

static __always_inline struct judged *judged_slot(const struct packet *packet)
{
	const addr_words *from = (const void *)&packet->source;
	const addr_words *to = (const void *)&packet->destination;
	__u64 port = (__u64)packet->destination_port << 32 | packet->protocol;
	__u32 slot = hash_secret(from[1] ^ hash64(to[1] ^ port)) &
		     (JUDGED_SLOTS - 1);

	return bpf_map_lookup_elem(&judged, &slot);
}

/* The verdict depends on the device that the packet came by. */
static __always_inline bool judged_is_single(const struct packet *packet,
					     const struct flow *flow)
{
	return packet->flags & PACKET_FORWARDED &&
	       flow->source.flags & ADDRESS_LOCAL;
}

/*
 * Keeps a verdict for the flows that follow. Only on flows to pods: the address
 * of anybody else may become a service's, which no epoch tells.
 */
static __always_inline void judged_keep(const struct packet *packet,
					__u32 sender, const struct flow *flow)
{
	struct judged *of;

	if (packet->flags & PACKET_LOOPBACK ||
	    judged_is_single(packet, flow) ||
	    (flow->destination.route != ROUTE_ENDPOINT &&
	     flow->destination.route != ROUTE_NODE))
		return;
	of = judged_slot(packet);
	if (!of)
		return;
	addr_copy(&of->source, &packet->source);
	addr_copy(&of->destination, &packet->destination);
	of->sender = sender;
	of->epoch[0] = flow->egress.epoch;
	of->epoch[1] = flow->ingress.epoch;
	of->identity[0] = flow->source.identity;
	of->identity[1] = flow->destination.identity;
	of->rule[0] = flow->egress.rule_id;
	of->rule[1] = flow->ingress.rule_id;
	of->endpoint[0] = flow->source.endpoint;
	of->endpoint[1] = flow->destination.endpoint;
	of->port = packet->destination_port;
	of->way = packet->flags & PACKET_WAY;
	of->protocol = packet->protocol;
	of->route[0] = flow_route(&flow->source);
	of->route[1] = flow->destination.route;
}

/* A local end is as it was when the verdict was reached. */
static __always_inline bool judged_end_stands(const struct judged *of,
					      const struct packet *packet,
					      const struct addr *addr,
					      __u32 end, __u32 addresses_at)
{
	struct endpoint *endpoint;

	if (!of->endpoint[end])
		return of->epoch[end] == addresses_at;
	endpoint = endpoint_by_id(of->endpoint[end]);
	return endpoint && endpoint->ifindex &&
	       endpoint_epoch(endpoint) + addresses_at == of->epoch[end] &&
	       endpoint->flags & ENDPOINT_READY &&
	       endpoint_has(endpoint, addr, packet);
}

/* An earlier verdict on a flow like this one that still stands, or NULL. */
static __always_inline struct judged *judged_find(const struct packet *packet)
{
	struct judged *of = judged_slot(packet);
	__u32 addresses_at = address_epoch();

	if (!of || !of->route[1] || of->port != packet->destination_port ||
	    of->protocol != packet->protocol ||
	    of->way != (packet->flags & PACKET_WAY) ||
	    of->sender != packet->source_identity ||
	    !addr_equal(&of->destination, &packet->destination) ||
	    !addr_equal(&of->source, &packet->source) ||
	    (packet->flags & PACKET_FROM_POD &&
	     of->endpoint[0] != packet->source_endpoint) ||
	    !judged_end_stands(of, packet, &packet->source, 0, addresses_at) ||
	    !judged_end_stands(of, packet, &packet->destination, 1,
			       addresses_at))
		return NULL;
	return of;
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
	flow->high = connection_key_of(packet, &flow->key);
	if (!(packet->flags & PACKET_BEGINS))
		connection = bpf_map_lookup_elem(&connections, &flow->key);
	if (connection)
		flow->side = flow->high ^
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
		ret = flow_judge(packet, flow);
	if (ret)
		return ret;
	if (!connection) {
		judged_keep(packet, sender, flow);
		return flow_begin(ctx, packet, flow);
	}

	flow_keep_verdict(connection, flow);
	side = index_of_two(flow->side);
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
	struct judged *of;
	struct flow *flow;
	int ret;

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	/* TCP begins with a SYN; what does not may bear another name. */
	if (!(packet->flags & PACKET_BEGINS) ||
	    packet->flags & PACKET_ANSWERS ||
	    (packet->protocol == IPPROTO_TCP && !(packet->tcp_flags & TCP_SYN)))
		return 0;
	of = judged_find(packet);
	if (!of)
		return 0;
	flow = &room->flow;
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->egress.epoch = of->epoch[0];
	flow->ingress.epoch = of->epoch[1];
	flow->egress.rule_id = of->rule[0];
	flow->ingress.rule_id = of->rule[1];
	flow->source.identity = of->identity[0];
	flow->destination.identity = of->identity[1];
	flow->source.endpoint = of->endpoint[0];
	flow->destination.endpoint = of->endpoint[1];
	flow->source.route = of->route[0];
	flow->destination.route = of->route[1];
	packet->source_identity = of->identity[0];
	packet->destination_identity = of->identity[1];
	packet->source_endpoint = of->endpoint[0];
	packet->destination_endpoint = of->endpoint[1];
	packet->route = of->route[1];
	packet->source_route = of->route[0];
	packet->rule_id = of->rule[1] ? of->rule[1] : of->rule[0];
	flow->high = connection_key_of(packet, &flow->key);
	if (packet->flags & PACKET_FROM_POD)
		flow_find_socket(ctx, packet);
	ret = flow_begin(ctx, packet, flow);
	return ret ? ret : 1;
}
