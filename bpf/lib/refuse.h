/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Drops that the sender is told of at once: a service without backends, or a port
 * that it does not have. The packet is turned into its own answer, TCP RST or
 * ICMP port unreachable, and goes back by the way it came; so the application
 * gets its error now and not after a minute of silence.
 */
#pragma once

#include "leave.h"
#include "neighbour.h"

struct refuse_unreachable {
	struct icmphdr icmp;
	__u8 inner[48]; /* the packet's IP header and 8 bytes; IPv4: 28 */
};

/* The sum of the header that IP lends to checksums of layer 4. */
static __always_inline __s64 refuse_pseudo_sum(const struct packet *packet,
					       __u32 length, __u8 protocol)
{
	bool is_ipv6 = packet->flags & PACKET_IPV6;
	__be32 last = bpf_htonl(length + protocol);
	__s64 sum;

	if (is_ipv6) {
		sum = bpf_csum_diff(NULL, 0, (__be32 *)packet->source.w, 16, 0);
		sum = bpf_csum_diff(NULL, 0, (__be32 *)packet->destination.w,
				    16, sum);
	} else {
		sum = bpf_csum_diff(NULL, 0, (__be32 *)&packet->source.w[3], 4,
				    0);
		sum = bpf_csum_diff(
			NULL, 0, (__be32 *)&packet->destination.w[3], 4, sum);
	}
	return bpf_csum_diff(NULL, 0, &last, 4, sum);
}

/* The IP header of the answer: from where the packet went, to its sender. */
static __always_inline int refuse_write_ip(struct __sk_buff *ctx,
					   const struct packet *packet,
					   __u32 length, __u8 protocol)
{
	if (packet->flags & PACKET_IPV6) {
		struct ipv6hdr ip = {
			.version_class_label = bpf_htonl(6U << 28),
			.payload_length = bpf_htons(length),
			.next_header = protocol,
			.hop_limit = 64,
		};

		__builtin_memcpy(ip.source, packet->destination.w, 16);
		__builtin_memcpy(ip.destination, packet->source.w, 16);
		return bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &ip,
					   sizeof(ip), 0);
	}

	struct iphdr ip = {
		.version_length = 0x45,
		.total_length = bpf_htons(sizeof(ip) + length),
		.fragment = bpf_htons(0x4000), /* do not */
		.ttl = 64,
		.protocol = protocol,
		.source = packet->destination.w[3],
		.destination = packet->source.w[3],
	};

	ip.check = checksum_fold(
		bpf_csum_diff(NULL, 0, (void *)&ip, sizeof(ip), 0));
	return bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &ip, sizeof(ip), 0);
}

