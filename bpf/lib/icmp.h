/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * ICMP errors. One is let through only as news of a known connection, to the
 * end that sent the packet it quotes; it never makes an entry. What it quotes
 * is translated back like the packet itself was, or the receiver would not know
 * it.
 */
#pragma once

#include "flow.h"
#include "nat.h"
#include "parse.h"
#include "service.h"

#define ICMP_HEADER_LENGTH ((__u32)sizeof(struct icmphdr))

/*
 * Parses the quoted packet with the parser of every other packet; `inner` is
 * zeroed. 0 or a drop. Errors quote no errors, and only the first fragment of a
 * packet says which flow it belongs to.
 */
static __always_inline int icmp_parse_inner(struct __sk_buff *ctx,
					    const struct packet *packet,
					    struct packet *inner)
{
	inner->flags = PACKET_QUOTED;
	inner->l3_offset = packet->l4_offset + ICMP_HEADER_LENGTH;
	if (packet_parse_slow(ctx, inner) ||
	    inner->flags &
		    (PACKET_LATER_FRAGMENT | PACKET_ICMP_ERROR | PACKET_CONTROL))
		return -DROP_UNSUPPORTED_ICMP;
	if ((inner->protocol == IPPROTO_ICMP ||
	     inner->protocol == IPPROTO_ICMPV6) &&
	    !icmp_role(inner->protocol, inner->icmp_type))
		return -DROP_UNSUPPORTED_ICMP;
	return 0;
}

/*
 * Writes another address and port at one end of the quoted packet. The ICMP
 * checksum covers the quote; the quote's own layer 4 checksum is left, since
 * most of what it covers is not there. With IPv4 the quoted header's checksum
 * takes up the change of the address, so that ICMP's sees none.
 */
static __always_inline int icmp_rewrite_inner(struct __sk_buff *ctx,
					      const struct packet *packet,
					      const struct packet *inner,
					      __u32 end)
{
	const struct addr *to = end ? &inner->destination : &inner->source;
	__be16 port = end ? inner->destination_port : inner->source_port;
	__u32 l3 = inner->l3_offset;
	__u32 check =
		packet->l4_offset + __builtin_offsetof(struct icmphdr, check);
	struct addr old = {};
	__be16 old_port = 0;
	__u32 offset;

	if (packet->flags & PACKET_IPV6) {
		offset = l3 +
			 (end ? __builtin_offsetof(struct ipv6hdr, destination)
			      : __builtin_offsetof(struct ipv6hdr, source));
		if (bpf_skb_load_bytes(ctx, offset, &old, 16) ||
		    bpf_skb_store_bytes(ctx, offset, to, 16, 0) ||
		    bpf_l4_csum_replace(
			    ctx, check, 0,
			    bpf_csum_diff(old.w, 16, (__be32 *)to->w, 16, 0),
			    0))
			return -DROP_WRITE_ERROR;
	} else {
		offset = l3 +
			 (end ? __builtin_offsetof(struct iphdr, destination)
			      : __builtin_offsetof(struct iphdr, source));
		if (bpf_skb_load_bytes(ctx, offset, &old.w[3], 4) ||
		    bpf_skb_store_bytes(ctx, offset, &to->w[3], 4, 0) ||
		    bpf_l3_csum_replace(
			    ctx, l3 + __builtin_offsetof(struct iphdr, check),
			    old.w[3], to->w[3], 4))
			return -DROP_WRITE_ERROR;
	}

	offset = inner->l4_offset + (end ? 2 : 0);
	if (inner->protocol == IPPROTO_ICMP ||
	    inner->protocol == IPPROTO_ICMPV6)
		offset = inner->l4_offset +
			 __builtin_offsetof(struct icmphdr, id);
	if (bpf_skb_load_bytes(ctx, offset, &old_port, 2) ||
	    bpf_skb_store_bytes(ctx, offset, &port, 2, 0) ||
	    bpf_l4_csum_replace(ctx, check, old_port, port, 2))
		return -DROP_WRITE_ERROR;
	return 0;
}

/*
 * A pod quotes what came from a service: a backend has sent that, with the
 * ports of the flow on its way. Names the backend in the quote and as the
 * error's destination: 0, also if the pod speaks with no such service, or a
 * drop.
 */
