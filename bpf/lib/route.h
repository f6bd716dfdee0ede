/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The node's own routes, asked by programs that send past its stack.
 */
#pragma once

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

/* By the way that was found: an action of tc. */
static __always_inline int route_follow(const struct bpf_fib_lookup *fib)
{
	struct bpf_redir_neigh next = {.nh_family = fib->family};

	__builtin_memcpy(next.nexthop, fib->destination, 16);
	return bpf_redirect_neigh(fib->ifindex, &next, sizeof(next), 0);
}
