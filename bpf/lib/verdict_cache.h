/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Verdicts on flows to pods, for the flows that follow from and to the same: a
 * new flow then needs no look-up of identities, services and policy. A verdict
 * is current while the epochs are that it was found in.
 */
#pragma once

#include "flow_insert.h"

/* How the packet came here: who may say what depends on it. */
#define PACKET_ARRIVAL                                                         \
	(PACKET_FROM_POD | PACKET_FROM_HOST | PACKET_FROM_OVERLAY |            \
	 PACKET_FROM_STACK | PACKET_FORWARDED)

/* What the verdict depends on: rules name ports, or types of ICMP. */
static __always_inline __be16 verdict_cache_port(const struct packet *packet)
{
	return packet->flags & PACKET_ASKS ? bpf_htons(packet->icmp_type)
					   : packet->destination_port;
}

static __always_inline struct cached_verdict *
verdict_cache_slot(const struct packet *packet)
{
	const addr_words *from = (const void *)&packet->source;
	const addr_words *to = (const void *)&packet->destination;
	__u64 port = (__u64)verdict_cache_port(packet) << 32 | packet->protocol;
	__u32 slot = hash_secret(from[1] ^ hash64(to[1] ^ port)) &
		     (VERDICT_SLOTS - 1);

	return bpf_map_lookup_elem(&verdict_cache, &slot);
}

/* The verdict depends on the device that the packet came by. */
static __always_inline bool
verdict_cache_is_useless(const struct packet *packet, const struct flow *flow)
{
	return packet->flags & PACKET_FORWARDED &&
	       flow->source.flags & ADDRESS_LOCAL;
}

/*
 * Keeps a verdict for the flows that follow. Only on flows to pods: the address
 * of anybody else may become a service's, which no epoch tells.
 */
static __always_inline void verdict_cache_insert(const struct packet *packet,
						 __u32 claimed_identity,
						 const struct flow *flow)
{
	struct cached_verdict *cached;

	if (packet->flags & (PACKET_LOOPBACK | PACKET_TO_PROXY) ||
	    verdict_cache_is_useless(packet, flow) ||
	    (flow->destination.route != ROUTE_ENDPOINT &&
	     flow->destination.route != ROUTE_NODE))
		return;
	cached = verdict_cache_slot(packet);
	if (!cached)
		return;
	addr_copy(&cached->source, &packet->source);
	addr_copy(&cached->destination, &packet->destination);
	cached->claimed_identity = claimed_identity;
	cached->epoch[0] = flow->egress.epoch;
	cached->epoch[1] = flow->ingress.epoch;
	cached->identity[0] = flow->source.identity;
	cached->identity[1] = flow->destination.identity;
	cached->rule[0] = flow->egress.rule_id;
	cached->rule[1] = flow->ingress.rule_id;
	cached->endpoint[0] = flow->source.endpoint;
	cached->endpoint[1] = flow->destination.endpoint;
	cached->port = verdict_cache_port(packet);
	cached->arrival = packet->flags & PACKET_ARRIVAL;
	cached->protocol = packet->protocol;
	cached->route[0] = flow_route(&flow->source);
	cached->route[1] = flow->destination.route;
}

/* A local end is as it was when the verdict was reached. */
static __always_inline bool verdict_cache_end_is_current(
	const struct cached_verdict *cached, const struct packet *packet,
	const struct addr *addr, __u32 end, __u32 addresses_at)
{
	struct endpoint *endpoint;

	if (!cached->endpoint[end])
		return cached->epoch[end] == addresses_at;
	endpoint = endpoint_by_id(cached->endpoint[end]);
	return endpoint && endpoint->ifindex &&
	       endpoint_epoch(endpoint) + addresses_at == cached->epoch[end] &&
	       endpoint->flags & ENDPOINT_READY &&
	       endpoint_has(endpoint, addr, packet);
}

/* An earlier verdict on a flow like this one that still stands, or NULL. */
static __always_inline struct cached_verdict *
verdict_cache_find(const struct packet *packet)
{
	struct cached_verdict *cached = verdict_cache_slot(packet);
	__u32 addresses_at = address_epoch();

	if (!cached || !cached->route[1] ||
	    cached->port != verdict_cache_port(packet) ||
	    cached->protocol != packet->protocol ||
	    cached->arrival != (packet->flags & PACKET_ARRIVAL) ||
	    cached->claimed_identity != packet->source_identity ||
	    !addr_equal(&cached->destination, &packet->destination) ||
	    !addr_equal(&cached->source, &packet->source) ||
	    (packet->flags & PACKET_FROM_POD &&
	     cached->endpoint[0] != packet->source_endpoint) ||
	    !verdict_cache_end_is_current(cached, packet, &packet->source, 0,
					  addresses_at) ||
	    !verdict_cache_end_is_current(cached, packet, &packet->destination,
					  1, addresses_at))
		return NULL;
	return cached;
}
