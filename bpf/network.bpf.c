// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The node's own devices. from_network gives pods what is theirs: answers to
 * masqueraded packets, what comes for services, by the tunnel for running flows,
 * and with native routing whatever is addressed to them; sends to other nodes
 * what their pods are to serve; everything else is the stack's. to_network
 * masquerades what pods send out of the cluster.
 */
#include "lib/announce.h"
#include "lib/encrypt.h"
#include "lib/flow.h"
#include "lib/forward.h"
#include "lib/fragment.h"
#include "lib/host.h"
#include "lib/icmp.h"
#include "lib/nat.h"
#include "lib/node_socket.h"
#include "lib/outside.h"
#include "lib/parse.h"
#include "lib/refuse.h"
#include "lib/service.h"
#include "lib/tunnel.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* An address of this node or of its pods. */
static __always_inline bool network_is_ours(const struct addr *addr)
{
	struct address *address = address_find(addr);

	return address && address->flags & ADDRESS_LOCAL;
}

/* A packet to an address that no pod of this node has: enum outside_way, or a
 * drop. A packet that cannot be parsed costs no row. */
static __always_inline int network_find_service(struct __sk_buff *ctx,
						struct packet *packet,
						int parsed)
{
	int ret;

	if (packet->flags & PACKET_ICMP_ERROR)
		return parsed ? OUTSIDE_STACK
			      : icmp_translate(ctx, packet, DIRECTION_INGRESS);
	if (parsed)
		return outside_translate(packet);
	ret = outside_find_service(ctx, packet);
	return ret == OUTSIDE_AWAY ? outside_send(ctx, packet) : ret;
}

/* Whose the packet is: enum outside_way, or a drop. */
static __always_inline int network_find_way(struct __sk_buff *ctx,
					    struct packet *packet, int parsed)
{
	struct address *address = address_find(&packet->destination);
	bool is_local = address && address->flags & ADDRESS_LOCAL;
	int ret = 0;

	if (address && address->endpoint_id) {
		if (packet->flags & PACKET_CONTROL)
			return -DROP_FORBIDDEN_ICMPV6;
		if (!parsed && direct_may_have_option(packet))
			direct_read(ctx, packet);
		return OUTSIDE_POD;
	}
	/* The tunnel would make a pod, or the node, of the sender. */
	if (address && address->flags & (ADDRESS_POD | ADDRESS_INTERNAL) &&
	    network_is_ours(&packet->source))
		return -DROP_INVALID_SOURCE_IP;
	/* A device's address may be newer than what `addresses` says: what a
	 * mapping or a frontend is for was the node's. */
	if (!(packet->flags & PACKET_ICMP_ERROR))
		ret = nat_restore(ctx, packet);
	if (!ret)
		ret = network_find_service(ctx, packet, parsed);
	if (ret == OUTSIDE_POD && settings.overlay_ifindex)
		egress_answer(packet);
	if (ret || is_local || packet->flags & PACKET_HAS_SERVICE)
		return ret;
	return outside_refuse_rest(packet);
}

enum network_flow {
	NETWORK_FLOW_NONE = 0, /* to be judged */
	NETWORK_FLOW_RUNS = 1, /* one whose verdict stands */
	NETWORK_FLOW_NODE = 2, /* the node's own */
};

/*
 * Whose a packet is that continues no flow under its name: enum network_flow, or
 * a drop. Its flow may have another source port on the way, or need one.
 */
__weak __noinline int network_find_flow(struct __sk_buff *ctx,
					struct packet *packet)
{
	int ret;

	if (!packet)
		return -DROP_INVALID_PACKET;
	if (packet->flags & PACKET_HAS_SERVICE &&
	    outside_is_for_node(ctx, packet))
		return NETWORK_FLOW_NODE;
	ret = service_avoid_clash(packet);
	if (ret > 0)
		ret = service_keep(packet);
	if (ret || !(packet->flags & PACKET_NEW_SOURCE))
		return ret;
	packet->flags &= ~(PACKET_BEGINS | PACKET_REPLACES | PACKET_CLASHES);
	return flow_established(ctx, packet) ? NETWORK_FLOW_RUNS
					     : NETWORK_FLOW_NONE;
}

/* Pods' connections from outside are looked for once more under the name that
 * they have on the way: new ones to a host port, and what comes late. */
static __always_inline bool network_may_clash(const struct packet *packet)
{
	if (packet->choice > CHOICE_HOST_PORT || packet->flags & PACKET_DIRECT)
		return false;
	if (packet->flags & (PACKET_HAS_SERVICE | PACKET_CLASHES))
		return true;
	return packet->protocol == IPPROTO_TCP &&
	       !(packet->tcp_flags & TCP_SYN);
}

