/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The packet that nearly every packet is: TCP or UDP from a pod to a pod of the
 * same node, or of another one by native routing, of a flow whose verdict
 * stands, with nothing to write. All it needs stays in registers; whatever is
 * not exactly so goes the ordinary way, which decides everything again (flow.h
 * has the reason for each check). Nothing here drops a packet.
 */
#pragma once

#include "flow.h"
#include "parse.h"
#include "route.h"

/* What was found on the fast way, for the ordinary one. */
struct fast {
	struct connection_key key __attribute__((aligned(8)));
	struct connection *connection;
	__u32 source_index; /* of the packet's sender, in key.addr */
	bool is_looked_up;
};

/* As endpoint_has. */
static __always_inline bool fast_has(const struct endpoint *endpoint,
				     const __u64 words[2], bool is_ipv6)
{
	const addr_words *own =
		(const void *)(is_ipv6 ? &endpoint->ipv6 : &endpoint->ipv4);

	return own[1] == words[1] && own[0] == words[0] &&
	       (words[0] | words[1]);
}

/* The pod is ready, and was judged in this epoch. */
static __always_inline bool fast_is_current(const struct endpoint *endpoint,
					    __u32 epoch)
{
	return endpoint_epoch(endpoint) + address_epoch() == epoch &&
	       endpoint->flags & ENDPOINT_READY;
}

/* False if time has something to say; within a tick it has not. */
static __always_inline bool fast_is_recent(struct connection *connection)
{
	__u64 now = bpf_jiffies64();

	if (connection->last_seen_jiffies == now)
		return true;
	if (now - connection->last_seen_jiffies > settings.jiffies_per_second ||
	    jiffies_since(connection->last_report_jiffies, now) >
		    seconds_to_jiffies(settings.flow_report_seconds))
		return false;
	connection->last_seen_jiffies = now;
	return true;
}

/* False for what is not plain, and what may begin or break a flow. A SYN and its
 * answer say how long a round trip takes (round_trip.h), and their segments may
 * have to get smaller (mss.h). */
static __always_inline bool fast_parse(void *frame, void *end,
				       struct packet_tuple *tuple)
{
	return packet_parse_plain(frame, end, tuple) &&
	       !(tuple->tcp_flags & (TCP_SYN | TCP_RST));
}

/* Flows with something to write, or with something to note about their end, and
 * those of the proxy. */
#define FAST_NOT                                         \
	(CONNECTION_TRANSLATED | CONNECTION_LOOPBACK |   \
	 CONNECTION_ENDED | CONNECTION_RESET | CONNECTION_PROXY)

/* The packet's flow, or NULL. */
static __always_inline struct connection *
fast_find(struct fast *fast, const struct packet_tuple *tuple)
{
	fast->source_index = connection_key_fill(
		tuple->source, tuple->destination, tuple->source_port,
		tuple->destination_port, tuple->protocol, &fast->key);
	fast->connection = bpf_map_lookup_elem(&connections, &fast->key);
	fast->is_looked_up = true;
	return fast->connection;
}

/* Which side of the flow has sent the packet. */
static __always_inline __u32 fast_side(const struct fast *fast,
				       const struct connection *connection)
{
	return index_of_two(fast->source_index ^
			    (connection->flags & CONNECTION_INITIATOR_HIGH));
}

/* The same of who receives, and at once: what has a limit passes a queue. */
static __always_inline bool fast_may_receive(const struct endpoint *endpoint,
					     __u32 epoch)
{
	return endpoint_epoch(endpoint) + address_epoch() == epoch &&
	       (endpoint->flags & (ENDPOINT_READY | ENDPOINT_LIMITED)) ==
		       ENDPOINT_READY;
}

/* The pod of this node that the packet is for, if the flow may go on there. */
static __always_inline struct endpoint *
fast_destination(const struct fast *fast, const struct connection *connection,
		 __u32 side, bool is_ipv6)
{
	/* Id 0 is nobody's: a flow that ends elsewhere stops here. */
	struct endpoint *endpoint =
		endpoint_by_id(connection->endpoint[side ^ 1]);

	if (!endpoint ||
	    !fast_has(endpoint,
		      (const void *)&fast->key.addr[fast->source_index ? 0 : 1],
		      is_ipv6) ||
	    !fast_may_receive(endpoint, side ? connection->egress_epoch
					     : connection->ingress_epoch))
		return NULL;
	return endpoint;
}

