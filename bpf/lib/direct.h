/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * DSR: a backend of another node gets the packet with the client's address, and
 * its node answers the client itself. An option behind the IP header, in the
 * tunnel or without one, says which frontend the client has asked: of a TCP
 * connection the SYN has it, of other flows each packet. Kernels skip it.
 */
#pragma once

#include "service.h"

#include "rewrite.h"

enum direct_option {
	DIRECT_IPV4 = 0x9a, /* copied, control, 26 */
	DIRECT_IPV6 = 0x1b, /* skipped if not known, does not change */
};

struct direct_ipv4 {
	__u8 type;
	__u8 length;
	__be16 port;
	__be32 addr;
};

/* A header of destination options with one option. */
struct direct_ipv6 {
	__u8 next_header;
	__u8 length; /* in 8 bytes, beyond the first 8 */
	__u8 type;
	__u8 option_length;
	__be16 port;
	__u8 pad[2];
	__be32 addr[4];
};
_Static_assert(sizeof(struct direct_ipv4) == 8 &&
		       sizeof(struct direct_ipv6) == 24,
	       "as on the wire");

static __always_inline bool direct_needs_option(const struct packet *packet)
{
	if (packet->flags & (PACKET_LATER_FRAGMENT | PACKET_ICMP_ERROR))
		return false;
	return packet->protocol != IPPROTO_TCP || packet->tcp_flags & TCP_SYN;
}

/* What naming the frontend adds to a packet. */
static __always_inline __u32 direct_length(const struct packet *packet)
{
	if (!direct_needs_option(packet))
		return 0;
	return packet->flags & PACKET_IPV6 ? sizeof(struct direct_ipv6)
					   : sizeof(struct direct_ipv4);
}

static __always_inline __sum16 direct_fold(__s64 sum)
{
	__u32 folded = sum;

	folded = (folded & 0xffff) + (folded >> 16);
	folded = (folded & 0xffff) + (folded >> 16);
	return ~folded;
}

static __always_inline int direct_write_ipv4(struct __sk_buff *ctx,
					     const struct packet *packet)
{
	struct {
		struct iphdr ip;
		struct direct_ipv4 option;
	} header = {};

	if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &header.ip,
			       sizeof(header.ip)) ||
	    header.ip.version_length != 0x45 ||
	    bpf_skb_adjust_room(ctx, sizeof(header.option), BPF_ADJ_ROOM_NET,
				BPF_F_ADJ_ROOM_FIXED_GSO))
		return -DROP_WRITE_ERROR;
	header.option.type = DIRECT_IPV4;
	header.option.length = sizeof(header.option);
	header.option.port = packet->service_port;
	header.option.addr = packet->service.w[3];
	header.ip.version_length = 0x47;
	header.ip.total_length = bpf_htons(bpf_ntohs(header.ip.total_length) +
					   sizeof(header.option));
	header.ip.check = 0;
	header.ip.check = direct_fold(bpf_csum_diff(
		NULL, 0, (void *)&header, sizeof(header), 0));
	return bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &header,
				   sizeof(header), 0)
		       ? -DROP_WRITE_ERROR
		       : 0;
}

static __always_inline int direct_write_ipv6(struct __sk_buff *ctx,
					     const struct packet *packet)
{
	struct direct_ipv6 option = {
		.length = sizeof(option) / 8 - 1,
		.type = DIRECT_IPV6,
		.option_length = sizeof(option) - 4,
		.port = packet->service_port,
	};
	struct ipv6hdr ip;

	if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &ip, sizeof(ip)) ||
	    bpf_skb_adjust_room(ctx, sizeof(option), BPF_ADJ_ROOM_NET,
				BPF_F_ADJ_ROOM_FIXED_GSO))
		return -DROP_WRITE_ERROR;
	__builtin_memcpy(option.addr, packet->service.w, 16);
	option.next_header = ip.next_header;
	ip.next_header = IPPROTO_DSTOPTS;
	ip.payload_length =
		bpf_htons(bpf_ntohs(ip.payload_length) + sizeof(option));
	return bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &ip, sizeof(ip), 0) ||
			       bpf_skb_store_bytes(
				       ctx, ETHERNET_LENGTH + sizeof(ip),
				       &option, sizeof(option), 0)
		       ? -DROP_WRITE_ERROR
		       : 0;
}

/* Names the frontend in a packet that has its backend: 0 or a drop. */
__weak __noinline int direct_write(struct __sk_buff *ctx, struct packet *packet)
{
	bool is_ipv6;
	int ret;

	if (!packet)
		return -DROP_WRITE_ERROR;
	if (!direct_needs_option(packet))
		return 0;
	is_ipv6 = packet->flags & PACKET_IPV6;
	ret = is_ipv6 ? direct_write_ipv6(ctx, packet)
		      : direct_write_ipv4(ctx, packet);
	packet->l4_offset += is_ipv6 ? sizeof(struct direct_ipv6)
				     : sizeof(struct direct_ipv4);
	return ret;
}

/*
 * The frontend that an option names, if it is one: nobody else's address may
 * become the source of a pod's answers.
 */
__weak __noinline int direct_read(struct __sk_buff *ctx, struct packet *packet)
{
	struct direct_ipv6 six;
	struct direct_ipv4 four;
	struct service service;
	struct addr addr __attribute__((aligned(8)));
	__be16 port;

	if (!packet || !direct_needs_option(packet))
		return 0;
	if (packet->flags & PACKET_IPV6) {
		if (bpf_skb_load_bytes(ctx,
				       ETHERNET_LENGTH + sizeof(struct ipv6hdr),
				       &six, sizeof(six)) ||
		    six.type != DIRECT_IPV6 ||
		    six.length != sizeof(six) / 8 - 1 ||
		    six.option_length != sizeof(six) - 4)
			return 0;
		addr_from_ipv6(&addr, six.addr);
		port = six.port;
	} else {
		if (bpf_skb_load_bytes(ctx,
				       ETHERNET_LENGTH + sizeof(struct iphdr),
				       &four, sizeof(four)) ||
		    four.type != DIRECT_IPV4 || four.length != sizeof(four))
			return 0;
		addr_from_ipv4(&addr, four.addr);
		port = four.port;
	}
	if (!service_find(&addr, port, packet->protocol, SCOPE_EXTERNAL,
			  &service) &&
	    !service_find(&addr, port, packet->protocol, SCOPE_INTERNAL,
			  &service))
		return 0;
	packet->service = addr;
	packet->service_port = port;
	packet->flags |= PACKET_HAS_SERVICE | PACKET_DIRECT;
	return 0;
}

/* The packet has something between its IP header and layer 4. */
static __always_inline bool direct_may_have_option(const struct packet *packet)
{
	return packet->l4_offset >
	       ETHERNET_LENGTH + (packet->flags & PACKET_IPV6
					  ? sizeof(struct ipv6hdr)
					  : sizeof(struct iphdr));
}
