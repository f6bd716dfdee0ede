/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * VXLAN (RFC 7348) past the kernel's device, which costs a packet more than all
 * of Weir: what a pod sends gets its outer headers here, and what comes for a
 * running flow loses them where it comes in. Whatever is not plain goes by the
 * device (from_overlay, to_overlay): each function here gives it back
 * untouched. Nothing here drops a packet that the device would not.
 */
#pragma once

#include "fast.h"
#include "own.h"

struct tunnel_headers {
	struct iphdr ip;
	struct udphdr udp;
	struct vxlanhdr vxlan;
	struct ethhdr ethernet;
} __attribute__((packed));

#define TUNNEL_LENGTH ((__u32)sizeof(struct tunnel_headers))

/* Not for this way: no action of tc, and no drop. */
#define TUNNEL_BY_DEVICE 1000

/* Source ports as the device gives them: ip_local_port_range's defaults. */
#define TUNNEL_PORT_MIN 32768
#define TUNNEL_PORT_MAX 60999

/* What waits for the device's queue has passed after so long; one may end at
 * once. */
#define TUNNEL_QUEUE_JIFFIES 3

/* RFC 3168, the low bits of TOS and of the traffic class. */
#define ECN_MASK      3
#define ECN_CAPABLE   2
#define ECN_CONGESTED 3

/* The number of the sender that a tunnel packet bears is one that a sender may
 * have: 0 or a drop. */
static __always_inline int tunnel_check_identity(__u32 *identity)
{
	if (!*identity)
		return -DROP_INVALID_VNI;
	/* Another node's host is not ours. */
	if (*identity == IDENTITY_HOST)
		*identity = IDENTITY_REMOTE_NODE;
	if (*identity > IDENTITY_LAST_CLUSTER ||
	    (*identity > IDENTITY_INGRESS &&
	     *identity < IDENTITY_FIRST_CLUSTER))
		return -DROP_INVALID_IDENTITY;
	return 0;
}

/* A node of the cluster, and no other than this one. */
static __always_inline bool tunnel_is_node(const struct addr *node)
{
	struct address *address = address_find(node);

	return address && address->flags & ADDRESS_NODE &&
	       !(address->flags & ADDRESS_LOCAL);
}

/*
 * Nobody known has the inner source. The node's word on it counts in the node's
 * own pod CIDR. For whom else it speaks it only forwards: who that is, this
 * node's own prefixes say, and the number becomes 0. 0 or a drop.
 */
static __always_inline int tunnel_check_stranger(const struct addr *node,
						 const struct addr *source,
						 __u32 *identity)
{
	struct prefix *prefix = prefix_find(source);
	bool is_pod = *identity >= IDENTITY_FIRST_CLUSTER;

	if (!tunnel_is_node(node))
		return -DROP_UNKNOWN_SENDER;
	if (prefix && prefix->flags & PREFIX_POD_CIDR) {
		if (!addr_equal(&prefix->node, node) ||
		    *identity == IDENTITY_WORLD)
			return -DROP_INVALID_SOURCE_IP;
		if (!is_pod)
			*identity = IDENTITY_REMOTE_NODE;
		return 0;
	}
	*identity = 0;
	return is_pod ? -DROP_INVALID_SOURCE_IP : 0;
}

/*
 * Whom the sender of an outer packet speaks for: the node that has the inner
 * source has sent it. 0 or a drop.
 */
static __always_inline int tunnel_check_sender(const struct addr *node,
					       const struct addr *source,
					       __u32 *identity)
{
	struct address *address = address_find(source);

	if (!address)
		return tunnel_check_stranger(node, source, identity);
	/* Ours do not come in from outside. */
	if (address->flags & ADDRESS_LOCAL)
		return -DROP_INVALID_SOURCE_IP;
	return addr_equal(&address->node, node) && !addr_is_zero(node)
		       ? 0
		       : -DROP_UNKNOWN_SENDER;
}

/* The node is known to have the source, as tunnel_check_sender asks. */
static __always_inline bool tunnel_is_of_sender(const struct addr *node,
						const __u64 source[2])
{
	struct addr words __attribute__((aligned(8)));
	addr_words *copy = (void *)&words;
	struct address *address;

	copy[0] = source[0];
	copy[1] = source[1];
	address = address_find(&words);
	/* Of this node's own the node is zero. */
	return address && addr_equal(&address->node, node);
}