/* The entry may be another flow's after this. */
static __always_inline void fast_count(struct __sk_buff *ctx, struct fast *fast,
				       struct connection *connection,
				       __u32 side, __u8 tcp_flags, __u32 flags,
				       __u32 direction)
{
	connection_count(connection, side, tcp_flags, ctx->len);
	if (connection_ends(connection, tcp_flags))
		connection_end(ctx, connection, &fast->key,
			       flags | (side ? EVENT_REPLY : 0));
	metric_count(DROP_NONE, direction, ctx->len);
}

/* The pod that another node's pod sends to, if their flow goes on. */
static __always_inline struct endpoint *
fast_arrival(const struct fast *fast, struct connection *connection, __u32 side,
	     bool is_ipv6)
{
	struct endpoint *destination;

	if (connection->flags & FAST_NOT ||
	    connection->endpoint[side] ||
	    connection->route[side] != ROUTE_NODE ||
	    connection->identity[side] == IDENTITY_HOST)
		return NULL;
	destination = fast_destination(fast, connection, side, is_ipv6);
	return destination && fast_is_recent(connection) ? destination : NULL;
}

/* Not for the fast way: no action of tc. */
#define FAST_OTHER_WAY -1

/*
 * To a pod of another node by the node's routes. Its address is still the one
 * that was judged, or the epoch would be another.
 */
static __always_inline int fast_leave(struct __sk_buff *ctx, struct fast *fast,
				      const struct packet_tuple *tuple)
{
	struct addr *first = &fast->key.addr[0], *second = &fast->key.addr[1];
	__u32 ip = tuple->is_ipv6 ? sizeof(struct ipv6hdr)
				  : sizeof(struct iphdr);
	__u32 length = packet_wire_length(ctx, ETHERNET_LENGTH + ip,
					  tuple->protocol);

	return fast->source_index ? route_leave(ctx, second, first, length)
			  : route_leave(ctx, first, second, length);
}

/* An action of tc, or FAST_OTHER_WAY. */
static __always_inline int fast_from_pod(struct __sk_buff *ctx,
					 struct fast *fast)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct endpoint *source, *destination;
	struct connection *connection;
	struct ethhdr *ethernet = data;
	struct packet_tuple tuple;
	__u32 side, id;
	int action;

	fast->is_looked_up = false;
	fast->connection = NULL;
	fast->source_index = 0;
	if (!fast_parse(data, end, &tuple))
		return FAST_OTHER_WAY;
	id = ethernet->destination[4] << 8 | ethernet->destination[5];
	source = endpoint_by_id(id);
	if (!source || source->ifindex != ctx->ifindex || ctx->vlan_present ||
	    !fast_has(source, tuple.source, tuple.is_ipv6))
		return FAST_OTHER_WAY;
	connection = fast_find(fast, &tuple);
	if (!connection)
		return FAST_OTHER_WAY;
	side = fast_side(fast, connection);
	if (connection->flags & FAST_NOT ||
	    connection->endpoint[side] != id ||
	    !fast_is_current(source, side ? connection->ingress_epoch
					  : connection->egress_epoch))
		return FAST_OTHER_WAY;
	if (!settings.tunnel_ifindex &&
	    connection->route[side ^ 1] == ROUTE_NODE) {
		if (connection->endpoint[side ^ 1] ||
		    !fast_is_recent(connection))
			return FAST_OTHER_WAY;
		ctx->priority = endpoint_priority(source);
		action = fast_leave(ctx, fast, &tuple);
		if (action < 0)
			return FAST_OTHER_WAY;
		fast_count(ctx, fast, connection, side, tuple.tcp_flags, 0,
			   DIRECTION_EGRESS);
		return action;
	}
	destination = fast_destination(fast, connection, side, tuple.is_ipv6);
	if (!destination || !fast_is_recent(connection))
		return FAST_OTHER_WAY;
	fast_count(ctx, fast, connection, side, tuple.tcp_flags, 0,
		   DIRECTION_EGRESS);
	return bpf_redirect_peer(destination->ifindex, 0);
}
