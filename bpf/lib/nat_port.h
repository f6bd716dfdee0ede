/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Translated source ports: which port of the node a pod's flow gets, and how
 * long it keeps it. A port is a flow's while the row for the way back says so;
 * that row is inserted first and never overwrites.
 */
#pragma once

#include "hash.h"
#include "node_socket.h"

/*
 * Places that are looked at for a new flow, of which at least every second one
 * is a port. With a share f of all ports in use a flow finds none with
 * probability f^512 at best: 0.6 % at 99 %, nothing at 95 %. A
 * port costs one look-up.
 */
#define NAT_STEPS 512

/* A port whose connection has ended rests so long before another flow gets it. */
#define NAT_REST_SECONDS 1

static __always_inline bool nat_may_have_port(__be16 port)
{
	__u16 number = bpf_ntohs(port);

	return number >= settings.nat_known_min &&
	       number <= settings.nat_known_max;
}

static __always_inline bool nat_row_is(const struct nat *row,
				       const struct addr *addr, __be16 port)
{
	return row->port == port && addr_equal(&row->addr, addr);
}

/* Both rows say the same end, and of a client's flow the same frontend. */
static __always_inline bool nat_row_equal(const struct nat *a,
					  const struct nat *b)
{
	return nat_row_is(a, &b->addr, b->port) &&
	       a->service_port == b->service_port &&
	       addr_equal(&a->service, &b->service);
}

/* The port is the node's: a packet to it is for the stack. */
static __always_inline bool nat_is_nodes(const struct nat *back,
					 const struct nat_key *key)
{
	return nat_row_is(back, &key->local, key->local_port);
}

/* The key of the row for the other direction. */
static __always_inline void nat_key_turn(const struct nat_key *key,
					 const struct nat *row,
					 struct nat_key *other)
{
	addr_copy(&other->local, &row->addr);
	addr_copy(&other->remote, &key->remote);
	other->local_port = row->port;
	other->remote_port = key->remote_port;
	other->protocol = key->protocol;
	other->direction = key->direction == DIRECTION_EGRESS
				   ? DIRECTION_INGRESS
				   : DIRECTION_EGRESS;
	other->pad[0] = 0;
	other->pad[1] = 0;
}

static __always_inline bool nat_is_older(const struct nat *row, __u64 now,
					 __u32 seconds)
{
	__s64 idle = now - row->last_seen_jiffies;

	return idle > (__s64)seconds_to_jiffies(seconds);
}

/*
 * How long a flow may be silent, of which these flags were seen one way and the
 * other way: as long as its connection. What was seen the other way may not be
 * known.
 */
static __always_inline __u32 nat_timeout(__u8 flags, bool other_is_known,
					 __u8 other_flags, __u8 protocol,
					 __u32 closing_seconds)
{
	if (protocol != IPPROTO_TCP)
		return settings.other_timeout_seconds;
	if ((flags | other_flags) & TCP_RST || flags & other_flags & TCP_FIN)
		return closing_seconds;
	/* Both directions were used; of a lost row the other one tells. */
	if (other_is_known ? flags && other_flags : flags & TCP_ACK)
		return settings.tcp_timeout_seconds;
	return settings.tcp_opening_seconds;
}

/*
 * A client's flow that nobody has answered, and whose way there is forgotten: of
 * those the newest count (connection_open), so a flood of questions keeps no
 * ports.
 */
static __noinline bool nat_is_forgotten(const struct nat *row, __u8 protocol)
{
	struct connection_key key __attribute__((aligned(8)));

	if (row->is_answered)
		return false;
	connection_key_fill((const void *)&row->addr,
			    (const void *)&row->service, row->port,
			    row->service_port, protocol, &key);
	key.kind = CONNECTION_SERVICE;
	return !bpf_map_lookup_elem(&connections, &key);
}

/* The flow of a row is over, and nothing of it is on its way any more. */
static __always_inline bool nat_is_over(const struct nat_key *key,
					const struct nat *row, __u64 now,
					__u32 closing_seconds)
{
	struct nat_key turned __attribute__((aligned(8)));
	const struct nat *other;
	__u32 seconds;

	if (key->direction == DIRECTION_INGRESS && nat_is_nodes(row, key))
		return nat_is_older(row, now, settings.other_timeout_seconds);
	if (!nat_is_older(row, now, NAT_REST_SECONDS))
		return false;
	/* A client's flow has this one row. */
	if (row->service_port)
		return nat_is_forgotten(row, key->protocol) ||
		       nat_is_older(row, now,
				    nat_timeout(row->tcp_flags, true,
						row->client_flags,
						key->protocol,
						closing_seconds));
	nat_key_turn(key, row, &turned);
	other = bpf_map_lookup_elem(&nat, &turned);
	/* A row that another one has replaced. */
	if (other && !nat_row_is(other, &key->local, key->local_port))
		return true;
	seconds = nat_timeout(row->tcp_flags, other,
			      other ? other->tcp_flags : 0, key->protocol,
			      closing_seconds);
	return nat_is_older(row, now, seconds) &&
	       (!other || nat_is_older(other, now, seconds));
}

