// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The proxy's end of the flows that it judges (lib/proxy.h). from_proxy runs at
 * the node's side of the veth pair and takes what the proxy sends to both ends.
 * proxy_listen runs in the proxy's namespace and finds the socket of a new flow.
 */
#include "lib/flow.h"
#include "lib/forward.h"
#include "lib/fragment.h"
#include "lib/parse.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* The pod of this node that the packet is for is the one of the flow. */
static __always_inline bool proxy_has_addressee(const struct packet *packet)
{
	struct endpoint *endpoint;

	if (!packet->destination_endpoint)
		return true;
	endpoint = endpoint_by_id(packet->destination_endpoint);
	return endpoint && endpoint->flags & ENDPOINT_READY &&
	       endpoint_has(endpoint, &packet->destination, packet);
}

/* Counts what the client gets. */
static __always_inline void proxy_account(struct __sk_buff *ctx,
					  struct packet *packet,
					  struct connection_key *key,
					  struct connection *connection)
{
	__u32 event = connection_account(ctx, connection, packet, 1,
					 bpf_jiffies64());

	if (connection_ends(connection, packet->tcp_flags))
		connection_end(ctx, connection, key, event_flags_of(packet));
	else if (event)
		event_flow(ctx, packet, connection, event);
}

/*
 * Of which flow a packet of the proxy is, and where it goes: 0 or a drop. Who
 * may speak was judged when the packet's content came to the proxy.
 */
__weak __noinline int proxy_resume(struct __sk_buff *ctx,
				   struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection;
	struct connection_key *key;
	__u32 sender;

	if (!packet || !room)
		return -DROP_NO_PROXY;
	key = &room->flow.key;
	sender = connection_key_of(packet, key);
	connection = bpf_map_lookup_elem(&connections, key);
	if (!connection || !(connection->flags & CONNECTION_PROXY))
		return -DROP_NO_PROXY;
	sender = index_of_two(sender ^
			      (connection->flags & CONNECTION_INITIATOR_HIGH));
	packet->flags |= PACKET_FROM_PROXY;
	if (sender)
		packet->flags |= PACKET_REPLY;
	packet->source_identity = connection->identity[sender];
	packet->destination_identity = connection->identity[sender ^ 1];
	packet->source_endpoint = connection->endpoint[sender];
	packet->destination_endpoint = connection->endpoint[sender ^ 1];
	packet->source_route = connection->route[sender];
	packet->route = connection->route[sender ^ 1];
	if (packet->source_endpoint)
		packet->flags |= PACKET_FROM_POD;
	if (!proxy_has_addressee(packet))
		return -DROP_UNROUTABLE_IP;
	flow_restore_service(packet, connection);
	if (sender)
		proxy_account(ctx, packet, key, connection);
	return 0;
}

SEC("tcx/ingress")
int from_proxy(struct __sk_buff *ctx)
{
	struct packet *packet;
	__u32 share;
	int ret;

	packet = packet_begin(DIRECTION_EGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	ret = packet_parse(ctx, packet);
	/* The link's own: nobody is asked who has an address. */
	if (!(packet->flags & PACKET_HAS_ADDRESSES) ||
	    packet->flags & PACKET_CONTROL)
		return TC_ACT_SHOT;
	share = fragment_share_of_sender(packet);
	if (!ret)
		ret = fragment_find(packet, ctx->ifindex * 2, share);
	if (!ret)
		ret = proxy_resume(ctx, packet);
	if (ret)
		return finish(ctx, packet, ret);
	fragment_keep(packet, share);
	return finish(ctx, packet, forward(ctx, packet));
}

/* A new flow in the proxy's namespace gets its listener, whatever its port. */
SEC("sk_lookup")
int proxy_listen(struct bpf_sk_lookup *ctx)
{
	__u32 listener = ctx->family == AF_INET ? L7_LISTENER_TCP_IPV4
						: L7_LISTENER_TCP_IPV6;
	struct bpf_sock *socket;
	long ret;

	if (ctx->protocol == IPPROTO_UDP)
		listener += L7_LISTENER_UDP_IPV4;
	else if (ctx->protocol != IPPROTO_TCP)
		return SK_DROP;
	socket = bpf_map_lookup_elem(&l7_listeners, &listener);
	if (!socket)
		return SK_DROP;
	ret = bpf_sk_assign(ctx, socket, 0);
	bpf_sk_release(socket);
	return ret ? SK_DROP : SK_PASS;
}
