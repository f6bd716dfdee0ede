/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Addresses and ports of a packet, written by helpers only (packet.h says why),
 * with every checksum that covers them kept right. The second place, beside
 * packet.h, that asks for the family.
 */
#pragma once

#include "sctp.h"

enum rewrite_end {
	REWRITE_SOURCE = 0,
	REWRITE_DESTINATION = 1,
};

/* Where the checksum of layer 4 is, from the frame's start; 0: has none. */
static __always_inline __u32
rewrite_checksum_offset(const struct packet *packet)
{
	switch (packet->protocol) {
	case IPPROTO_TCP:
		return packet->l4_offset +
		       __builtin_offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
		return packet->l4_offset +
		       __builtin_offsetof(struct udphdr, check);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return packet->l4_offset +
		       __builtin_offsetof(struct icmphdr, check);
	}
	return 0;
}

/* ICMP over IPv4 is the only checksum that leaves the addresses out. */
static __always_inline int rewrite_address(struct __sk_buff *ctx,
					   const struct packet *packet,
					   const struct addr *to, __u32 end)
{
	__u32 checksum = rewrite_checksum_offset(packet);
	/* A UDP checksum of 0 means: none; it stays none. */
	__u64 mangled =
		packet->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	struct addr old = {};
	__u32 offset;
	__s64 difference;

	if (packet->flags & PACKET_LATER_FRAGMENT)
		checksum = 0;
	if (!(packet->flags & PACKET_IPV6)) {
		offset = ETHERNET_LENGTH +
			 (end ? __builtin_offsetof(struct iphdr, destination)
			      : __builtin_offsetof(struct iphdr, source));
		if (bpf_skb_load_bytes(ctx, offset, &old.w[3], 4) ||
		    bpf_skb_store_bytes(ctx, offset, &to->w[3], 4, 0) ||
		    bpf_l3_csum_replace(
			    ctx,
			    ETHERNET_LENGTH +
				    __builtin_offsetof(struct iphdr, check),
			    old.w[3], to->w[3], 4))
			return -DROP_WRITE_ERROR;
		if (checksum && packet->protocol != IPPROTO_ICMP &&
		    bpf_l4_csum_replace(ctx, checksum, old.w[3], to->w[3],
					BPF_F_PSEUDO_HDR | mangled | 4))
			return -DROP_WRITE_ERROR;
		return 0;
	}

	offset = ETHERNET_LENGTH +
		 (end ? __builtin_offsetof(struct ipv6hdr, destination)
		      : __builtin_offsetof(struct ipv6hdr, source));
	if (bpf_skb_load_bytes(ctx, offset, &old, 16) ||
	    bpf_skb_store_bytes(ctx, offset, to, 16, 0))
		return -DROP_WRITE_ERROR;
	difference = bpf_csum_diff(old.w, 16, (__be32 *)to->w, 16, 0);
	if (!checksum)
		return 0;
	/*
	 * With a checksum of the whole packet from the device, the change of
	 * the address and that of the checksum cancel out; kernels that know so
	 * want to be told that it is IPv6, the others refuse the flag.
	 */
	if (bpf_l4_csum_replace(ctx, checksum, 0, difference,
				BPF_F_PSEUDO_HDR | BPF_F_IPV6 | mangled) &&
	    bpf_l4_csum_replace(ctx, checksum, 0, difference,
				BPF_F_PSEUDO_HDR | mangled))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* The identifier of an ICMP query is the asker's port. 0 or a drop. */
static __always_inline int rewrite_port(struct __sk_buff *ctx,
					const struct packet *packet, __be16 to,
					__u32 end)
{
	__u32 checksum = rewrite_checksum_offset(packet);
	__u32 offset = packet->l4_offset + (end ? 2 : 0);
	__u64 mangled =
		packet->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__be16 old = 0;

	if (packet->flags & PACKET_LATER_FRAGMENT)
		return 0;
	if (packet->protocol == IPPROTO_ICMP ||
	    packet->protocol == IPPROTO_ICMPV6)
		offset = packet->l4_offset +
			 __builtin_offsetof(struct icmphdr, id);
	if (bpf_skb_load_bytes(ctx, offset, &old, 2))
		return -DROP_WRITE_ERROR;
	if (old == to)
		return 0;
	if (packet->protocol == IPPROTO_SCTP)
		return sctp_mend(ctx, packet, end ? 2 : 0, old ^ to) ||
				       bpf_skb_store_bytes(ctx, offset, &to, 2,
							   0)
			       ? -DROP_WRITE_ERROR
			       : 0;
	if (!checksum || bpf_skb_store_bytes(ctx, offset, &to, 2, 0) ||
	    bpf_l4_csum_replace(ctx, checksum, old, to, mangled | 2))
		return -DROP_WRITE_ERROR;
	return 0;
}

static __always_inline bool rewrite_has_port(const struct packet *packet,
					     __u32 end)
{
	switch (packet->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		return true;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return icmp_role(packet->protocol, packet->icmp_type) ==
		       (end ? PACKET_ANSWERS : PACKET_ASKS);
	}
	return false;
}

/* Writes what translation has changed in `packet` into the frame. */
__weak __noinline int rewrite_apply(struct __sk_buff *ctx,
				    struct packet *packet)
{
	int ret = 0;

	if (!packet)
		return -DROP_WRITE_ERROR;
	if (packet->flags & PACKET_NEW_SOURCE) {
		ret = rewrite_address(ctx, packet, &packet->source,
				      REWRITE_SOURCE);
		if (!ret && rewrite_has_port(packet, REWRITE_SOURCE))
			ret = rewrite_port(ctx, packet, packet->source_port,
					   REWRITE_SOURCE);
	}
	if (!ret && packet->flags & PACKET_NEW_DESTINATION) {
		ret = rewrite_address(ctx, packet, &packet->destination,
				      REWRITE_DESTINATION);
		if (!ret && rewrite_has_port(packet, REWRITE_DESTINATION))
			ret = rewrite_port(ctx, packet,
					   packet->destination_port,
					   REWRITE_DESTINATION);
	}
	return ret;
}