static __noinline int icmp_name_backend(struct __sk_buff *ctx,
					struct packet *packet,
					struct packet *inner)
{
	struct scratch *room = scratch_get();
	__be16 own_port = inner->destination_port;
	struct connection *chosen;
	__u32 source_index;
	int ret;

	if (!room)
		return -DROP_UNSUPPORTED_ICMP;
	source_index = connection_key_of(inner, &room->service_key);
	room->service_key.kind = CONNECTION_SERVICE;
	chosen = bpf_map_lookup_elem(&connections, &room->service_key);
	/* The sender of what is quoted is the service's side. */
	if (!chosen ||
	    source_index == (chosen->flags & CONNECTION_INITIATOR_HIGH) ||
	    connection_is_expired(chosen, inner->protocol, bpf_jiffies64()))
		return 0;
	addr_copy(&packet->destination, &chosen->service);
	packet->flags |= PACKET_NEW_DESTINATION;
	addr_copy(&inner->source, &chosen->service);
	inner->source_port = chosen->service_port;
	if (chosen->other_port)
		inner->destination_port = chosen->other_port;
	ret = icmp_rewrite_inner(ctx, packet, inner, REWRITE_SOURCE);
	if (!ret && inner->destination_port != own_port)
		ret = icmp_rewrite_inner(ctx, packet, inner,
					 REWRITE_DESTINATION);
	return ret;
}

/* Lets an ICMP error pass if it belongs to a running flow: 0 or a drop. */
__weak __noinline int icmp_decide(struct __sk_buff *ctx, struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct packet *inner;
	struct connection *connection;
	__u32 end;
	int ret;

	if (!packet || !room)
		return -DROP_UNSUPPORTED_ICMP;
	inner = &room->quoted;
	__builtin_memset(inner, 0, sizeof(*inner));
	ret = icmp_parse_inner(ctx, packet, inner);
	if (ret)
		return ret;
	/* To him who sent what is quoted; from a pod, only on what it received.
	 */
	if (identity_is_nobody(&packet->source) ||
	    !addr_equal(&inner->source, &packet->destination) ||
	    (packet->flags & PACKET_FROM_POD &&
	     !addr_equal(&inner->destination, &packet->source)))
		return -DROP_UNSUPPORTED_ICMP;
	if (packet->flags & PACKET_FROM_POD) {
		ret = icmp_name_backend(ctx, packet, inner);
		if (ret)
			return ret;
	}
	end = connection_key_of(inner, &room->flow.key);
	connection = bpf_map_lookup_elem(&connections, &room->flow.key);
	if (!connection ||
	    connection_is_expired(connection, inner->protocol,
				  bpf_jiffies64()) ||
	    connection->flags & CONNECTION_LOOPBACK)
		return -DROP_UNSUPPORTED_ICMP;
	end ^= connection->flags & CONNECTION_INITIATOR_HIGH;
	/* Routers are only where the flow goes; between pods there are none. */
	if (!(packet->flags & PACKET_FROM_HOST) &&
	    !flow_came_by_its_way(connection, packet, end ^ 1))
		return -DROP_UNSUPPORTED_ICMP;

	packet->route = connection->route[end];
	packet->source_route = connection->route[end ^ 1];
	packet->source_identity = connection->identity[end ^ 1];
	packet->destination_identity = connection->identity[end];
	packet->destination_endpoint = connection->endpoint[end];
	if (!packet->route || (packet->destination_endpoint &&
			       !flow_end_is_current(connection, packet,
						    &packet->destination, end)))
		return -DROP_UNSUPPORTED_ICMP;
	/* The proxy has sent what is quoted. */
	if (connection->flags & CONNECTION_PROXY) {
		packet->flags |= PACKET_TO_PROXY;
		return 0;
	}
	if (end != connection_client_side(connection) ||
	    !(connection->flags & CONNECTION_TRANSLATED))
		return 0;

	/* The client knows the service, not the backend. */
	if (addr_equal(&packet->source, &inner->destination)) {
		packet->source = connection->service;
		packet->flags |= PACKET_NEW_SOURCE;
	}
	inner->destination = connection->service;
	inner->destination_port = connection->service_port;
	ret = icmp_rewrite_inner(ctx, packet, inner, REWRITE_DESTINATION);
	if (ret || !connection->other_port)
		return ret;
	inner->source_port = connection->other_port;
	return icmp_rewrite_inner(ctx, packet, inner, REWRITE_SOURCE);
}

