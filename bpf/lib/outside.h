/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Services for clients outside: packets that come from the network to a node
 * port, a load balancer's address, an external address or a host port.
 *
 * A backend of this node gets the packet as the client has sent it, but for the
 * destination; what it answers passes from_pod, which names the frontend. The
 * backend's policy sees the client.
 *
 * A backend elsewhere gets the packet from this node's address, or its answer
 * would not come by here: DNAT and SNAT at once. One row of `connections` leads
 * there, one row of `nat` back:
 *
 *   client 198.51.100.9:40000 --> node 192.0.2.1:30080 --> backend 10.2.0.1:8080
 *                                                from 192.0.2.1:20001
 *
 *                SERVICE (connections)           back (nat)
 *   key          198.51.100.9:40000,             192.0.2.1:20001,
 *                192.0.2.1:30080                 10.2.0.1:8080
 *   leads to     10.2.0.1:8080                   198.51.100.9:40000
 *   from         port 20001                      192.0.2.1:30080
 *
 * With DSR (direct.h) such a backend gets the packet with the client's address.
 *
 * The tunnel carries such packets with the identity WORLD: no rule for nodes at
 * the backend lets them in. With native routing the backend's node sees a packet
 * of this node, as with kube-proxy.
 */
#pragma once

#include "direct.h"
#include "forward.h"
#include "nat.h"
#include "node_socket.h"
#include "service.h"

/* Whose a packet is that came from the network. */
enum outside_way {
	OUTSIDE_STACK = 0, /* the node's; packet->choice says if for a frontend */
	OUTSIDE_POD = 1,   /* a pod's of this node */
	OUTSIDE_AWAY = 2,  /* to be sent away */
};

/* The client is one of those that the service is for. */
static __always_inline bool outside_may_ask(const struct packet *packet,
					    const struct service *service)
{
	struct source_range_key key = {
		.prefix_length = 160,
		.service_id = bpf_htonl(service->service_id),
		.addr = packet->source,
	};

	return !(service->flags & SERVICE_RANGES) ||
	       bpf_map_lookup_elem(&source_ranges, &key);
}

/*
 * No frontend has this port. On an address that is a service's alone nothing
 * else is to be found: the stack would send the packet back to where it came
 * from. 0 or a drop.
 */
static __always_inline int outside_refuse_rest(const struct packet *packet)
{
	struct service service;

	return service_find(&packet->destination, 0, 0, SCOPE_INTERNAL,
			    &service)
		       ? -DROP_IS_CLUSTER_IP
		       : 0;
}

/* The pod of this node, or nobody, whose port this is. */
static __always_inline int outside_host_port(struct packet *packet,
					     const struct service *service)
{
	struct backend pod;
	__u32 id = service_by_number(service, 0);

	if (!id || !backend_copy(id, &pod))
		return -DROP_NO_SERVICE_BACKEND;
	packet->destination = pod.addr;
	packet->destination_port = pod.port;
	packet->choice = CHOICE_HOST_PORT;
	return OUTSIDE_POD;
}

/* A flow to the frontend begins: chooses its backend. */
static __always_inline int outside_choose(struct packet *packet,
					  const struct service *service,
					  struct service_choice *choice)
{
	if (!outside_may_ask(packet, service))
		return -DROP_SOURCE_RANGE;
	service_prepare(packet, service, SCOPE_EXTERNAL, choice);
	if (!service_choose_for(packet, choice)) {
		if (!(service->flags & SERVICE_HAS_OTHERS))
			packet->choice = CHOICE_REFUSED;
		return -DROP_NO_SERVICE_BACKEND;
	}
	packet->choice = CHOICE_NEW;
	return OUTSIDE_POD;
}

/*
 * If the packet goes to a frontend: makes its destination the backend.
 * OUTSIDE_POD if so (packet->choice says how it is known), OUTSIDE_STACK, or a
 * drop.
 */
__weak __noinline int outside_translate(struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection_key *key;
	struct connection *chosen;
	struct service service;
	__u64 now = bpf_jiffies64();

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	/* Tunnel packets are the most of what comes, and never a service's. */
	if (packet->protocol == IPPROTO_UDP &&
	    packet->destination_port == bpf_htons(settings.tunnel_port))
		return OUTSIDE_STACK;
	if (!service_find(&packet->destination, packet->destination_port,
			  packet->protocol, SCOPE_EXTERNAL, &service))
		return OUTSIDE_STACK;
	if (service.flags & (SERVICE_LOOPBACK | SERVICE_WILDCARD))
		return OUTSIDE_STACK;
	addr_copy(&packet->service, &packet->destination);
	packet->service_port = packet->destination_port;
	packet->flags |= PACKET_HAS_SERVICE | PACKET_NEW_DESTINATION;
	if (service.kind == SERVICE_HOST_PORT)
		return outside_host_port(packet, &service);
	key = &room->service_key;
	connection_key_fill((const void *)&packet->source,
			    (const void *)&packet->service, packet->source_port,
			    packet->service_port, packet->protocol, key);
	key->kind = CONNECTION_SERVICE;
	chosen = service_recall(&service, packet, key, now);
	if (!chosen)
		return outside_choose(packet, &service, &room->choice);
	addr_copy(&packet->destination, &chosen->service);
	packet->destination_port = chosen->service_port;
	packet->route = chosen->route[1];
	packet->choice = chosen->flags & CONNECTION_SOCKET   ? CHOICE_NODE
			 : chosen->flags & CONNECTION_DIRECT ? CHOICE_DIRECT
			 : packet->route		     ? CHOICE_AWAY
							     : CHOICE_KNOWN;
	service_follow(chosen, packet, now);
	return OUTSIDE_POD;
}

