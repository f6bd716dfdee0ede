/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Connection tracking (K5): one entry a flow, found by both directions. It
 * keeps the verdict with the epochs it was reached in; while they are current,
 * a packet needs nothing but to be counted.
 */
#pragma once

#include "endpoint.h"
#include "event.h"

static __always_inline __u64 seconds_to_jiffies(__u32 seconds)
{
	return (__u64)seconds * settings.jiffies_per_second;
}

static __always_inline bool connection_is_expired(const struct connection *of,
						  __u8 protocol, __u64 now)
{
	__u64 idle = now - of->last_seen_jiffies;
	__u32 seconds;

	/* Another CPU may have seen a later tick. */
	if ((__s64)idle < 0)
		return false;
	if (protocol != IPPROTO_TCP)
		seconds = settings.other_timeout_seconds;
	else if (of->flags & CONNECTION_CLOSING)
		seconds = settings.tcp_closing_seconds;
	else if (of->flags & CONNECTION_REPLIED)
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
static __always_inline bool connection_begins_anew(const struct connection *of,
						   const struct packet *packet,
						   __u32 side, __u64 now)
{
	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN &&
	    (side || of->flags & CONNECTION_CLOSING))
		return true;
	return connection_is_expired(of, packet->protocol, now);
}

/* Between two pods of this node. */
static __always_inline bool connection_is_local(const struct connection *of)
{
	return of->endpoint[0] && of->endpoint[1];
}

/* True with the acknowledgement of the last FIN. */
static __always_inline bool connection_ends(const struct connection *of,
					    __u8 tcp_flags)
{
	return of->tcp_flags[0] & of->tcp_flags[1] & TCP_FIN &&
	       !(tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) &&
	       !(of->flags & CONNECTION_ENDED);
}

/*
 * Short connections would fill the map within seconds, and each new one would
 * find nothing of it in the cache: one that has ended makes room soon. Between
 * two pods of this node nothing is on its way any more; elsewhere a FIN or its
 * acknowledgement may get lost and come again, so that many others must end
 * first: at 1,000 a second and CPU it stays half a second. What comes after
 * that is judged as if it began a flow, as a host's stack would.
 */
static __always_inline void connection_retire(const struct connection_key *key,
					      bool is_local)
{
	struct connection *connection;
	struct ended *last;
	__u32 zero = 0, slot;

	last = bpf_map_lookup_elem(&ended, &zero);
	if (!last)
		return;
	slot = is_local ? last->local++ % ENDED_LOCAL
			: ENDED_LOCAL + last->remote++ % ENDED_REMOTE;
	connection = bpf_map_lookup_elem(&connections, &last->keys[slot]);
	/* It may have begun anew. */
	if (connection && connection->flags & CONNECTION_ENDED)
		bpf_map_delete_elem(&connections, &last->keys[slot]);
	last->keys[slot] = *key;
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
	connection_retire(key, connection_is_local(connection));
	return 0;
}

/* Counts a packet and what it says of its connection; the TCP flags that this
 * side has not shown before. */
static __always_inline __u8 connection_count(struct connection *connection,
					     __u32 side, __u8 tcp_flags,
					     __u32 bytes)
{
	__u8 fresh = tcp_flags & ~connection->tcp_flags[side];

	__sync_fetch_and_add(&connection->packets[side], 1);
	__sync_fetch_and_add(&connection->bytes[side], bytes);
	if (side && !(connection->flags & CONNECTION_REPLIED))
		connection->flags |= CONNECTION_REPLIED;
	if (fresh) {
		connection->tcp_flags[side] |= fresh;
		if (fresh & TCP_RST ||
		    fresh & connection->tcp_flags[side ^ 1] & TCP_FIN)
			connection->flags |= CONNECTION_CLOSING;
	}
	return fresh;
}

/* Counts a packet; the type of the event that it is worth, or 0. */
static __always_inline __u32 connection_account(struct connection *connection,
						const struct packet *packet,
						__u32 side, __u64 now)
{
	bool report = now - connection->last_report_jiffies >
		      seconds_to_jiffies(settings.flow_report_seconds);

	if (connection->last_seen_jiffies != now)
		connection->last_seen_jiffies = now;
	/* An answer and FINs say little: the end is told with the last packet,
	 * and a flow that rests by the collector. */
	report |= connection_count(connection, side, packet->tcp_flags,
				   packet->bytes) &
		  TCP_RST;
	if (!report || !settings.flow_events)
		return 0;
	connection->last_report_jiffies = now;
	return EVENT_FLOW_UPDATE;
}
