// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The host side of a pod's veth. from_pod sees what the pod sends: most packets
 * belong to a flow whose verdict stands and leave by the first few lines
 * (fast.h).
 * to_pod sees what the node's own stack sends to the pod; packets from other
 * pods never come by here.
 */
#include "lib/fast.h"
#include "lib/flow.h"
#include "lib/forward.h"
#include "lib/fragment.h"
#include "lib/icmp.h"
#include "lib/neighbour.h"
#include "lib/parse.h"
#include "lib/refuse.h"
#include "lib/service.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/*
 * The packet may be of a flow that has another source port on the way: another
 * flow has its name there, or had when it began.
 */
static __always_inline bool from_pod_may_clash(const struct packet *packet)
{
	if (packet->flags & PACKET_CLASHES)
		return true;
	return packet->flags & PACKET_BEGINS &&
	       !(packet->flags & PACKET_HAS_SERVICE) &&
	       packet->protocol == IPPROTO_TCP &&
	       !(packet->tcp_flags & TCP_SYN);
}

/*
 * The pod's packet is of no flow under this name. Names the backend if it goes
 * to a service: 1 if that flow is known, 0 if it must be judged, or a drop.
 */
__weak __noinline int from_pod_translate(struct __sk_buff *ctx,
					 struct packet *packet)
{
	int ret;

	if (!packet)
		return -DROP_INVALID_PACKET;
	ret = service_translate(packet);
	if (ret == SERVICE_TO_CHOOSE)
		ret = service_translate_new(packet);
	if (!ret && from_pod_may_clash(packet))
		ret = service_avoid_clash(packet);
	if (ret > 0)
		ret = service_keep(packet);
	if (ret)
		return ret;
	if (!(packet->flags & PACKET_HAS_SERVICE))
		return 0;
	packet->flags &= ~(PACKET_BEGINS | PACKET_REPLACES | PACKET_CLASHES);
	if (flow_established(ctx, packet))
		return 1;
	return packet->flags & PACKET_CLASHES ? service_keep(packet) : 0;
}

/*
 * The flow of this name is another one: the pod's to a service, on its way to
 * this backend. What it sends to the service never comes here by this name. The
 * backend may not know yet that it has ended: its socket would swallow a SYN.
 * That asks the few local slots only, as every new flow pays for it, and between
 * nodes one queue keeps a flow's packets in order.
 */
static __always_inline bool from_pod_clashes(const struct packet *packet,
					     const struct fast *fast)
{
	const struct connection *flow = fast->connection;

	if (!flow && packet->protocol == IPPROTO_TCP)
		flow = packet->tcp_flags & TCP_SYN
			       ? connection_ended_here(&fast->key)
			       : connection_ended(&fast->key);
	return flow && flow->flags & CONNECTION_TRANSLATED &&
	       (fast->source_index ^
		(flow->flags & CONNECTION_INITIATOR_HIGH)) ==
		       connection_client_side(flow) &&
	       !connection_is_expired(flow, packet->protocol, bpf_jiffies64());
}

/* Of a flow whose verdict stands; it may have been looked for already. */
static __always_inline bool from_pod_continues(struct __sk_buff *ctx,
					       struct packet *packet,
					       struct fast *fast)
{
	if (!fast->is_looked_up) {
		fast->source_index = connection_key_of(packet, &fast->key);
		fast->connection =
			bpf_map_lookup_elem(&connections, &fast->key);
	}
	if (from_pod_clashes(packet, fast)) {
		packet->flags |= PACKET_CLASHES;
		return false;
	}
	if (!fast->connection)
		fast->connection = flow_recall(packet, &fast->key);
	if (fast->connection)
		return flow_continue(ctx, packet, &fast->key, fast->connection,
				     fast->source_index);
	packet->flags |= PACKET_BEGINS;
	return false;
}

