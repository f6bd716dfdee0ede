/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Fairness: what one endpoint may have of the tables that all pods of a node
 * share. usage[] counts by endpoint; only what is new or goes is counted, a
 * packet of a running flow is not.
 *
 * Two rules bound an endpoint. Of connections and NAT ports it may have
 * settings.quota_limit, and never more than there is left for all: so the last
 * rows of a table are never one pod's, however many pods take what they can.
 * Of unanswered connections the newest count: over the limit the endpoint's own
 * oldest one goes (struct share), so that a flood of requests does not keep a
 * pod from being asked.
 *
 * Rows go without a word when a full table evicts them, so counters drift. The
 * collector counts the rows, and corrects. While nobody collects, limits do not
 * count either: expired rows would use them up.
 */
#pragma once

#include "../config.h"
#include "../maps.h"

#include <bpf/bpf_helpers.h>

/* A CPU adds so many to the sum of all at once. */
#define QUOTA_BATCH 32

/* Working memory of share_replace: a newcomer, what had its place, and a key of
 * connections for the caller. */
struct share_room {
	struct share_key place;
	struct share newcomer;
	struct share former;
	struct connection_key key;
};

/* The bucket of what no endpoint answers for, by device. */
static __always_inline __u32 usage_of_device(__u32 ifindex)
{
	return USAGE_ENDPOINTS + (ifindex & (USAGE_DEVICES - 1));
}

/* The bucket of another node's pod, by a hash of its address. */
static __always_inline __u32 usage_of_stranger(__u32 hash)
{
	return USAGE_ENDPOINTS + USAGE_DEVICES + (hash & (USAGE_STRANGERS - 1));
}

static __always_inline void quota_total_add(__u32 kind, __s32 change)
{
	struct quota_total *total;
	__u32 *pending;
	__s32 sum;

	pending = bpf_map_lookup_elem(&quota_pending, &kind);
	if (!pending)
		return;
	/* A program of another hook may interrupt this one on the same CPU. */
	sum = (__s32)__sync_fetch_and_add(pending, change) + change;
	if (sum < QUOTA_BATCH && sum > -QUOTA_BATCH)
		return;
	total = bpf_map_lookup_elem(&quota_totals, &kind);
	if (!total)
		return;
	__sync_fetch_and_add(pending, -sum);
	__sync_fetch_and_add(&total->in_use, sum);
}

/* Rows of a table that nobody has. */
static __always_inline __s32 quota_left(__u32 kind)
{
	/* A variable of its own: what a helper has seen is no constant after. */
	__u32 index = kind;
	struct quota_total *total = bpf_map_lookup_elem(&quota_totals, &index);
	__s32 left;

	if (!total)
		return 0;
	left = settings.quota_capacity[kind] - total->in_use;
	return left > 0 ? left : 0;
}

static __always_inline bool quota_is_enforced(void)
{
	__u32 kind = QUOTA_CONNECTIONS;
	struct quota_total *total = bpf_map_lookup_elem(&quota_totals, &kind);

	return total &&
	       (__s64)(total->enforced_until_jiffies - bpf_jiffies64()) > 0;
}

/* The endpoint has `in_use` of this kind, and is to get no more. */
static __always_inline bool quota_is_used_up(__u32 kind, __s32 in_use)
{
	return (in_use >= (__s32)settings.quota_limit[kind] ||
		in_use >= quota_left(kind)) &&
	       quota_is_enforced();
}

/* Takes one of a kind for an endpoint; false if it has its share. */
static __always_inline bool quota_take(__u32 endpoint, __u32 kind)
{
	struct usage *of = bpf_map_lookup_elem(&usage, &endpoint);
	__s32 before;

	if (!of)
		return true;
	before = __sync_fetch_and_add(&of->in_use[kind], 1);
	if (quota_is_used_up(kind, before)) {
		__sync_fetch_and_add(&of->in_use[kind], -1);
		__sync_fetch_and_add(&of->refused[kind], 1);
		return false;
	}
	__sync_fetch_and_add(&of->taken[kind], 1);
	quota_total_add(kind, 1);
	return true;
}

/* Counts one that an endpoint gets whatever it has. */
static __always_inline void quota_count(__u32 endpoint, __u32 kind)
{
	struct usage *of = bpf_map_lookup_elem(&usage, &endpoint);

	if (!of)
		return;
	__sync_fetch_and_add(&of->in_use[kind], 1);
	__sync_fetch_and_add(&of->taken[kind], 1);
	quota_total_add(kind, 1);
}

/* Gives one back. */
static __always_inline void quota_give(__u32 endpoint, __u32 kind)
{
	struct usage *of = bpf_map_lookup_elem(&usage, &endpoint);

	if (!of)
		return;
	__sync_fetch_and_add(&of->in_use[kind], -1);
	quota_total_add(kind, -1);
}

/*
 * Puts the newcomer into its place among an endpoint's own; `number` counts
 * them. What had the place is in `former` then: true if there was one.
 */
static __always_inline bool share_replace(struct share_room *room,
					  __u32 endpoint, __u32 number,
					  __u32 places)
{
	struct share *share;

	room->place.endpoint = endpoint;
	room->place.place = places ? number % places : 0;
	share = bpf_map_lookup_elem(&shares, &room->place);
	if (!share) {
		bpf_map_update_elem(&shares, &room->place, &room->newcomer,
				    BPF_ANY);
		return false;
	}
	room->former = *share;
	*share = room->newcomer;
	return true;
}

/*
 * True if an endpoint may have one more record. The time of the next one moves
 * on with each, at most a second ahead: so a second's records may come at once.
 */
static __always_inline bool quota_take_record(__u32 endpoint)
{
	__u64 now = bpf_jiffies64() << 10;
	struct usage *of;
	__u64 due;

	if (!settings.drop_record_cost)
		return true;
	of = bpf_map_lookup_elem(&usage, &endpoint);
	if (!of)
		return true;
	due = of->records_due;
	if ((__s64)(due - now) < 0) {
		of->records_due = now;
		due = now;
	}
	if (due - now >= (__u64)settings.jiffies_per_second << 10) {
		__sync_fetch_and_add(&of->records_suppressed, 1);
		return false;
	}
	__sync_fetch_and_add(&of->records_due, settings.drop_record_cost);
	return true;
}