/* The verdict on a packet that begins a flow, or whose flow's is stale. What is
 * denied leaves no choice of a backend. */
static __always_inline int network_open(struct __sk_buff *ctx,
					struct packet *packet)
{
	int ret = flow_open_again(ctx, packet);

	if (!ret)
		ret = flow_open(ctx, packet);
	if (ret < 0 && packet->choice == CHOICE_NEW)
		service_forget(packet);
	return ret;
}

/* The verdict on a packet for a pod: 0, or a drop; 1 if it is the node's. */
static __always_inline int network_decide(struct __sk_buff *ctx,
					 struct packet *packet)
{
	int ret;

	if (packet->flags & PACKET_ICMP_ERROR)
		return icmp_decide(ctx, packet);
	if (packet->choice == CHOICE_NEW) {
		ret = service_keep(packet);
		if (ret)
			return ret;
	}
	if (flow_established(ctx, packet))
		return 0;
	if (network_may_clash(packet)) {
		ret = network_find_flow(ctx, packet);
		if (ret == NETWORK_FLOW_NODE)
			return 1;
		if (ret)
			return ret > 0 ? 0 : ret;
	} else if (packet->choice && packet->flags & PACKET_CLASHES) {
		ret = service_keep(packet);
		if (ret)
			return ret;
	}
	ret = network_open(ctx, packet);
	return ret > 0 ? 0 : ret;
}

/* With native routing: what comes for a running flow goes to its pod. An action
 * of tc, or TC_ACT_OK for the ordinary way. */
__weak __noinline int network_receive(struct __sk_buff *ctx)
{
	struct connection *connection;
	struct endpoint *destination;
	struct packet_tuple tuple;
	struct fast fast;
	__u32 side;

	if (!fast_parse((void *)(long)ctx->data, (void *)(long)ctx->data_end,
			&tuple) ||
	    /* Whose they are must be looked at (connection_believe). */
	    tuple.tcp_flags & (TCP_SYN | TCP_FIN))
		return TC_ACT_OK;
	connection = fast_find(&fast, &tuple);
	if (!connection)
		return TC_ACT_OK;
	side = fast_side(&fast, connection);
	destination = fast_arrival(&fast, connection, side, tuple.is_ipv6);
	if (!destination)
		return TC_ACT_OK;
	fast_count(ctx, &fast, connection, side, tuple.tcp_flags, 0,
		   DIRECTION_INGRESS);
	return bpf_redirect_peer(destination->ifindex, 0);
}

/* What is for this node or a pod of its may wait; the rest is forwarded by the
 * stack, which needs no ports. As fragment_find_or_wait. */
static __always_inline int network_find_fragment(struct __sk_buff *ctx,
						 struct packet *packet,
						 __u32 share)
{
	struct address *address;

	if (!(packet->flags & PACKET_LATER_FRAGMENT))
		return fragment_find(packet, FRAGMENT_FROM_NETWORK, share);
	address = address_find(&packet->destination);
	if (!address || !(address->flags & ADDRESS_LOCAL))
		return fragment_find(packet, FRAGMENT_FROM_NETWORK, share);
	return fragment_find_or_wait(ctx, packet, FRAGMENT_FROM_NETWORK, share);
}

/* Neighbour discovery, of whatever address. */
static __always_inline bool network_is_neighbours(const struct packet *packet)
{
	return packet->flags & PACKET_CONTROL &&
	       (packet->icmp_type == ICMPV6_NEIGHBOUR_SOLICITATION ||
		packet->icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT);
}

