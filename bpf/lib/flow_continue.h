/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * A packet of a running flow: the row of the flow has the verdict. The packet
 * must come from where the flow's packets come from, by the frontend of the
 * flow, and the verdict must be of the policy in force. Everything else is left
 * to flow.h.
 */
#pragma once

#include "connection.h"
#include "identity.h"

/* A local end is the pod that the verdict is of, and nothing that the verdict
 * depends on has changed since. */
static __always_inline bool
flow_end_is_current(const struct connection *connection,
		    const struct packet *packet, const struct addr *addr,
		    __u32 end)
{
	struct endpoint *endpoint = endpoint_by_id(connection->endpoint[end]);

	return endpoint &&
	       endpoint_epoch(endpoint) + address_epoch() ==
		       (end ? connection->ingress_epoch
			    : connection->egress_epoch) &&
	       endpoint->flags & ENDPOINT_READY &&
	       (connection->flags & CONNECTION_LOOPBACK ||
		endpoint_has(endpoint, addr, packet));
}

/*
 * The node's own packets of a running flow. The stack alone makes answers to
 * what a pod asked the node, also of what it forwards: its NAT may have led the
 * question to somebody else. Its packets need no socket here: kernels before
 * 6.13 send IPv6's last acknowledgements and resets without one.
 */
static __always_inline bool flow_is_of_host(const struct packet *packet,
					    __u32 sender)
{
	return packet->flags & PACKET_FROM_STACK &&
	       (sender || !(packet->flags & PACKET_FORWARDED));
}

/*
 * Whoever knows a flow's tuple must not be able to put packets into the flow. A
 * pod's packets come from the pod's own device, those of another node's pod by
 * the tunnel, the node's own from its stack. A packet that arrives otherwise
 * gets a verdict of its own, which refuses it.
 */
static __always_inline bool
flow_came_by_its_way(const struct connection *connection,
		     const struct packet *packet, __u32 sender)
{
	if (connection->endpoint[sender] != packet->source_endpoint)
		return false;
	if (packet->flags & PACKET_FROM_POD)
		return true;
	if (connection->identity[sender] == IDENTITY_HOST)
		return flow_is_of_host(packet, sender);
	return !settings.tunnel_ifindex ||
	       connection->route[sender] != ROUTE_NODE ||
	       packet->flags & PACKET_FROM_OVERLAY;
}

/* What a backend sends comes from where the question was sent to. */
static __always_inline void
flow_restore_service(struct packet *packet, const struct connection *connection)
{
	__u32 sender = packet->flags & PACKET_REPLY ? 1 : 0;

	/* The proxy knows both ends by the addresses of the flow. */
	if (connection->flags & CONNECTION_PROXY &&
	    !(packet->flags & PACKET_FROM_PROXY))
		return;
	if (sender == connection_client_side(connection) ||
	    !(connection->flags &
	      (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK)))
		return;
	/* The loopback address stands for the pod itself. */
	if (connection->flags & CONNECTION_LOOPBACK) {
		packet->destination = packet->source;
		packet->flags |= PACKET_NEW_DESTINATION;
	}
	if (connection->other_port) {
		packet->destination_port = connection->other_port;
		packet->flags |= PACKET_NEW_DESTINATION;
	}
	packet->source = connection->service;
	packet->source_port = connection->service_port;
	packet->flags |= PACKET_NEW_SOURCE;
}

/*
 * The packet was sent to the same frontend (a service, a host port, the pod's
 * own address) as this flow, whose key it has. A backend's is, whatever the
 * frontend; a pod's own flows are kept apart before (from_pod_clashes).
 */
static __always_inline bool
flow_has_frontend(const struct connection *connection,
		  const struct packet *packet, __u32 sender)
{
	bool is_translated = connection->flags &
			     (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK);

	/* Of a TCP connection only the SYN says the frontend. */
	if (!(packet->flags & PACKET_HAS_SERVICE))
		return !is_translated ||
		       connection->flags & CONNECTION_DIRECT ||
		       packet->flags & PACKET_FROM_POD ||
		       sender != connection_client_side(connection);
	return is_translated && sender == connection_client_side(connection) &&
	       connection->service_port == packet->service_port &&
	       addr_equal(&connection->service, &packet->service);
}

