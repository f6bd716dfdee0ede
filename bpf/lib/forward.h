/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Where a packet goes once it may: a pod of this node, another node by tunnel
 * or by route, or the node's own stack.
 */
#pragma once

#include "egress.h"
#include "endpoint.h"
#include "limit.h"
#include "mss.h"
#include "proxy.h"
#include "rewrite.h"
#include "tunnel.h"

/*
 * Into the pod's namespace at once. The frame keeps the MAC addresses it has
 * and the packet its TTL: the kernel compares the destination MAC with the
 * device's only when the frame is first received, and redirect_peer keeps the
 * answer (pkt_type); so the fast path writes nothing.
 */
static __always_inline int forward_to_endpoint(struct __sk_buff *ctx,
					       const struct packet *packet)
{
	__u32 id = packet->destination_endpoint;
	struct endpoint *endpoint = endpoint_by_id(id);

	if (!endpoint)
		return -DROP_UNROUTABLE_IP;
	if (limit_has(endpoint))
		return limit_queue(ctx, endpoint->ifindex, id);
	return bpf_redirect_peer(endpoint->ifindex, 0);
}

static __always_inline int forward_set_tunnel_key(struct __sk_buff *ctx,
						  const struct addr *node,
						  __u32 identity)
{
	struct bpf_tunnel_key key = {.tunnel_id = identity, .tunnel_ttl = 64};
	/* RFC 7348, 4.3; IPv6 has no other checksum of its addresses. */
	__u64 flags = BPF_F_ZERO_CSUM_TX;

	if (addr_is_ipv4(node)) {
		key.remote_ipv4 = bpf_ntohl(node->w[3]);
	} else {
		__builtin_memcpy(key.remote_ipv6, node->w, 16);
		flags = BPF_F_TUNINFO_IPV6;
	}
	return bpf_skb_set_tunnel_key(ctx, &key, sizeof(key), flags)
		       ? -DROP_WRITE_ERROR
		       : 0;
}

/*
 * The packet answers by an address that is not the pod's own, a host port's. The
 * stack would not take that address from a pod's device: translation is the last
 * that is done to it, and only if it leaves past the stack.
 */
static __always_inline bool forward_is_answer(const struct packet *packet)
{
	return packet->flags & PACKET_NEW_SOURCE &&
	       packet->flags & (PACKET_REPLY | PACKET_ICMP_ERROR);
}

/* What the stack is given is as the pod sent it, so that the pod knows what an
 * error quotes. It may not be cut there: the pieces would miss translation. */
static __always_inline int forward_too_long_answer(struct __sk_buff *ctx,
						   const struct packet *packet)
{
	__be16 fragment = 0;

	if (!(packet->flags & PACKET_IPV6) &&
	    (bpf_skb_load_bytes(ctx,
				ETHERNET_LENGTH + __builtin_offsetof(
							  struct iphdr, fragment),
				&fragment, sizeof(fragment)) ||
	     !(fragment & bpf_htons(IP_DONT_FRAGMENT))))
		return -DROP_FRAGMENT_UNSUPPORTED;
	return leave_to_stack(ctx);
}

/*
 * By the node's routes, but past its stack: an action of tc, or a drop. What is
 * too long for its way, or at its last hop, is the stack's (TC_ACT_OK), which
 * cuts it or tells its sender. By the stack, too, if `may_pass` and the way is
 * none of to_network's.
 */
__weak __noinline int forward_to_route(struct __sk_buff *ctx,
				       struct packet *packet, bool may_pass)
{
	struct bpf_fib_lookup fib = {.ifindex = ctx->ifindex};
	long ret;

	if (!packet)
		return -DROP_UNROUTABLE_IP;
	fib.tot_len = packet_wire_length(ctx, packet->l4_offset,
					 packet->protocol);
	ret = route_find(ctx, &packet->source, &packet->destination,
			 packet->flags & PACKET_IPV6, &fib);
	if (may_pass && (ret != BPF_FIB_LKUP_RET_SUCCESS ||
			 !own_device_find(fib.ifindex)))
		return leave_to_stack(ctx);
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return forward_is_answer(packet)
			       ? forward_too_long_answer(ctx, packet)
			       : leave_to_stack(ctx);
	if (ret != BPF_FIB_LKUP_RET_SUCCESS)
		return -DROP_FIB_LOOKUP_FAILED;
	if (!hop_take(ctx, packet->flags & PACKET_IPV6))
		return leave_to_stack(ctx);
	if (forward_is_answer(packet)) {
		ret = rewrite_apply(ctx, packet);
		if (ret)
			return ret;
	}
	/* Who asked the pod by its own address, or by a host port, hears from
	 * that address; what the pod asks may bear the node's. */
	if (may_pass && !(packet->flags & PACKET_REPLY))
		return leave_by_network(ctx, fib.ifindex, fib.family,
					fib.destination);
	return leave(ctx, fib.ifindex, fib.family, fib.destination);
}

/* To the node that has the pod, by native routing: an action of tc, or a drop. */
static __always_inline int forward_by_route(struct __sk_buff *ctx,
					    struct packet *packet)
{
	__u32 length;
	int action;

