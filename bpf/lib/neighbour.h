/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What a pod asks its link rather than the network: ARP and IPv6 neighbour
 * discovery. Whoever it asks for, the answer is the host side of its veth. What
 * would make a pod a router or tell others lies is dropped.
 */
#pragma once

#include "advertisement.h"
#include "endpoint.h"
#include "event.h"
#include "mark.h"
#include "rewrite.h"

/* 02:57:65:69:<id>: the MAC address of the host side. */
static __always_inline void neighbour_mac(__u8 mac[6], __u16 id)
{
	mac[0] = ENDPOINT_MAC_0;
	mac[1] = ENDPOINT_MAC_1;
	mac[2] = ENDPOINT_MAC_2;
	mac[3] = ENDPOINT_MAC_3;
	mac[4] = id >> 8;
	mac[5] = id;
}

/*
 * Gives the frame back to the pod that sent it, straight into its namespace:
 * to_pod never sees it, so to_pod need not trust a mark. What was a broadcast is
 * an answer now, which the pod's kernel believes only when addressed to it.
 */
static __always_inline int neighbour_reply(struct __sk_buff *ctx,
					   const __u8 from[6], const __u8 to[6])
{
	if (bpf_skb_store_bytes(ctx, 0, to, 6, 0) ||
	    bpf_skb_store_bytes(ctx, 6, from, 6, 0) ||
	    bpf_skb_change_type(ctx, PACKET_HOST))
		return -DROP_WRITE_ERROR;
	mark_set(ctx, MARK_ANSWER);
	return bpf_redirect_peer(ctx->ifindex, 0);
}

static __always_inline int neighbour_answer_arp(struct __sk_buff *ctx)
{
	struct addr source __attribute__((aligned(8))) = {};
	struct endpoint *endpoint;
	struct address *address;
	struct arphdr arp;
	__be32 sender, target;
	__u8 mac[6];

	if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &arp, sizeof(arp)) ||
	    arp.operation != bpf_htons(1) || arp.protocol_length != 4)
		return -DROP_UNSUPPORTED_L2;
	__builtin_memcpy(&sender, arp.sender_ip, 4);
	__builtin_memcpy(&target, arp.target_ip, 4);
	addr_from_ipv4(&source, sender);
	address = address_find(&source);
	/* Gratuitous or somebody else's: nobody needs an answer. */
	if (!address || !address->endpoint_id || sender == target)
		return -DROP_UNSUPPORTED_L2;
	endpoint = endpoint_by_id(address->endpoint_id);
	if (!endpoint || endpoint->ifindex != ctx->ifindex)
		return -DROP_UNSUPPORTED_L2;

	neighbour_mac(mac, address->endpoint_id);
	arp_answer(&arp, mac);
	if (bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &arp, sizeof(arp), 0))
		return -DROP_WRITE_ERROR;
	return neighbour_reply(ctx, mac, arp.target_mac);
}

/* Not where the source is ::, which asks whether the address is free. */
static __always_inline int neighbour_answer_solicitation(struct __sk_buff *ctx,
							 struct packet *packet)
{
	struct neighbour_advertisement answer = {};
	struct endpoint *endpoint;
	struct addr target __attribute__((aligned(8)));
	__u16 id = 0;

	if (bpf_skb_load_bytes(ctx, 6, answer.mac, 6) ||
	    bpf_skb_load_bytes(ctx, packet->l4_offset + 8, &target, 16))
		return -DROP_FORBIDDEN_ICMPV6;
	if (addr_is_zero(&packet->source))
		return -DROP_FORBIDDEN_ICMPV6;
	endpoint = endpoint_of_source(ctx, packet);
	if (endpoint)
		id = packet->source_endpoint;
	else
		return -DROP_FORBIDDEN_ICMPV6;
	if (addr_equal(&endpoint->ipv6, &target))
		return -DROP_FORBIDDEN_ICMPV6;
	if (bpf_skb_change_tail(ctx, ETHERNET_LENGTH + sizeof(answer), 0))
		return -DROP_WRITE_ERROR;

	{
		__u8 to[6], mac[6];

		__builtin_memcpy(to, answer.mac, 6);
		neighbour_mac(mac, id);
		__builtin_memcpy(answer.ip.destination, packet->source.w, 16);
		__builtin_memcpy(answer.mac, mac, 6);
		advertisement_fill(&answer, &target,
				   ADVERTISEMENT_SOLICITED |
					   ADVERTISEMENT_OVERRIDES);
		if (bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &answer,
					sizeof(answer), 0))
			return -DROP_WRITE_ERROR;
		return neighbour_reply(ctx, mac, to);
	}
}

static __always_inline int neighbour_quiet(const struct packet *packet,
					   __u32 reason)
{
	metric_count(reason, packet->direction, packet->bytes);
	return TC_ACT_SHOT;
}

/* What parsing did not take for an ordinary packet. */
__weak __noinline int neighbour_from_pod(struct __sk_buff *ctx,
					 struct packet *packet, int reason)
{
	int ret;

	if (!packet)
		return TC_ACT_SHOT;
	if (packet->flags & PACKET_CONTROL) {
		switch (packet->icmp_type) {
		case ICMPV6_NEIGHBOUR_SOLICITATION:
			ret = neighbour_answer_solicitation(ctx, packet);
			if (ret >= 0)
				return finish(ctx, packet, ret);
			return neighbour_quiet(packet, -ret);
		case ICMPV6_ROUTER_ADVERTISEMENT:
		case ICMPV6_REDIRECT:
			break;
		default:
			/* Every pod's kernel asks for routers and groups. */
			return neighbour_quiet(packet, DROP_FORBIDDEN_ICMPV6);
		}
		reason = -DROP_FORBIDDEN_ICMPV6;
	}
	if (ctx->protocol == bpf_htons(ETH_P_ARP)) {
		ret = neighbour_answer_arp(ctx);
		if (ret >= 0)
			return finish(ctx, packet, ret);
		return neighbour_quiet(packet, -ret);
	}
	if (packet->flags & PACKET_HAS_ADDRESSES)
		endpoint_of_source(ctx, packet);
	return finish(ctx, packet, reason);
}
