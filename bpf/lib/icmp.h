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
#include "service.h"

#define ICMP_HEADER_LENGTH ((__u32)sizeof(struct icmphdr))

/* Parses the quoted packet; `inner` is zeroed. 0 or a drop. */
static __always_inline int icmp_parse_inner(struct __sk_buff *ctx,
					    const struct packet *packet,
					    struct packet *inner)
{
	__u32 offset = packet->l4_offset + ICMP_HEADER_LENGTH;
	struct icmphdr l4;

	if (packet->flags & PACKET_IPV6) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(ctx, offset, &ip, sizeof(ip)))
			return -DROP_UNSUPPORTED_ICMP;
		addr_from_ipv6(&inner->source, ip.source);
		addr_from_ipv6(&inner->destination, ip.destination);
		inner->protocol = ip.next_header;
		inner->flags = PACKET_IPV6;
		offset += sizeof(ip);
	} else {
		struct iphdr ip;

		if (bpf_skb_load_bytes(ctx, offset, &ip, sizeof(ip)) ||
		    ip.version_length >> 4 != 4 ||
		    (ip.version_length & 15) < 5 ||
		    ip.fragment & bpf_htons(IP_FRAGMENT_OFFSET))
			return -DROP_UNSUPPORTED_ICMP;
		addr_from_ipv4(&inner->source, ip.source);
		addr_from_ipv4(&inner->destination, ip.destination);
		inner->protocol = ip.protocol;
		offset += (ip.version_length & 15) * 4;
	}
	inner->l4_offset = offset;
	if (bpf_skb_load_bytes(ctx, offset, &l4, sizeof(l4)))
		return -DROP_UNSUPPORTED_ICMP;

	switch (inner->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		__builtin_memcpy(&inner->source_port, &l4, 2);
		__builtin_memcpy(&inner->destination_port, (void *)&l4 + 2, 2);
		return 0;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		packet_note_icmp(inner, l4.type, l4.id);
		if (!icmp_role(inner->protocol, l4.type))
			return -DROP_UNSUPPORTED_ICMP;
	}
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
	__u32 l3 = packet->l4_offset + ICMP_HEADER_LENGTH;
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

/* Lets an ICMP error pass if it belongs to a running flow: 0 or a drop. */
__weak __noinline int icmp_judge(struct __sk_buff *ctx, struct packet *packet)
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
		return icmp_judge(ctx, packet);
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
 * Translates an ICMP error like the flow it tells of, masqueraded or of a host
 * port: coming in, the node's address becomes the pod's; going out, the pod's
 * the node's. 1 if it did, 0 if the flow is none of ours, or a drop.
 */
__weak __noinline int icmp_translate(struct __sk_buff *ctx,
				     struct packet *packet, __u32 direction)
{
	struct scratch *room = scratch_get();
	struct packet *inner;
	struct nat_key key = {};
	bool out = direction == DIRECTION_EGRESS;
	struct backend pod;
	struct nat *other;
	struct nat to = {};
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
	other = bpf_map_lookup_elem(&nat, &key);
	if (other && !out && nat_is_nodes(other, &key))
		return 0;
	if (other) {
		to = *other;
	} else {
		if (out ||
		    !service_host_port(&inner->source, inner->source_port,
				       inner->protocol, &pod) ||
		    !icmp_has_host_port_flow(inner, &pod))
			return 0;
		to.addr = pod.addr;
		to.port = pod.port;
	}
	if (out) {
		inner->destination = to.addr;
		inner->destination_port = to.port;
		packet->source = to.addr;
		packet->flags |= PACKET_NEW_SOURCE;
		ret = icmp_rewrite_inner(ctx, packet, inner,
					 REWRITE_DESTINATION);
	} else {
		inner->source = to.addr;
		inner->source_port = to.port;
		packet->destination = to.addr;
		packet->flags |= PACKET_NEW_DESTINATION;
		ret = icmp_rewrite_inner(ctx, packet, inner, REWRITE_SOURCE);
	}
	if (!ret)
		ret = rewrite_apply(ctx, packet);
	packet->flags &= ~(PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION);
	return ret ? ret : 1;
}
