/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The node's own routes, asked by programs that send past its stack.
 */
#pragma once

#include "leave.h"
#include "packet.h"

/* Where the node would forward this to: BPF_FIB_LKUP_RET_*. IPv4 addresses are
 * the last words. */
static __always_inline long route_find(struct __sk_buff *ctx,
				       const struct addr *source,
				       const struct addr *destination,
				       bool is_ipv6, struct bpf_fib_lookup *fib)
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
			      BPF_FIB_LOOKUP_SKIP_NEIGH);
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
	struct bpf_fib_lookup fib = {.ifindex = ctx->ifindex};
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
	__builtin_memcpy(route->next_hop, fib.destination, 16);
	return route;
}

/*
 * What a pod sends to another node's pod leaves by the way that is known of it:
 * an action of tc, or -1 if there is none.
 */
__weak __noinline int route_leave(struct __sk_buff *ctx,
				  const struct addr *source,
				  const struct addr *destination)
{
	struct known_route *route;

	if (!source || !destination)
		return -1;
	route = route_recall(ctx, source, destination);
	if (!route)
		return -1;
	return leave(ctx, route->ifindex, route->family, route->next_hop);
}
