/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The key of connections (K5): the lower end first, so that both directions
 * meet the same entry with one lookup.
 */
#pragma once

#include "packet.h"

/* Fills the key of a flow; 1 if the packet's source is addr[1], else 0. */
static __always_inline __u32 connection_key_of(const struct packet *packet,
					       struct connection_key *key)
{
	const addr_words *source = (const void *)&packet->source;
	const addr_words *destination = (const void *)&packet->destination;
	bool high;

	if (source[1] != destination[1])
		high = source[1] > destination[1];
	else if (source[0] != destination[0])
		high = source[0] > destination[0];
	else
		high = packet->source_port > packet->destination_port;

	if (high) {
		addr_copy(&key->addr[0], &packet->destination);
		addr_copy(&key->addr[1], &packet->source);
		key->port[0] = packet->destination_port;
		key->port[1] = packet->source_port;
	} else {
		addr_copy(&key->addr[0], &packet->source);
		addr_copy(&key->addr[1], &packet->destination);
		key->port[0] = packet->source_port;
		key->port[1] = packet->destination_port;
	}
	key->protocol = packet->protocol;
	key->kind = CONNECTION_FLOW;
	key->pad[0] = 0;
	key->pad[1] = 0;
	return high;
}
