/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what the programs know of their own node.
 */
#pragma once

/* node_state[0]. */
struct node_state {
	__u32 address_epoch; /* raised when the identity of an address changes */
	__u32 flags;	     /* enum node_flags */
};

enum node_flags {
	NODE_PAST_STACK = 1 << 0, /* packets may go past the node's stack: it has no IPsec policies to apply */
	NODE_ENCRYPT_SECOND = 1 << 1, /* settings.encrypt_second encrypts: keys change by two devices in turn */
};

/*
 * devices[ifindex]: a device that leads out of the node, with the addresses that
 * the node gives to what leaves by it. this_node[0]: the addresses by which the
 * other nodes know this one. Zero: it has none of that family.
 */
struct own_addresses {
	struct addr ipv4;
	struct addr ipv6;
};
