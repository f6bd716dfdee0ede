/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Parses a packet, once. The family is asked here and in rewrite.h, nowhere
 * else. What nearly every packet is (TCP or UDP, no options, no fragment) is
 * read in place; the rest goes through packet_parse_slow, which is verified
 * once and copies what it reads. packet_parse_slow reads quoted packets, too.
 * Nothing here writes to the packet: a direct write anywhere in a program makes
 * the kernel copy the headers of every packet, since TCP's are shared with its
 * queue.
 */
#pragma once

#include "packet.h"

/*
 * An ICMP query has one identifier and two roles: the asker's port is the
 * identifier, the answerer's 0. Who asks is part of the flow's key, so a request
 * from either side is a flow of its own, and nobody gets a ping through as the
 * answer to one that he received. What has no identifier only asks.
 */
static __always_inline void packet_note_icmp(struct packet *packet, __u8 type,
					     __be16 id)
{
	__u32 role = icmp_role(packet->protocol, type);

	packet->icmp_type = type;
	packet->flags |= role ? role : PACKET_ASKS;
	if (role == PACKET_ASKS)
		packet->source_port = id;
	else if (role == PACKET_ANSWERS)
		packet->destination_port = id;
}

static __always_inline int packet_parse_icmp(struct __sk_buff *ctx,
					     struct packet *packet)
{
	struct icmphdr icmp;

	if (bpf_skb_load_bytes(ctx, packet->l4_offset, &icmp, sizeof(icmp)))
		return -DROP_INVALID_PACKET;
	packet->icmp_code = icmp.code;
	packet_note_icmp(packet, icmp.type, icmp.id);

	if (packet->protocol == IPPROTO_ICMP) {
		switch (icmp.type) {
		case ICMP_UNREACHABLE:
		case ICMP_TIME_EXCEEDED:
		case ICMP_PARAMETER_PROBLEM:
			packet->flags |= PACKET_ICMP_ERROR;
			return 0;
		case ICMP_REDIRECT:
			return -DROP_UNSUPPORTED_ICMP;
		}
		return 0;
	}
	if (icmp.type < ICMPV6_ECHO)
		packet->flags |= PACKET_ICMP_ERROR;
	else if ((icmp.type >= ICMPV6_MLD_QUERY &&
		  icmp.type <= ICMPV6_REDIRECT) ||
		 icmp.type == ICMPV6_MLD2_REPORT)
		packet->flags |= PACKET_CONTROL;
	return 0;
}

/*
 * The flags of TCP, and whether its header is there. A quote has the first 8
 * bytes of it for certain, and no more.
 */
static __always_inline int packet_parse_tcp(struct __sk_buff *ctx,
					    struct packet *packet)
{
	struct tcphdr tcp;

	if (packet->flags & PACKET_QUOTED)
		return 0;
	if (bpf_skb_load_bytes(ctx, packet->l4_offset, &tcp, sizeof(tcp)))
		return -DROP_INVALID_PACKET;
	packet->tcp_flags = tcp.flags;
	return 0;
}

/* A function of its own, so that the verifier does not follow it once for each
 * way there. */
__weak __noinline int packet_parse_l4(struct __sk_buff *ctx,
				      struct packet *packet)
{
	struct udphdr ports;

	if (!packet)
		return -DROP_INVALID_PACKET;
	switch (packet->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		if (bpf_skb_load_bytes(ctx, packet->l4_offset, &ports,
				       sizeof(ports)))
			return -DROP_INVALID_PACKET;
		packet->source_port = ports.source;
		packet->destination_port = ports.destination;
		return packet->protocol == IPPROTO_TCP
			       ? packet_parse_tcp(ctx, packet)
			       : 0;
	case IPPROTO_ICMP:
		/* A family's ICMP over the other one is nobody's packet. */
		if (packet->flags & PACKET_IPV6)
			return -DROP_UNKNOWN_L4;
		return packet_parse_icmp(ctx, packet);
	case IPPROTO_ICMPV6:
		if (!(packet->flags & PACKET_IPV6))
			return -DROP_UNKNOWN_L4;
		return packet_parse_icmp(ctx, packet);
	}
	/* The rest has no ports: only rules for any port can match. */
	return 0;
}

