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

/* Groups, everybody on the link, and what only stands for a pod itself. */
static __always_inline bool identity_is_nobody(const struct addr *addr)
{
	if (addr_is_ipv4(addr))
		return (addr->w[3] & bpf_htonl(0xf0000000)) ==
			       bpf_htonl(0xe0000000) ||
		       addr->w[3] == 0xffffffff ||
		       addr->w[3] == settings.loopback_ipv4.w[3];
	return (addr->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000) ||
	       addr_equal(addr, (const struct addr *)&settings.loopback_ipv6);
}

/* By a copy: older verifiers take no key out of a function's argument. */
static __noinline struct address *address_find(const struct addr *addr)
{
	struct addr key __attribute__((aligned(8)));

	addr_copy(&key, addr);
	return bpf_map_lookup_elem(&addresses, &key);
}

static __noinline void identity_of_prefix(const struct addr *addr,
					  struct peer *peer)
{
	struct prefix_key key = {.prefix_length = 128, .addr = *addr};
	struct prefix *prefix = bpf_map_lookup_elem(&prefixes, &key);

	peer->identity = IDENTITY_WORLD;
	peer->endpoint = 0;
	peer->flags = 0;
	peer->route = identity_is_nobody(addr) ? ROUTE_NOWHERE : ROUTE_STACK;
	if (!prefix)
		return;
	if (prefix->identity)
		peer->identity = prefix->identity;
	if (prefix->flags & PREFIX_POD_CIDR)
		peer->route = ROUTE_NOWHERE;
}

static __always_inline void identity_resolve(const struct addr *addr,
					     struct peer *peer)
{
	struct address *address = address_find(addr);

	if (address)
		identity_of_address(address, peer);
	else
		identity_of_prefix(addr, peer);
}

/* An address of one of the cluster's nodes. */
static __always_inline bool identity_is_node(const struct addr *addr)
{
	struct address *address = address_find(addr);

	return address && address->flags & (ADDRESS_NODE | ADDRESS_INTERNAL);
}