static __always_inline bool tunnel_is_direct(void)
{
	return settings.tunnel_direct && node_allows_past_stack();
}

static __always_inline __u8 tunnel_ecn(void *frame, bool is_ipv6)
{
	const __u8 *ip = frame + ETHERNET_LENGTH;
	__u8 ecn = (is_ipv6 ? ip[1] >> 4 : ip[1]) & ECN_MASK;

	/* RFC 6040, 4.1: congestion further in is not told twice. */
	return ecn == ECN_CONGESTED ? ECN_CAPABLE : ecn;
}

static __always_inline __sum16
tunnel_ip_checksum(const struct tunnel_headers *headers)
{
	const __u32 *words = (const void *)headers;
	__u64 sum = 0;

	for (int i = 0; i < 5; i++)
		sum += words[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~((sum & 0xffff) + (sum >> 16));
}

/* To the node with this address, with the sender's identity: an action of tc, a
 * drop, or TUNNEL_BY_DEVICE. `wire_length` is the packet's own. */
__weak __noinline int tunnel_send(struct __sk_buff *ctx, struct packet *packet,
				  __be32 node, __u32 identity,
				  __u32 wire_length)
{
	struct own_addresses *own = own_addresses_find();
	struct bpf_fib_lookup fib = {.ifindex = ctx->ifindex};
	struct tunnel_headers headers __attribute__((aligned(8))) = {};
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u32 length = ctx->len - ETHERNET_LENGTH + TUNNEL_LENGTH;
	__u32 hash;

	if (!packet || !own || !own->ipv4.w[3] ||
	    data + ETHERNET_LENGTH + 2 > end)
		return TUNNEL_BY_DEVICE;
	__builtin_memcpy(&headers.ethernet, data, ETHERNET_LENGTH);
	headers.ip.tos = tunnel_ecn(data, packet->flags & PACKET_IPV6);
	hash = bpf_get_hash_recalc(ctx);
	hash ^= hash << 16;
	headers.udp.source = bpf_htons(
		TUNNEL_PORT_MIN +
		((__u64)hash * (TUNNEL_PORT_MAX - TUNNEL_PORT_MIN) >> 32));
	headers.udp.destination = bpf_htons(settings.tunnel_port);
	headers.ip.source = own->ipv4.w[3];
	headers.ip.destination = node;

	fib.family = AF_INET;
	fib.l4_protocol = IPPROTO_UDP;
	fib.sport = headers.udp.source;
	fib.dport = headers.udp.destination;
	fib.tot_len = wire_length + TUNNEL_LENGTH;
	fib.source[0] = headers.ip.source;
	fib.destination[0] = node;
	/* Too long for that way, too: the device cuts it or says so. */
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), BPF_FIB_LOOKUP_SKIP_NEIGH) !=
		    BPF_FIB_LKUP_RET_SUCCESS ||
	    fib.family != AF_INET)
		return TUNNEL_BY_DEVICE;
	if (bpf_skb_adjust_room(
		    ctx, TUNNEL_LENGTH, BPF_ADJ_ROOM_MAC,
		    BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 |
			    BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
			    BPF_F_ADJ_ROOM_ENCAP_L2_ETH |
			    BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(struct ethhdr))))
		return TUNNEL_BY_DEVICE;

	headers.ip.version_length = 0x45;
	headers.ip.total_length = bpf_htons(length);
	headers.ip.id = bpf_get_prandom_u32();
	headers.ip.ttl = 64;
	headers.ip.protocol = IPPROTO_UDP;
	headers.ip.check = tunnel_ip_checksum(&headers);
	headers.udp.length = bpf_htons(length - sizeof(struct iphdr));
	headers.vxlan.flags = bpf_htonl(VXLAN_HAS_VNI);
	headers.vxlan.vni = bpf_htonl(identity << 8);
	if (bpf_skb_store_bytes(ctx, ETHERNET_LENGTH, &headers, TUNNEL_LENGTH,
				0))
		return -DROP_WRITE_ERROR;
	return leave(ctx, fib.ifindex, AF_INET, fib.destination);
}

/* The inner frame of a plain tunnel packet for this node: its sender's number
 * and address, or false. */