/*
 * Layer 4 of a packet that is whole or a first fragment. Neither errors nor
 * neighbour discovery may come in fragments (RFC 1122 3.2.2, RFC 6980): nobody
 * could tell what the later ones belong to.
 */
static __always_inline int packet_parse_first(struct __sk_buff *ctx,
					      struct packet *packet)
{
	int ret = packet_parse_l4(ctx, packet);

	if (ret || !(packet->flags & PACKET_FRAGMENT) ||
	    !(packet->flags & (PACKET_ICMP_ERROR | PACKET_CONTROL)))
		return ret;
	/* So that nobody takes it for neighbour discovery. */
	packet->flags &= ~PACKET_CONTROL;
	return -DROP_FRAGMENT_UNSUPPORTED;
}

/*
 * A fragment that does not begin its packet; offset in bytes. One that would
 * overwrite ports or flags of the first one is refused (RFC 1858).
 */
static __always_inline int packet_parse_later(struct packet *packet,
					      __u32 offset)
{
	if (offset < sizeof(struct tcphdr))
		return -DROP_FRAGMENT_UNSUPPORTED;
	packet->flags |= PACKET_LATER_FRAGMENT;
	return 0;
}

/* IPv4 options between two offsets: source routes are refused. */
__weak __noinline int packet_check_options(struct __sk_buff *ctx, __u32 offset,
					   __u32 end)
{
	__u8 option[2];

	for (int i = 0; i < 20; i++) {
		if (offset >= end)
			return 0;
		if (bpf_skb_load_bytes(ctx, offset, option, 2))
			return -DROP_INVALID_PACKET;
		if (option[0] == 0)
			return 0;
		if (option[0] == 1) {
			offset++;
			continue;
		}
		/* 131 and 137: the sender would choose the way. */
		if (option[0] == 131 || option[0] == 137 || option[1] < 2)
			return -DROP_INVALID_PACKET;
		offset += option[1];
	}
	return -DROP_INVALID_PACKET;
}

/* What a quote leaves out is not missed. */
static __always_inline bool packet_is_cut(struct __sk_buff *ctx,
					  const struct packet *packet,
					  __u32 end)
{
	return !(packet->flags & PACKET_QUOTED) && end > ctx->len;
}

static __always_inline int packet_parse_ipv4(struct __sk_buff *ctx,
					     struct packet *packet)
{
	__u32 start = packet->l3_offset;
	struct iphdr ip;
	__u32 length;
	__u16 fragment;
	int ret;

	if (bpf_skb_load_bytes(ctx, start, &ip, sizeof(ip)))
		return -DROP_INVALID_PACKET;
	length = (ip.version_length & 15) * 4;
	if (ip.version_length >> 4 != 4 || length < sizeof(ip))
		return -DROP_INVALID_PACKET;

	addr_from_ipv4(&packet->source, ip.source);
	addr_from_ipv4(&packet->destination, ip.destination);
	packet->protocol = ip.protocol;
	packet->flags |= PACKET_HAS_ADDRESSES;
	packet->l4_offset = start + length;
	if (bpf_ntohs(ip.total_length) < length ||
	    packet_is_cut(ctx, packet, bpf_ntohs(ip.total_length) + start))
		return -DROP_INVALID_PACKET;
	if (length > sizeof(ip)) {
		ret = packet_check_options(ctx, start + sizeof(ip),
					   start + length);
		if (ret)
			return ret;
	}

	packet->fragment_id = ip.id;
	fragment = bpf_ntohs(ip.fragment);
	if (fragment & IP_FRAGMENT_OFFSET)
		return packet_parse_later(
			packet, (fragment & IP_FRAGMENT_OFFSET) * 8);
	if (fragment & IP_MORE_FRAGMENTS)
		packet->flags |= PACKET_FRAGMENT;
	return packet_parse_first(ctx, packet);
}

/* The first eight bytes of an extension header. */
struct ipv6_extension {
	__u8 next_header;
	__u8 length;
	__be16 fragment; /* of a routing header: type, segments left */
	__be32 id;
};

static __always_inline bool is_extension_header(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING ||
	       next == IPPROTO_DSTOPTS || next == IPPROTO_FRAGMENT;
}