	/* A service answers: its address may have another way. */
	if (packet->flags & PACKET_NEW_SOURCE)
		return forward_to_route(ctx, packet, false);
	length = packet_wire_length(ctx, packet->l4_offset, packet->protocol);
	action = route_leave(ctx, &packet->source, &packet->destination,
			     length);
	if (action == ROUTE_BY_STACK)
		return leave_to_stack(ctx);
	return action < 0 ? -DROP_FIB_LOOKUP_FAILED : action;
}

/*
 * The node that has the packet's destination, or NULL. An address that nobody
 * known has is that of a pod that has begun a flow already (flow_keep_newcomer):
 * its node has the pod CIDR. What leaves the cluster goes to the pod's gateway.
 */
static __always_inline const struct addr *
forward_node(const struct packet *packet)
{
	struct address *address = address_find(&packet->destination);
	const struct egress_rule *rule;
	struct prefix *prefix;

	if (address)
		return &address->node;
	if (packet->flags & PACKET_BY_GATEWAY) {
		rule = egress_find(packet);
		return rule ? &rule->node : NULL;
	}
	prefix = prefix_find(&packet->destination);
	return prefix && prefix->flags & PREFIX_POD_CIDR ? &prefix->node : NULL;
}

/*
 * The identity that the packet bears in the tunnel; 0: there is none. What comes
 * from outside to a service is not the node's, whose address it may have.
 */
static __always_inline __u32 forward_identity(const struct packet *packet)
{
	struct endpoint *endpoint;

	if (packet_passes_by(packet))
		return IDENTITY_WORLD;
	endpoint = endpoint_by_id(packet->source_endpoint);
	return endpoint ? endpoint->identity : 0;
}

/* To the node that has the pod, or that is the gateway of what it sends. */
__weak __noinline int forward_to_node(struct __sk_buff *ctx,
				      struct packet *packet)
{
	const struct addr *node;
	__u32 identity;
	int ret;

	if (!packet)
		return -DROP_UNROUTABLE_IP;
	ret = mss_clamp(ctx, packet);
	if (ret)
		return ret;
	if (!settings.tunnel_ifindex && !(packet->flags & PACKET_BY_GATEWAY))
		return forward_by_route(ctx, packet);
	node = forward_node(packet);
	if (!node)
		return -DROP_UNROUTABLE_IP;
	if (addr_is_zero(node))
		return -DROP_NO_TUNNEL_ENDPOINT;
	identity = forward_identity(packet);
	if (!identity)
		return -DROP_INVALID_IDENTITY;
	if (!hop_take(ctx, packet->flags & PACKET_IPV6))
		return packet_passes_by(packet) ? -DROP_TTL_EXCEEDED
						: leave_to_stack(ctx);
	if (forward_is_answer(packet)) {
		ret = rewrite_apply(ctx, packet);
		if (ret)
			return ret;
	}
	if (tunnel_is_direct() && addr_is_ipv4(node)) {
		ret = tunnel_send(ctx, packet, node->w[3], identity,
				  packet_wire_length(ctx, packet->l4_offset,
						     packet->protocol));
		if (ret != TUNNEL_BY_DEVICE)
			return ret;
	}
	ret = forward_set_tunnel_key(ctx, node, identity);
	if (ret)
		return ret;
	return leave(ctx, settings.overlay_ifindex, 0, NULL);
}

/*
 * Of what leaves the cluster, and no policy of egress gateways says how: an
 * action of tc, or a drop.
 */
static __always_inline int forward_to_world(struct __sk_buff *ctx,
					    struct packet *packet)
{
	/* The node's connection tracking would see one direction alone, and its
	 * firewall take the rest for invalid. */
	if (packet->flags & PACKET_FROM_POD && node_allows_past_stack() &&
	    packet->route != ROUTE_GUARDED)
		return forward_to_route(ctx, packet, true);
	return leave_to_stack(ctx);
}

/* Of a packet that a pod has sent, or the proxy for it. */
static __always_inline int forward(struct __sk_buff *ctx, struct packet *packet)
{
	int ret;

	if (packet->flags & (PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION) &&
	    (packet->route == ROUTE_ENDPOINT || !forward_is_answer(packet))) {
		ret = rewrite_apply(ctx, packet);
		if (ret)
			return ret;
	}
	if (packet->flags & PACKET_TO_PROXY)
		return proxy_take(ctx, packet);
	switch (packet->route) {
	case ROUTE_ENDPOINT:
		return forward_to_endpoint(ctx, packet);
	case ROUTE_NODE:
		return forward_to_node(ctx, packet);
	case ROUTE_STACK:
	case ROUTE_GUARDED:
		/* Also in a running flow, which somebody outside may have begun
		 * from that port. */
		if (packet->flags & PACKET_FROM_POD && packet_is_tunnel(packet))
			return -DROP_ENCAPSULATION_PROHIBITED;
		/* A host port answers: the stack would not take the node's own
		 * address from a device. */
		if (forward_is_answer(packet))
			return forward_to_route(ctx, packet, false);
		switch (egress_choose(packet)) {
		case EGRESS_TO_WORLD:
			return forward_to_world(ctx, packet);
		case EGRESS_AS_GATEWAY:
			return egress_leave(ctx, packet);
		case EGRESS_TO_GATEWAY:
			return forward_to_node(ctx, packet);
		case -DROP_NO_EGRESS_IP:
			return -DROP_NO_EGRESS_IP;
		}
		return -DROP_NO_EGRESS_GATEWAY;
	}
	return -DROP_UNROUTABLE_IP;
}
