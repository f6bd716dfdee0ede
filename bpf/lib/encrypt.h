/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Encryption between nodes. The programs know one device that encrypts what is
 * sent to it (settings.encrypt_ifindex): the kernel's WireGuard, a user-space
 * process behind a TUN device, or an xfrm interface.
 *
 * Two walls stand on the devices that lead out. The egress wall hands the device
 * whatever is for a pod of another node, and every tunnel packet to one. The
 * ingress wall drops the same where it comes in plain. Both look at the rows of
 * `addresses` and `prefixes` alone, so no way through the programs or through
 * the stack gets past them.
 */
#pragma once

#include "identity.h"
#include "mark.h"
#include "parse.h"

/* One end of a packet as the walls see it, and the other end's address. */
struct encrypt_view {
	struct addr end __attribute__((aligned(8)));
	struct addr other __attribute__((aligned(8)));
	bool is_tunnel; /* of a tunnel, or a part of one */
};

static __always_inline bool encrypt_is_tunnel_port(struct __sk_buff *ctx,
						   __u32 udp)
{
	__be16 port = 0;

	return !bpf_skb_load_bytes(
		       ctx, udp + __builtin_offsetof(struct udphdr, destination),
		       &port, sizeof(port)) &&
	       port == bpf_htons(settings.tunnel_port);
}

static __always_inline bool encrypt_view_ipv4(struct __sk_buff *ctx,
					      bool of_source,
					      struct encrypt_view *view)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &ip, sizeof(ip)))
		return false;
	addr_from_ipv4(&view->end, of_source ? ip.source : ip.destination);
	addr_from_ipv4(&view->other, of_source ? ip.destination : ip.source);
	if (ip.protocol != IPPROTO_UDP || !settings.overlay_ifindex)
		return true;
	/* Later fragments have no port: they may be a tunnel packet's. */
	view->is_tunnel =
		ip.fragment & bpf_htons(IP_FRAGMENT_OFFSET) ||
		encrypt_is_tunnel_port(ctx, ETHERNET_LENGTH +
						    (ip.version_length & 0xf) *
							    4);
	return true;
}

/* The header of an IPv6 fragment. */
struct encrypt_fragment {
	__u8 next_header;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

static __always_inline bool encrypt_view_ipv6(struct __sk_buff *ctx,
					      bool of_source,
					      struct encrypt_view *view)
{
	__u32 next = ETHERNET_LENGTH + sizeof(struct ipv6hdr);
	struct encrypt_fragment fragment = {};
	struct ipv6hdr ip;
	__u8 protocol;

	if (bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &ip, sizeof(ip)))
		return false;
	__builtin_memcpy(view->end.w, of_source ? ip.source : ip.destination,
			 16);
	__builtin_memcpy(view->other.w, of_source ? ip.destination : ip.source,
			 16);
	protocol = ip.next_header;
	if (protocol == IPPROTO_FRAGMENT) {
		if (bpf_skb_load_bytes(ctx, next, &fragment, sizeof(fragment)))
			return true;
		protocol = fragment.next_header;
		next += sizeof(fragment);
	}
	/* What hides the port may be a tunnel packet. */
	if (settings.overlay_ifindex && is_extension_header(protocol)) {
		view->is_tunnel = true;
		return true;
	}
	if (protocol != IPPROTO_UDP || !settings.overlay_ifindex)
		return true;
	view->is_tunnel = fragment.offset & bpf_htons(0xfff8) ||
			  encrypt_is_tunnel_port(ctx, next);
	return true;
}

/* The packet's source or destination; false if it is no IP packet. */
static __always_inline bool encrypt_look(struct __sk_buff *ctx, bool of_source,
					 struct encrypt_view *view)
{
	view->is_tunnel = false;
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		return encrypt_view_ipv4(ctx, of_source, view);
	if (ctx->protocol == bpf_htons(ETH_P_IPV6))
		return encrypt_view_ipv6(ctx, of_source, view);
	return false;
}

/* The packet's other end is a pod of this node. */
static __always_inline bool encrypt_is_of_pod(const struct addr *addr)
{
	struct address *address = address_find(addr);

	return address && address->endpoint_id;
}

/*
 * What has this end may pass encrypted alone. Nodes speak to one another in
 * plain (the API server, health, the publication of keys itself); what they have
 * to say to pods, and their tunnels, they do not.
 */