/* A fragment header: 0, or a drop. */
static __always_inline int
packet_parse_fragment(struct packet *packet,
		      const struct ipv6_extension *extension)
{
	__u16 fragment = bpf_ntohs(extension->fragment);

	/* Fragments are not fragmented again. */
	if (packet->flags & PACKET_FRAGMENT)
		return -DROP_INVALID_EXTENSION_HEADER;
	packet->fragment_id = extension->id;
	if (fragment & 0xfff8)
		return packet_parse_later(packet, fragment & 0xfff8);
	if (fragment & 1)
		packet->flags |= PACKET_FRAGMENT;
	return 0;
}

/* At most six extension headers, RFC 8200's order not enforced. */
static __always_inline int packet_parse_ipv6(struct __sk_buff *ctx,
					     struct packet *packet)
{
	__u32 offset = packet->l3_offset + sizeof(struct ipv6hdr);
	struct ipv6_extension extension;
	struct ipv6hdr ip;
	__u8 next;
	int ret;

	packet->flags |= PACKET_IPV6;
	if (bpf_skb_load_bytes(ctx, packet->l3_offset, &ip, sizeof(ip)))
		return -DROP_INVALID_PACKET;
	if ((bpf_ntohl(ip.version_class_label) >> 28) != 6)
		return -DROP_INVALID_PACKET;

	addr_from_ipv6(&packet->source, ip.source);
	addr_from_ipv6(&packet->destination, ip.destination);
	packet->flags |= PACKET_HAS_ADDRESSES;
	/* ::ffff:a.b.c.d on the wire would be taken for the IPv4 address. */
	if (addr_is_ipv4(&packet->source) || addr_is_ipv4(&packet->destination))
		return -DROP_INVALID_PACKET;
	if (packet_is_cut(ctx, packet, bpf_ntohs(ip.payload_length) + offset))
		return -DROP_INVALID_PACKET;

	next = ip.next_header;
	/* Counted: older verifiers refuse a loop entered in its middle. */
	for (int i = 0; i < 6 && is_extension_header(next); i++) {
		if (bpf_skb_load_bytes(ctx, offset, &extension, 8))
			return -DROP_INVALID_EXTENSION_HEADER;
		/* Not at its destination yet: the sender chose the way. */
		if (next == IPPROTO_ROUTING &&
		    extension.fragment & bpf_htons(0xff))
			return -DROP_INVALID_EXTENSION_HEADER;
		if (next == IPPROTO_FRAGMENT) {
			packet->protocol = extension.next_header;
			packet->l4_offset = offset + 8;
			ret = packet_parse_fragment(packet, &extension);
			if (ret || packet->flags & PACKET_LATER_FRAGMENT)
				return ret;
			offset += 8;
		} else {
			offset += 8 + extension.length * 8;
		}
		next = extension.next_header;
	}
	if (is_extension_header(next))
		return -DROP_INVALID_EXTENSION_HEADER;
	packet->protocol = next;
	packet->l4_offset = offset;
	return packet_parse_first(ctx, packet);
}

/*
 * Of any packet, whole or quoted, at l3_offset: 0 or a drop. A quote has the
 * family of the packet that it is in. Ports of a later fragment are 0 until
 * fragment_find() knows them.
 */
__weak __noinline int packet_parse_slow(struct __sk_buff *ctx,
					struct packet *packet)
{
	if (!packet)
		return -DROP_INVALID_PACKET;
	packet->source_port = 0;
	packet->destination_port = 0;
	switch (bpf_ntohs(ctx->protocol)) {
	case ETH_P_IP:
		return packet_parse_ipv4(ctx, packet);
	case ETH_P_IPV6:
		return packet_parse_ipv6(ctx, packet);
	}
	return -DROP_UNSUPPORTED_L3;
}

/* A plain packet's ends; nobody takes its address, so it is never in memory. */
struct packet_tuple {
	__u64 source[2]; /* words of the address */
	__u64 destination[2];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 tcp_flags;
	bool is_ipv6;
};

/* False if the packet is anything but whole TCP or UDP without options. */
static __always_inline bool packet_parse_plain(void *data, void *end,
					       struct packet_tuple *tuple)
{
	struct ethhdr *ethernet = data;
	struct tcphdr *l4;