/* The verdict on any packet: 0 or a drop. */
static __always_inline int judge(struct __sk_buff *ctx, struct packet *packet)
{
	int ret;

	if (packet->flags & PACKET_ICMP_ERROR)
		return icmp_decide(ctx, packet);
	if (flow_established(ctx, packet))
		return 0;
	ret = flow_open_again(ctx, packet);
	if (ret)
		return ret > 0 ? 0 : ret;
	return flow_open(ctx, packet);
}

/* A flow to the pod by its host port, which the quoted answer is of. */
static __always_inline bool icmp_has_host_port_flow(const struct packet *inner,
						    const struct backend *pod)
{
	struct connection_key key __attribute__((aligned(8)));

	connection_key_fill((const void *)&pod->addr,
			    (const void *)&inner->destination, pod->port,
			    inner->destination_port, inner->protocol, &key);
	return bpf_map_lookup_elem(&connections, &key);
}

/*
 * A backend elsewhere, or a router on the way there, quotes what has gone there
 * from the node's address for a client: 1, or a drop.
 */
static __noinline int icmp_to_client(struct __sk_buff *ctx,
				     struct packet *packet,
				     struct packet *inner,
				     const struct nat *row)
{
	int ret;

	addr_copy(&inner->source, &row->addr);
	inner->source_port = row->port;
	ret = icmp_rewrite_inner(ctx, packet, inner, REWRITE_SOURCE);
	if (addr_equal(&packet->source, &inner->destination)) {
		addr_copy(&packet->source, &row->service);
		packet->flags |= PACKET_NEW_SOURCE;
	}
	addr_copy(&inner->destination, &row->service);
	inner->destination_port = row->service_port;
	if (!ret)
		ret = icmp_rewrite_inner(ctx, packet, inner,
					 REWRITE_DESTINATION);
	addr_copy(&packet->destination, &row->addr);
	packet->flags |= PACKET_NEW_DESTINATION;
	packet->choice = CHOICE_ANSWER;
	return ret ? ret : 1;
}

/*
 * A client, or a router on the way there, quotes what a service has answered:
 * 1, 0 if the flow is not known, or a drop.
 */
static __noinline int icmp_to_backend(struct __sk_buff *ctx,
				      struct packet *packet,
				      struct packet *inner)
{
	struct scratch *room = scratch_get();
	__be16 own_port = inner->destination_port;
	struct connection *chosen;
	int ret;

	if (!room)
		return 0;
	connection_key_fill((const void *)&inner->destination,
			    (const void *)&inner->source,
			    inner->destination_port, inner->source_port,
			    inner->protocol, &room->service_key);
	room->service_key.kind = CONNECTION_SERVICE;
	chosen = bpf_map_lookup_elem(&connections, &room->service_key);
	if (!chosen || connection_is_expired(chosen, inner->protocol,
					     bpf_jiffies64()))
		return 0;
	addr_copy(&inner->source, &chosen->service);
	inner->source_port = chosen->service_port;
	addr_copy(&packet->destination, &chosen->service);
	packet->flags |= PACKET_NEW_DESTINATION;
	if (chosen->other_port)
		inner->destination_port = chosen->other_port;
	if (chosen->flags & CONNECTION_SOCKET) {
		packet->choice = CHOICE_NODE;
	} else if (chosen->flags & CONNECTION_DIRECT) {
		packet->route = chosen->route[1];
		packet->choice = CHOICE_DIRECT;
	} else if (chosen->route[1]) {
		if (!nat_node_addr(packet, &inner->destination))
			return 0;
		addr_copy(&packet->source, &inner->destination);
		packet->flags |= PACKET_NEW_SOURCE;
		packet->route = chosen->route[1];
		packet->choice = CHOICE_AWAY;
	}
	ret = icmp_rewrite_inner(ctx, packet, inner, REWRITE_SOURCE);
	if (!ret && inner->destination_port != own_port)
		ret = icmp_rewrite_inner(ctx, packet, inner,
					 REWRITE_DESTINATION);
	return ret ? ret : 1;
}

