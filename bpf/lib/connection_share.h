/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Connections at the expense of an endpoint: every row of `connections` is
 * inserted and deleted by a function of this file, which counts it (quota.h).
 */
#pragma once

#include "event.h"
#include "scratch.h"

/* The entry is gone: its owner may have another one. */
static __always_inline void connection_give(__u32 owner, __u16 flags)
{
	quota_give(owner, QUOTA_CONNECTIONS);
	if (flags & CONNECTION_OPENING)
		quota_give(owner, QUOTA_OPENING);
}

/* Unanswered connections that one endpoint may have. */
static __always_inline __u32 connection_opening_limit(void)
{
	__u32 limit = settings.quota_limit[QUOTA_OPENING];
	__u32 left = quota_left(QUOTA_CONNECTIONS) / 4;

	return left < limit ? left : limit;
}

/* Deletes an entry of this owner and kind of flags, and gives it back. */
static __always_inline bool connection_delete(const void *key, __u32 owner,
					      __u16 flags)
{
	if (bpf_map_delete_elem(&connections, key))
		return false;
	connection_give(owner, flags);
	return true;
}

/* Deletes the choice of a backend that was made for a flow; the key of the flow
 * is in `former`. */
static __always_inline void connection_delete_choice(struct share_room *room,
						     const struct connection *of,
						     __u32 owner)
{
	const struct connection_key *flow = (const void *)&room->former;
	bool second_began = of->flags & CONNECTION_INITIATOR_HIGH;
	__be16 port = of->other_port;

	if (!(of->flags & CONNECTION_TRANSLATED) ||
	    of->flags & (CONNECTION_LOOPBACK | CONNECTION_REVERSED))
		return;
	if (!port)
		port = second_began ? flow->port[1] : flow->port[0];
	connection_key_fill(second_began ? (const void *)&flow->addr[1]
				 : (const void *)&flow->addr[0],
			    (const void *)&of->service, port, of->service_port,
			    flow->protocol, &room->key);
	room->key.kind = CONNECTION_SERVICE;
	connection_delete(&room->key, owner, 0);
}

/*
 * The endpoint has as many unanswered connections as it may: the newcomer gets
 * the place of its oldest one, which is forgotten if it still is unanswered.
 * `number` counts the endpoint's connections.
 */
__weak __noinline int connection_replace_oldest(__u32 owner, __u32 number,
						__u32 places,
						struct connection_key *key)
{
	struct scratch *scratch = scratch_get();
	struct share_room *room;
	struct connection *oldest;
	struct usage *of;
	__u16 flags;

	if (!key || !scratch)
		return 0;
	room = &scratch->share;
	__builtin_memcpy(&room->newcomer, key, sizeof(room->newcomer));
	if (!share_replace(room, owner, number, places))
		return 0;
	oldest = bpf_map_lookup_elem(&connections, &room->former);
	if (!oldest)
		return 0;
	flags = oldest->flags;
	if (!(flags & CONNECTION_OPENING) || connection_owner(oldest) != owner)
		return 0;
	connection_delete_choice(room, oldest, owner);
	connection_delete(&room->former, owner, flags);
	of = bpf_map_lookup_elem(&usage, &owner);
	if (of)
		__sync_fetch_and_add(&of->refused[QUOTA_OPENING], 1);
	return 0;
}

/* Counts an unanswered connection, which may cost its owner the oldest one. */
static __always_inline void connection_open(__u32 owner,
					    struct connection_key *key)
{
	struct usage *of = bpf_map_lookup_elem(&usage, &owner);
	__u32 places = connection_opening_limit();
	__s32 before, number;

	if (!of)
		return;
	before = __sync_fetch_and_add(&of->in_use[QUOTA_OPENING], 1);
	number = __sync_fetch_and_add(&of->taken[QUOTA_OPENING], 1);
	if (before >= (__s32)places && quota_is_enforced())
		connection_replace_oldest(owner, number, places, key);
}

/* Writes an entry in the place of one that is over, which is given back: 0 or an
 * error. */
static __always_inline long connection_replace(struct connection_key *key,
					       const struct connection *fresh)
{
	struct connection *former = bpf_map_lookup_elem(&connections, key);

	if (former)
		connection_give(connection_owner(former), former->flags);
	return map_insert(&connections, key, fresh);
}

/*
 * Adds an entry at its owner's expense: 0 or a drop. `replaces`: an entry that
 * is over has this key; one may have it anyway, by another CPU.
 */
static __always_inline int connection_insert(struct connection_key *key,
					     const struct connection *fresh,
					     bool replaces)
{
	__u32 owner = connection_owner(fresh);
	int ret = -DROP_QUOTA_CONNECTIONS;

	if (fresh->flags & CONNECTION_OPENING)
		connection_open(owner, key);
	if (quota_take(owner, QUOTA_CONNECTIONS)) {
		if (!replaces && !bpf_map_update_elem(&connections, key, fresh,
						      BPF_NOEXIST))
			return 0;
		if (!connection_replace(key, fresh))
			return 0;
		quota_give(owner, QUOTA_CONNECTIONS);
		ret = -DROP_CONNECTION_INSERT;
	}
	if (fresh->flags & CONNECTION_OPENING)
		quota_give(owner, QUOTA_OPENING);
	return ret;
}

/* True once both ends have spoken; TCP: when the handshake is complete. */
static __always_inline bool connection_is_answered(const struct connection *of)
{
	return of->flags & CONNECTION_REPLIED &&
	       (of->tcp_flags[0] & (TCP_SYN | TCP_ACK)) != TCP_SYN;
}

/* It is answered: counts no longer among the unanswered ones. */
__weak __noinline int connection_answer(struct connection *of)
{
	if (!of)
		return 0;
	of->flags &= ~CONNECTION_OPENING;
	quota_give(connection_owner(of), QUOTA_OPENING);
	return 0;
}
