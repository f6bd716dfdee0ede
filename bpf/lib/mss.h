/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * TCP's segments fit the way to another node's pod (settings.path_mtu). A pod
 * keeps the MTU that it began with, and offers segments of that size also after
 * encryption was turned on, which leaves less room.
 */
#pragma once

#include "packet.h"

#define TCP_OPTION_MSS 2

struct mss_option {
	__u8 kind;
	__u8 length;
	__be16 size;
};

/* Makes what a SYN offers no more than fits: 0, or a drop. Whoever sends the
 * option sends it first. */
static __noinline int mss_clamp_slow(struct __sk_buff *ctx,
				     const struct packet *packet)
{
	__u32 l4 = packet->l4_offset;
	__u32 at = l4 + sizeof(struct tcphdr);
	__u32 headers = at - ETHERNET_LENGTH;
	struct mss_option option;
	__u8 offset = 0;
	__be16 fits;

	if (bpf_skb_load_bytes(ctx, l4 + __builtin_offsetof(struct tcphdr, offset),
			       &offset, sizeof(offset)) ||
	    offset >> 4 <= (int)sizeof(struct tcphdr) / 4 ||
	    bpf_skb_load_bytes(ctx, at, &option, sizeof(option)) ||
	    option.kind != TCP_OPTION_MSS || option.length != sizeof(option) ||
	    bpf_ntohs(option.size) + headers <= settings.path_mtu)
		return 0;
	fits = bpf_htons(settings.path_mtu - headers);
	if (bpf_skb_store_bytes(
		    ctx, at + __builtin_offsetof(struct mss_option, size),
		    &fits, sizeof(fits), 0) ||
	    bpf_l4_csum_replace(ctx,
				l4 + __builtin_offsetof(struct tcphdr, check),
				option.size, fits, sizeof(fits)))
		return -DROP_WRITE_ERROR;
	return 0;
}

static __always_inline int mss_clamp(struct __sk_buff *ctx,
				     const struct packet *packet)
{
	return settings.path_mtu && packet->protocol == IPPROTO_TCP &&
			       packet->tcp_flags & TCP_SYN
		       ? mss_clamp_slow(ctx, packet)
		       : 0;
}
