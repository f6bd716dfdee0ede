/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The one place where a pod's packets leave this node. Every way out ends in
 * leave(), leave_by_network() or leave_to_stack(): what must happen to all of them (encryption, an
 * egress gateway) is added here. to_network is the guard behind it.
 */
#pragma once

#include "mark.h"

#include <bpf/bpf_helpers.h>

/*
 * Past the node's stack, by the device `ifindex`: to the next hop of this
 * address family, or, with family 0, to a device that needs none. The packet
 * has its verdict and its final addresses: to_network and to_overlay have
 * nothing to add. An action of tc.
 */
static __always_inline int leave(struct __sk_buff *ctx, __u32 ifindex,
				 __u32 family, const __u32 *next_hop)
{
	struct bpf_redir_neigh next = {.nh_family = family};

	mark_set(ctx, MARK_LEAVE);
	if (!family)
		return bpf_redirect(ifindex, 0);
	__builtin_memcpy(next.nexthop, next_hop, 16);
	return bpf_redirect_neigh(ifindex, &next, sizeof(next), 0);
}

/* The same for a packet that to_network is still to look at: it may have to
 * masquerade it. */
static __always_inline int leave_by_network(struct __sk_buff *ctx,
					    __u32 ifindex, __u32 family,
					    const __u32 *next_hop)
{
	struct bpf_redir_neigh next = {.nh_family = family};

	mark_clear(ctx);
	__builtin_memcpy(next.nexthop, next_hop, 16);
	return bpf_redirect_neigh(ifindex, &next, sizeof(next), 0);
}

/* Back by the device that the frame came by, with these MAC addresses: an action
 * of tc, or a drop. */
static __always_inline int leave_back(struct __sk_buff *ctx,
				      const __u8 from[6], const __u8 to[6])
{
	if (bpf_skb_store_bytes(ctx, 0, to, 6, 0) ||
	    bpf_skb_store_bytes(ctx, 6, from, 6, 0))
		return -DROP_WRITE_ERROR;
	mark_set(ctx, MARK_LEAVE);
	return bpf_redirect(ctx->ifindex, 0);
}

/* By the node's stack, which routes the packet; to_network masquerades. */
static __always_inline int leave_to_stack(struct __sk_buff *ctx)
{
	return TC_ACT_OK;
}