SEC("tcx/ingress")
int from_pod(struct __sk_buff *ctx)
{
	struct endpoint *endpoint;
	struct packet *packet;
	struct fast fast;
	__u32 share;
	int ret;

	ret = fast_from_pod(ctx, &fast);
	if (ret != FAST_OTHER_WAY)
		return ret;

	packet = packet_begin(DIRECTION_EGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	ret = packet_parse(ctx, packet);
	if (ret || packet->flags & PACKET_CONTROL)
		return neighbour_from_pod(ctx, packet, ret);

	endpoint = endpoint_of_source(ctx, packet);
	if (!endpoint || !endpoint_has(endpoint, &packet->source, packet))
		return finish(ctx, packet, -DROP_INVALID_SOURCE_IP);
	if (ctx->vlan_present)
		return finish(ctx, packet, -DROP_UNSUPPORTED_L2);
	if (!(endpoint->flags & ENDPOINT_READY))
		return finish(ctx, packet, -DROP_ENDPOINT_NOT_READY);
	packet->flags |= PACKET_FROM_POD;
	ctx->priority = endpoint_priority(endpoint);
	share = fragment_share_of_endpoint(packet->source_endpoint);
	ret = fragment_find_or_wait(ctx, packet, ctx->ifindex * 2, share);
	if (ret)
		return ret < 0 ? finish(ctx, packet, ret) : ret;

	if (packet->flags & PACKET_ICMP_ERROR) {
		ret = icmp_decide(ctx, packet);
		if (ret)
			return finish(ctx, packet, ret);
	} else if (!from_pod_continues(ctx, packet, &fast)) {
		ret = flow_open_again(ctx, packet);
		if (!ret)
			ret = from_pod_translate(ctx, packet);
		if (!ret)
			ret = flow_open(ctx, packet);
		if (ret < 0)
			return refuse(ctx, packet, ret);
	}
	fragment_keep(packet, share);
	return finish(ctx, packet, forward(ctx, packet));
}

/* Of a packet that the stack sends by this device: whose pod it is for. */
static __always_inline bool to_pod_is_addressee(struct __sk_buff *ctx,
						struct packet *packet)
{
	struct address *address;
	struct endpoint *endpoint;

	address = address_find(&packet->destination);
	if (!address || !address->endpoint_id)
		return false;
	packet->destination_endpoint = address->endpoint_id;
	endpoint = endpoint_by_id(address->endpoint_id);
	return endpoint && endpoint->ifindex == ctx->ifindex;
}

/*
 * Neighbour discovery and group messages belong to the link: the node's own
 * reach the pod, and nobody's through the node. An action of tc.
 */
static __always_inline int to_pod_control(struct __sk_buff *ctx,
					  struct packet *packet, __u32 device)
{
	__u8 hop_limit = 0, own = 255;

	if (packet->icmp_type <= ICMPV6_MLD_DONE ||
	    packet->icmp_type == ICMPV6_MLD2_REPORT)
		own = 1;
	if (device || packet->flags & PACKET_FRAGMENT ||
	    bpf_skb_load_bytes(ctx,
			       ETHERNET_LENGTH +
				       __builtin_offsetof(struct ipv6hdr,
							  hop_limit),
			       &hop_limit, 1) ||
	    hop_limit != own)
		return finish(ctx, packet, -DROP_FORBIDDEN_ICMPV6);
	return TC_ACT_OK;
}

/* To the pod, by its queue if it has one: an action of tc, or a drop. */
static __always_inline int to_pod_give(struct __sk_buff *ctx,
				       const struct packet *packet)
{
	__u32 id = packet->destination_endpoint;
	struct endpoint *endpoint = endpoint_by_id(id);

	return endpoint && limit_has(endpoint)
		       ? limit_queue(ctx, endpoint->ifindex, id)
		       : TC_ACT_OK;
}

SEC("tcx/egress")
int to_pod(struct __sk_buff *ctx)
{
	__u32 device = ctx->ingress_ifindex;
	struct packet *packet;
	__u32 share;
	int ret;

	packet = packet_begin(DIRECTION_INGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	ret = packet_parse(ctx, packet);
	/* The node's own ARP. */
	if (ret == -DROP_UNSUPPORTED_L3)
		return TC_ACT_OK;
	if (packet->flags & PACKET_CONTROL)
		return to_pod_control(ctx, packet, device);
	packet->flags |= PACKET_FROM_STACK;
	/* A socket of the node has made the packet, and no device has brought
	 * it: forwarded packets lose their device when they are cut again. */
	if (device)
		packet->flags |= PACKET_FORWARDED;
	else if (ctx->sk)
		packet->flags |= PACKET_FROM_HOST;

	if (!ret && !to_pod_is_addressee(ctx, packet))
		ret = -DROP_UNROUTABLE_IP;
	share = fragment_share_of_endpoint(packet->destination_endpoint);
	if (!ret)
		ret = fragment_find(packet, ctx->ifindex * 2 + 1, share);
	if (!ret)
		ret = judge(ctx, packet);
	if (ret)
		return finish(ctx, packet, ret);
	fragment_keep(packet, share);
	if (packet->flags & (PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION))
		ret = rewrite_apply(ctx, packet);
	if (!ret)
		ret = packet->flags & PACKET_TO_PROXY
			      ? proxy_take(ctx, packet)
			      : to_pod_give(ctx, packet);
	return finish(ctx, packet, ret);
}
