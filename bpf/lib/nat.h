/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Masquerade: what pods send out of the cluster bears the node's address, and
 * the answers find back. Two rows a flow, one for each direction; whichever is
 * lost comes back by the other one.
 */
#pragma once

#include "nat_port.h"
#include "own.h"
#include "rewrite.h"

/* The address from which this node sends on what clients outside ask services:
 * false if it has none of the packet's family. */
static __always_inline bool nat_node_addr(const struct packet *packet,
					  struct addr *node)
{
	struct own_addresses *own = own_addresses_find();

	if (!own)
		return false;
	*node = *own_addr(own, packet->flags & PACKET_IPV6);
	return !addr_is_zero(node);
}

static __always_inline bool nat_has_port(const struct packet *packet)
{
	switch (packet->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return true;
	}
	return false;
}

/* A port for a flow that has none, and the row for its way out: 0 or a drop. */
static __always_inline int nat_allocate(struct __sk_buff *ctx,
					struct nat_mapping *to)
{
	int ret = nat_find_port(ctx, to);

	if (ret)
		return ret;
	to->node.port = to->back.local_port;
	/* Kernels before 6.15 may find every free row busy: ask again. */
	if (bpf_map_update_elem(&nat, &to->out, &to->node, BPF_ANY) &&
	    bpf_map_update_elem(&nat, &to->out, &to->node, BPF_ANY))
		return -DROP_NO_NAT_MAPPING;
	return 0;
}

/*
 * True if the port of a mapping still is its flow's. A row for the way back
 * that was lost is written again.
 */
static __always_inline bool nat_is_whole(struct nat_mapping *to,
					 const struct nat *known)
{
	struct nat *row;

	to->back.local_port = known->port;
	row = bpf_map_lookup_elem(&nat, &to->back);
	if (row)
		return nat_row_equal(row, &to->pod);
	to->pod.tcp_flags = known->tcp_flags & TCP_ACK;
	return !bpf_map_update_elem(&nat, &to->back, &to->pod, BPF_NOEXIST);
}

static __always_inline void nat_mapping_of(const struct packet *packet,
					   const struct addr *node, __u64 now,
					   struct nat_mapping *to)
{
	__builtin_memset(to, 0, sizeof(*to));
	to->out.local = packet->source;
	to->out.remote = packet->destination;
	to->out.local_port = packet->source_port;
	to->out.remote_port = packet->destination_port;
	to->out.protocol = packet->protocol;
	to->out.direction = DIRECTION_EGRESS;
	to->back = to->out;
	to->back.local = *node;
	to->back.direction = DIRECTION_INGRESS;
	to->node.addr = *node;
	to->node.last_seen_jiffies = now;
	to->node.tcp_flags = packet->tcp_flags;
	to->pod.addr = packet->source;
	to->pod.port = packet->source_port;
	to->pod.last_seen_jiffies = now;
}

/*
 * The mapping's address may stand: it is the device's, or still the node's. A
 * flow keeps its address when the routes lead it to another device.
 */
static __always_inline bool nat_address_stands(const struct nat *known,
					       const struct addr *node)
{
	return addr_equal(&known->addr, node) || own_has_addr(&known->addr);
}

/*
 * Makes the node the source, with this address unless the flow has another one
 * already and `exactly` is false; the packet is a pod's. 0 or a drop.
 */
__weak __noinline int nat_masquerade(struct __sk_buff *ctx,
				     struct packet *packet,
				     const struct addr *node, bool exactly)
{
	__u32 owner;
	struct scratch *room = scratch_get();
	__u64 now = bpf_jiffies64();
	struct nat_mapping *to;
	struct nat *known;
	int ret;

	if (!packet || !room || !node || addr_is_zero(node))
		return -DROP_NO_NAT_MAPPING;
	if (!nat_has_port(packet))
		return -DROP_UNKNOWN_L4;
	to = &room->mapping;
	nat_mapping_of(packet, node, now, to);
	known = bpf_map_lookup_elem(&nat, &to->out);
	if (known && !(exactly ? addr_equal(&known->addr, node)
			       : nat_address_stands(known, node)))
		known = NULL;
	if (known) {
		to->node.addr = known->addr;
		to->back.local = known->addr;
	}
	if (known && known->last_seen_jiffies != now) {
		known->last_seen_jiffies = now;
		if (!nat_is_whole(to, known)) {
			to->node.addr = *node;
			to->back.local = *node;
			known = NULL;
		}
	}
	if (known) {
		nat_note(known, packet->tcp_flags);
		to->node.port = known->port;
	} else {
		owner = packet->source_endpoint;
		if (!owner)
			owner = nat_owner(&to->pod.addr);
		if (owner && !quota_take(owner, QUOTA_NAT_PORTS))
			return -DROP_QUOTA_NAT_PORTS;
		ret = nat_allocate(ctx, to);
		if (ret) {
			if (owner)
				quota_give(owner, QUOTA_NAT_PORTS);
			return ret;
		}
	}
	packet->source = to->node.addr;
	packet->source_port = to->node.port;
	packet->flags |= PACKET_NEW_SOURCE;
	return rewrite_apply(ctx, packet);
}

/*
 * Of what the node itself sends, or forwards with its address: nothing else may
 * have that port towards the remote end. Sockets are found when a port is
 * sought; a row is for what has none (netfilter's masquerading, pings), and for
 * what a pod's flow would otherwise take the answers of.
 */
