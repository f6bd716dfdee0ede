/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The node's own routes, asked by programs that send past its stack.
 */
#pragma once

#include "hop.h"
#include "leave.h"

/* Where the node would forward this to, as these flags of bpf_fib_lookup say:
 * BPF_FIB_LKUP_RET_*. IPv4 addresses are the last words. */
static __always_inline long
route_find_by(struct __sk_buff *ctx, const struct addr *source,
	      const struct addr *destination, bool is_ipv6, __u32 flags,
	      struct bpf_fib_lookup *fib)
{
	if (is_ipv6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->source, source->w, 16);
		__builtin_memcpy(fib->destination, destination->w, 16);
	} else {
		fib->family = AF_INET;
		fib->source[0] = source->w[3];
		fib->destination[0] = destination->w[3];
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib),
			      BPF_FIB_LOOKUP_SKIP_NEIGH | flags);
}

static __always_inline long route_find(struct __sk_buff *ctx,
				       const struct addr *source,
				       const struct addr *destination,
				       bool is_ipv6, struct bpf_fib_lookup *fib)
{
	return route_find_by(ctx, source, destination, is_ipv6, 0, fib);
}

/*
 * The node's stack may keep what goes there for itself, though the address is no
 * device's: a subnet's broadcast address, that of all routers of a link, a local
 * route. The kernel says the same where there is no way at all, and what a device
 * that does not forward brings can go nowhere else.
 */
static __noinline bool route_may_end_here(struct __sk_buff *ctx,
					  const struct packet *packet)
{
	struct bpf_fib_lookup fib = {.ifindex = ctx->ifindex};
	long ret = route_find(ctx, &packet->source, &packet->destination,
			      packet->flags & PACKET_IPV6, &fib);

	return ret == BPF_FIB_LKUP_RET_NOT_FWDED ||
	       ret == BPF_FIB_LKUP_RET_FWD_DISABLED;
}

/*
 * The same for what a pod sends, which has one address of each family. Asking
 * costs more than everything else about such a packet; within a tick the answer
 * is not asked for again. NULL if there is no way.
 */
static __always_inline struct known_route *
route_recall(struct __sk_buff *ctx, const struct addr *source,
	     const struct addr *destination)
{
	__u32 slot = bpf_ntohl(destination->w[3]) & (ROUTE_SLOTS - 1);
	/* A length makes the kernel say the MTU of the way. */
	struct bpf_fib_lookup fib = {.ifindex = ctx->ifindex, .tot_len = 1};
	__u64 now = bpf_jiffies64();
	struct known_route *route = bpf_map_lookup_elem(&routes, &slot);

	if (!route)
		return NULL;
	if (route->from_ifindex == ctx->ifindex &&
	    route->found_jiffies == now &&
	    addr_equal(&route->destination, destination))
		return route;
	if (route_find(ctx, source, destination, !addr_is_ipv4(destination),
		       &fib) != BPF_FIB_LKUP_RET_SUCCESS)
		return NULL;
	addr_copy(&route->destination, destination);
	route->found_jiffies = now;
	route->from_ifindex = ctx->ifindex;
	route->ifindex = fib.ifindex;
	route->family = fib.family;
	route->mtu = fib.tot_len;
	__builtin_memcpy(route->next_hop, fib.destination, 16);
	return route;
}

/* No action of tc. */
#define ROUTE_UNKNOWN  -1 /* there is no way */
#define ROUTE_BY_STACK -2 /* too long for the way, or at its last hop */

/*
 * What a pod sends to another node's pod leaves by the way that is known of it:
 * an action of tc, or ROUTE_UNKNOWN or ROUTE_BY_STACK, and the packet is as
 * before. Its length on the wire is asked for.
 */
__weak __noinline int route_leave(struct __sk_buff *ctx,
				  const struct addr *source,
				  const struct addr *destination, __u32 length)
{
	struct known_route *route;

	if (!source || !destination)
		return ROUTE_UNKNOWN;
	route = route_recall(ctx, source, destination);
	if (!route)
		return ROUTE_UNKNOWN;
	if (length > route->mtu || !hop_take(ctx, !addr_is_ipv4(destination)))
		return ROUTE_BY_STACK;
	return leave(ctx, route->ifindex, route->family, route->next_hop);
}