/*
 * A packet to a frontend belongs to none of its flows. It may be for a
 * connection of the node itself, whose source port is the frontend's: the node's
 * sockets know. A first SYN is the frontend's, whoever listens.
 */
static __always_inline bool outside_is_for_node(struct __sk_buff *ctx,
						const struct packet *packet)
{
	struct nat_key end = {
		.local = packet->service,
		.remote = packet->source,
		.local_port = packet->service_port,
		.remote_port = packet->source_port,
		.protocol = packet->protocol,
	};

	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return false;
	return node_socket_find(ctx, &end) == NODE_SOCKET_TALKS;
}

/* The rows of a client's flow: what they would say. The packet has its
 * backend. */
static __always_inline void outside_mapping(const struct packet *packet,
					    const struct addr *node, __u64 now,
					    struct nat_mapping *to)
{
	nat_mapping_of(packet, node, now, to);
	if (packet->own_port) {
		to->out.local_port = packet->own_port;
		to->pod.port = packet->own_port;
	}
	to->pod.service = packet->service;
	to->pod.service_port = packet->service_port;
	to->pod.client_flags = packet->tcp_flags;
}

/* The row for the way there: 0 or a drop. */
__weak __noinline int outside_keep(struct packet *packet, __u32 flags)
{
	struct scratch *room = scratch_get();
	__u64 now = bpf_jiffies64();
	struct connection *chosen;
	__u32 source_index;

	if (!packet || !room)
		return -DROP_CONNECTION_INSERT;
	chosen = &room->connection;
	__builtin_memset(chosen, 0, sizeof(*chosen));
	chosen->last_seen_jiffies = now;
	chosen->last_report_jiffies = now;
	addr_copy(&chosen->service, &packet->destination);
	chosen->service_port = packet->destination_port;
	if (packet->own_port)
		chosen->other_port = packet->source_port;
	chosen->egress_epoch = room->choice.service.generation;
	chosen->identity[1] = room->choice.service.service_id;
	chosen->tcp_flags[0] = packet->tcp_flags;
	chosen->route[1] = packet->route;
	chosen->flags = flags;
	source_index = connection_key_fill(
		(const void *)&packet->source, (const void *)&packet->service,
		packet->own_port ? packet->own_port : packet->source_port,
		packet->service_port, packet->protocol,
		&room->service_key);
	room->service_key.kind = CONNECTION_SERVICE;
	if (source_index)
		chosen->flags |= CONNECTION_INITIATOR_HIGH;
	return connection_insert(&room->service_key, chosen, false);
}

/* A new flow to a backend elsewhere: finds its port. 0 or a drop. */
__weak __noinline int outside_begin(struct __sk_buff *ctx,
				    struct packet *packet,
				    const struct addr *node)
{
	struct scratch *room = scratch_get();
	__u64 now = bpf_jiffies64();
	int ret;

	if (!packet || !room || !node)
		return -DROP_NO_NAT_MAPPING;
	outside_mapping(packet, node, now, &room->mapping);
	ret = nat_find_port(ctx, &room->mapping);
	if (ret)
		return ret;
	packet->own_port = packet->source_port;
	packet->source_port = room->mapping.back.local_port;
	return outside_keep(packet, CONNECTION_OPENING);
}

/* The row for the way back lives as long as this one: once a tick it is seen to
 * be there, and always told of the end. 0 or a drop. */
__weak __noinline int outside_go_on(struct packet *packet,
				    const struct addr *node)
{
	struct scratch *room = scratch_get();
	__u64 now = bpf_jiffies64();
	struct nat_mapping *to;
	struct nat *row;

	if (!packet || !room || !node)
		return -DROP_NO_NAT_MAPPING;
	to = &room->mapping;
	outside_mapping(packet, node, now, to);
	to->back.local_port = packet->source_port;
	row = bpf_map_lookup_elem(&nat, &to->back);
	if (!row)
		return bpf_map_update_elem(&nat, &to->back, &to->pod,
					   BPF_NOEXIST)
			       ? -DROP_NO_NAT_MAPPING
			       : 0;
	if (!nat_row_equal(row, &to->pod))
		return -DROP_NO_NAT_MAPPING;
	if (row->last_seen_jiffies != now)
		row->last_seen_jiffies = now;
	if (row->client_flags != (row->client_flags | packet->tcp_flags))
		row->client_flags |= packet->tcp_flags;
	return 0;
}