__weak __noinline int nat_keep_for_node(struct __sk_buff *ctx,
					struct packet *packet)
{
	struct nat_key back __attribute__((aligned(8))) = {};
	struct nat own __attribute__((aligned(8))) = {};
	struct nat *row;

	/* An RST says that the node has no such port. */
	if (!packet || !nat_may_have_port(packet->source_port) ||
	    !nat_has_port(packet) || packet->tcp_flags & TCP_RST ||
	    (packet->protocol == IPPROTO_UDP &&
	     packet->destination_port == bpf_htons(settings.tunnel_port)))
		return 0;
	back.local = packet->source;
	back.remote = packet->destination;
	back.local_port = packet->source_port;
	back.remote_port = packet->destination_port;
	back.protocol = packet->protocol;
	back.direction = DIRECTION_INGRESS;
	row = bpf_map_lookup_elem(&nat, &back);
	own.last_seen_jiffies = bpf_jiffies64();
	if (row && nat_is_nodes(row, &back)) {
		row->last_seen_jiffies = own.last_seen_jiffies;
		return 0;
	}
	if (!row && ctx->sk && packet->protocol != IPPROTO_ICMP &&
	    packet->protocol != IPPROTO_ICMPV6)
		return 0;
	own.addr = back.local;
	own.port = back.local_port;
	bpf_map_update_elem(&nat, &back, &own, BPF_ANY);
	return 0;
}

/*
 * The pod's row for what comes from a remote end, or NULL if that is the
 * node's. The node's sockets are asked again now and then: one of them may have
 * come after the mapping.
 */
static __always_inline struct nat *nat_find_back(struct __sk_buff *ctx,
						 struct nat_key *back)
{
	struct nat *row = bpf_map_lookup_elem(&nat, back);
	struct nat own __attribute__((aligned(8))) = {};
	__u64 now = bpf_jiffies64();
	int found;

	if (!row || nat_is_nodes(row, back))
		return NULL;
	if (now - row->last_seen_jiffies < settings.jiffies_per_second / 4)
		return row;
	row->last_seen_jiffies = now;
	/* Who listens for TCP takes SYNs alone, which never come here. */
	found = node_socket_find(ctx, back);
	if (!found || (found == NODE_SOCKET_LISTENS &&
		       back->protocol == IPPROTO_TCP))
		return row;
	own.addr = back->local;
	own.port = back->local_port;
	own.last_seen_jiffies = now;
	bpf_map_update_elem(&nat, back, &own, BPF_ANY);
	return NULL;
}

/* The backend has spoken to a client, or has ended their connection: the row for
 * the way there is to know. */
static __always_inline void nat_tell_client_row(const struct packet *packet,
						struct nat *row)
{
	struct connection_key key __attribute__((aligned(8)));
	struct connection *choice;

	connection_key_fill((const void *)&row->addr,
			    (const void *)&row->service, row->port,
			    row->service_port, packet->protocol, &key);
	key.kind = CONNECTION_SERVICE;
	choice = bpf_map_lookup_elem(&connections, &key);
	if (!choice)
		return;
	if (choice->flags & CONNECTION_OPENING)
		connection_answer(choice);
	if (packet->tcp_flags & TCP_RST ||
	    row->tcp_flags & row->client_flags & TCP_FIN)
		choice->flags |= CONNECTION_CLOSING;
}

/* The packet comes from a backend elsewhere: the client knows the frontend. */
static __always_inline void nat_answer_client(struct packet *packet,
					      struct nat *row)
{
	if (!row->is_answered || packet->tcp_flags & (TCP_FIN | TCP_RST) ||
	    row->tcp_flags & row->client_flags & TCP_FIN) {
		row->is_answered = 1;
		nat_tell_client_row(packet, row);
	}
	addr_copy(&packet->source, &row->service);
	packet->source_port = row->service_port;
	packet->flags |= PACKET_NEW_SOURCE;
	packet->choice = CHOICE_ANSWER;
}

/*
 * If the packet answers a masqueraded one, or one that went to a backend
 * elsewhere from the node's address: makes the pod, or the client, its
 * destination, and writes the pod into the frame. 1 if it did, 0 if the packet is
 * none of ours, or a drop.
 */
__weak __noinline int nat_restore(struct __sk_buff *ctx, struct packet *packet)
{
	struct nat_key back __attribute__((aligned(8))) = {};
	struct nat *pod;
	int ret;

	if (!packet)
		return -DROP_NO_NAT_MAPPING;
	if (!nat_may_have_port(packet->destination_port))
		return 0;
	/* Pods begin what is masqueraded: a SYN is for whoever listens here. */
	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return 0;
	back.local = packet->destination;
	back.remote = packet->source;
	back.local_port = packet->destination_port;
	back.remote_port = packet->source_port;
	back.protocol = packet->protocol;
	back.direction = DIRECTION_INGRESS;
	pod = nat_find_back(ctx, &back);
	if (!pod)
		return 0;
	nat_note(pod, packet->tcp_flags);
	if (pod->service_port)
		nat_answer_client(packet, pod);
	packet->destination = pod->addr;
	packet->destination_port = pod->port;
	packet->flags |= PACKET_NEW_DESTINATION;
	/* Its sender may have to be told that it is too long (outside_forward). */
	if (packet->choice == CHOICE_ANSWER)
		return 1;
	ret = rewrite_apply(ctx, packet);
	packet->flags &= ~(PACKET_NEW_SOURCE | PACKET_NEW_DESTINATION);
	return ret ? ret : 1;
}
