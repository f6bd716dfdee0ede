/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Connection tracking: one entry a flow, found by both directions. It
 * keeps the verdict with the epochs it was reached in; while they are current,
 * a packet needs nothing but to be counted.
 */
#pragma once

#include "event.h"
#include "connection_share.h"
#include "hash.h"
#include "round_trip.h"

static __always_inline __u64 seconds_to_jiffies(__u32 seconds)
{
	return (__u64)seconds * settings.jiffies_per_second;
}

/* Since a tick of which only the low bits were kept. */
static __always_inline __u32 jiffies_since(__u32 then, __u64 now)
{
	return (__u32)now - then;
}

/* The connection is over as far as its packets say. */
#define CONNECTION_OVER (CONNECTION_CLOSING | CONNECTION_RESET)

static __always_inline bool
connection_is_expired(const struct connection *connection, __u8 protocol,
		      __u64 now)
{
	__u64 idle = now - connection->last_seen_jiffies;
	__u32 seconds;

	/* Another CPU may have seen a later tick. */
	if ((__s64)idle < 0)
		return false;
	if (protocol != IPPROTO_TCP)
		seconds = settings.other_timeout_seconds;
	else if (connection->flags & CONNECTION_OVER)
		seconds = settings.tcp_closing_seconds;
	else if (connection->flags & CONNECTION_REPLIED &&
		 !(connection->flags & CONNECTION_OPENING))
		seconds = settings.tcp_timeout_seconds;
	else
		seconds = settings.tcp_opening_seconds;
	return idle > seconds_to_jiffies(seconds);
}

/*
 * True if a packet begins a flow of its own although the tuple is known: the
 * entry has expired, or a SYN follows the end of the last connection. A SYN
 * from the responder is his own attempt, never an answer.
 */
static __always_inline bool
connection_begins_anew(const struct connection *connection,
		       const struct packet *packet, __u32 sender, __u64 now)
{
	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN &&
	    (sender || connection->flags & CONNECTION_OVER))
		return true;
	return connection_is_expired(connection, packet->protocol, now);
}

/* Of a flow to a service: the side that does not know the backend's address. */
static __always_inline __u32
connection_client_side(const struct connection *connection)
{
	return connection->flags & CONNECTION_REVERSED ? 1 : 0;
}

/* Between two pods of this node. */
static __always_inline bool
connection_is_local(const struct connection *connection)
{
	return connection->endpoint[0] && connection->endpoint[1];
}

/* True with the acknowledgement of the last FIN. */
static __always_inline bool connection_ends(const struct connection *connection,
					    __u8 tcp_flags)
{
	return connection->tcp_flags[0] & connection->tcp_flags[1] & TCP_FIN &&
	       !(tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) &&
	       !(connection->flags & CONNECTION_ENDED);
}

/* A number that some words decide, each at its place of `struct ended`. */
static __always_inline __u64 ended_sum(const void *of, __u32 from, __u32 to)
{
	const __u64 *words = of;
	__u64 sum = 0;

#pragma unroll
	for (__u32 i = from; i < to; i++)
		sum += words[i - from] * (HASH_MULTIPLIER * (2 * i + 1));
	return sum;
}

static __always_inline __u64 ended_sum_of_key(const struct connection_key *key)
{
	return ended_sum(key, 0, __builtin_offsetof(struct ended, connection) / 8);
}

static __always_inline __u64
ended_sum_of_rest(const struct connection *connection)
{
	return ended_sum(connection,
			 __builtin_offsetof(struct ended, connection) / 8,
			 __builtin_offsetof(struct ended, check) / 8);
}

/* Where a connection that has ended is written down. */
static __always_inline struct ended *ended_slot(__u64 sum_of_key, bool is_local)
{
	__u32 slot = hash_secret(sum_of_key);

	if (is_local)
		slot &= ENDED_LOCAL - 1;
	else
		slot = ENDED_LOCAL + (slot & (ENDED_REMOTE - 1));
	return bpf_map_lookup_elem(&ended, &slot);
}

