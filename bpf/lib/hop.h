/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What a router does to a packet that it passes on: it takes a hop off TTL or
 * hop limit. By a helper: a direct write anywhere in a program makes the kernel
 * copy the headers of every packet (packet.h).
 */
#pragma once

#include "packet.h"

/* The four bytes of an IPv4 header around its TTL. */
struct hop_ipv4 {
	__u8 ttl;
	__u8 protocol;
	__sum16 check;
};

static __always_inline bool hop_take_ipv4(struct __sk_buff *ctx, void *data,
					  void *end)
{
	struct iphdr *ip = data + ETHERNET_LENGTH;
	struct hop_ipv4 hop;
	__u32 sum;

	if ((void *)(ip + 1) > end || ip->ttl <= 1)
		return false;
	/* RFC 1624: the header has 0x100 less, so its checksum has as much
	 * more, and the carry. */
	sum = ip->check + bpf_htons(0x100);
	hop.ttl = ip->ttl - 1;
	hop.protocol = ip->protocol;
	hop.check = sum + (sum >= 0xffff);
	return !bpf_skb_store_bytes(
		ctx, ETHERNET_LENGTH + __builtin_offsetof(struct iphdr, ttl),
		&hop, sizeof(hop), 0);
}

static __always_inline bool hop_take_ipv6(struct __sk_buff *ctx, void *data,
					  void *end)
{
	struct ipv6hdr *ip = data + ETHERNET_LENGTH;
	__u8 limit;

	if ((void *)(ip + 1) > end || ip->hop_limit <= 1)
		return false;
	limit = ip->hop_limit - 1;
	return !bpf_skb_store_bytes(
		ctx,
		ETHERNET_LENGTH + __builtin_offsetof(struct ipv6hdr, hop_limit),
		&limit, sizeof(limit), 0);
}

/* False, and nothing written, if the packet may go no further: that is the
 * stack's to say to its sender. */
static __always_inline bool hop_take(struct __sk_buff *ctx, bool is_ipv6)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;

	return is_ipv6 ? hop_take_ipv6(ctx, data, end)
		       : hop_take_ipv4(ctx, data, end);
}

/* The packet may go no further than here. */
static __always_inline bool hop_is_last(struct __sk_buff *ctx, bool is_ipv6)
{
	__u8 hops = 0;

	bpf_skb_load_bytes(ctx,
			   ETHERNET_LENGTH +
				   (is_ipv6 ? __builtin_offsetof(struct ipv6hdr,
								 hop_limit)
					    : __builtin_offsetof(struct iphdr,
								 ttl)),
			   &hops, sizeof(hops));
	return hops <= 1;
}
