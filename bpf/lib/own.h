/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * This node's own addresses and devices, which change while the programs run.
 */
#pragma once

#include "identity.h"

static __always_inline const struct addr *
own_addr(const struct own_addresses *of, bool is_ipv6)
{
	return is_ipv6 ? &of->ipv6 : &of->ipv4;
}

/* By which the other nodes know this one. NULL only for the verifier. */
static __always_inline struct own_addresses *own_addresses_find(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&this_node, &zero);
}

/* A device that leads out of the node, or NULL. */
static __always_inline struct own_addresses *own_device_find(__u32 ifindex)
{
	return bpf_map_lookup_elem(&devices, &ifindex);
}

/* An address of this node itself, and not of its pods. */
static __always_inline bool own_has_addr(const struct addr *addr)
{
	struct address *address = address_find(addr);

	return address && address->flags & ADDRESS_LOCAL &&
	       !address->endpoint_id;
}
