/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The key of connections: the lower end first, so that both directions
 * meet the same entry with one lookup.
 */
#pragma once

#include "packet.h"

/* Fills the key of a flow; 1 if the packet's source is addr[1], else 0. */
static __always_inline __u32
connection_key_fill(const addr_words *source, const addr_words *destination,
		    __be16 source_port, __be16 destination_port, __u8 protocol,
		    struct connection_key *key)
{
	addr_words *first = (void *)&key->addr[0];
	addr_words *second = (void *)&key->addr[1];
	bool source_index;

	if (source[1] != destination[1])
		source_index = source[1] > destination[1];
	else if (source[0] != destination[0])
		source_index = source[0] > destination[0];
	else
		source_index = source_port > destination_port;

	if (source_index) {
		first[0] = destination[0];
		first[1] = destination[1];
		second[0] = source[0];
		second[1] = source[1];
		key->port[0] = destination_port;
		key->port[1] = source_port;
	} else {
		first[0] = source[0];
		first[1] = source[1];
		second[0] = destination[0];
		second[1] = destination[1];
		key->port[0] = source_port;
		key->port[1] = destination_port;
	}
	key->protocol = protocol;
	key->kind = CONNECTION_FLOW;
	key->asker = 0;
	key->icmp_type = 0;
	return source_index;
}

/* The same for a packet. */
static __always_inline __u32 connection_key_of(const struct packet *packet,
					       struct connection_key *key)
{
	__u32 source_index = connection_key_fill(
		(const void *)&packet->source,
		(const void *)&packet->destination, packet->source_port,
		packet->destination_port, packet->protocol, key);

	if (packet->flags & PACKET_ASKS)
		key->asker = 1 + source_index;
	else if (packet->flags & PACKET_ANSWERS)
		key->asker = 2 - source_index;
	/* One identifier may serve queries of several types. */
	if (key->asker)
		key->icmp_type = icmp_asked(packet);
	return source_index;
}

static __always_inline bool connection_key_equal(const struct connection_key *a,
						 const struct connection_key *b)
{
	const __u64 *first = (const void *)a;
	const __u64 *second = (const void *)b;

	return first[0] == second[0] && first[1] == second[1] &&
	       first[2] == second[2] && first[3] == second[3] &&
	       first[4] == second[4];
}