/*
 * Short connections would fill the map within seconds, and each new one would
 * find nothing of it in the cache. One that has ended goes at once, and is saved
 * before that, so that other CPUs always find it, for the few whose last packets
 * are on their way yet, or get lost and come again.
 *
 * The row is deleted by its key. If another CPU puts a new flow under the key
 * between the look and the deletion, well below a microsecond, the new row goes.
 * BPF has no deletion on a condition. It costs the new flow one SYN that comes
 * again. The same holds for collect_connection (gc.bpf.c).
 */
static __always_inline void
connection_retire(const struct connection *connection,
		  const struct connection_key *key)
{
	__u64 sum = ended_sum_of_key(key);
	struct ended *slot = ended_slot(sum, connection_is_local(connection));
	struct scratch *room = scratch_get();
	struct ended *copy;

	if (!slot || !room)
		return;
	copy = &room->ended;
	/* Linux 6.1 takes no key to delete out of a function's argument. */
	copy->key = *key;
	copy->connection = *connection;
	/* Other CPUs may count in *of meanwhile. */
	copy->check = sum + ended_sum_of_rest(&copy->connection);
	barrier();
	*slot = *copy;
	connection_delete(&copy->key, connection_owner(&copy->connection),
			  copy->connection.flags);
}

/* What is written down of this name among the local ones, or the others. */
static __always_inline struct ended *
ended_find_at(__u64 sum_of_key, const struct connection_key *key, bool is_local)
{
	struct ended *slot = ended_slot(sum_of_key, is_local);

	return slot && connection_key_equal(&slot->key, key) ? slot : NULL;
}

/* The slot of a connection that has ended, if it still is there, or NULL. */
static __always_inline struct ended *ended_find(const struct connection_key *key)
{
	__u64 sum = ended_sum_of_key(key);
	struct ended *slot = ended_find_at(sum, key, true);

	return slot ? slot : ended_find_at(sum, key, false);
}

/*
 * The flow that had this name last, or NULL. While it is not expired a packet of
 * it may yet come, and its ends need not know yet that it is over.
 */
static __always_inline struct connection *
connection_ended(const struct connection_key *key)
{
	struct ended *slot = ended_find(key);

	return slot ? &slot->connection : NULL;
}

/* The same between pods of this node: few slots, that stay in the cache. */
static __always_inline struct connection *
connection_ended_here(const struct connection_key *key)
{
	struct ended *slot = ended_find_at(ended_sum_of_key(key), key, true);

	return slot ? &slot->connection : NULL;
}

/*
 * Brings a connection back that has ended, for a packet that comes late: 1 if
 * it did. Whether the packet may pass is asked as always.
 */
__weak __noinline int connection_recall(struct connection_key *key)
{
	struct scratch *room = scratch_get();
	struct ended *slot, *copy;

	if (!key || !room)
		return 0;
	slot = ended_find(key);
	if (!slot)
		return 0;
	copy = &room->ended;
	*copy = *slot;
	/* What was copied counts, whatever is written there now. */
	barrier();
	if (!connection_key_equal(&copy->key, key) ||
	    ended_sum_of_key(&copy->key) +
			    ended_sum_of_rest(&copy->connection) !=
		    copy->check ||
	    connection_is_expired(&copy->connection, key->protocol,
				  bpf_jiffies64()))
		return 0;
	if (bpf_map_update_elem(&connections, &copy->key, &copy->connection,
				BPF_NOEXIST))
		return 0;
	quota_count(connection_owner(&copy->connection), QUOTA_CONNECTIONS);
	return 1;
}

/*
 * The backend that was chosen for a flow to a service is kept under a key of its
 * own (service.h). When the flow is over the choice is, too: only the flow knows
 * that both ends have closed.
 */
__weak __noinline int connection_release_backend(struct connection *flow,
						 struct connection_key *flow_key)
{
	struct connection_key key __attribute__((aligned(8)));
	struct connection *choice;
	__u32 client, holder;

