/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Addresses become identities in two steps: the exact address in a hash,
 * and only when nobody has it, the prefixes in a trie, which are slow.
 */
#pragma once

#include "packet.h"

/* What is known of an address. */
struct peer {
	__u32 identity;
	__u16 endpoint; /* of this node's pod, else 0 */
	__u16 flags;	/* enum address_flags; 0: from prefixes */
	__u8 route;	/* enum route */
};

static __always_inline bool route_is_stack(__u8 route)
{
	return route == ROUTE_STACK || route == ROUTE_GUARDED;
}

static __always_inline void identity_of_address(const struct address *address,
						struct peer *peer)
{
	peer->identity = address->identity;
	peer->endpoint = address->endpoint_id;
	peer->flags = address->flags;
	if (address->endpoint_id)
		peer->route = ROUTE_ENDPOINT;
	else if (address->flags & ADDRESS_LOCAL)
		peer->route = ROUTE_STACK;
	else if (address->flags & (ADDRESS_POD | ADDRESS_INTERNAL))
		peer->route = ROUTE_NODE;
	else
		peer->route = ROUTE_STACK;
}

/* 0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/4 and broadcast. */
static __always_inline bool identity_is_nobody_ipv4(__u32 ipv4)
{
	__u8 first = ipv4 >> 24;

	return !first || first == 127 || first >> 4 == 0xe ||
	       ipv4 == 0xffffffff;
}

/*
 * No end of a flow has the address: unspecified, loopback, a group, broadcast,
 * IPv6 of one link alone, or what stands for a pod itself.
 */
static __always_inline bool identity_is_nobody(const struct addr *addr)
{
	__u32 first = bpf_ntohl(addr->w[0]), last = bpf_ntohl(addr->w[3]);

	if (addr_is_ipv4(addr))
		return identity_is_nobody_ipv4(last) ||
		       addr->w[3] == settings.loopback_ipv4.w[3];
	return first >> 24 == 0xff || first >> 22 == 0xfe80 >> 6 ||
	       (!addr->w[0] && !addr->w[1] && !addr->w[2] && last <= 1) ||
	       addr_equal(addr, (const struct addr *)&settings.loopback_ipv6);
}

/* By a copy: older verifiers take no key out of a function's argument. */
static __noinline struct address *address_find(const struct addr *addr)
{
	struct addr key __attribute__((aligned(8)));

	addr_copy(&key, addr);
	return bpf_map_lookup_elem(&addresses, &key);
}

static __noinline struct prefix *prefix_find(const struct addr *addr)
{
	struct prefix_key key = {.prefix_length = 128, .addr = *addr};

	return bpf_map_lookup_elem(&prefixes, &key);
}

static __noinline void identity_of_prefix(const struct addr *addr,
					  struct peer *peer)
{
	struct prefix *prefix = prefix_find(addr);

	peer->identity = IDENTITY_WORLD;
	peer->endpoint = 0;
	peer->flags = 0;
	peer->route = ROUTE_STACK;
	if (!prefix)
		return;
	if (prefix->identity)
		peer->identity = prefix->identity;
	if (prefix->flags & PREFIX_POD_CIDR)
		peer->route = ROUTE_NOWHERE;
	else if (prefix->flags & PREFIX_GUARDED)
		peer->route = ROUTE_GUARDED;
}

static __always_inline void identity_resolve(const struct addr *addr,
					     struct peer *peer)
{
	struct address *address = address_find(addr);

	if (address)
		identity_of_address(address, peer);
	else
		identity_of_prefix(addr, peer);
	if (identity_is_nobody(addr))
		peer->route = ROUTE_NOWHERE;
}