static __always_inline bool tunnel_parse(struct __sk_buff *ctx,
					 struct addr *node, __u32 *identity)
{
	struct own_addresses *own = own_addresses_find();
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct tunnel_headers *headers = data + ETHERNET_LENGTH;

	if ((void *)(headers + 1) > end)
		return false;
	/* A checksum is the kernel's to verify. */
	if (ethernet->protocol != bpf_htons(ETH_P_IP) ||
	    headers->ip.version_length != 0x45 ||
	    headers->ip.protocol != IPPROTO_UDP ||
	    headers->udp.destination != bpf_htons(settings.tunnel_port) ||
	    !own || headers->ip.destination != own->ipv4.w[3] ||
	    headers->ip.fragment &
		    bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET) ||
	    (headers->ip.tos & ECN_MASK) == ECN_CONGESTED ||
	    headers->udp.check ||
	    headers->vxlan.flags != bpf_htonl(VXLAN_HAS_VNI) ||
	    ctx->pkt_type != PACKET_HOST || ctx->vlan_present)
		return false;
	addr_from_ipv4(node, headers->ip.source);
	*identity = bpf_ntohl(headers->vxlan.vni) >> 8;
	return true;
}

/*
 * A merged packet (GSO) goes by the device: the kernel forgets to call it a
 * plain one when its outer headers are cut off (bpf_skb_net_shrink), and it may
 * be forwarded from the pod. What comes behind it must not overtake it.
 */
static __always_inline bool tunnel_must_queue(struct __sk_buff *ctx,
					      struct connection *connection)
{
	__u8 now = bpf_jiffies64();

	if (ctx->gso_size) {
		if (connection->merged_jiffies != now)
			connection->merged_jiffies = now;
		return true;
	}
	return (__u8)(now - connection->merged_jiffies) < TUNNEL_QUEUE_JIFFIES;
}

/* Of the frame that is left, whose Ethernet header was the outer one. */
static __always_inline long tunnel_set_protocol(struct __sk_buff *ctx,
						__u16 protocol)
{
	__be16 wire = bpf_htons(protocol);

	return bpf_skb_store_bytes(ctx,
				   __builtin_offsetof(struct ethhdr, protocol),
				   &wire, sizeof(wire), 0);
}

/* What comes by the tunnel for a running flow goes to its pod: an action of tc,
 * or TUNNEL_BY_DEVICE. */
__weak __noinline int tunnel_receive(struct __sk_buff *ctx)
{
	struct connection *connection;
	struct endpoint *destination;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	struct packet_tuple tuple;
	__u32 side, identity;
	struct fast fast;
	struct addr node __attribute__((aligned(8)));

	if (!tunnel_is_direct() || !tunnel_parse(ctx, &node, &identity) ||
	    !fast_parse((void *)(long)ctx->data + TUNNEL_LENGTH,
			(void *)(long)ctx->data_end, &tuple) ||
	    tunnel_check_identity(&identity) ||
	    !tunnel_is_of_sender(&node, tuple.source))
		return TUNNEL_BY_DEVICE;
	connection = fast_find(&fast, &tuple);
	if (!connection || tunnel_must_queue(ctx, connection))
		return TUNNEL_BY_DEVICE;
	side = fast_side(&fast, connection);
	destination = fast_arrival(&fast, connection, side, tuple.is_ipv6);
	if (!destination)
		return TUNNEL_BY_DEVICE;
	/* Kernels before 6.3 do not know the flag, and change nothing. */
	if (tuple.is_ipv6)
		flags |= BPF_F_ADJ_ROOM_DECAP_L3_IPV6;
	if (bpf_skb_adjust_room(ctx, -(__s32)TUNNEL_LENGTH, BPF_ADJ_ROOM_MAC,
				flags))
		return TUNNEL_BY_DEVICE;
	if (tuple.is_ipv6 && tunnel_set_protocol(ctx, ETH_P_IPV6)) {
		metric_count(DROP_WRITE_ERROR, DIRECTION_INGRESS, ctx->len);
		return TC_ACT_SHOT;
	}
	fast_count(ctx, &fast, connection, side, tuple.tcp_flags,
		   EVENT_FROM_OVERLAY, DIRECTION_INGRESS);
	return bpf_redirect_peer(destination->ifindex, 0);
}