	if (!flow || !flow_key)
		return 0;
	client = index_of_two(flow->flags ^ connection_client_side(flow));
	/* The loopback address stands for the backend itself. */
	holder = index_of_two(client ^
			      !!(flow->flags & CONNECTION_LOOPBACK));
	if (!(flow->flags & (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK)))
		return 0;
	connection_key_fill(
		(const void *)&flow_key->addr[holder],
		(const void *)&flow->service,
		flow->other_port ? flow->other_port : flow_key->port[client],
		flow->service_port, flow_key->protocol, &key);
	key.kind = CONNECTION_SERVICE;
	choice = bpf_map_lookup_elem(&connections, &key);
	if (choice && !(choice->flags & CONNECTION_CLOSING))
		choice->flags |= CONNECTION_CLOSING;
	return 0;
}

/* Its last packet has passed: tells so, with `flags` of the record, and lets
 * it go. */
__weak __noinline int connection_end(struct __sk_buff *ctx,
				     struct connection *connection,
				     struct connection_key *key, __u32 flags)
{
	struct event *event;

	if (!connection || !key)
		return 0;
	if (settings.flow_events) {
		event = event_of_flow(connection, key, EVENT_FLOW_END,
				      ctx->ifindex, flags);
		if (event)
			bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	}
	connection->flags |= CONNECTION_ENDED;
	connection_release_backend(connection, key);
	/* The proxy may have more to tell the other end. */
	if (!(connection->flags & CONNECTION_PROXY))
		connection_retire(connection, key);
	return 0;
}

/* Counts a packet and what it says of its connection; the TCP flags that this
 * side has not shown before. */
static __always_inline __u8 connection_count(struct connection *connection,
					     __u32 sender, __u8 tcp_flags,
					     __u32 bytes)
{
	__u8 fresh = tcp_flags & ~connection->tcp_flags[sender];

	__sync_fetch_and_add(&connection->packets[sender], 1);
	__sync_fetch_and_add(&connection->bytes[sender], bytes);
	if (sender && !(connection->flags & CONNECTION_REPLIED))
		connection->flags |= CONNECTION_REPLIED;
	if (fresh) {
		connection->tcp_flags[sender] |= fresh;
		if (fresh & connection->tcp_flags[sender ^ 1] & TCP_FIN)
			connection->flags |= CONNECTION_CLOSING;
	}
	if (connection->flags & CONNECTION_OPENING &&
	    connection_is_answered(connection))
		connection_answer(connection);
	return fresh;
}

/*
 * Nobody else can have sent the packet: a pod's comes from the pod's own
 * device, the node's from its stack, and another node's pod's by the tunnel.
 */
static __always_inline bool
connection_knows_sender(const struct packet *packet, __u8 route_to_sender)
{
	return packet->flags & (PACKET_FROM_POD | PACKET_FROM_HOST |
				PACKET_FROM_PROXY) ||
	       (packet->flags & PACKET_FROM_OVERLAY &&
		route_to_sender == ROUTE_NODE);
}

/* Of a connection that is not answered yet. */
static __always_inline void
connection_note_handshake(const struct packet *packet,
			  struct connection *connection, __u32 sender)
{
	if (connection->tcp_flags[1] & TCP_SYN ||
	    !(connection->tcp_flags[0] & TCP_SYN))
		return;
	if (!sender)
		round_trip_begin(connection);
	else if (packet->tcp_flags & TCP_ACK)
		round_trip_end(connection);
}

/*
 * The TCP flags of a packet that are to be believed. Anybody on the way to the
 * node can send a FIN or an RST with an address that is not its own. The pod's
 * kernel compares the sequence number with its window and ignores what is
 * wrong; so does this, with what it has: the number cannot lie before the SYN's,
 * nor farther behind it than bytes have come. A flow whose SYN was not seen has
 * nothing to compare with.
 */