static __always_inline bool encrypt_must(const struct encrypt_view *view)
{
	struct address *address = address_find(&view->end);
	struct prefix *prefix;

	if (address) {
		if (!(address->flags & ADDRESS_ENCRYPT))
			return false;
		return view->is_tunnel ||
		       address->flags & (ADDRESS_POD | ADDRESS_INTERNAL) ||
		       encrypt_is_of_pod(&view->other);
	}
	/* A pod that nobody has told of yet. */
	prefix = prefix_find(&view->end);
	return prefix && prefix->flags & PREFIX_ENCRYPT;
}

/* The device that encrypts now. What either of them decrypts is taken. */
static __always_inline __u32 encrypt_device(void)
{
	__u32 zero = 0;
	struct node_state *state = bpf_map_lookup_elem(&node_state, &zero);

	return state && state->flags & NODE_ENCRYPT_SECOND ?
		       settings.encrypt_second :
		       settings.encrypt_ifindex;
}

/* The egress wall, on a device that leads out: an action of tc. */
__weak __noinline int encrypt_leave(struct __sk_buff *ctx)
{
	struct encrypt_view view;

	if (!encrypt_look(ctx, false, &view) || !encrypt_must(&view))
		return TC_ACT_OK;
	mark_clear(ctx);
	return bpf_redirect(encrypt_device(), 0);
}

/* The ingress wall, on a device that leads out: 0 or a drop. */
__weak __noinline int encrypt_arrive(struct __sk_buff *ctx)
{
	struct encrypt_view view;

	if (!settings.encrypt_strict || !encrypt_look(ctx, true, &view))
		return 0;
	return encrypt_must(&view) ? -DROP_UNENCRYPTED : 0;
}

/*
 * ESP leaves the Ethernet header that the packet came with in front of what was
 * inside. Where there was none, data begins with the IP header.
 */
static __always_inline bool encrypt_has_ethernet(struct __sk_buff *ctx)
{
	struct iphdr ip, behind;

	return !bpf_skb_load_bytes_relative(ctx, 0, &ip, sizeof(ip),
					    BPF_HDR_START_NET) &&
	       !bpf_skb_load_bytes(ctx, ETHERNET_LENGTH, &behind,
				   sizeof(behind)) &&
	       !__builtin_memcmp(&ip, &behind, sizeof(ip));
}

/*
 * IPsec proves which node has sent a packet, and not that the addresses inside
 * are its: 0 or a drop. WireGuard has refused such packets already.
 */
static __always_inline int
encrypt_check_sender(struct __sk_buff *ctx, const struct bpf_xfrm_state *state)
{
	struct encrypt_view view;
	struct addr sender __attribute__((aligned(8)));
	struct address *address;
	struct prefix *prefix;
	const struct addr *node = NULL;

	if (state->family == AF_INET)
		addr_from_ipv4(&sender, state->remote[0]);
	else
		__builtin_memcpy(sender.w, state->remote, 16);
	if (!encrypt_look(ctx, true, &view))
		return -DROP_UNSUPPORTED_L3;
	address = address_find(&view.end);
	if (address) {
		node = &address->node;
	} else {
		prefix = prefix_find(&view.end);
		if (prefix && prefix->flags & PREFIX_POD_CIDR)
			node = &prefix->node;
	}
	return node && addr_equal(node, &sender) ? 0 : -DROP_INVALID_SOURCE_IP;
}

/*
 * What the encrypting device receives has no Ethernet header. With one, which
 * nobody reads, it is a packet like those of the devices that lead out.
 */
static __always_inline bool encrypt_add_ethernet(struct __sk_buff *ctx)
{
	struct ethhdr ethernet = {.protocol = ctx->protocol};

	return !bpf_skb_change_head(ctx, ETHERNET_LENGTH, 0) &&
	       !bpf_skb_store_bytes(ctx, 0, &ethernet, sizeof(ethernet), 0);
}

/* The packet cannot be given an Ethernet header. */
#define ENCRYPT_NO_ROOM 1

/*
 * Looks at what the encrypting device has decrypted, and gives it an Ethernet
 * header: 0, a drop, or ENCRYPT_NO_ROOM. A function of its own, so that its stack
 * is none of what follows. One device for both generations is that of IPsec:
 * a packet without a state was not decrypted there.
 */
__weak __noinline int encrypt_enter(struct __sk_buff *ctx)
{
	struct bpf_xfrm_state state = {};
	bool by_ipsec = !bpf_skb_get_xfrm_state(ctx, 0, &state, sizeof(state), 0);

	if (!(by_ipsec && encrypt_has_ethernet(ctx)) &&
	    !encrypt_add_ethernet(ctx))
		return ENCRYPT_NO_ROOM;
	if (by_ipsec)
		return encrypt_check_sender(ctx, &state);
	return settings.encrypt_ifindex == settings.encrypt_second ?
		       -DROP_UNENCRYPTED :
		       0;
}
