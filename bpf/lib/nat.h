/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Masquerade: what pods send out of the cluster bears the node's address, and
 * the answers find back. Two entries a flow, one per direction; the one for the
 * way back is inserted first and never overwrites, so it decides who has a
 * port.
 */
#pragma once

#include "connection.h"
#include "rewrite.h"

#define NAT_TRIES 32

static __always_inline const struct addr *
nat_node_addr(const struct packet *packet)
{
	return (const struct addr *)(packet->flags & PACKET_IPV6
					     ? &settings.node_ipv6
					     : &settings.node_ipv4);
}

static __always_inline bool nat_has_port(const struct packet *packet)
{
	switch (packet->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return true;
	}
	return false;
}

/* A number that the tuple alone decides, so that a lost entry comes back alike.
 */
static __always_inline __u32 nat_hash(const struct packet *packet)
{
	__u32 hash = packet->source.w[3] ^ packet->destination.w[3] * 31;

	hash ^= packet->source.w[2] ^ packet->destination.w[2] * 17;
	hash ^= (packet->source_port << 16) + packet->destination_port;
	hash = (hash ^ (hash >> 16)) * 0x7feb352d;
	hash = (hash ^ (hash >> 15)) * 0x846ca68b;
	return hash ^ (hash >> 16);
}

/* A free port of the node towards this remote end; 0 or a drop. */
static __always_inline int nat_allocate(const struct packet *packet,
					const struct nat_key *out,
					struct nat *to)
{
	struct nat_key back = {
		.local = to->addr,
		.remote = packet->destination,
		.remote_port = packet->destination_port,
		.protocol = packet->protocol,
		.direction = DIRECTION_INGRESS,
	};
	struct nat pod = {
		.addr = packet->source,
		.created_jiffies = bpf_jiffies64(),
		.port = packet->source_port,
	};
	__u32 range = settings.nat_port_max - settings.nat_port_min + 1;
	__u32 hash = nat_hash(packet);

	for (int i = 0; i < NAT_TRIES; i++) {
		__u32 port = settings.nat_port_min +
			     (((__u64)hash * (range & 0x1ffff)) >> 32);

		back.local_port = bpf_htons(port);
		if (!bpf_map_update_elem(&nat, &back, &pod, BPF_NOEXIST)) {
			to->port = back.local_port;
			to->created_jiffies = pod.created_jiffies;
			return bpf_map_update_elem(&nat, out, to, BPF_ANY)
				       ? -DROP_NO_NAT_MAPPING
				       : 0;
		}
		hash += 0x9e3779b9;
	}
	return -DROP_NO_NAT_MAPPING;
}

/* Makes the node the source; the packet is a local pod's. 0 or a drop. */
__weak __noinline int nat_masquerade(struct __sk_buff *ctx,
				     struct packet *packet)
{
	struct nat_key out = {};
	struct nat *known, to = {};
	int ret;

	if (!packet)
		return -DROP_NO_NAT_MAPPING;
	if (!nat_has_port(packet))
		return -DROP_UNKNOWN_L4;
	out.local = packet->source;
	out.remote = packet->destination;
	out.local_port = packet->source_port;
	out.remote_port = packet->destination_port;
	out.protocol = packet->protocol;
	out.direction = DIRECTION_EGRESS;
	known = bpf_map_lookup_elem(&nat, &out);
	/* The node may have got another address since. */
	if (known && addr_equal(&known->addr, nat_node_addr(packet))) {
		to = *known;
	} else {
		to.addr = *nat_node_addr(packet);
		ret = nat_allocate(packet, &out, &to);
		if (ret)
			return ret;
	}
	packet->source = to.addr;
	packet->source_port = to.port;
	packet->flags |= PACKET_NEW_SOURCE;
	return rewrite_apply(ctx, packet);
}

/*
 * If the packet answers a masqueraded one: makes the pod its destination.
 * 1 if it did, 0 if the packet is none of ours, or a drop.
 */
__weak __noinline int nat_restore(struct __sk_buff *ctx, struct packet *packet)
{
	__u32 port;
	struct nat_key back = {};
	struct nat *pod;
	int ret;

	if (!packet)
		return -DROP_NO_NAT_MAPPING;
	port = bpf_ntohs(packet->destination_port);
	if (port < settings.nat_port_min || port > settings.nat_port_max)
		return 0;
	back.local = packet->destination;
	back.remote = packet->source;
	back.local_port = packet->destination_port;
	back.remote_port = packet->source_port;
	back.protocol = packet->protocol;
	back.direction = DIRECTION_INGRESS;
	pod = bpf_map_lookup_elem(&nat, &back);
	if (!pod)
		return 0;
	packet->destination = pod->addr;
	packet->destination_port = pod->port;
	packet->flags |= PACKET_NEW_DESTINATION;
	ret = rewrite_apply(ctx, packet);
	packet->flags &= ~PACKET_NEW_DESTINATION;
	return ret ? ret : 1;
}
