/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What a pod may receive (kubernetes.io/ingress-bandwidth). redirect_peer passes
 * no queue, so what is for a pod with a limit goes out by a device whose queue
 * (htb) has a class for the pod, comes in by that device's other end, and
 * from_limit gives it to the pod. It has its verdict before it is queued.
 *
 *   verdict --> weir_limit [ htb: a class for each such pod ] --> weir_limited
 *                                       from_limit --> redirect_peer --> pod
 *
 * Meanwhile the Ethernet addresses, which nobody needs any more, say whose it
 * is. No socket can write them so: the stack gives what it sends by that device
 * the device's own addresses.
 */
#pragma once

#include "endpoint.h"
#include "mark.h"

/* In place of a queued frame's Ethernet addresses. */
struct limit_note {
	__u8 unicast; /* an address of one device that nobody has */
	__u8 zero[3];
	__u32 ifindex; /* of the pod: numbers of endpoints are used again */
	__u32 endpoint;
};
_Static_assert(sizeof(struct limit_note) == 12, "two Ethernet addresses");

#define LIMIT_UNICAST 0x06

/* The handle of the queue; the class of a pod is its endpoint's number. */
#define LIMIT_QUEUE (1 << 16)

/* The pod has a limit, and there is a queue to keep it with. */
static __always_inline bool limit_has(const struct endpoint *endpoint)
{
	return settings.limit_ifindex && endpoint->flags & ENDPOINT_LIMITED;
}

/* Of a packet that the pod may have: an action of tc, or a drop. */
__weak __noinline int limit_queue(struct __sk_buff *ctx, __u32 ifindex,
				  __u32 id)
{
	struct limit_note note = {
		.unicast = LIMIT_UNICAST,
		.ifindex = ifindex,
		.endpoint = id,
	};

	if (bpf_skb_store_bytes(ctx, 0, &note, sizeof(note), 0))
		return -DROP_WRITE_ERROR;
	mark_set(ctx, MARK_LIMITED);
	ctx->priority = LIMIT_QUEUE | id;
	return bpf_redirect(settings.limit_ifindex, 0);
}

/* The note of a packet that comes from the queue, or false. */
static __always_inline bool limit_read(struct __sk_buff *ctx,
				       struct limit_note *note)
{
	return mark_is(ctx, MARK_LIMITED) &&
	       !bpf_skb_load_bytes(ctx, 0, note, sizeof(*note)) &&
	       note->unicast == LIMIT_UNICAST;
}
