// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The VXLAN device, which carries the sender's identity in the VNI.
 * from_overlay takes packets of other nodes' pods to ours; to_overlay sends
 * what the node's own stack has for pods of other nodes.
 */
#include "lib/flow.h"
#include "lib/forward.h"
#include "lib/fragment.h"
#include "lib/host.h"
#include "lib/icmp.h"
#include "lib/outside.h"
#include "lib/parse.h"
#include "lib/refuse.h"
#include "lib/tunnel.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* The source of the outer packet, which must be for this node: 0 or a drop. */
static __always_inline int overlay_find_node(struct __sk_buff *ctx,
					     struct bpf_tunnel_key *key,
					     struct addr *node)
{
	struct own_addresses *own = own_addresses_find();
	bool is_ipv6 = false;
	struct addr to __attribute__((aligned(8))) = {};

	if (!bpf_skb_get_tunnel_key(ctx, key, sizeof(*key), 0)) {
		addr_from_ipv4(node, bpf_htonl(key->remote_ipv4));
		addr_from_ipv4(&to, bpf_htonl(key->local_ipv4));
	} else if (!bpf_skb_get_tunnel_key(ctx, key, sizeof(*key),
					   BPF_F_TUNINFO_IPV6)) {
		__builtin_memcpy(node->w, key->remote_ipv6, 16);
		__builtin_memcpy(to.w, key->local_ipv6, 16);
		is_ipv6 = true;
	} else {
		return -DROP_UNKNOWN_SENDER;
	}
	/* Nodes send to this address alone. What guards it (a firewall between
	 * the nodes, say) need not guard the others. */
	return own && addr_equal(&to, own_addr(own, is_ipv6))
		       ? 0
		       : -DROP_ENCAPSULATION_PROHIBITED;
}

/* Who sent the outer packet, and whom he speaks for: 0 or a drop. */
static __noinline int overlay_check_sender(struct __sk_buff *ctx,
						struct packet *packet)
{
	struct bpf_tunnel_key key = {};
	struct addr node __attribute__((aligned(8))) = {};
	int ret;

	ret = overlay_find_node(ctx, &key, &node);
	/* It has no tunnel key: a fragment that has waited, whose sender was
	 * checked before. */
	if (ret == -DROP_UNKNOWN_SENDER &&
	    wait_identity(ctx, &packet->source_identity))
		return 0;
	if (!ret)
		ret = tunnel_check_identity(&key.tunnel_id);
	if (!ret)
		ret = tunnel_check_sender(&node, &packet->source,
					  &key.tunnel_id);
	if (!ret)
		packet->source_identity = key.tunnel_id;
	return ret;
}

/*
 * What the node's own stack asked for, or is asked: no pod's policy applies.
 * 1 if it is, 0 if it is a pod's, or a drop.
 */
static __always_inline int overlay_is_for_node(const struct packet *packet)
{
	struct address *address;

	address = address_find(&packet->destination);
	if (!address || !(address->flags & ADDRESS_LOCAL) ||
	    address->endpoint_id)
		return 0;
	if (identity_is_nobody(&packet->source))
		return -DROP_INVALID_SOURCE_IP;
	/* What the tunnel carried for others would come out as theirs. */
	return packet_is_tunnel(packet) ? -DROP_ENCAPSULATION_PROHIBITED : 1;
}

/* A backend of another node answers a client outside, which it knows by this
 * node's address: 1, 0 if it does not, or a drop. */
__weak __noinline int overlay_answer_client(struct __sk_buff *ctx,
					    struct packet *packet)
{
	if (!packet || !own_has_addr(&packet->destination))
		return 0;
	return packet->flags & PACKET_ICMP_ERROR
		       ? icmp_translate(ctx, packet, DIRECTION_INGRESS)
		       : nat_restore(ctx, packet);
}

/* Most packets belong to a flow whose verdict stands. */
static __always_inline int overlay_decide(struct __sk_buff *ctx,
					 struct packet *packet)
{
	int ret;

