// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The far end of the queue for pods with a limit on what they receive.
 */
#include "lib/limit.h"
#include "lib/event.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* The pod may have gone while the packet waited. An action of tc. */
static __always_inline int limit_too_late(struct __sk_buff *ctx)
{
	metric_count(DROP_UNROUTABLE_IP, DIRECTION_INGRESS, ctx->len);
	return TC_ACT_SHOT;
}

/* Gives a packet to the pod that it is for. */
SEC("tcx/ingress")
int from_limit(struct __sk_buff *ctx)
{
	struct endpoint *endpoint;
	struct limit_note note = {};
	struct ethhdr ethernet = {};

	/* Nobody else has anything to send here. */
	if (!limit_read(ctx, &note))
		return TC_ACT_SHOT;
	endpoint = endpoint_by_id(note.endpoint);
	if (!endpoint || endpoint->ifindex != note.ifindex ||
	    !(endpoint->flags & ENDPOINT_READY))
		return limit_too_late(ctx);
	__builtin_memcpy(ethernet.destination, endpoint->mac, 6);
	ethernet.source[0] = ENDPOINT_MAC_0;
	ethernet.source[1] = ENDPOINT_MAC_1;
	ethernet.source[2] = ENDPOINT_MAC_2;
	ethernet.source[3] = ENDPOINT_MAC_3;
	ethernet.source[4] = note.endpoint >> 8;
	ethernet.source[5] = note.endpoint;
	if (bpf_skb_store_bytes(ctx, 0, &ethernet, 12, 0) ||
	    bpf_skb_change_type(ctx, PACKET_HOST))
		return limit_too_late(ctx);
	mark_clear(ctx);
	return bpf_redirect_peer(note.ifindex, 0);
}
