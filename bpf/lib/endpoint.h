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

/* skb->priority of what the pod sends out of the node: the queues of network
 * devices have bands by it. */
static __always_inline __u32 endpoint_priority(const struct endpoint *endpoint)
{
	return endpoint->flags / ENDPOINT_PRIORITY;
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

/* Epoch and policy as they were together at one moment. */
struct endpoint_policy {
	__u32 epoch;
	__u32 policy;
};

static __always_inline struct endpoint_policy
endpoint_policy(const struct endpoint *endpoint)
{
	__u64 word = *(const volatile __u64 *)&endpoint->epoch;
	struct endpoint_policy of;

	__builtin_memcpy(&of, &word, sizeof(of));
	return of;
}

/*
 * What is read after this is at least as new as what was read before it. A
 * processor with weak order (arm64) may read in any order otherwise; an atomic
 * that returns a value is fully ordered for BPF. `word` is nobody else's.
 */
static __always_inline void order_reads(__u32 *word)
{
	__sync_val_compare_and_swap(word, 0, 0);
}