	if (data + ETHERNET_LENGTH + sizeof(struct iphdr) +
		    sizeof(struct udphdr) >
	    end)
		return false;
	if (ethernet->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETHERNET_LENGTH;

		if (ip->version_length != 0x45 ||
		    ip->fragment &
			    bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
			return false;
		tuple->is_ipv6 = false;
		tuple->source[0] = 0;
		tuple->destination[0] = 0;
		tuple->source[1] = addr_low_word_of_ipv4(ip->source);
		tuple->destination[1] = addr_low_word_of_ipv4(ip->destination);
		tuple->protocol = ip->protocol;
		l4 = (void *)(ip + 1);
	} else if (ethernet->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETHERNET_LENGTH;

		if ((void *)(ip + 1) + sizeof(struct udphdr) > end ||
		    (ip->version_class_label & bpf_htonl(0xf0000000)) !=
			    bpf_htonl(0x60000000))
			return false;
		tuple->is_ipv6 = true;
		__builtin_memcpy(tuple->source, ip->source, 16);
		__builtin_memcpy(tuple->destination, ip->destination, 16);
		if (addr_words_are_ipv4(tuple->source) ||
		    addr_words_are_ipv4(tuple->destination))
			return false;
		tuple->protocol = ip->next_header;
		l4 = (void *)(ip + 1);
	} else {
		return false;
	}
	tuple->tcp_flags = 0;
	if (tuple->protocol == IPPROTO_TCP) {
		if ((void *)(l4 + 1) > end)
			return false;
		tuple->tcp_flags = l4->flags;
	} else if (tuple->protocol != IPPROTO_UDP) {
		return false;
	}
	tuple->source_port = l4->source;
	tuple->destination_port = l4->destination;
	return true;
}

/* So much of a packet is the kernel's own memory before it is parsed. */
#define PACKET_HEADERS_MAX 256

static __always_inline bool packet_is_linear(const struct __sk_buff *ctx,
					     __u32 length)
{
	return (void *)(long)ctx->data_end - (void *)(long)ctx->data >= length;
}

/*
 * What is judged must be what goes on. A pod can still write pages that it has
 * sent without a copy (AF_PACKET's ring, splice): the headers are copied into
 * the packet's linear part, which is the kernel's own, before they are read.
 */
static __always_inline int packet_parse_copied(struct __sk_buff *ctx,
					       struct packet *packet)
{
	__u32 length = ctx->len < PACKET_HEADERS_MAX ? ctx->len
						     : PACKET_HEADERS_MAX;
	int ret;

	if (!packet_is_linear(ctx, length) && bpf_skb_pull_data(ctx, length))
		return -DROP_WRITE_ERROR;
	ret = packet_parse_slow(ctx, packet);
	if (ret)
		return ret;
	return packet->l4_offset + sizeof(struct tcphdr) > PACKET_HEADERS_MAX &&
			       !packet_is_linear(ctx, ctx->len)
		       ? -DROP_INVALID_EXTENSION_HEADER
		       : 0;
}

/* Fills what the frame says; 0 or a drop. The caller has called packet_begin.
 */
static __always_inline int packet_parse(struct __sk_buff *ctx,
					struct packet *packet)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	addr_words *source = (void *)&packet->source;
	addr_words *destination = (void *)&packet->destination;
	struct packet_tuple tuple;

	packet->bytes = ctx->len;
	packet->l3_offset = ETHERNET_LENGTH;
	if (!packet_parse_plain(data, end, &tuple))
		return packet_parse_copied(ctx, packet);
	source[0] = tuple.source[0];
	source[1] = tuple.source[1];
	destination[0] = tuple.destination[0];
	destination[1] = tuple.destination[1];
	packet->source_port = tuple.source_port;
	packet->destination_port = tuple.destination_port;
	packet->protocol = tuple.protocol;
	packet->tcp_flags = tuple.tcp_flags;
	packet->l4_offset =
		ETHERNET_LENGTH + (tuple.is_ipv6 ? sizeof(struct ipv6hdr)
						 : sizeof(struct iphdr));
	packet->flags |= PACKET_HAS_ADDRESSES;
	if (tuple.is_ipv6)
		packet->flags |= PACKET_IPV6;
	return 0;
}