/* Makes the node the source of a packet to a backend elsewhere: OUTSIDE_AWAY or
 * a drop. */
static __always_inline int outside_send_away(struct __sk_buff *ctx,
					     struct packet *packet)
{
	struct addr node __attribute__((aligned(8)));
	int ret;

	if (!nat_node_addr(packet, &node))
		return -DROP_NO_NAT_MAPPING;
	ret = packet->choice == CHOICE_AWAY ? outside_go_on(packet, &node)
					    : outside_begin(ctx, packet, &node);
	if (ret)
		return ret;
	packet->choice = CHOICE_AWAY;
	addr_copy(&packet->source, &node);
	packet->flags |= PACKET_NEW_SOURCE;
	return OUTSIDE_AWAY;
}

/*
 * The backend is a socket of this node: the stack gets the packet. The row that
 * leads back, and the one that leads there if the flow is new. 0 or a drop.
 */
__weak __noinline int outside_serve_by_node(struct __sk_buff *ctx,
					    struct packet *packet)
{
	struct scratch *room = scratch_get();
	__u64 now = bpf_jiffies64(), *served;
	struct connection *back;
	__u32 zero = 0;
	int ret = 0;

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	served = bpf_map_lookup_elem(&node_served, &zero);
	if (served && *served != now)
		*served = now;
	if (packet->choice == CHOICE_NEW)
		ret = outside_keep(packet, CONNECTION_SOCKET);
	if (ret)
		return ret;
	packet->choice = CHOICE_NODE;
	connection_key_of(packet, &room->service_key);
	room->service_key.kind = CONNECTION_NODE;
	back = bpf_map_lookup_elem(&connections, &room->service_key);
	if (back && back->service_port == packet->service_port &&
	    addr_equal(&back->service, &packet->service)) {
		back->last_seen_jiffies = now;
		return 0;
	}
	back = &room->connection;
	__builtin_memset(back, 0, sizeof(*back));
	back->last_seen_jiffies = now;
	addr_copy(&back->service, &packet->service);
	back->service_port = packet->service_port;
	return connection_insert(&room->service_key, back, false);
}

/*
 * The node sends with its own address: what answers a client that has asked a
 * service gets the service's. 1 if it does, 0 if it does not, or a drop.
 */
__weak __noinline int outside_answer_of_node(struct __sk_buff *ctx,
					     struct packet *packet)
{
	struct connection_key key __attribute__((aligned(8)));
	__u64 now = bpf_jiffies64(), *served;
	struct connection *back;
	__u32 zero = 0;
	int ret;

	served = bpf_map_lookup_elem(&node_served, &zero);
	if (!packet || !served || !*served ||
	    now - *served > seconds_to_jiffies(settings.tcp_timeout_seconds))
		return 0;
	connection_key_of(packet, &key);
	key.kind = CONNECTION_NODE;
	back = bpf_map_lookup_elem(&connections, &key);
	if (!back || connection_is_expired(back, packet->protocol, now))
		return 0;
	back->last_seen_jiffies = now;
	if (!(back->flags & CONNECTION_REPLIED))
		back->flags |= CONNECTION_REPLIED;
	addr_copy(&packet->source, &back->service);
	packet->source_port = back->service_port;
	packet->flags |= PACKET_NEW_SOURCE;
	ret = rewrite_apply(ctx, packet);
	packet->flags &= ~PACKET_NEW_SOURCE;
	return ret ? ret : 1;
}

/* The backend's node answers the client itself: OUTSIDE_AWAY, 0 if it cannot, or
 * a drop. */
static __always_inline int outside_send_direct(struct packet *packet)
{
	struct scratch *room = scratch_get();
	int ret;

	if (!room || !(room->choice.service.flags & SERVICE_DSR) ||
	    packet->route != ROUTE_NODE || direct_may_have_option(packet))
		return 0;
	ret = outside_keep(packet, CONNECTION_DIRECT);
	if (ret)
		return ret;
	packet->choice = CHOICE_DIRECT;
	return OUTSIDE_AWAY;
}

/* A packet from the network that is addressed to no pod: enum outside_way, or a
 * drop. */
__weak __noinline int outside_find_service(struct __sk_buff *ctx,
					   struct packet *packet)
{
	struct peer to = {};
	int ret;

