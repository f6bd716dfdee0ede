/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * How long a TCP handshake took: from the SYN to its answer, seen at this node.
 * At the client's end that is a round trip to the server, at the server's end
 * what the server itself took. No packet but these two is looked at.
 */
#pragma once

#include "basics.h"

static __always_inline __u32 round_trip_now_us(void)
{
	return bpf_ktime_get_ns() / 1000;
}

/* The SYN comes, again perhaps: its time takes the place of the result. */
static __always_inline void round_trip_begin(struct connection *connection)
{
	__u16 now = round_trip_now_us();

	connection->merged_jiffies = now;
	connection->round_trip = now >> 8;
}

static __always_inline __u8 round_trip_encode(__u32 us)
{
	__u32 exponent = 0;
	__u32 rest = us ? us : 1;

	if (rest >> 16) {
		exponent += 16;
		rest >>= 16;
	}
	if (rest >> 8) {
		exponent += 8;
		rest >>= 8;
	}
	if (rest >> 4) {
		exponent += 4;
		rest >>= 4;
	}
	if (rest >> 2) {
		exponent += 2;
		rest >>= 2;
	}
	if (rest >> 1)
		exponent += 1;
	if (exponent > ROUND_TRIP_EXPONENT_MAX)
		exponent = ROUND_TRIP_EXPONENT_MAX;
	/* The three bits behind the first. */
	rest = ((__u64)(us ? us : 1) << 3 >> exponent) & 7;
	return 1 + ROUND_TRIP_STEPS * exponent + rest;
}

/*
 * The answer comes. The ticks since the SYN say how long that was within some
 * milliseconds, the low bits of the clock say the rest.
 */
static __always_inline void round_trip_end(struct connection *connection)
{
	__u64 ticks = bpf_jiffies64() - connection->last_seen_jiffies;
	__u32 coarse = ticks * 1000000 / (settings.jiffies_per_second ?: 1);
	__u16 begun = connection->merged_jiffies |
		      (__u16)connection->round_trip << 8;
	__u16 fine = (__u16)round_trip_now_us() - begun;
	__s32 us = coarse + (__s16)(fine - (__u16)coarse);

	connection->round_trip = round_trip_encode(us < 0 ? 0 : us);
	connection->merged_jiffies = 0;
}
