/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Answers of ARP (RFC 826) and neighbour advertisements of IPv6 (RFC 4861, 4.4):
 * which MAC address an address has on the link.
 */
#pragma once

#include "packet.h"

/* Makes an answer of an ARP request: the target has this MAC address. */
static __always_inline void arp_answer(struct arphdr *arp, const __u8 mac[6])
{
	__u8 target[4];

	__builtin_memcpy(target, arp->target_ip, 4);
	arp->operation = bpf_htons(2);
	__builtin_memcpy(arp->target_mac, arp->sender_mac, 6);
	__builtin_memcpy(arp->target_ip, arp->sender_ip, 4);
	__builtin_memcpy(arp->sender_mac, mac, 6);
	__builtin_memcpy(arp->sender_ip, target, 4);
}

enum advertisement_flags {
	ADVERTISEMENT_SOLICITED = 0x40000000,
	ADVERTISEMENT_OVERRIDES = 0x20000000,
};

struct neighbour_advertisement {
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 flags;
	__be32 target[4];
	__u8 option;
	__u8 option_length;
	__u8 mac[6];
};

static __always_inline __sum16 checksum_fold(__s64 sum)
{
	__u32 folded = sum;

	folded = (folded & 0xffff) + (folded >> 16);
	folded = (folded & 0xffff) + (folded >> 16);
	return ~folded;
}

/* Fills what is left of an advertisement that is zero but for its destination and
 * MAC address. The address itself is the source. */
static __always_inline void
advertisement_fill(struct neighbour_advertisement *answer,
		   const struct addr *target, __u32 flags)
{
	__be32 length = bpf_htonl(32 + IPPROTO_ICMPV6);
	__s64 sum;

	answer->ip.version_class_label = bpf_htonl(6U << 28);
	answer->ip.payload_length = bpf_htons(32);
	answer->ip.next_header = IPPROTO_ICMPV6;
	answer->ip.hop_limit = 255;
	__builtin_memcpy(answer->ip.source, target, 16);
	answer->type = ICMPV6_NEIGHBOUR_ADVERTISEMENT;
	answer->flags = bpf_htonl(flags);
	__builtin_memcpy(answer->target, target, 16);
	answer->option = 2;
	answer->option_length = 1;
	sum = bpf_csum_diff(NULL, 0, answer->ip.source, 32, 0);
	sum = bpf_csum_diff(NULL, 0, &length, 4, sum);
	sum = bpf_csum_diff(NULL, 0, (void *)&answer->type, 32, sum);
	answer->check = checksum_fold(sum);
}
