// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Collecting what has expired, in the kernel: an iterator looks again at the
 * entry before it deletes it, so a flow that came back a moment ago stays; and
 * it yields between batches. The agent only reads the iterators to their end:
 * one byte for each entry that is gone. On the way it reports the flows that
 * rest: what came since their last record would wait for their next packet.
 */
#include "lib/connection.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* A masqueraded packet's connection is a moment younger than its mapping's. */
#define NAT_GRACE_SECONDS 5

static __always_inline void count_deleted(struct bpf_iter_meta *meta)
{
	__u8 mark = 1;

	bpf_seq_write(meta->seq, &mark, sizeof(mark));
}

/* Without a packet: of a flow that has ended, or rests. */
static __always_inline void report(const struct connection *connection,
				   const struct connection_key *key, __u8 type)
{
	struct event *event = event_of_flow(connection, key, type, 0, 0);

	if (event)
		bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

/*
 * A TCP connection that was answered, or more, since its last record, and has
 * no packet to take the next one along; what else there is ends within a
 * minute.
 */
static __always_inline bool rests_unreported(const struct connection *of,
					     __u8 protocol, __u64 now)
{
	return protocol == IPPROTO_TCP && of->flags & CONNECTION_REPLIED &&
	       of->last_seen_jiffies >= of->last_report_jiffies &&
	       now - of->last_report_jiffies >
		       seconds_to_jiffies(settings.flow_report_seconds);
}

SEC("iter/bpf_map_elem")
int collect_connections(struct bpf_iter__bpf_map_elem *ctx)
{
	struct connection *connection = ctx->value;
	struct connection_key *key = ctx->key;
	__u64 now = bpf_jiffies64();
	struct connection_key copy;
	bool is_reported;

	if (!connection || !key)
		return 0;
	copy = *key;
	is_reported = copy.kind == CONNECTION_FLOW && settings.flow_events &&
		      !(connection->flags & CONNECTION_ENDED);
	if (!connection_is_expired(connection, copy.protocol, now)) {
		if (is_reported &&
		    rests_unreported(connection, copy.protocol, now)) {
			connection->last_report_jiffies = now;
			report(connection, &copy, EVENT_FLOW_UPDATE);
		}
		return 0;
	}
	if (is_reported)
		report(connection, &copy, EVENT_FLOW_END);
	if (!bpf_map_delete_elem(&connections, &copy))
		count_deleted(ctx->meta);
	return 0;
}

SEC("iter/bpf_map_elem")
int collect_nat(struct bpf_iter__bpf_map_elem *ctx)
{
	struct packet flow __attribute__((aligned(8))) = {};
	struct connection_key connection_key __attribute__((aligned(8)));
	struct nat *entry = ctx->value;
	struct nat_key *key = ctx->key;
	struct nat_key copy;

	if (!entry || !key)
		return 0;
	if (bpf_jiffies64() - entry->created_jiffies <
	    seconds_to_jiffies(NAT_GRACE_SECONDS))
		return 0;
	copy = *key;
	/* The pod's own view of the flow, whichever of the two entries this is.
	 */
	if (copy.direction == DIRECTION_EGRESS) {
		flow.source = copy.local;
		flow.source_port = copy.local_port;
	} else {
		flow.source = entry->addr;
		flow.source_port = entry->port;
	}
	flow.destination = copy.remote;
	flow.destination_port = copy.remote_port;
	flow.protocol = copy.protocol;
	connection_key_of(&flow, &connection_key);
	if (!bpf_map_lookup_elem(&connections, &connection_key) &&
	    !bpf_map_delete_elem(&nat, &copy))
		count_deleted(ctx->meta);
	return 0;
}