	if (!packet)
		return -DROP_INVALID_PACKET;
	if (packet->protocol != IPPROTO_TCP &&
	    packet->protocol != IPPROTO_UDP && packet->protocol != IPPROTO_SCTP)
		return OUTSIDE_STACK;
	ret = outside_translate(packet);
	if (ret < 0)
		return packet->flags & PACKET_HAS_SERVICE &&
				       outside_is_for_node(ctx, packet)
			       ? OUTSIDE_STACK
			       : ret;
	if (!ret)
		return OUTSIDE_STACK;
	if (packet->choice == CHOICE_DIRECT || packet->choice == CHOICE_AWAY)
		return OUTSIDE_AWAY;
	if (packet->choice == CHOICE_NODE)
		return outside_serve_by_node(ctx, packet);
	if (packet->choice != CHOICE_NEW)
		return OUTSIDE_POD;
	if (outside_is_for_node(ctx, packet))
		return OUTSIDE_STACK;
	identity_resolve(&packet->destination, &to);
	packet->destination_endpoint = to.endpoint;
	packet->route = to.route;
	if (to.endpoint)
		return OUTSIDE_POD;
	if (to.route == ROUTE_NOWHERE)
		return -DROP_UNROUTABLE_IP;
	if (to.flags & ADDRESS_LOCAL)
		return outside_serve_by_node(ctx, packet);
	return OUTSIDE_AWAY;
}

/* Gives a packet that is to be sent away what it needs: OUTSIDE_AWAY or a
 * drop. A function of its own: a chain of calls has little stack. */
__weak __noinline int outside_send(struct __sk_buff *ctx, struct packet *packet)
{
	int ret;

	if (!packet)
		return -DROP_INVALID_PACKET;
	if (packet->choice == CHOICE_DIRECT)
		return OUTSIDE_AWAY;
	if (packet->choice == CHOICE_NEW) {
		ret = outside_send_direct(packet);
		if (ret)
			return ret;
	}
	return outside_send_away(ctx, packet);
}

/* What the packet's way makes of it; before, it is as its sender wrote it. 0 or
 * a drop. */
static __always_inline int outside_write(struct __sk_buff *ctx,
					 struct packet *packet)
{
	int ret = 0;

	if (packet->flags & (PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION)) {
		ret = rewrite_apply(ctx, packet);
		packet->flags &= ~(PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION);
	}
	if (!ret && packet->choice == CHOICE_DIRECT)
		ret = direct_write(ctx, packet);
	return ret;
}

/* By the node's routes: an action of tc, or a drop. packet->mtu says for what the
 * packet is too long. */
__weak __noinline int outside_by_route(struct __sk_buff *ctx,
				       struct packet *packet)
{
	struct bpf_fib_lookup fib = {.ifindex = ctx->ifindex};
	__u32 more;
	long ret;

	if (!packet)
		return -DROP_UNROUTABLE_IP;
	more = packet->choice == CHOICE_DIRECT ? direct_length(packet) : 0;
	fib.tot_len = more + packet_wire_length(ctx, packet->l4_offset,
						packet->protocol);
	ret = route_find(ctx, &packet->source, &packet->destination,
			 packet->flags & PACKET_IPV6, &fib);
	/* The stack cannot cut it: it takes the node's own address, and a
	 * service's, from no device. */
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		packet->mtu = fib.tot_len > more ? fib.tot_len - more : 0;
		return -DROP_FRAGMENT_UNSUPPORTED;
	}
	if (ret != BPF_FIB_LKUP_RET_SUCCESS)
		return -DROP_FIB_LOOKUP_FAILED;
	if (!hop_take(ctx, packet->flags & PACKET_IPV6))
		return -DROP_TTL_EXCEEDED;
	ret = packet->choice != CHOICE_ANSWER && packet->route == ROUTE_NODE
		      ? mss_clamp(ctx, packet)
		      : 0;
	if (!ret)
		ret = outside_write(ctx, packet);
	return ret ? ret : leave(ctx, fib.ifindex, fib.family, fib.destination);
}

/* What goes to a backend elsewhere, or from there to the client: an action of
 * tc, or a drop, which refuse() tells the sender. */
__weak __noinline int outside_forward(struct __sk_buff *ctx,
				      struct packet *packet)
{
	int ret;

	if (!packet)
		return -DROP_UNROUTABLE_IP;
	if (packet->choice == CHOICE_GATEWAY && packet->route != ROUTE_NODE)
		return egress_leave(ctx, packet);
	if (packet->choice == CHOICE_ANSWER || packet->route != ROUTE_NODE ||
	    (!settings.tunnel_ifindex && packet->choice != CHOICE_GATEWAY))
		return outside_by_route(ctx, packet);
	if (hop_is_last(ctx, packet->flags & PACKET_IPV6))
		return -DROP_TTL_EXCEEDED;
	ret = outside_write(ctx, packet);
	return ret ? ret : forward_to_node(ctx, packet);
}
