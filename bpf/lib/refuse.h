/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Drops that the sender is told of at once: a service without backends, a port
 * that it does not have, and of what passes this node between a client and a
 * backend, packets that are too long for their way or at their last hop. The
 * packet is turned into its own answer, TCP RST or an ICMP error, and goes back
 * by the way it came; so the application gets its error now and not after a
 * minute of silence.
 */
#pragma once

#include "forward.h"
#include "leave.h"
#include "neighbour.h"

/* The packet's IP header and 8 bytes; with IPv6 the header of a fragment, too. */
struct refuse_error {
	struct icmphdr icmp;
	__u8 inner[56];
};

#define REFUSE_FRAGMENT_LENGTH 8

/* More than there is before the header of layer 4. */
#define REFUSE_CUT 64

/* Where the IP header of the answer ends. */
static __always_inline __u32 refuse_offset(const struct packet *packet)
{
	return ETHERNET_LENGTH + (packet->flags & PACKET_IPV6
					  ? sizeof(struct ipv6hdr)
					  : sizeof(struct iphdr));
}

/*
 * Makes the frame so long. Its front is cut off and written anew: by that the
 * kernel forgets a checksum that is still to be written (of merged packets, and
 * of those that never saw a wire), which would get into the answer.
 */
static __always_inline long refuse_resize(struct __sk_buff *ctx, __u32 length)
{
	return bpf_skb_change_tail(ctx, length + REFUSE_CUT, 0) ||
	       bpf_skb_adjust_room(ctx, -REFUSE_CUT, BPF_ADJ_ROOM_MAC, 0);
}

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
	if (refuse_resize(ctx, end) ||
	    refuse_write_ip(ctx, packet, sizeof(answer), IPPROTO_TCP) ||
	    bpf_skb_store_bytes(ctx, packet->l4_offset, &answer, sizeof(answer),
				0))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* What the sender is told: RFC 792, 1191, 1812, 4443. */
static __always_inline void refuse_fill(const struct packet *packet, int reason,
					struct icmphdr *icmp)
{
	bool is_ipv6 = packet->flags & PACKET_IPV6;

	icmp->type = is_ipv6 ? ICMPV6_UNREACHABLE : ICMP_UNREACHABLE;
	switch (reason) {
	case -DROP_FRAGMENT_UNSUPPORTED:
		if (is_ipv6)
			icmp->type = ICMPV6_PACKET_TOO_BIG;
		else
			icmp->code = 4; /* it may not be cut */
		icmp->sequence = bpf_htons(packet->mtu);
		break;
	case -DROP_TTL_EXCEEDED:
		icmp->type = is_ipv6 ? ICMPV6_TIME_EXCEEDED
				     : ICMP_TIME_EXCEEDED;
		break;
	case -DROP_POLICY_DENIED:
	case -DROP_POLICY_DENY_RULE:
		icmp->code = is_ipv6 ? 1 : 13; /* prohibited */
		break;
	default:
		icmp->code = is_ipv6 ? 4 : 3; /* there is no such port */
	}
}

static __always_inline int refuse_with_icmp(struct __sk_buff *ctx,
					    const struct packet *packet,
					    int reason)
{
	bool is_ipv6 = packet->flags & PACKET_IPV6;
	__u32 at = refuse_offset(packet);
	struct refuse_error answer = {};
	__u32 length = sizeof(answer);
	__s64 sum = 0;

	refuse_fill(packet, reason, &answer.icmp);
	/* All lengths are constants to the verifier. */
	if (!is_ipv6) {
		length = sizeof(answer.icmp) + 28;
		if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, answer.inner, 28))
			return -DROP_INVALID_PACKET;
	} else if (packet->flags & PACKET_FRAGMENT) {
		if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, answer.inner, 56))
			return -DROP_INVALID_PACKET;
	} else {
		length -= REFUSE_FRAGMENT_LENGTH;
		if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, answer.inner, 48))
			return -DROP_INVALID_PACKET;
	}
	if (is_ipv6)
		sum = refuse_pseudo_sum(packet, length, IPPROTO_ICMPV6);
	/* What is left unused is zero and adds nothing. */
	answer.icmp.check = checksum_fold(
		bpf_csum_diff(NULL, 0, (void *)&answer, sizeof(answer), sum));
	/* All of it is written, and what is too much is cut off. */
	if (refuse_resize(ctx, at + sizeof(answer)) ||
	    refuse_write_ip(ctx, packet, length,
			    is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) ||
	    bpf_skb_store_bytes(ctx, at, &answer, sizeof(answer), 0) ||
	    bpf_skb_change_tail(ctx, at + length, 0))
		return -DROP_WRITE_ERROR;
	return 0;
}

