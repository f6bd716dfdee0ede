/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Flows whose requests the proxy judges. Both ends send to the proxy's network
 * namespace, by a veth pair, and hear from there by the addresses of each other:
 *
 *   client --> from_pod --> [ proxy ] --> from_proxy --> server
 *   client <-- from_proxy <-- [ proxy ] <-- from_pod <-- server
 *
 * The proxy takes the client's address and port to the server, so both legs have
 * one name and one row of `connections`. Which leg a packet is of, the device
 * says that it comes by: whatever has CONNECTION_PROXY goes to the proxy, and
 * what comes from the proxy goes to whom it is addressed to.
 */
#pragma once

#include "scratch.h"

/*
 * The rule set that alone judges the flow, or 0: rules of both ends, or none, are
 * no listener's.
 */
static __always_inline __u16 l7_flow_only_set(const struct l7_flow *row)
{
	if (!row->egress_set || row->egress_set == row->ingress_set)
		return row->ingress_set;
	return row->ingress_set ? 0 : row->egress_set;
}

/* The flow's name in `l7_flows`; sender 1: its server has sent the packet. */
static __always_inline void proxy_key_of(const struct packet *packet,
					 struct l7_flow_key *key, __u32 sender)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->protocol = packet->protocol;
	addr_copy(sender ? &key->server : &key->client, &packet->source);
	addr_copy(sender ? &key->client : &key->server, &packet->destination);
	key->client_port =
		sender ? packet->destination_port : packet->source_port;
	key->server_port =
		sender ? packet->source_port : packet->destination_port;
}

/* Says who speaks, and by which rules the proxy judges it: 0 or a drop. */
static __always_inline int proxy_tell(const struct packet *packet,
				      const struct flow *flow)
{
	const struct peer *client = flow->side ? &flow->destination
					       : &flow->source;
	const struct peer *server = flow->side ? &flow->source
					       : &flow->destination;
	__u32 first = index_of_two(flow->source_index ^ flow->side);
	struct l7_flow_key key __attribute__((aligned(8))) = {
		.client_port = flow->key.port[first],
		.server_port = flow->key.port[first ^ 1],
		.protocol = packet->protocol,
	};
	struct l7_flow row = {
		.client_identity = client->identity,
		.server_identity = server->identity,
		.client_endpoint = client->endpoint,
		.server_endpoint = server->endpoint,
		.egress_set = flow->egress.l7_set,
		.ingress_set = flow->ingress.l7_set,
	};
	struct l7_flow *before;

	addr_copy(&key.client, &flow->key.addr[first]);
	addr_copy(&key.server, &flow->key.addr[first ^ 1]);
	before = bpf_map_lookup_elem(&l7_flows, &key);
	if (!before)
		return map_insert(&l7_flows, &key, &row) ? -DROP_NO_PROXY : 0;
	/*
	 * In place: who listens for the flow, proxy_listen alone says, and by no
	 * packet does a pod change it. A SYN may be one of a running flow.
	 */
	before->client_identity = row.client_identity;
	before->server_identity = row.server_identity;
	before->client_endpoint = row.client_endpoint;
	before->server_endpoint = row.server_endpoint;
	before->egress_set = row.egress_set;
	before->ingress_set = row.ingress_set;
	return 0;
}

/*
 * Who listens for one rule set judges by no other: when rules have changed,
 * nothing of the flow gets there any more, and the agent ends its sockets. Every
 * packet is compared: the row of the flow has the new verdict before the row
 * here does. A SYN gets a listener of the rules of now (proxy_listen), or the
 * flow's socket takes nothing from it. 0 or a drop.
 */
static __always_inline int proxy_check(const struct packet *packet,
				       struct scratch *room)
{
	struct l7_flow *row;

	if (packet->protocol != IPPROTO_TCP ||
	    (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return 0;
	proxy_key_of(packet, &room->l7_key,
		     packet->flags & PACKET_REPLY ? 1 : 0);
	row = bpf_map_lookup_elem(&l7_flows, &room->l7_key);
	return row && row->listener_set &&
			       row->listener_set != l7_flow_only_set(row)
		       ? -DROP_NO_PROXY
		       : 0;
}

/*
 * Says so before the packet goes to its pod by the node's stack: to_pod finds a
 * running flow and would not say it. 0 or a drop.
 */
__weak __noinline int proxy_expect(struct packet *packet)
{
	struct scratch *room = scratch_get();

	if (!packet || !room)
		return -DROP_NO_PROXY;
	if (!(packet->flags & PACKET_TELL_PROXY))
		return 0;
	return proxy_tell(packet, &room->flow);
}

/* The frame is for the other end of the pair: 0 or a drop. */
static __always_inline int proxy_address(struct __sk_buff *ctx,
					 const struct proxy_device *device)
{
	return bpf_skb_store_bytes(ctx, 0, device->mac, sizeof(device->mac), 0)
		       ? -DROP_WRITE_ERROR
		       : 0;
}

/* To the proxy: an action of tc, or a drop. */
__weak __noinline int proxy_take(struct __sk_buff *ctx, struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct proxy_device *device;
	__u32 zero = 0;
	int ret = 0;

	if (!packet || !room)
		return -DROP_NO_PROXY;
	device = bpf_map_lookup_elem(&proxy, &zero);
	if (!device || !device->ifindex)
		return -DROP_NO_PROXY;
	if (packet->flags & PACKET_TELL_PROXY)
		ret = proxy_tell(packet, &room->flow);
	if (!ret)
		ret = proxy_check(packet, room);
	if (ret)
		return ret;
	if (!(packet->flags & PACKET_FROM_STACK))
		return bpf_redirect_peer(device->ifindex, 0);
	/* What a device sends cannot go to the other end at once. */
	ret = proxy_address(ctx, device);
	return ret ? ret : bpf_redirect(device->ifindex, 0);
}
