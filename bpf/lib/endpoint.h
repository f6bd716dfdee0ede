/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Pods of this node: an array by endpoint id, so that finding one costs no
 * hash. Ids are reused, therefore whoever has one from elsewhere (a frame, a
 * connection) compares the address or the device before it counts.
 */
#pragma once

#include "identity.h"

static __always_inline struct endpoint *endpoint_by_id(__u32 id)
{
	return bpf_map_lookup_elem(&endpoints, &id);
}

/* The pod has this address; one that it lacks is zero in its row, and zero is
 * an address of IPv6. */
static __always_inline bool endpoint_has(const struct endpoint *endpoint,
					 const struct addr *addr,
					 const struct packet *packet)
{
	return addr_equal(addr, packet->flags & PACKET_IPV6
					? &endpoint->ipv6
					: &endpoint->ipv4) &&
	       !addr_is_zero(addr);
}

/*
 * The endpoint whose device the packet came from. The frame is addressed to the
 * host side of the veth, whose MAC address ends with the id. A pod that
 * addresses it to anyone else is found by its source address; wherever the id
 * comes from, the device must be the endpoint's own.
 */
static __always_inline struct endpoint *
endpoint_of_source(struct __sk_buff *ctx, struct packet *packet)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct endpoint *endpoint;
	struct address *address;

	if ((void *)(ethernet + 1) <= end) {
		packet->source_endpoint = ethernet->destination[4] << 8 |
					  ethernet->destination[5];
		endpoint = endpoint_by_id(packet->source_endpoint);
		if (endpoint && endpoint->ifindex == ctx->ifindex)
			return endpoint;
	}
	packet->source_endpoint = 0;
	address = address_find(&packet->source);
	if (!address || !address->endpoint_id)
		return NULL;
	endpoint = endpoint_by_id(address->endpoint_id);
	if (!endpoint || endpoint->ifindex != ctx->ifindex)
		return NULL;
	packet->source_endpoint = address->endpoint_id;
	return endpoint;
}

/* Raised when the identity of an address changes. */
static __always_inline __u32 address_epoch(void)
{
	__u32 zero = 0;
	struct node_state *state = bpf_map_lookup_elem(&node_state, &zero);

	return state ? *(volatile __u32 *)&state->address_epoch : 0;
}

/* Only the node's stack applies its IPsec policies. */
static __always_inline bool node_allows_past_stack(void)
{
	__u32 zero = 0;
	struct node_state *state = bpf_map_lookup_elem(&node_state, &zero);

	return state && state->flags & NODE_PAST_STACK;
}

/* Raised when the endpoint's policy changes; with the other: a verdict's epoch.
 */
static __always_inline __u32 endpoint_epoch(const struct endpoint *endpoint)
{
	return *(const volatile __u32 *)&endpoint->epoch;
}