/*
 * Back by the device that the packet came by; what is to the pod that sent it
 * goes straight into its namespace, and what a backend elsewhere has sent by the
 * tunnel, where it is the node's. An action of tc, or a drop.
 */
static __always_inline int refuse_send(struct __sk_buff *ctx,
				       const struct packet *packet,
				       const __u8 from[6], const __u8 to[6])
{
	struct address *address;
	int ret;

	if (packet->flags & PACKET_FROM_POD)
		return neighbour_reply(ctx, from, to);
	if (packet->flags & PACKET_FROM_OVERLAY) {
		address = address_find(&packet->source);
		if (!address || addr_is_zero(&address->node))
			return -DROP_NO_TUNNEL_ENDPOINT;
		ret = forward_set_tunnel_key(ctx, &address->node,
					     IDENTITY_REMOTE_NODE);
		if (ret)
			return ret;
	}
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

/*
 * What passes by is as its sender wrote it, and he may send it shorter or
 * further. An egress gateway's packets are not: it is the stack's.
 */
static __always_inline bool refuse_is_of_way(const struct packet *packet,
					     int reason)
{
	if (!packet_passes_by(packet) || packet->choice == CHOICE_GATEWAY ||
	    packet->flags & PACKET_ICMP_ERROR)
		return false;
	return reason == -DROP_TTL_EXCEEDED ||
	       (reason == -DROP_FRAGMENT_UNSUPPORTED && packet->mtu);
}

/* Only what has no options is worth an answer; of fragments the first one, and
 * only what is about its way. */
static __always_inline bool refuse_is_plain(const struct packet *packet,
					    bool is_of_way)
{
	__u32 offset = refuse_offset(packet);

	if (packet->flags & PACKET_LATER_FRAGMENT)
		return false;
	if (packet->flags & PACKET_FRAGMENT) {
		if (!is_of_way)
			return false;
		if (packet->flags & PACKET_IPV6)
			offset += REFUSE_FRAGMENT_LENGTH;
	}
	return packet->l4_offset == offset;
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

/* Drops a packet, and tells its sender if a service has refused it, its way does
 * or the pod's policy says so. */
__weak __noinline int refuse(struct __sk_buff *ctx, struct packet *packet,
			     int reason)
{
	bool is_policy, is_of_way;
	__u8 from[6], to[6];
	int ret = -1;

	if (!packet)
		return TC_ACT_SHOT;
	finish(ctx, packet, reason);
	is_policy = refuse_is_rejected(packet, reason);
	is_of_way = refuse_is_of_way(packet, reason);
	if (!is_policy && !is_of_way && reason != -DROP_NO_SERVICE_BACKEND &&
	    reason != -DROP_IS_CLUSTER_IP)
		return TC_ACT_SHOT;
	if (!refuse_is_plain(packet, is_of_way))
		return TC_ACT_SHOT;
	if ((is_policy || is_of_way) && refuse_restore(ctx, packet))
		return TC_ACT_SHOT;
	if (packet->protocol == IPPROTO_TCP && !is_of_way)
		ret = refuse_with_reset(ctx, packet);
	else if (packet->protocol == IPPROTO_UDP || is_policy || is_of_way)
		ret = refuse_with_icmp(ctx, packet, reason);
	if (ret || bpf_skb_load_bytes(ctx, 0, from, 6) ||
	    bpf_skb_load_bytes(ctx, 6, to, 6))
		return TC_ACT_SHOT;
	ret = refuse_send(ctx, packet, from, to);
	return ret < 0 ? TC_ACT_SHOT : ret;
}
