/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The host's own policy, row 0 of `endpoints`, on packets to and from the node's
 * own addresses. Of TCP the SYN is judged: whatever runs goes on. Of the rest a
 * row of host_flows says who began. Neighbour discovery, ICMP errors, the tunnel,
 * and of what is for groups all but UDP are not the policy's.
 */
#pragma once

#include "flow.h"
#include "own.h"
#include "route.h"
#include "tunnel.h"

#define HOST_ENFORCED (POLICY_ENFORCE_INGRESS | POLICY_ENFORCE_EGRESS)

/* Off until a policy selects the node. */
static __always_inline __u32 host_enforces(void)
{
	struct endpoint *host = endpoint_by_id(HOST_ENDPOINT);

	return host ? host->policy & HOST_ENFORCED : 0;
}

/* An address of the node itself; those of IPv6 that are a link's alone are in no
 * map. */
static __always_inline bool host_has(const struct addr *addr)
{
	return bpf_ntohl(addr->w[0]) >> 22 == 0xfe80 >> 6 || own_has_addr(addr);
}

/* The packet is of a flow that was let through: an answer while anybody speaks,
 * what asks while the verdict is of the policy in force. */
static __always_inline bool host_flow_runs(const struct packet *packet,
					   struct connection_key *key,
					   __u32 direction, __u32 epoch)
{
	__u64 now = bpf_jiffies64();
	struct host_flow *row;

	connection_key_of(packet, key);
	row = bpf_map_lookup_elem(&host_flows, key);
	if (!row ||
	    /* Another CPU may have seen a later tick. */
	    (__s64)(now - row->seen_jiffies) >
		    (__s64)seconds_to_jiffies(settings.other_timeout_seconds) ||
	    (row->direction == direction && row->epoch != epoch))
		return false;
	if (row->seen_jiffies != now)
		row->seen_jiffies = now;
	return true;
}

/* Who is at the other end of what comes in: 0, or a drop if he may not be. */
static __always_inline int host_resolve_sender(struct packet *packet,
					       struct peer *peer)
{
	if (packet->flags & PACKET_FROM_OVERLAY) {
		flow_resolve_tunnel(packet, peer);
		return 0;
	}
	/* Ours do not come in from outside, and pods come by the tunnel. */
	if (peer->flags & ADDRESS_LOCAL ||
	    (settings.tunnel_ifindex &&
	     peer->flags & (ADDRESS_POD | ADDRESS_INTERNAL)))
		return -DROP_INVALID_SOURCE_IP;
	return 0;
}

static __always_inline bool host_begins_tcp(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* 0, or a drop. */
__weak __noinline int host_judge(struct packet *packet, __u32 direction)
{
	struct endpoint *host = endpoint_by_id(HOST_ENDPOINT);
	bool is_ingress = direction == DIRECTION_INGRESS;
	struct flow_verdict verdict = {.direction = direction};
	struct scratch *room = scratch_get();
	struct host_flow row = {};
	struct endpoint_policy of;
	struct peer peer = {};
	int ret = 0;

	if (!packet || !host || !room)
		return -DROP_INVALID_PACKET;
	of = endpoint_policy(host);
	row.epoch = of.epoch + address_epoch();
	/* Before the identity, or an old one would be kept as a new one. */
	order_reads(&room->fence);
	if (is_ingress)
		identity_resolve(&packet->source, &peer);
	else
		identity_resolve(&packet->destination, &peer);
	if (is_ingress)
		ret = host_resolve_sender(packet, &peer);
	packet->direction = direction;
	packet->source_identity = is_ingress ? peer.identity : IDENTITY_HOST;
	packet->destination_identity = is_ingress ? IDENTITY_HOST
						  : peer.identity;
	if (ret)
		return ret;
	if (packet->protocol == IPPROTO_TCP && !host_begins_tcp(packet))
		return 0;
	if (packet->protocol != IPPROTO_TCP &&
	    host_flow_runs(packet, &room->flow.key, direction, row.epoch))
		return 0;
	ret = policy_check(of.policy, &verdict, peer.identity, packet);
	/* No proxy judges what is for the node, or its own. */
	if (!ret && verdict.l7_set)
		ret = -DROP_NO_PROXY;
	if (ret || packet->protocol == IPPROTO_TCP)
		return ret;
	row.seen_jiffies = bpf_jiffies64();
	row.direction = direction;
	/* Full: the answers are judged as questions. */
	bpf_map_update_elem(&host_flows, &room->flow.key, &row, BPF_ANY);
	return 0;
}

/* Of what the policy does not speak, to or from the address of the node. */
static __always_inline bool host_is_beyond(const struct packet *packet,
					   const struct addr *other)
{
	return packet->flags & (PACKET_CONTROL | PACKET_ICMP_ERROR) ||
	       (settings.overlay_ifindex && packet_is_tunnel(packet) &&
		tunnel_is_node(other));
}

/* What everyone on the link gets, or a group: each socket of the node that
 * listens on the port. Without ports it is routers' and hosts' own business. */
static __always_inline bool host_is_one_of_many(struct __sk_buff *ctx,
						const struct packet *packet)
{
	const struct addr *to = &packet->destination;

	if (addr_is_multicast(to))
		return packet->protocol == IPPROTO_UDP;
	return ctx->pkt_type == PACKET_BROADCAST ||
	       ctx->pkt_type == PACKET_MULTICAST ||
	       (addr_is_ipv4(to) && to->w[3] == 0xffffffff);
}

/* The node itself is to get it. */
static __always_inline bool host_is_for_node(struct __sk_buff *ctx,
					     const struct packet *packet)
{
	if (host_has(&packet->destination) || host_is_one_of_many(ctx, packet))
		return true;
	return !addr_is_multicast(&packet->destination) &&
	       route_may_end_here(ctx, packet);
}

/* What is for the node itself: 0, or a drop. `parsed` is what the parser says;
 * what it refuses comes in no more than what the policy denies. */
static __always_inline int host_receive(struct __sk_buff *ctx,
					struct packet *packet, int parsed)
{
	__u32 enforced = host_enforces();

	if (!enforced || host_is_beyond(packet, &packet->source) ||
	    !host_is_for_node(ctx, packet))
		return 0;
	if (parsed < 0)
		return enforced & POLICY_ENFORCE_INGRESS ? parsed : 0;
	return host_judge(packet, DIRECTION_INGRESS);
}

/* What a socket of the node has made: 0, or a drop. A later fragment goes with
 * the first one. */
static __always_inline int host_send(struct __sk_buff *ctx,
				     struct packet *packet, int parsed)
{
	__u32 enforced = host_enforces();

	if (!enforced || ctx->ingress_ifindex ||
	    host_is_beyond(packet, &packet->destination) ||
	    packet->flags & PACKET_LATER_FRAGMENT ||
	    addr_is_multicast(&packet->destination) ||
	    !host_has(&packet->source))
		return 0;
	if (parsed < 0)
		return enforced & POLICY_ENFORCE_EGRESS ? parsed : 0;
	/* What runs goes on: its segments need no identity. */
	if (packet->protocol == IPPROTO_TCP && !host_begins_tcp(packet))
		return 0;
	return host_judge(packet, DIRECTION_EGRESS);
}
