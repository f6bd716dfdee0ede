// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The proxy's end of the flows that it judges (lib/proxy.h). from_proxy runs at
 * the node's side of the veth pair and takes what the proxy sends to both ends.
 * before_proxy runs where the proxy's namespace begins, and judges what of DNS
 * needs no proxy (lib/dns.h). proxy_listen runs there, too, and finds the socket
 * of a new flow.
 */
#include "lib/dns.h"
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

/* A datagram without options, which is no fragment and not several at once: its
 * message is noted. */
static __always_inline bool before_proxy_is_plain(struct __sk_buff *ctx,
						  const struct packet *packet,
						  struct dns_question *dns)
{
	__u32 headers = packet->flags & PACKET_IPV6 ? sizeof(struct ipv6hdr)
						    : sizeof(struct iphdr);
	struct udphdr udp;

	if (ctx->gso_size || ctx->vlan_present ||
	    packet->flags & PACKET_FRAGMENT ||
	    packet->l4_offset != ETHERNET_LENGTH + headers ||
	    bpf_skb_load_bytes(ctx, packet->l4_offset, &udp, sizeof(udp)))
		return false;
	dns->offset = packet->l4_offset + sizeof(udp);
	dns->length = bpf_ntohs(udp.length) - sizeof(udp);
	return bpf_ntohs(udp.length) > sizeof(udp) &&
	       packet_ip_length(ctx, packet) ==
		       headers + bpf_ntohs(udp.length);
}

/* A datagram of a flow that is the proxy's: an action of tc. */
__weak __noinline int before_proxy_judge(struct __sk_buff *ctx,
					 struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection;
	struct l7_flow *flow;
	__u16 denied_by = 0;
	bool is_answer;
	__u64 asked = 0;
	__u32 sender, jiffies;
	__u64 now;
	int verdict;

	if (!packet || !room)
		return TC_ACT_OK;
	sender = connection_key_of(packet, &room->flow.key);
	connection = bpf_map_lookup_elem(&connections, &room->flow.key);
	if (!connection || !(connection->flags & CONNECTION_PROXY))
		return TC_ACT_OK;
	is_answer = index_of_two(
		sender ^ (connection->flags & CONNECTION_INITIATOR_HIGH));
	proxy_key_of(packet, &room->l7_key, is_answer);
	flow = bpf_map_lookup_elem(&l7_flows, &room->l7_key);
	if (!flow)
		return TC_ACT_OK;
	now = bpf_ktime_get_ns();
	if (!before_proxy_is_plain(ctx, packet, &room->dns))
		verdict = DNS_TO_PROXY;
	else if (is_answer)
		verdict = dns_judge_answer(ctx, packet, room, flow, now,
					   &asked);
	else
		verdict = dns_judge_query(ctx, packet, room, flow, now,
					  &denied_by);
	if (verdict == DNS_TO_PROXY) {
		jiffies = bpf_jiffies64();
		if (!is_answer)
			flow->asked_jiffies = jiffies ? jiffies : 1;
		return TC_ACT_OK;
	}
	if (verdict == DNS_UNASKED) {
		packet->flags |= PACKET_REPLY;
		packet->source_identity = flow->server_identity;
		packet->source_endpoint = flow->server_endpoint;
		packet->destination_identity = flow->client_identity;
		packet->destination_endpoint = flow->client_endpoint;
		return finish(ctx, packet, -DROP_DNS_UNASKED);
	}
	if (verdict == DNS_DENIED) {
		verdict = dns_deny(ctx, packet, &room->dns);
		if (verdict)
			return finish(ctx, packet, verdict);
	}
	dns_note(ctx, room, flow, now, asked, denied_by);
	/* To from_proxy, as what the proxy sends. */
	return bpf_redirect_peer(ctx->ifindex, 0);
}

/*
 * What is judged must be what goes on. A pod can still write pages that it has
 * sent without a copy (splice, AF_PACKET's ring); a packet's linear part is the
 * kernel's own. False if the packet stays the pod's: nothing of it is judged.
 */
static __always_inline bool before_proxy_own(struct __sk_buff *ctx)
{
	if (packet_is_linear(ctx, ctx->len))
		return true;
	return !ctx->gso_size && ctx->len <= DNS_FRAME_MAX &&
	       !bpf_skb_pull_data(ctx, ctx->len);
}

SEC("tcx/ingress")
int before_proxy(struct __sk_buff *ctx)
{
	struct packet *packet = packet_begin(DIRECTION_EGRESS);

	if (!packet || !before_proxy_own(ctx) || packet_parse(ctx, packet) ||
	    packet->protocol != IPPROTO_UDP ||
	    packet->flags & PACKET_LATER_FRAGMENT)
		return TC_ACT_OK;
	return before_proxy_judge(ctx, packet);
}

/* The socket of the rule set that alone judges the new flow; NULL: it has none. */
static __always_inline struct bpf_sock *
proxy_listener_of_rules(struct bpf_sk_lookup *ctx)
{
	struct l7_rule_listener_key listener = {};
	struct l7_flow_key key __attribute__((aligned(8))) = {};
	struct bpf_sock *socket;
	struct l7_flow *flow;

	if (ctx->family == AF_INET) {
		addr_from_ipv4(&key.client, ctx->remote_ip4);
		addr_from_ipv4(&key.server, ctx->local_ip4);
	} else {
		listener.is_ipv6 = 1;
		key.client.w[0] = ctx->remote_ip6[0];
		key.client.w[1] = ctx->remote_ip6[1];
		key.client.w[2] = ctx->remote_ip6[2];
		key.client.w[3] = ctx->remote_ip6[3];
		key.server.w[0] = ctx->local_ip6[0];
		key.server.w[1] = ctx->local_ip6[1];
		key.server.w[2] = ctx->local_ip6[2];
		key.server.w[3] = ctx->local_ip6[3];
	}
	key.client_port = ctx->remote_port;
	key.server_port = bpf_htons(ctx->local_port);
	key.protocol = ctx->protocol;
	flow = bpf_map_lookup_elem(&l7_flows, &key);
	if (!flow)
		return NULL;
	flow->listener_set = 0;
	flow->alias = 0;
	listener.set = l7_flow_only_set(flow);
	if (!listener.set)
		return NULL;
	socket = bpf_map_lookup_elem(&l7_rule_listeners, &listener);
	if (socket)
		flow->listener_set = listener.set;
	return socket;
}

/* A new flow in the proxy's namespace gets its listener, whatever its port. */
SEC("sk_lookup")
int proxy_listen(struct bpf_sk_lookup *ctx)
{
	__u32 listener = ctx->family == AF_INET ? L7_LISTENER_TCP_IPV4
						: L7_LISTENER_TCP_IPV6;
	struct bpf_sock *socket = NULL;
	long ret;

	if (ctx->protocol == IPPROTO_UDP)
		listener += L7_LISTENER_UDP_IPV4;
	else if (ctx->protocol == IPPROTO_TCP)
		socket = proxy_listener_of_rules(ctx);
	else
		return SK_DROP;
	if (!socket)
		socket = bpf_map_lookup_elem(&l7_listeners, &listener);
	if (!socket)
		return SK_DROP;
	ret = bpf_sk_assign(ctx, socket, 0);
	bpf_sk_release(socket);
	return ret ? SK_DROP : SK_PASS;
}
