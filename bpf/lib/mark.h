/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Weir's field of skb->mark: a few bits under settings.mark_mask, between the
 * bits that others use (docs/decisions/002-packet-mark.md). No other file
 * touches ctx->mark.
 *
 * netfilter's CONNMARK can save a mark and restore it on a packet that no
 * program has seen. So a value is set only where the packet goes to its next
 * program without passing netfilter: by bpf_redirect and bpf_redirect_neigh.
 */
#pragma once

#include "../config.h"

#include <bpf/bpf_helpers.h>

/* The field's lowest bit is the unit of its values. */
static __always_inline __u32 mark_field(__u32 value)
{
	return value * (settings.mark_mask & -settings.mark_mask);
}

static __always_inline void mark_set(struct __sk_buff *ctx,
				     enum packet_mark value)
{
	ctx->mark = (ctx->mark & ~settings.mark_mask) | mark_field(value);
}

static __always_inline bool mark_is(const struct __sk_buff *ctx,
				    enum packet_mark value)
{
	return (ctx->mark & settings.mark_mask) == mark_field(value);
}

static __always_inline void mark_clear(struct __sk_buff *ctx)
{
	ctx->mark &= ~settings.mark_mask;
}
