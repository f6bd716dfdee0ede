/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Addresses of Services on the link: the node that leads an address answers ARP
 * and neighbour discovery for it, with the MAC address of the device that was
 * asked. The rows count only while the agent renews them.
 *
 * A leader that cannot ask the API server goes on. It yields when it hears that
 * another node announces the address: that one has the Lease now.
 */
#pragma once

#include "advertisement.h"
#include "leave.h"

/* A row that may be answered by, or that a rival may end. */
static __always_inline struct announced *
announce_find(const struct __sk_buff *ctx, const struct addr *addr)
{
	struct announced_key key = {
		.addr = *addr,
		.ifindex = ctx->ifindex,
	};

	return bpf_map_lookup_elem(&announced, &key);
}

static __always_inline bool announce_counts(const struct announced *row)
{
	struct announcing *times;
	__u32 zero = 0;

	times = bpf_map_lookup_elem(&announcing, &zero);
	return times && !row->is_yielded &&
	       bpf_ktime_get_boot_ns() < times->until_ns;
}

/* Somebody else, with this MAC address, says that the address is his. */
static __always_inline void announce_hear(struct announced *row,
					  const __u8 mac[6])
{
	struct announcing *times;
	__u32 zero = 0;

	if (!__builtin_memcmp(row->mac, mac, 6))
		return;
	times = bpf_map_lookup_elem(&announcing, &zero);
	if (!times || bpf_ktime_get_boot_ns() >= times->led_until_ns)
		row->is_yielded = 1;
}

/* Sends the frame back by the device that it came by: an action of tc. */
static __always_inline int announce_send(struct __sk_buff *ctx,
					 const __u8 from[6], const __u8 to[6])
{
	int ret = leave_back(ctx, from, to);

	return ret < 0 ? TC_ACT_SHOT : ret;
}

/* An ARP frame from the network: an action of tc, TC_ACT_OK for the stack. */
__weak __noinline int announce_arp(struct __sk_buff *ctx)
{
	struct addr addr __attribute__((aligned(8))) = {};
	struct announced *row;
	__be32 sender, target;
	struct arphdr arp;

	if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &arp, sizeof(arp)) ||
	    arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_length != 6 ||
	    arp.protocol_length != 4)
		return TC_ACT_OK;
	__builtin_memcpy(&sender, arp.sender_ip, 4);
	__builtin_memcpy(&target, arp.target_ip, 4);
	addr_from_ipv4(&addr, sender);
	row = announce_find(ctx, &addr);
	if (row)
		announce_hear(row, arp.sender_mac);
	if (arp.operation != bpf_htons(1) || sender == target)
		return TC_ACT_OK;
	addr_from_ipv4(&addr, target);
	row = announce_find(ctx, &addr);
	if (!row || !announce_counts(row))
		return TC_ACT_OK;
	arp_answer(&arp, row->mac);
	if (bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &arp, sizeof(arp), 0))
		return TC_ACT_SHOT;
	return announce_send(ctx, arp.sender_mac, arp.target_mac);
}

/*
 * A neighbour solicitation or advertisement from the network: an action of tc,
 * TC_ACT_OK for the stack. Who asks from :: asks whether the address is free: all
 * hear that it is not.
 */
__weak __noinline int announce_neighbour(struct __sk_buff *ctx,
					 struct packet *packet)
{
	struct neighbour_advertisement answer = {};
	struct addr target __attribute__((aligned(8)));
	struct announced *row;
	__u8 to[6], hops;

	if (!packet ||
	    bpf_skb_load_bytes(ctx, ETHERNET_LENGTH + 7, &hops, 1) ||
	    hops != 255 || bpf_skb_load_bytes(ctx, 6, to, 6) ||
	    bpf_skb_load_bytes(ctx, packet->l4_offset + 8, &target, 16))
		return TC_ACT_OK;
	row = announce_find(ctx, &target);
	if (!row)
		return TC_ACT_OK;
	if (packet->icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT) {
		announce_hear(row, to);
		return TC_ACT_OK;
	}
	if (!announce_counts(row))
		return TC_ACT_OK;
	__builtin_memcpy(answer.mac, row->mac, 6);
	if (addr_is_zero(&packet->source)) {
		/* All nodes: ff02::1. */
		to[0] = to[1] = 0x33;
		to[2] = to[3] = to[4] = 0;
		to[5] = 1;
		answer.ip.destination[0] = bpf_htonl(0xff020000);
		answer.ip.destination[3] = bpf_htonl(1);
		advertisement_fill(&answer, &target, ADVERTISEMENT_OVERRIDES);
	} else {
		__builtin_memcpy(answer.ip.destination, packet->source.w, 16);
		advertisement_fill(&answer, &target,
				   ADVERTISEMENT_SOLICITED |
					   ADVERTISEMENT_OVERRIDES);
	}
	if (bpf_skb_change_tail(ctx, ETHERNET_LENGTH + sizeof(answer), 0) ||
	    bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &answer, sizeof(answer),
				0))
		return TC_ACT_SHOT;
	return announce_send(ctx, answer.mac, to);
}
