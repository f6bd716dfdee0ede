/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Fragments that come before the first one of their packet wait for it, since
 * nobody knows their ports. A BPF program cannot hold a packet, a queue of the
 * kernel can: the fragment goes out by a device with a token bucket (tbf), comes
 * in by that device's other end, and from_wait gives it back to the device that
 * it came by. The same program as before sees it, and lets it wait again or not.
 * Meanwhile the Ethernet addresses, which nobody needs any more, say where it
 * came from.
 */
#pragma once

#include "mark.h"
#include "scratch.h"

/* In place of a waiting frame's Ethernet addresses. */
struct wait_note {
	__u8 unicast;	  /* an address of one device that nobody has */
	__u8 identity[3]; /* of the sender, as the tunnel said */
	__u32 ifindex;	  /* the device that it came by */
	__u32 jiffies;	  /* low bits, when it came */
};
_Static_assert(sizeof(struct wait_note) == 12, "two Ethernet addresses");

#define WAIT_UNICAST 0x02

/* So long a fragment waits, and so often in this time one share's may begin to:
 * one share of senders must not fill the queue. */
#define WAIT_MILLISECONDS 50
#define WAIT_MOST_OF_SHARE 128

static __always_inline __u32 wait_jiffies(void)
{
	return settings.jiffies_per_second * WAIT_MILLISECONDS / 1000 + 1;
}

/* One more fragment of this share may wait. */
static __always_inline bool wait_may(__u32 share, __u32 now)
{
	struct waiting *of = bpf_map_lookup_elem(&waiting, &share);

	if (!of)
		return false;
	if (now - of->since_jiffies >= wait_jiffies()) {
		of->since_jiffies = now;
		of->count = 0;
	}
	return __sync_fetch_and_add(&of->count, 1) < WAIT_MOST_OF_SHARE;
}

/* The packet has waited. The mark cannot come from outside: it is taken off in
 * other namespaces, and no network carries it. */
static __always_inline bool wait_is_back(struct __sk_buff *ctx)
{
	return settings.wait_ifindex && mark_is(ctx, MARK_WAITS);
}

/* The note of a packet that has waited, or false. */
static __always_inline bool wait_read(struct __sk_buff *ctx,
				      struct wait_note *note)
{
	return wait_is_back(ctx) &&
	       !bpf_skb_load_bytes(ctx, 0, note, sizeof(*note));
}

/* For whom the sender of what has waited spoke in the tunnel; false if it has
 * not waited. */
static __always_inline bool wait_identity(struct __sk_buff *ctx,
					  __u32 *identity)
{
	struct wait_note note = {};

	if (!wait_read(ctx, &note))
		return false;
	*identity = note.identity[0] << 16 | note.identity[1] << 8 |
		    note.identity[2];
	return true;
}

/* It waits no longer; its addresses are nobody's, so the stack must be told
 * that it is for this node. */
static __always_inline void wait_end(struct __sk_buff *ctx)
{
	if (!wait_is_back(ctx))
		return;
	mark_clear(ctx);
	bpf_skb_change_type(ctx, PACKET_HOST);
}

/*
 * Lets a fragment wait whose first one is not known: an action of tc, or a drop
 * if it has waited long enough or may not.
 */
__weak __noinline int wait_for_first(struct __sk_buff *ctx,
				     struct packet *packet, __u32 share)
{
	__u32 now = bpf_jiffies64();
	struct wait_note note = {};

	if (!packet || !settings.wait_ifindex)
		return -DROP_FRAGMENT_NOT_FOUND;
	if (wait_read(ctx, &note)) {
		if (now - note.jiffies >= wait_jiffies())
			return -DROP_FRAGMENT_NOT_FOUND;
		return bpf_redirect(settings.wait_ifindex, 0);
	}
	if (ctx->vlan_present || !wait_may(share, now))
		return -DROP_FRAGMENT_NOT_FOUND;
	note.unicast = WAIT_UNICAST;
	note.identity[0] = packet->source_identity >> 16;
	note.identity[1] = packet->source_identity >> 8;
	note.identity[2] = packet->source_identity;
	note.ifindex = ctx->ifindex;
	note.jiffies = now;
	if (bpf_skb_store_bytes(ctx, 0, &note, sizeof(note), 0))
		return -DROP_FRAGMENT_NOT_FOUND;
	mark_set(ctx, MARK_WAITS);
	return bpf_redirect(settings.wait_ifindex, 0);
}
