/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Egress gateways: what some pods send to some destinations outside the cluster
 * leaves by a node, and with an address, that a policy names (egress_rules).
 *
 * The pod's node sends to the gateway by the tunnel, whatever the routing is
 * (egress_choose). The gateway sends on by its routes (egress_receive,
 * egress_leave), and to_network gives the packet its address, for pods of the
 * gateway, too. Answers go back by the tunnel (egress_answer). to_network is also
 * the guard: no way through the node gets past it with another address.
 */
#pragma once

#include "endpoint.h"
#include "hop.h"
#include "own.h"
#include "route.h"

/* The way of what a pod sends to the world. */
enum egress_way {
	EGRESS_TO_WORLD = 0,   /* no rule is about it */
	EGRESS_AS_GATEWAY = 1, /* this node is its gateway */
	EGRESS_TO_GATEWAY = 2, /* another node is */
};

/*
 * No address of the cluster, and none that is reached through the node's
 * netfilter: a link's own services are each node's own.
 */
static __noinline bool egress_is_outside(const struct addr *addr)
{
	struct peer to = {};

	identity_resolve(addr, &to);
	return to.route == ROUTE_STACK && !to.flags;
}

/* The rule for a packet to the world of a pod that a policy selects. NULL: the
 * pod's rules are not in force, and nothing leaves. */
static __noinline const struct egress_rule *
egress_find(const struct packet *packet)
{
	struct egress_rule_key key = {
		.prefix_length = 160,
		.destination = packet->destination,
	};
	/* Linux 6.1 takes no key out of an argument. */
	struct addr source = packet->source;
	__u32 *set = bpf_map_lookup_elem(&egress_pods, &source);

	if (!set)
		return NULL;
	key.set = *set;
	return bpf_map_lookup_elem(&egress_rules, &key);
}

/* 1 if packets leave by this node with the rule's address, or a drop. */
static __always_inline int egress_may_leave(const struct egress_rule *rule)
{
	if (!(rule->flags & EGRESS_HERE))
		return -DROP_NO_EGRESS_GATEWAY;
	return rule->flags & EGRESS_OF_DEVICE || !addr_is_zero(&rule->address)
		       ? 1
		       : -DROP_NO_EGRESS_IP;
}

/* What packets leave with, where the device has this address. */
static __always_inline const struct addr *
egress_address(const struct egress_rule *rule, const struct addr *device)
{
	return rule && !(rule->flags & EGRESS_OF_DEVICE) ? &rule->address
							 : device;
}

/* The rule for what the pod with this row sends; NULL: it goes the ordinary way,
 * or by none (PACKET_CLOSED). */
static __always_inline const struct egress_rule *
egress_of(struct packet *packet, const struct address *pod)
{
	const struct egress_rule *rule;
	struct endpoint *endpoint;

	if (pod->endpoint_id) {
		endpoint = endpoint_by_id(pod->endpoint_id);
		if (!endpoint || !(endpoint->flags & ENDPOINT_EGRESS))
			return NULL;
	} else if (!settings.overlay_ifindex) {
		return NULL;
	}
	if (!egress_is_outside(&packet->destination))
		return NULL;
	rule = egress_find(packet);
	/* A pod of another node is none of this one's business then. */
	if (!rule) {
		if (pod->endpoint_id)
			packet->flags |= PACKET_CLOSED;
		return NULL;
	}
	return rule->flags & EGRESS_ORDINARY ? NULL : rule;
}

/* Of what a pod of this node sends to the world: enum egress_way, or a drop. */
static __noinline int egress_choose(struct packet *packet)
{
	const struct egress_rule *rule;
	struct endpoint *endpoint;
	int ret;

	/* Who asked the pod hears from whom he asked. */
	if (!(packet->flags & PACKET_FROM_POD) || packet->flags & PACKET_REPLY)
		return EGRESS_TO_WORLD;
	endpoint = endpoint_by_id(packet->source_endpoint);
	if (!endpoint || !(endpoint->flags & ENDPOINT_EGRESS) ||
	    !egress_is_outside(&packet->destination))
		return EGRESS_TO_WORLD;
	rule = egress_find(packet);
	if (!rule)
		return -DROP_NO_EGRESS_GATEWAY;
	if (rule->flags & EGRESS_ORDINARY)
		return EGRESS_TO_WORLD;
	if (rule->flags & EGRESS_HERE) {
		ret = egress_may_leave(rule);
		return ret < 0 ? ret : EGRESS_AS_GATEWAY;
	}
	if (addr_is_zero(&rule->node) || !settings.overlay_ifindex)
		return -DROP_NO_EGRESS_GATEWAY;
	packet->flags |= PACKET_BY_GATEWAY;
	return EGRESS_TO_GATEWAY;
}

/*
 * The tunnel brings what is for the world, of a pod whose sender has been
 * checked: 0, and CHOICE_GATEWAY if this node is the pod's gateway, or a drop.
 * The sender may know of the policy before this node does.
 */