	if (!(packet->flags & PACKET_ICMP_ERROR) &&
	    flow_established(ctx, packet))
		return 0;
	ret = overlay_answer_client(ctx, packet);
	if (ret < 0 || packet_passes_by(packet))
		return ret < 0 ? ret : 0;
	if (!(packet->flags & PACKET_ICMP_ERROR)) {
		ret = flow_open_again(ctx, packet);
		if (ret)
			return ret > 0 ? 0 : ret;
	}
	ret = settings.overlay_ifindex ? egress_receive(packet) : 0;
	if (ret < 0 || packet_passes_by(packet))
		return ret < 0 ? ret : 0;
	ret = overlay_is_for_node(packet);
	if (ret > 0) {
		packet->route = ROUTE_STACK;
		return host_receive(ctx, packet, 0);
	}
	if (ret)
		return ret;
	return packet->flags & PACKET_ICMP_ERROR ? icmp_decide(ctx, packet)
						 : flow_open(ctx, packet);
}

SEC("tcx/ingress")
int from_overlay(struct __sk_buff *ctx)
{
	struct packet *packet;
	__u32 share;
	int ret;

	packet = packet_begin(DIRECTION_INGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	packet->flags = PACKET_FROM_OVERLAY;
	ret = packet_parse(ctx, packet);
	if (!ret)
		ret = overlay_check_sender(ctx, packet);
	if (!ret && packet->flags & PACKET_CONTROL)
		ret = -DROP_FORBIDDEN_ICMPV6;
	if (!ret && direct_may_have_option(packet))
		direct_read(ctx, packet);
	share = fragment_share_of_sender(packet);
	if (!ret)
		ret = fragment_find_or_wait(ctx, packet, ctx->ifindex * 2,
					    share);
	if (ret > 0)
		return ret;
	if (!ret)
		ret = overlay_decide(ctx, packet);
	if (ret)
		return finish(ctx, packet, ret);
	fragment_keep(packet, share);
	/* The inner frame is addressed to nobody here. */
	if (bpf_skb_change_type(ctx, PACKET_HOST))
		return finish(ctx, packet, -DROP_WRITE_ERROR);
	if (packet_passes_by(packet)) {
		ret = outside_forward(ctx, packet);
		return ret < 0 ? refuse(ctx, packet, ret)
			       : finish(ctx, packet, ret);
	}
	return finish(ctx, packet, forward(ctx, packet));
}

/*
 * For whom the node's stack sends: a drop, or the number that goes with the
 * packet. The node answers only for what a socket of its own has made; behind
 * its address is anybody else, after its NAT.
 */
static __always_inline int overlay_identity(struct __sk_buff *ctx,
					    const struct packet *packet)
{
	struct address *address = address_find(&packet->source);
	struct endpoint *endpoint;

	if (!address)
		return IDENTITY_WORLD;
	/* The other nodes' own come from them. */
	if (!(address->flags & ADDRESS_LOCAL))
		return -DROP_INVALID_SOURCE_IP;
	if (!address->endpoint_id)
		return ctx->sk && !ctx->ingress_ifindex ? IDENTITY_REMOTE_NODE
							: IDENTITY_WORLD;
	endpoint = endpoint_by_id(address->endpoint_id);
	if (!endpoint || endpoint->ifindex != ctx->ingress_ifindex)
		return -DROP_INVALID_SOURCE_IP;
	return endpoint->identity;
}

SEC("tcx/egress")
int to_overlay(struct __sk_buff *ctx)
{
	struct address *address;
	struct packet *packet;
	int identity, parsed, ret;

	/* from_pod has set the tunnel key. */
	if (mark_is(ctx, MARK_LEAVE)) {
		mark_clear(ctx);
		return TC_ACT_OK;
	}
	packet = packet_begin(DIRECTION_EGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	parsed = packet_parse(ctx, packet);
	if (!(packet->flags & PACKET_HAS_ADDRESSES))
		return finish(ctx, packet, -DROP_UNSUPPORTED_L3);
	/* What the stack tells every device (MLD, mDNS) is no packet lost. */
	if (addr_is_multicast(&packet->destination))
		return TC_ACT_SHOT;
	if (packet->flags & PACKET_CONTROL)
		return finish(ctx, packet, -DROP_FORBIDDEN_ICMPV6);
	address = address_find(&packet->destination);
	if (!address || addr_is_zero(&address->node))
		return finish(ctx, packet, -DROP_NO_TUNNEL_ENDPOINT);
	identity = overlay_identity(ctx, packet);
	if (identity < 0)
		return finish(ctx, packet, identity);
	ret = host_send(ctx, packet, parsed);
	if (!ret)
		ret = forward_set_tunnel_key(ctx, &address->node, identity);
	return finish(ctx, packet, ret ? ret : TC_ACT_OK);
}