__weak __noinline int connection_believe(struct __sk_buff *ctx,
					 struct packet *packet,
					 struct connection *connection,
					 __u32 sender)
{
	__u32 sequence;

	if (!packet || !connection)
		return 0;
	sender &= 1;
	if (packet->tcp_flags & TCP_SYN)
		connection_note_handshake(packet, connection, sender);
	if (!(packet->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) ||
	    connection_knows_sender(packet, connection->route[sender]))
		return packet->tcp_flags;
	sequence = packet_sequence(ctx, packet);
	if (packet->tcp_flags & TCP_SYN) {
		if (!(connection->tcp_flags[sender] & TCP_SYN))
			connection->sequence = sequence;
		return packet->tcp_flags & ~(TCP_FIN | TCP_RST);
	}
	if (connection->tcp_flags[sender] & TCP_SYN &&
	    sequence - connection->sequence > connection->bytes[sender] + 1)
		return packet->tcp_flags & ~(TCP_FIN | TCP_RST);
	return packet->tcp_flags;
}

/* Packets that may come after the end and say nothing: FINs that are sent
 * again, and their acknowledgements. */
#define CONNECTION_LATE_PACKETS 4

/*
 * A packet comes after the end was reported. True if the connection goes on:
 * the packet carries something, or is one of many. Then it is not over, is
 * reported, and ends once more.
 */
__weak __noinline int connection_goes_on(struct __sk_buff *ctx,
					 struct packet *packet,
					 struct connection *connection)
{
	if (!packet || !connection)
		return 0;
	if (connection->flags < CONNECTION_LATE * CONNECTION_LATE_PACKETS &&
	    !packet_has_payload(ctx, packet)) {
		connection->flags += CONNECTION_LATE;
		return 0;
	}
	connection->flags &= CONNECTION_LATE - 1;
	connection->flags &= ~CONNECTION_ENDED;
	connection->tcp_flags[0] &= ~TCP_FIN;
	connection->tcp_flags[1] &= ~TCP_FIN;
	return 1;
}

/*
 * An RST ends a connection only if everybody is silent afterwards: both ends
 * obey a right one, and whatever else comes shows that it was a wrong one.
 */
static __always_inline void connection_note_reset(struct connection *connection,
						  const struct packet *packet,
						  __u8 believed)
{
	if (believed & TCP_RST)
		connection->flags |= CONNECTION_RESET;
	else if (connection->flags & CONNECTION_RESET &&
		 !(packet->tcp_flags & TCP_RST))
		connection->flags &= ~CONNECTION_RESET;
}

/*
 * Counts a packet; the type of the event that it is worth, or 0. Flags are
 * changed without a lock: one that is lost to another CPU comes back with the
 * next packet (REPLIED, RESET), or is not what ends the connection (CLOSING).
 */
static __always_inline __u32 connection_account(struct __sk_buff *ctx,
						struct connection *connection,
						struct packet *packet,
						__u32 sender, __u64 now)
{
	bool report = jiffies_since(connection->last_report_jiffies, now) >
		      seconds_to_jiffies(settings.flow_report_seconds);
	__u8 believed = packet->tcp_flags;

	if (believed & (TCP_SYN | TCP_FIN | TCP_RST))
		believed = connection_believe(ctx, packet, connection, sender);
	/* The end is told once, unless the connection goes on after it. */
	if (connection->flags & CONNECTION_ENDED)
		report = connection_goes_on(ctx, packet, connection);
	if (connection->last_seen_jiffies != now)
		connection->last_seen_jiffies = now;
	/* An answer and FINs say little: the end is told with the last packet,
	 * and a flow that rests by the collector. */
	report |=
		connection_count(connection, sender, believed, packet->bytes) &
		TCP_RST;
	connection_note_reset(connection, packet, believed);
	if (!report || !settings.flow_events ||
	    connection->flags & CONNECTION_ENDED)
		return 0;
	connection->last_report_jiffies = now;
	return EVENT_FLOW_UPDATE;
}