/* What comes in quotes a pod's answer by its host port: 1, 0 if it does not, or
 * a drop. */
static __always_inline int icmp_to_host_port(struct __sk_buff *ctx,
					     struct packet *packet,
					     struct packet *inner)
{
	struct backend pod;
	int ret;

	if (!service_host_port(&inner->source, inner->source_port,
			       inner->protocol, &pod) ||
	    !icmp_has_host_port_flow(inner, &pod))
		return 0;
	inner->source = pod.addr;
	inner->source_port = pod.port;
	packet->destination = pod.addr;
	packet->flags |= PACKET_NEW_DESTINATION;
	ret = icmp_rewrite_inner(ctx, packet, inner, REWRITE_SOURCE);
	return ret ? ret : 1;
}

/* The quoted packet has a mapping of masquerading: 1 or a drop. */
static __always_inline int icmp_masquerade(struct __sk_buff *ctx,
					   struct packet *packet,
					   struct packet *inner,
					   const struct nat *row, bool out)
{
	int ret;

	if (out) {
		inner->destination = row->addr;
		inner->destination_port = row->port;
		packet->source = row->addr;
		packet->flags |= PACKET_NEW_SOURCE;
	} else {
		inner->source = row->addr;
		inner->source_port = row->port;
		packet->destination = row->addr;
		packet->flags |= PACKET_NEW_DESTINATION;
	}
	ret = icmp_rewrite_inner(ctx, packet, inner,
				 out ? REWRITE_DESTINATION : REWRITE_SOURCE);
	return ret ? ret : 1;
}

/* Of what comes in without a mapping: a service has sent what it quotes. */
static __always_inline int icmp_to_service(struct __sk_buff *ctx,
					   struct packet *packet,
					   struct packet *inner)
{
	int ret = icmp_to_backend(ctx, packet, inner);

	return ret ? ret : icmp_to_host_port(ctx, packet, inner);
}

/*
 * Translates an ICMP error like the flow it tells of, masqueraded or of a
 * service for clients outside: coming in, the node's address becomes the pod's
 * or the client's; going out, the pod's the node's. 1 if it did
 * (packet_passes_by says whether it is for a pod of this node), 0 if the packet
 * is the stack's, or a drop.
 */
__weak __noinline int icmp_translate(struct __sk_buff *ctx,
				     struct packet *packet, __u32 direction)
{
	struct scratch *room = scratch_get();
	struct packet *inner;
	struct nat_key key = {};
	bool out = direction == DIRECTION_EGRESS;
	struct nat *row;
	int ret;

	if (!packet || !room)
		return -DROP_UNSUPPORTED_ICMP;
	inner = &room->quoted;
	__builtin_memset(inner, 0, sizeof(*inner));
	/* What we cannot read, we have not masqueraded. */
	if (icmp_parse_inner(ctx, packet, inner))
		return 0;
	/* Out: a pod quotes what it received. In: somebody quotes what we sent.
	 */
	key.local = out ? inner->destination : inner->source;
	key.remote = out ? inner->source : inner->destination;
	key.local_port = out ? inner->destination_port : inner->source_port;
	key.remote_port = out ? inner->source_port : inner->destination_port;
	key.protocol = inner->protocol;
	key.direction = direction;
	row = bpf_map_lookup_elem(&nat, &key);
	if (row && !out && nat_is_nodes(row, &key))
		return 0;
	if (row && row->service_port)
		ret = icmp_to_client(ctx, packet, inner, row);
	else if (row)
		ret = icmp_masquerade(ctx, packet, inner, row, out);
	else
		ret = out ? 0 : icmp_to_service(ctx, packet, inner);
	if (ret <= 0)
		return ret;
	ret = rewrite_apply(ctx, packet);
	packet->flags &= ~(PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION);
	if (ret)
		return ret;
	/* What is for a socket of the node is the stack's. */
	return packet->choice == CHOICE_NODE ? 0 : 1;
}
