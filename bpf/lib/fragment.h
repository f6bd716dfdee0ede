/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Only the first fragment of a packet has ports. Its ports are kept in
 * `fragments` once it was allowed, for the fragments that follow. A row serves
 * fragments that come by the same way only (the same program, the same pod's
 * device), and each pod has rows of its own: nobody's fragments replace or
 * serve another pod's.
 */
#pragma once

#include "connection.h"
#include "wait.h"

/* Half of the shares are for the pods of this node, half for everybody else. */
#define FRAGMENT_SHARES_OF_PODS (FRAGMENT_SHARES / 2)

/* Of the node's network devices, whichever it is: what they receive and send. */
#define FRAGMENT_FROM_NETWORK 0
#define FRAGMENT_TO_NETWORK 1

/* A first fragment and those that follow come within this time. */
#define FRAGMENT_SECONDS 5

static __always_inline __u32 fragment_share_of_endpoint(__u32 endpoint_id)
{
	return endpoint_id % FRAGMENT_SHARES_OF_PODS;
}

/* Of a sender elsewhere. */
static __always_inline __u32
fragment_share_of_sender(const struct packet *packet)
{
	const addr_words *from = (const void *)&packet->source;

	return FRAGMENT_SHARES_OF_PODS +
	       ((from[0] ^ from[1]) * 0x9e3779b97f4a7c15 >> 32) %
		       FRAGMENT_SHARES_OF_PODS;
}

/* What a row says, summed up; never 0. */
static __always_inline __u64 fragment_sum(const struct fragment *row)
{
	const __u64 *words = (const void *)row;
	__u64 sum = 0x9e3779b97f4a7c15;

	for (int i = 0; i < (int)(sizeof(*row) / 8) - 1; i++)
		sum = (sum ^ words[i]) * 0xd6e8feb86659fd93;
	return sum | 1;
}

/* The row that the packet's fragments have in a share. */
static __always_inline struct fragment *
fragment_slot(const struct fragment *of, __u32 share)
{
	const addr_words *to = (const void *)&of->destination;
	__u64 hash = to[0] ^ to[1] ^ ((__u64)of->id << 32 | of->way);
	__u32 slot;

	hash = hash * 0x9e3779b97f4a7c15;
	hash ^= hash >> 29;
	slot = hash * 0xd6e8feb86659fd93 >> 32;
	slot = share % FRAGMENT_SHARES * FRAGMENT_SLOTS + slot % FRAGMENT_SLOTS;
	return bpf_map_lookup_elem(&fragments, &slot);
}

/* Both are fragments of one packet, and `row` is not too old. IPv6 has one
 * series of numbers for all protocols (RFC 8200, 4.5). */
static __always_inline bool fragment_matches(const struct fragment *row,
					     const struct fragment *of,
					     bool is_ipv6)
{
	return row->id == of->id && row->way == of->way &&
	       addr_equal(&row->source, &of->source) &&
	       addr_equal(&row->destination, &of->destination) &&
	       (is_ipv6 || row->protocol == of->protocol) &&
	       (__s64)(of->seen_jiffies - row->seen_jiffies) <
		       (__s64)seconds_to_jiffies(FRAGMENT_SECONDS);
}

/* fragment_find of a fragment. */
__weak __noinline int fragment_find_slow(struct packet *packet, __u32 way,
					 __u32 share)
{
	struct scratch *room = scratch_get();
	struct fragment *of, *row, *copy;

	if (!packet || !room)
		return -DROP_FRAGMENT_NOT_FOUND;
	of = &room->fragment;
	__builtin_memset(of, 0, sizeof(*of));
	addr_copy(&of->source, &packet->source);
	addr_copy(&of->destination, &packet->destination);
	of->seen_jiffies = bpf_jiffies64();
	of->id = packet->fragment_id;
	of->way = way;
	of->source_port = packet->source_port;
	of->destination_port = packet->destination_port;
	of->protocol = packet->protocol;
	of->asks = packet->flags & PACKET_ASKS ? 1 : 0;
	of->answers = packet->flags & PACKET_ANSWERS ? 1 : 0;
	of->icmp_type = packet->icmp_type;
	if (packet->flags & PACKET_FRAGMENT)
		return 0;

	row = fragment_slot(of, share);
	copy = &room->known_fragment;
	if (!row)
		return -DROP_FRAGMENT_NOT_FOUND;
	/* Another CPU may write the row meanwhile: what was copied counts. */
	*copy = *row;
	barrier();
	if (copy->check != fragment_sum(copy) ||
	    !fragment_matches(copy, of, packet->flags & PACKET_IPV6))
		return -DROP_FRAGMENT_NOT_FOUND;
	packet->source_port = copy->source_port;
	packet->destination_port = copy->destination_port;
	packet->protocol = copy->protocol;
	packet->icmp_type = copy->icmp_type;
	packet->flags |= copy->asks ? PACKET_ASKS : 0;
	packet->flags |= copy->answers ? PACKET_ANSWERS : 0;
	return 0;
}

/*
 * Gives a later fragment the ports of its packet's first one, which came by the
 * same way. 0, also for what is no fragment, or a drop. What a first fragment's
 * row is to say is noted here, before translation changes the packet.
 */
static __always_inline int fragment_find(struct packet *packet, __u32 way,
					 __u32 share)
{
	return packet->flags & (PACKET_FRAGMENT | PACKET_LATER_FRAGMENT)
		       ? fragment_find_slow(packet, way, share)
		       : 0;
}

/*
 * The same, but a fragment whose first one is not known may wait for it: then an
 * action of tc, which is all that is left to do.
 */
static __always_inline int fragment_find_or_wait(struct __sk_buff *ctx,
						 struct packet *packet,
						 __u32 way, __u32 share)
{
	int ret = fragment_find(packet, way, share);

	if (ret == -DROP_FRAGMENT_NOT_FOUND)
		return wait_for_first(ctx, packet, share);
	if (packet->flags & PACKET_LATER_FRAGMENT)
		wait_end(ctx);
	return ret;
}

/* fragment_keep of a first fragment. */
__weak __noinline int fragment_keep_slow(__u32 share)
{
	struct scratch *room = scratch_get();
	struct fragment *row;

	if (!room)
		return 0;
	row = fragment_slot(&room->fragment, share);
	if (!row)
		return 0;
	room->fragment.check = fragment_sum(&room->fragment);
	*row = room->fragment;
	return 0;
}

/* The packet was allowed: those that follow a first fragment may be, too. */
static __always_inline void fragment_keep(const struct packet *packet,
					  __u32 share)
{
	if (packet->flags & PACKET_FRAGMENT)
		fragment_keep_slow(share);
}
