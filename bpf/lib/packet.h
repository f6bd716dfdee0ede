/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A packet as the programs know it, once it is parsed (parse.h). */
#pragma once

#include "../config.h"
#include "../maps.h"
#include "addr.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETHERNET_LENGTH ((__u32)sizeof(struct ethhdr))

enum packet_flags {
	PACKET_IPV6 = 1 << 0,
	PACKET_HAS_ADDRESSES = 1 << 1,	/* parsing came that far */
	PACKET_FRAGMENT = 1 << 2,	/* the first one of several */
	PACKET_LATER_FRAGMENT = 1 << 3, /* no header of layer 4 in it */
	PACKET_ICMP_ERROR = 1 << 4,	/* ports are 0; see icmp.h */
	PACKET_CONTROL = 1 << 5,	/* neighbour discovery and MLD */
	PACKET_FROM_HOST = 1 << 6,	/* sent by this node's own stack */
	PACKET_FROM_POD = 1 << 7, /* source and source_endpoint are checked */
	PACKET_FROM_OVERLAY = 1 << 8,
	PACKET_REPLY = 1 << 9,	      /* sent by the flow's responder */
	PACKET_HAS_SERVICE = 1 << 10, /* service and service_port are set */
	PACKET_AT_SOCKET = 1 << 11,   /* translated by the socket hook */
	PACKET_LOOPBACK = 1 << 12,    /* a pod to itself through its service */
	PACKET_NEW_SOURCE =
		1 << 13, /* source differs from what is in the frame */
	PACKET_NEW_DESTINATION = 1 << 14,
	PACKET_BEGINS = 1 << 15,  /* no flow of this name runs */
	PACKET_CLASHES = 1 << 16, /* a translated flow has its name on the way */
	PACKET_ASKS = 1 << 18,    /* ICMP: anything but an answer or an error */
	PACKET_ANSWERS = 1 << 19, /* ICMP: to one that asks */
	PACKET_REPLACES = 1 << 17, /* the flow that it begins has the key of one that is over */
	PACKET_FROM_STACK = 1 << 20, /* to_pod: the node's stack sends it */
	PACKET_FORWARDED = 1 << 21,  /* to_pod: it came to the stack by a device */
	PACKET_QUOTED = 1 << 22,     /* an ICMP error quotes it: its end is missing */
	PACKET_DIRECT = 1 << 23,     /* another node sends it on; an option says the frontend */
	PACKET_STRANGER = 1 << 24,   /* no row of `addresses` names the initiator's pod */
	PACKET_TO_PROXY = 1 << 25,   /* its flow is the proxy's (proxy.h) */
	PACKET_TELL_PROXY = 1 << 26, /* and has a new verdict */
	PACKET_FROM_PROXY = 1 << 27, /* the proxy has sent it for the other end */
	PACKET_BY_GATEWAY = 1 << 28, /* by the tunnel: between a pod and its egress gateway */
	PACKET_CLOSED = 1 << 29,     /* to the world, of a pod whose egress rules are not in force */
};

/* Of a packet from the network: what it has to do with a service. */
enum packet_choice {
	CHOICE_NONE = 0,
	CHOICE_HOST_PORT = 1, /* there is nothing to choose */
	CHOICE_KNOWN = 2,     /* its flow has a backend here */
	CHOICE_NEW = 3,	      /* its flow gets a backend with this packet */
	CHOICE_AWAY = 4,      /* it goes to a backend elsewhere, from the node's address */
	CHOICE_ANSWER = 5,    /* it comes from there, and goes to the client */
	CHOICE_NODE = 6,      /* its backend is this node itself */
	CHOICE_DIRECT = 7,    /* it goes to a backend elsewhere, which answers itself */
	CHOICE_REFUSED = 8,   /* there is nobody to choose, and the client is told */
	CHOICE_GATEWAY = 9,   /* of a pod elsewhere whose egress gateway this node is */
};

struct packet {
	struct addr source;
	struct addr destination;
	struct addr service; /* the address that the sender used */
	__u32 source_identity;
	__u32 destination_identity;
	__u32 rule_id;
	__u32 bytes;
	__u32 flags;	   /* enum packet_flags */
	__u32 fragment_id; /* as in the frame; see fragment.h */
	__u32 mtu; /* of its way, if that is what it is dropped for */
	__be16 source_port;
	__be16 destination_port;
	__be16 service_port;
	__be16 own_port; /* the source port before translation; 0: the same */
	__u16 source_endpoint;
	__u16 destination_endpoint;
	__u16 l3_offset; /* from the start of the frame, as the next one */
	__u16 l4_offset;
	__u8 protocol;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 direction;
	__u8 route;	   /* enum route, of the destination */
	__u8 source_route; /* enum route, back to the source */
	__u8 choice;	   /* enum packet_choice */
} __attribute__((aligned(8)));

/* It passes this node, from a client to a backend elsewhere or back, or between
 * a pod elsewhere and the world. */
static __always_inline bool packet_passes_by(const struct packet *packet)
{
	return packet->choice == CHOICE_AWAY ||
	       packet->choice == CHOICE_ANSWER ||
	       packet->choice == CHOICE_DIRECT ||
	       packet->choice == CHOICE_GATEWAY;
}