/* A packet from the network, plain or decrypted: an action of tc. */
static __always_inline int network_arrive(struct __sk_buff *ctx)
{
	struct packet *packet;
	int parsed, ret;
	__u32 share;

	/* The stack decides on tags, and drops what others are sent. What has
	 * waited is addressed to nobody. */
	if (ctx->vlan_present ||
	    (ctx->pkt_type == PACKET_OTHERHOST && !wait_is_back(ctx)))
		return TC_ACT_OK;
	if (settings.tunnel_ifindex) {
		ret = tunnel_receive(ctx);
		if (ret != TUNNEL_BY_DEVICE)
			return ret;
	} else {
		ret = network_receive(ctx);
		if (ret != TC_ACT_OK)
			return ret;
	}
	if (ctx->protocol == bpf_htons(ETH_P_ARP))
		return announce_arp(ctx);
	packet = packet_begin(DIRECTION_INGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	parsed = packet_parse(ctx, packet);
	if (!(packet->flags & PACKET_HAS_ADDRESSES))
		return TC_ACT_OK;
	if (network_is_neighbours(packet)) {
		ret = announce_neighbour(ctx, packet);
		if (ret != TC_ACT_OK)
			return ret;
	}
	share = fragment_share_of_sender(packet);
	if (!parsed)
		parsed = network_find_fragment(ctx, packet, share);
	if (parsed > 0)
		return parsed;
	ret = network_find_way(ctx, packet, parsed);
	if (!ret) {
		ret = host_receive(ctx, packet, parsed);
		if (ret)
			return finish(ctx, packet, ret);
		/* Of what is the stack's later fragments are, too. */
		if (!parsed)
			fragment_keep(packet, share);
		wait_end(ctx);
		if (packet->choice == CHOICE_NODE)
			ret = rewrite_apply(ctx, packet);
		return ret ? finish(ctx, packet, ret) : TC_ACT_OK;
	}
	if (ret > 0)
		ret = parsed;
	if (ret < 0 && packet->choice == CHOICE_REFUSED)
		return refuse(ctx, packet, ret);
	if (!ret && packet_passes_by(packet)) {
		fragment_keep(packet, share);
		ret = outside_forward(ctx, packet);
		return ret < 0 ? refuse(ctx, packet, ret)
			       : finish(ctx, packet, ret);
	}
	if (!ret)
		ret = network_decide(ctx, packet);
	if (ret > 0) {
		fragment_keep(packet, share);
		return TC_ACT_OK;
	}
	if (ret)
		return finish(ctx, packet, ret);
	if (packet->route != ROUTE_ENDPOINT)
		return finish(ctx, packet, -DROP_UNROUTABLE_IP);
	fragment_keep(packet, share);
	/* to_pod gives its verdict once more: no mark survives netfilter that
	 * it could trust. */
	if (packet->source_route == ROUTE_GUARDED) {
		ret = proxy_expect(packet);
		if (!ret)
			ret = rewrite_apply(ctx, packet);
		return finish(ctx, packet, ret ? ret : TC_ACT_OK);
	}
	return finish(ctx, packet, forward(ctx, packet));
}

/* A packet that must not come so, in plain or of this sender: counts and reports it. */
static __noinline int network_refuse(struct __sk_buff *ctx, int drop)
{
	struct packet *packet = packet_begin(DIRECTION_INGRESS);

	if (!packet)
		return TC_ACT_SHOT;
	packet_parse(ctx, packet);
	return finish(ctx, packet, drop);
}

SEC("tcx/ingress")
int from_network(struct __sk_buff *ctx)
{
	int ret = settings.encrypt_ifindex ? encrypt_arrive(ctx) : 0;

	return ret ? network_refuse(ctx, ret) : network_arrive(ctx);
}

/* What the encrypting device has decrypted: its sender is who it says it is. */
SEC("tcx/ingress")
int from_encrypted(struct __sk_buff *ctx)
{
	int ret = encrypt_enter(ctx);

	if (ret == ENCRYPT_NO_ROOM)
		return TC_ACT_SHOT;
	return ret ? network_refuse(ctx, ret) : network_arrive(ctx);
}

/*
 * 1 if what a pod sends there must bear the node's address, 0 if not, or a drop.
 * The guard behind leave(): whatever leaves by it has its mark and is not seen
 * here, so a pod's packet to another node's pod has missed the tunnel.
 */
static __always_inline int
network_must_masquerade(struct packet *packet, const struct egress_rule *rule)
{
	struct peer to = {};

	identity_resolve(&packet->destination, &to);
	if (to.route == ROUTE_NOWHERE)
		return -DROP_UNROUTABLE_IP;
	if (to.flags & (ADDRESS_POD | ADDRESS_INTERNAL))
		return settings.tunnel_ifindex ? -DROP_NO_TUNNEL_ENDPOINT : 0;
	/* Whatever way it came: never with another address. */
	if (packet->flags & PACKET_CLOSED)
		return flow_is_reply(packet) ? 0 : -DROP_NO_EGRESS_GATEWAY;
	if (rule) {
		if (flow_is_reply(packet))
			return 0;
		return packet_is_tunnel(packet)
			       ? -DROP_ENCAPSULATION_PROHIBITED
			       : egress_may_leave(rule);
	}
	if (!(packet->flags & PACKET_IPV6 ? settings.masquerade_ipv6
					  : settings.masquerade_ipv4))
		return 0;
	/* Who asked the pod by its own address hears from that address. */
	if (flow_is_reply(packet))
		return 0;
	/* With native routing nodes know the way to pods. */
	if (!settings.tunnel_ifindex && to.flags & ADDRESS_NODE)
		return 0;
	return packet_is_tunnel(packet) ? -DROP_ENCAPSULATION_PROHIBITED : 1;
}

/* The node's NAT has made a tunnel packet of what came by a device: the node's
 * own come by none. */
static __always_inline bool network_is_forged(struct __sk_buff *ctx,
					      const struct packet *packet)
{
	return ctx->ingress_ifindex && packet_is_tunnel(packet);
}

static __always_inline int network_wall(struct __sk_buff *ctx)
{
	return settings.encrypt_ifindex ? encrypt_leave(ctx) : TC_ACT_OK;
}

/* The packet has another source than the rule about it says: that of a flow that
 * is older than the rule. */
static __always_inline bool network_differs(const struct packet *packet,
					    const struct egress_rule *rule,
					    const struct addr *node)
{
	const struct addr *with = rule ? egress_address(rule, node) : NULL;

	/* A service's client hears from the service. */
	return rule && packet->choice != CHOICE_ANSWER &&
	       (!with || !addr_equal(&packet->source, with));
}

static __always_inline int network_leave(struct __sk_buff *ctx)
{
	const struct egress_rule *rule;
	struct own_addresses *own;
	const struct addr *node;
	struct address *address;
	struct packet *packet;
	int parsed, ret;
	__u32 share;

	if (mark_is(ctx, MARK_LEAVE))
		return TC_ACT_OK;
	packet = packet_begin(DIRECTION_EGRESS);
	if (!packet)
		return TC_ACT_SHOT;
	parsed = packet_parse(ctx, packet);
	if (!(packet->flags & PACKET_HAS_ADDRESSES))
		return TC_ACT_OK;
	ret = host_send(ctx, packet, parsed);
	if (ret)
		return finish(ctx, packet, ret);
	own = own_device_find(ctx->ifindex);
	node = own ? own_addr(own, packet->flags & PACKET_IPV6) : NULL;
	if ((node && addr_equal(&packet->source, node)) ||
	    own_has_addr(&packet->source)) {
		if (network_is_forged(ctx, packet))
			return finish(ctx, packet,
				      -DROP_ENCAPSULATION_PROHIBITED);
		ret = parsed ? 0 : outside_answer_of_node(ctx, packet);
		if (ret < 0)
			return finish(ctx, packet, ret);
		if (!parsed && !ret)
			nat_keep_for_node(ctx, packet);
		return TC_ACT_OK;
	}
	/* Before a pod's packet may get the address of the node. */
	ret = network_wall(ctx);
	if (ret != TC_ACT_OK)
		return ret;
	address = address_find(&packet->source);
	if (!address || !(address->endpoint_id || address->flags & ADDRESS_POD))
		return TC_ACT_OK;
	rule = egress_of(packet, address);
	/* A pod of another node leaves by this one only if it is the gateway. */
	if (!address->endpoint_id && !(rule && rule->flags & EGRESS_HERE))
		return TC_ACT_OK;
	packet->source_endpoint = address->endpoint_id;
	packet->source_identity = address->identity;
	share = address->endpoint_id
			? fragment_share_of_endpoint(address->endpoint_id)
			: fragment_share_of_sender(packet);
	if (!parsed)
		parsed = fragment_find(packet, FRAGMENT_TO_NETWORK, share);
	ret = parsed ? parsed : network_must_masquerade(packet, rule);
	if (ret > 0 && packet->flags & PACKET_ICMP_ERROR) {
		ret = icmp_translate(ctx, packet, DIRECTION_EGRESS);
		/* Pods' addresses do not go out, and no other than the rule's. */
		if (!ret || (ret > 0 && network_differs(packet, rule, node)))
			ret = -DROP_NO_NAT_MAPPING;
	} else if (ret > 0) {
		ret = nat_masquerade(ctx, packet, egress_address(rule, node),
				     rule);
	}
	if (ret >= 0)
		fragment_keep(packet, share);
	return finish(ctx, packet, ret < 0 ? ret : TC_ACT_OK);
}

/* The wall comes behind the host's policy and its rows, which hold for what is
 * encrypted, too. */
SEC("tcx/egress")
int to_network(struct __sk_buff *ctx)
{
	int ret = network_leave(ctx);

	return ret == TC_ACT_OK ? network_wall(ctx) : ret;
}