/*
 * The packet goes to another frontend than the flow that has its key. If that
 * is nothing but what the backend sent of its own accord, after the flow to the
 * frontend was forgotten, the client's packet begins that flow again. Else both
 * run, and the packet needs another source port.
 */
static __always_inline void flow_note_clash(const struct connection *connection,
					    struct packet *packet, __u32 sender)
{
	if (sender && !(connection->flags & CONNECTION_REPLIED))
		packet->flags |= PACKET_BEGINS | PACKET_REPLACES;
	else
		packet->flags |= PACKET_CLASHES;
}

/*
 * True if the packet belongs to this flow and its verdict stands. Counts it and
 * fills what forwarding needs.
 */
static __always_inline bool flow_continue(struct __sk_buff *ctx,
					  struct packet *packet,
					  struct connection_key *key,
					  struct connection *connection,
					  __u32 source_index)
{
	__u32 sender = index_of_two(
		source_index ^ (connection->flags & CONNECTION_INITIATOR_HIGH));
	__u32 event;
	bool ends;

	if (connection_begins_anew(connection, packet, sender,
				   bpf_jiffies64())) {
		packet->flags |= PACKET_BEGINS | PACKET_REPLACES;
		return false;
	}

	if (!flow_came_by_its_way(connection, packet, sender))
		return false;
	if (!flow_has_frontend(connection, packet, sender)) {
		flow_note_clash(connection, packet, sender);
		return false;
	}
	packet->route = connection->route[sender ^ 1];
	packet->source_route = connection->route[sender];
	if (!packet->route)
		return false;
	if (connection->endpoint[sender] &&
	    !flow_end_is_current(connection, packet, &packet->source, sender))
		return false;
	packet->destination_endpoint = connection->endpoint[sender ^ 1];
	if (packet->destination_endpoint &&
	    !flow_end_is_current(connection, packet, &packet->destination,
				 sender ^ 1))
		return false;

	if (sender)
		packet->flags |= PACKET_REPLY;
	if (connection->flags & CONNECTION_PROXY) {
		packet->flags |= PACKET_TO_PROXY;
		/* What counts is what the client sends and gets. */
		if (sender)
			return true;
	}
	event = connection_account(ctx, connection, packet, sender,
				   bpf_jiffies64());
	ends = connection_ends(connection, packet->tcp_flags);
	if (event && !ends)
		event_flow(ctx, packet, connection, event);
	flow_restore_service(packet, connection);
	/* The entry may be another flow's after this. */
	if (ends)
		connection_end(ctx, connection, key, event_flags_of(packet));
	return true;
}

/* The packet answers a flow that its destination began. */
static __always_inline bool flow_is_reply(const struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection;
	__u32 source_index;

	if (!room)
		return false;
	source_index = connection_key_of(packet, &room->flow.key);
	connection = bpf_map_lookup_elem(&connections, &room->flow.key);
	return connection &&
	       source_index ^ (connection->flags & CONNECTION_INITIATOR_HIGH);
}

/* The flow that has ended when the packet comes, or NULL. */
static __always_inline struct connection *
flow_recall(const struct packet *packet, struct connection_key *key)
{
	/* A SYN begins another one. */
	if (packet->protocol != IPPROTO_TCP || packet->tcp_flags & TCP_SYN ||
	    !connection_recall(key))
		return NULL;
	return bpf_map_lookup_elem(&connections, key);
}

/* The same of whichever flow the packet belongs to. */
static __always_inline bool flow_established(struct __sk_buff *ctx,
					     struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection *connection;
	struct connection_key *key;
	__u32 source_index;

	if (!room)
		return false;
	key = &room->flow.key;
	source_index = connection_key_of(packet, key);
	connection = bpf_map_lookup_elem(&connections, key);
	if (!connection)
		connection = flow_recall(packet, key);
	if (connection)
		return flow_continue(ctx, packet, key, connection,
				     source_index);
	packet->flags |= PACKET_BEGINS;
	return false;
}