/* A packet of tunnels between nodes, if its ends are nodes. */
static __always_inline bool packet_is_tunnel(const struct packet *packet)
{
	return packet->protocol == IPPROTO_UDP &&
	       packet->destination_port == bpf_htons(settings.tunnel_port);
}

/* What an ICMP message with an identifier is: RFC 792, 950, 4443, 8335. 0: it
 * has none. */
static __always_inline __u32 icmp_role(__u8 protocol, __u8 type)
{
	if (protocol == IPPROTO_ICMPV6) {
		switch (type) {
		case ICMPV6_ECHO:
		case ICMPV6_EXTENDED_ECHO:
			return PACKET_ASKS;
		case ICMPV6_ECHO_REPLY:
		case ICMPV6_EXTENDED_ECHO_REPLY:
			return PACKET_ANSWERS;
		}
		return 0;
	}
	switch (type) {
	case ICMP_ECHO:
	case ICMP_TIMESTAMP:
	case ICMP_INFORMATION:
	case ICMP_ADDRESS_MASK:
	case ICMP_EXTENDED_ECHO:
		return PACKET_ASKS;
	case ICMP_ECHO_REPLY:
	case ICMP_TIMESTAMP_REPLY:
	case ICMP_INFORMATION_REPLY:
	case ICMP_ADDRESS_MASK_REPLY:
	case ICMP_EXTENDED_ECHO_REPLY:
		return PACKET_ANSWERS;
	}
	return 0;
}

/* The type of the query that an answer of ICMP belongs to; other types are
 * themselves. */
static __always_inline __u8 icmp_asked(const struct packet *packet)
{
	__u8 type = packet->icmp_type;

	if (!(packet->flags & PACKET_ANSWERS))
		return type;
	if (packet->protocol == IPPROTO_ICMPV6 ||
	    type == ICMP_EXTENDED_ECHO_REPLY)
		return type - 1;
	return type == ICMP_ECHO_REPLY ? ICMP_ECHO : type - 1;
}

/* Of a TCP segment, in host order; 0 if it cannot be read. */
static __always_inline __u32 packet_sequence(struct __sk_buff *ctx,
					     const struct packet *packet)
{
	__be32 sequence = 0;

	bpf_skb_load_bytes(ctx,
			   packet->l4_offset +
				   __builtin_offsetof(struct tcphdr, sequence),
			   &sequence, sizeof(sequence));
	return bpf_ntohl(sequence);
}

/* Of the IP packet: the frame may be padded. */
static __always_inline __u32 packet_ip_length(struct __sk_buff *ctx,
					      const struct packet *packet)
{
	__be16 length = 0;

	if (packet->flags & PACKET_IPV6) {
		bpf_skb_load_bytes(ctx,
				   ETHERNET_LENGTH +
					   __builtin_offsetof(struct ipv6hdr,
							      payload_length),
				   &length, 2);
		return bpf_ntohs(length) + sizeof(struct ipv6hdr);
	}
	bpf_skb_load_bytes(ctx,
			   ETHERNET_LENGTH + __builtin_offsetof(struct iphdr,
								total_length),
			   &length, 2);
	return bpf_ntohs(length);
}

/* True if a TCP segment carries anything; short frames have padding behind. */
static __always_inline bool packet_has_payload(struct __sk_buff *ctx,
					       const struct packet *packet)
{
	bool is_ipv6 = packet->flags & PACKET_IPV6;
	__u32 headers = packet->l4_offset - ETHERNET_LENGTH;
	__be16 length = 0;
	__u8 offset = 0;

	if (bpf_skb_load_bytes(
		    ctx,
		    ETHERNET_LENGTH +
			    (is_ipv6 ? __builtin_offsetof(struct ipv6hdr,
							  payload_length)
				     : __builtin_offsetof(struct iphdr,
							  total_length)),
		    &length, sizeof(length)) ||
	    bpf_skb_load_bytes(
		    ctx,
		    packet->l4_offset +
			    __builtin_offsetof(struct tcphdr, offset),
		    &offset, sizeof(offset)))
		return true;
	headers += (offset >> 4) * 4;
	if (is_ipv6)
		headers -= sizeof(struct ipv6hdr);
	/* One that was merged may be too long for the field. */
	return ctx->gso_size || bpf_ntohs(length) > headers;
}

/* Of each packet that a merged one (GSO) will be cut into. */
__weak __noinline int packet_segment_length(struct __sk_buff *ctx,
					    __u32 l4_offset, __u32 protocol)
{
	__u32 headers = l4_offset - ETHERNET_LENGTH;
	__u8 offset = 0;

	if (protocol != IPPROTO_TCP)
		headers += sizeof(struct udphdr);
	else if (!bpf_skb_load_bytes(
			 ctx,
			 l4_offset + __builtin_offsetof(struct tcphdr, offset),
			 &offset, 1))
		headers += (offset >> 4) * 4;
	return ctx->gso_size + headers;
}

/* The length of the packet on the wire, from the IP header on. */
static __always_inline __u32 packet_wire_length(struct __sk_buff *ctx,
						__u32 l4_offset, __u8 protocol)
{
	if (ctx->gso_size)
		return packet_segment_length(ctx, l4_offset, protocol);
	return ctx->len - ETHERNET_LENGTH;
}
