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

/* Counts a packet; the type of the event that it is worth, or 0. */
static __always_inline __u32 connection_account(struct connection *connection,
						const struct packet *packet,
						__u32 side, __u64 now)
{
	__u8 fresh = packet->tcp_flags & ~connection->tcp_flags[side];
	bool report = now - connection->last_report_jiffies >
		      seconds_to_jiffies(settings.flow_report_seconds);
	bool ends;

	if (connection->last_seen_jiffies != now)
		connection->last_seen_jiffies = now;
	__sync_fetch_and_add(&connection->packets[side], 1);
	__sync_fetch_and_add(&connection->bytes[side], packet->bytes);
	if (side && !(connection->flags & CONNECTION_REPLIED))
		connection->flags |= CONNECTION_REPLIED;
	if (fresh) {
		connection->tcp_flags[side] |= fresh;
		ends = fresh & TCP_RST ||
		       fresh & connection->tcp_flags[side ^ 1] & TCP_FIN;
		if (ends)
			connection->flags |= CONNECTION_CLOSING;
		/* One side's FIN alone and the rest say little. */
		report |= ends || fresh & TCP_SYN;
	}
	if (!report || !settings.flow_events)
		return 0;
	connection->last_report_jiffies = now;
	return EVENT_FLOW_UPDATE;
}