/* What is seen of a packet in its direction. */
static __always_inline void nat_note(struct nat *row, __u8 tcp_flags)
{
	__u8 seen = row->tcp_flags | tcp_flags;

	/* What goes on after an RST was not ended by it. */
	if (!(tcp_flags & TCP_RST))
		seen &= ~TCP_RST;
	if (row->tcp_flags != seen)
		row->tcp_flags = seen;
}

/* Whose share a mapping is of, by its pod's address: an endpoint, or the bucket
 * of another node's pod; 0: nobody's. */
static __always_inline __u32 nat_owner(const struct addr *pod)
{
	struct address *address = address_find(pod);
	const addr_words *words = (const void *)pod;

	if (!address)
		return 0;
	if (address->endpoint_id || !(address->flags & ADDRESS_POD))
		return address->endpoint_id;
	return usage_of_stranger(hash_secret(words[0] ^ hash64(words[1])));
}

/* A row for the way back is gone: its pod may have another port. */
static __always_inline void nat_give_port(const struct addr *pod)
{
	__u32 owner = nat_owner(pod);

	if (owner)
		quota_give(owner, QUOTA_NAT_PORTS);
}

/*
 * Takes a port for the flow of the mapping in `scratch`: 1 if the flow has that
 * port now. The port of a flow that is over changes hands.
 */
__weak __noinline int nat_take_port(struct __sk_buff *ctx, __u32 port)
{
	struct nat_key old __attribute__((aligned(8)));
	struct scratch *room = scratch_get();
	struct nat_mapping *to;
	bool is_clients;
	struct nat *row;

	if (!room)
		return 0;
	to = &room->mapping;
	to->tries++;
	to->back.local_port = bpf_htons(port);
	row = bpf_map_lookup_elem(&nat, &to->back);
	/* The other half of this flow's mapping was lost, or is on its way. */
	if (row && nat_row_equal(row, &to->pod))
		return 1;
	if (row && !nat_is_over(&to->back, row, to->pod.last_seen_jiffies,
				NAT_REST_SECONDS))
		return 0;
	if (node_has_port(ctx, &to->back))
		return 0;
	if (row) {
		nat_key_turn(&to->back, row, &old);
		is_clients = row->service_port;
		/* One processor alone takes it away, and may put its own. */
		if (bpf_map_delete_elem(&nat, &to->back))
			return 0;
		if (!is_clients)
			nat_give_port(&old.local);
		bpf_map_delete_elem(&nat, &old);
	}
	return !bpf_map_update_elem(&nat, &to->back, &to->pod, BPF_NOEXIST);
}

/* One less than the power of two that has room for all ports. */
static __always_inline __u32 nat_port_mask(__u32 range)
{
	__u32 mask = range - 1;

	mask |= mask >> 1;
	mask |= mask >> 2;
	mask |= mask >> 4;
	return mask | mask >> 8;
}

/* Counts a search, by how many ports it has tried. */
static __always_inline void nat_note_search(__u32 tries, bool is_found)
{
	__u32 bucket = is_found ? 0 : NAT_SEARCH_FAILED;
	struct nat_search *row;

	while (bucket < NAT_SEARCH_FAILED - 1 && tries > 1U << bucket)
		bucket++;
	row = bpf_map_lookup_elem(&nat_searches, &bucket);
	if (!row)
		return;
	row->searches++;
	row->tries += tries;
}

/*
 * Finds a port of the node for the flow of the mapping in `scratch`: 0 or a
 * drop. The first port and the step are the tuple's (double hashing), so that
 * flows do not gather, and one that was forgotten comes back alike. The step is
 * odd, so no port comes twice before all came.
 */
static __always_inline int nat_find_port(struct __sk_buff *ctx,
					 struct nat_mapping *to)
{
	const struct nat_key *out = &to->out;
	__u32 range = settings.nat_port_max - settings.nat_port_min + 1;
	__u32 mask = nat_port_mask(range);
	struct hash hash;
	__u32 place, step;
	__u64 number;

	hash_begin(&hash);
	hash_add_addr(&hash, &out->local);
	hash_add_addr(&hash, &out->remote);
	hash_add(&hash, (__u64)out->local_port << 32 |
				(__u64)out->remote_port << 16 | out->protocol);
	number = hash_end(&hash);
	place = number;
	step = number >> 32 | 1;
	to->tries = 0;
	for (int i = 0; i < NAT_STEPS; i++, place += step) {
		if ((place & mask) >= range ||
		    !nat_take_port(ctx, settings.nat_port_min + (place & mask)))
			continue;
		nat_note_search(to->tries, true);
		return 0;
	}
	nat_note_search(to->tries, false);
	return -DROP_NO_NAT_MAPPING;
}