__weak __noinline int egress_receive(struct packet *packet)
{
	const struct egress_rule *rule;
	struct address *pod;
	int ret;

	if (!packet)
		return -DROP_INVALID_PACKET;
	if (!egress_is_outside(&packet->destination))
		return 0;
	pod = address_find(&packet->source);
	/* Of a pod that nobody has told of yet the tunnel says the identity;
	 * to_network knows pods by their rows alone. */
	if (!pod)
		return packet->source_identity < IDENTITY_FIRST_CLUSTER
			       ? 0
			       : -DROP_NO_EGRESS_GATEWAY;
	if (!(pod->flags & ADDRESS_POD))
		return 0;
	rule = egress_find(packet);
	ret = rule ? egress_may_leave(rule) : -DROP_NO_EGRESS_GATEWAY;
	if (ret < 0)
		return ret;
	packet->choice = CHOICE_GATEWAY;
	packet->route = ROUTE_STACK;
	return 0;
}

/* What the world answers, or an ICMP error about it, has the pod's address now:
 * that of another node's pod goes there as it came. */
static __always_inline void egress_answer(struct packet *packet)
{
	struct address *pod;

	if (packet->choice != CHOICE_NONE)
		return;
	pod = address_find(&packet->destination);
	if (!pod || pod->flags & ADDRESS_LOCAL || !(pod->flags & ADDRESS_POD))
		return;
	packet->choice = CHOICE_GATEWAY;
	packet->flags |= PACKET_BY_GATEWAY;
	packet->route = ROUTE_NODE;
}

/* The gateway's way to the destination: BPF_FIB_LKUP_RET_*. By the device that
 * the policy names, if that leads there. */
static __always_inline long egress_find_route(struct __sk_buff *ctx,
					      const struct packet *packet,
					      const struct egress_rule *rule,
					      struct bpf_fib_lookup *fib)
{
	bool is_ipv6 = packet->flags & PACKET_IPV6;
	__u32 length = packet_wire_length(ctx, packet->l4_offset,
					  packet->protocol);
	long ret;

	if (rule->ifindex) {
		fib->ifindex = rule->ifindex;
		fib->tot_len = length;
		ret = route_find_by(ctx, &rule->address, &packet->destination,
				    is_ipv6, BPF_FIB_LOOKUP_OUTPUT, fib);
		if (ret == BPF_FIB_LKUP_RET_SUCCESS ||
		    ret == BPF_FIB_LKUP_RET_FRAG_NEEDED)
			return ret;
		__builtin_memset(fib, 0, sizeof(*fib));
	}
	fib->ifindex = ctx->ifindex;
	fib->tot_len = length;
	return route_find(ctx,
			  rule->flags & EGRESS_OF_DEVICE ? &packet->source
							 : &rule->address,
			  &packet->destination, is_ipv6, fib);
}

/* To the stack, where its way is one with to_network on it: else the packet would
 * leave with the pod's address. */
static __noinline int egress_to_stack(struct __sk_buff *ctx,
				      const struct packet *packet,
				      struct bpf_fib_lookup *fib)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = ctx->ifindex;
	/* Of a packet that is too long the kernel does not say the device. */
	fib->tot_len = 1;
	if (route_find(ctx, &packet->source, &packet->destination,
		       packet->flags & PACKET_IPV6,
		       fib) != BPF_FIB_LKUP_RET_SUCCESS ||
	    !own_device_find(fib->ifindex))
		return -DROP_NO_EGRESS_GATEWAY;
	return leave_to_stack(ctx);
}

/*
 * From the gateway to the world, by a device where to_network gives the packet
 * its address: an action of tc, or a drop. What is too long, or at its last hop,
 * the stack tells the pod.
 */
__weak __noinline int egress_leave(struct __sk_buff *ctx, struct packet *packet)
{
	struct bpf_fib_lookup fib = {};
	const struct egress_rule *rule;
	long ret;

	if (!packet)
		return -DROP_UNROUTABLE_IP;
	rule = egress_find(packet);
	if (!rule || !(rule->flags & EGRESS_HERE))
		return -DROP_NO_EGRESS_GATEWAY;
	if (!node_allows_past_stack())
		return egress_to_stack(ctx, packet, &fib);
	ret = egress_find_route(ctx, packet, rule, &fib);
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return egress_to_stack(ctx, packet, &fib);
	if (ret != BPF_FIB_LKUP_RET_SUCCESS)
		return -DROP_FIB_LOOKUP_FAILED;
	if (!own_device_find(fib.ifindex))
		return -DROP_NO_EGRESS_GATEWAY;
	if (!hop_take(ctx, packet->flags & PACKET_IPV6))
		return leave_to_stack(ctx);
	return leave_by_network(ctx, fib.ifindex, fib.family, fib.destination);
}