/* RFC 9293, 3.10.7.1: the answer to a segment for no connection. */
static __always_inline int refuse_with_reset(struct __sk_buff *ctx,
					     const struct packet *packet)
{
	struct tcphdr tcp, answer = {.offset = sizeof(tcp) / 4 << 4};
	__u32 end = packet->l4_offset + sizeof(tcp), length;

	if (bpf_skb_load_bytes(ctx, packet->l4_offset, &tcp, sizeof(tcp)) ||
	    tcp.flags & TCP_RST)
		return -DROP_NO_SERVICE_BACKEND;
	answer.source = tcp.destination;
	answer.destination = tcp.source;
	if (tcp.flags & TCP_ACK) {
		answer.sequence = tcp.acknowledgment;
		answer.flags = TCP_RST;
	} else {
		length = packet_ip_length(ctx, packet) -
			 (packet->l4_offset - ETHERNET_LENGTH) -
			 (tcp.offset >> 4) * 4;
		if (tcp.flags & (TCP_SYN | TCP_FIN))
			length++;
		answer.acknowledgment =
			bpf_htonl(bpf_ntohl(tcp.sequence) + length);
		answer.flags = TCP_RST | TCP_ACK;
	}
	answer.check = checksum_fold(bpf_csum_diff(
		NULL, 0, (void *)&answer, sizeof(answer),
		refuse_pseudo_sum(packet, sizeof(answer), IPPROTO_TCP)));
	if (bpf_skb_change_tail(ctx, end, 0) ||
	    refuse_write_ip(ctx, packet, sizeof(answer), IPPROTO_TCP) ||
	    bpf_skb_store_bytes(ctx, packet->l4_offset, &answer, sizeof(answer),
				0))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* `is_policy`: administratively prohibited, else the port is unreachable. */
static __always_inline int refuse_with_icmp(struct __sk_buff *ctx,
					    const struct packet *packet,
					    bool is_policy)
{
	bool is_ipv6 = packet->flags & PACKET_IPV6;
	/* An IP header and 8 bytes: both lengths are constants to the verifier.
	 */
	__u32 length = is_ipv6 ? 8 + 48 : 8 + 28;
	struct refuse_unreachable answer = {};
	__s64 sum = 0;

	answer.icmp.type = is_ipv6 ? ICMPV6_UNREACHABLE : ICMP_UNREACHABLE;
	if (is_policy)
		answer.icmp.code = is_ipv6 ? 1 : 13;
	else
		answer.icmp.code = is_ipv6 ? 4 : 3;
	if (is_ipv6 ? bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, answer.inner, 48)
		    : bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, answer.inner,
					 28))
		return -DROP_INVALID_PACKET;
	if (is_ipv6)
		sum = refuse_pseudo_sum(packet, length, IPPROTO_ICMPV6);
	/* What IPv4 leaves unused is zero and adds nothing. */
	answer.icmp.check = checksum_fold(
		bpf_csum_diff(NULL, 0, (void *)&answer, sizeof(answer), sum));
	if (bpf_skb_change_tail(ctx, packet->l4_offset + length, 0) ||
	    refuse_write_ip(ctx, packet, length,
			    is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return -DROP_WRITE_ERROR;
	if (is_ipv6 ? bpf_skb_store_bytes(ctx, packet->l4_offset, &answer,
					  8 + 48, 0)
		    : bpf_skb_store_bytes(ctx, packet->l4_offset, &answer,
					  8 + 28, 0))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* Back by the device that the packet came by; what is to the pod that sent it
 * goes straight into its namespace. An action of tc. */
static __always_inline int refuse_send(struct __sk_buff *ctx,
				       const struct packet *packet,
				       const __u8 from[6], const __u8 to[6])
{
	if (packet->flags & PACKET_FROM_POD)
		return neighbour_reply(ctx, from, to);
	return leave_back(ctx, from, to);
}

/* The pod is told what its policy denies it to send. */
static __always_inline bool refuse_is_rejected(const struct packet *packet,
					       int reason)
{
	struct endpoint *endpoint;

	if (reason != -DROP_POLICY_DENIED && reason != -DROP_POLICY_DENY_RULE)
		return false;
	if (packet->direction != DIRECTION_EGRESS ||
	    packet->flags & (PACKET_REPLY | PACKET_ICMP_ERROR))
		return false;
	endpoint = endpoint_by_id(packet->source_endpoint);
	return endpoint && endpoint->policy & POLICY_REJECT;
}

/* The sender knows the packet by the addresses that it wrote: those of a service,
 * where policy has judged the backend. */
static __always_inline int refuse_restore(struct __sk_buff *ctx,
					  struct packet *packet)
{
	const __u32 ip = ETHERNET_LENGTH;

	if (packet->flags & PACKET_IPV6)
		return bpf_skb_load_bytes(
			       ctx,
			       ip + __builtin_offsetof(struct ipv6hdr, source),
			       packet->source.w, 16) ||
		       bpf_skb_load_bytes(
			       ctx,
			       ip + __builtin_offsetof(struct ipv6hdr,
						       destination),
			       packet->destination.w, 16);
	return bpf_skb_load_bytes(
		       ctx, ip + __builtin_offsetof(struct iphdr, source),
		       &packet->source.w[3], 4) ||
	       bpf_skb_load_bytes(
		       ctx, ip + __builtin_offsetof(struct iphdr, destination),
		       &packet->destination.w[3], 4);
}

/* Drops a packet, and tells its sender if a service has refused it or the pod's
 * policy says so. */
__weak __noinline int refuse(struct __sk_buff *ctx, struct packet *packet,
			     int reason)
{
	bool is_policy;
	__u8 from[6], to[6];
	int ret = -1;

	if (!packet)
		return TC_ACT_SHOT;
	finish(ctx, packet, reason);
	is_policy = refuse_is_rejected(packet, reason);
	if (!is_policy && reason != -DROP_NO_SERVICE_BACKEND &&
	    reason != -DROP_IS_CLUSTER_IP)
		return TC_ACT_SHOT;
	/* Only what has no options and no fragments is worth an answer. */
	if (packet->flags & (PACKET_FRAGMENT | PACKET_LATER_FRAGMENT) ||
	    packet->l4_offset !=
		    ETHERNET_LENGTH + (packet->flags & PACKET_IPV6
					       ? sizeof(struct ipv6hdr)
					       : sizeof(struct iphdr)))
		return TC_ACT_SHOT;
	if (is_policy && refuse_restore(ctx, packet))
		return TC_ACT_SHOT;
	if (packet->protocol == IPPROTO_TCP)
		ret = refuse_with_reset(ctx, packet);
	else if (packet->protocol == IPPROTO_UDP || is_policy)
		ret = refuse_with_icmp(ctx, packet, is_policy);
	if (ret || bpf_skb_load_bytes(ctx, 0, from, 6) ||
	    bpf_skb_load_bytes(ctx, 6, to, 6))
		return TC_ACT_SHOT;
	ret = refuse_send(ctx, packet, from, to);
	return ret < 0 ? TC_ACT_SHOT : ret;
}
