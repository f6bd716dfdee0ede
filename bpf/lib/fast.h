/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The packet that nearly every packet is: TCP or UDP from a pod to a pod of the
 * same node, of a flow whose verdict stands, with nothing to write and nothing
 * to report. All it needs stays in registers; whatever is not exactly so goes
 * the ordinary way, which decides everything again (flow.h has the reason for
 * each check). Nothing here drops a packet.
 */
#pragma once

#include "flow.h"

/* A packet's ends; nobody takes its address, so that it is never in memory. */
struct fast_tuple {
	__u64 source[2]; /* words of the address */
	__u64 destination[2];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 tcp_flags;
	bool is_ipv6;
};

/* What was found on the fast way, for the ordinary one. */
struct fast {
	struct connection_key key __attribute__((aligned(8)));
	struct connection *connection;
	__u32 high;
	bool is_looked_up;
};

/* False if the packet is anything but plain TCP or UDP. */
static __always_inline bool fast_parse(void *data, void *end,
				       struct fast_tuple *tuple)
{
	struct ethhdr *ethernet = data;
	struct tcphdr *l4;

	if (data + ETHERNET_LENGTH + sizeof(struct iphdr) +
		    sizeof(struct udphdr) >
	    end)
		return false;
	if (ethernet->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETHERNET_LENGTH;

		if (ip->version_length != 0x45 ||
		    ip->fragment &
			    bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
			return false;
		tuple->is_ipv6 = false;
		tuple->source[0] = 0;
		tuple->destination[0] = 0;
		tuple->source[1] = addr_low_word_of_ipv4(ip->source);
		tuple->destination[1] = addr_low_word_of_ipv4(ip->destination);
		tuple->protocol = ip->protocol;
		l4 = (void *)(ip + 1);
	} else if (ethernet->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETHERNET_LENGTH;

		if ((void *)(ip + 1) + sizeof(struct udphdr) > end ||
		    (ip->version_class_label & bpf_htonl(0xf0000000)) !=
			    bpf_htonl(0x60000000))
			return false;
		tuple->is_ipv6 = true;
		__builtin_memcpy(tuple->source, ip->source, 16);
		__builtin_memcpy(tuple->destination, ip->destination, 16);
		tuple->protocol = ip->next_header;
		l4 = (void *)(ip + 1);
	} else {
		return false;
	}
	tuple->tcp_flags = 0;
	if (tuple->protocol == IPPROTO_TCP) {
		if ((void *)(l4 + 1) > end)
			return false;
		tuple->tcp_flags = l4->flags;
		/* Beginnings and ends are reported. */
		if (tuple->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))
			return false;
	} else if (tuple->protocol != IPPROTO_UDP) {
		return false;
	}
	tuple->source_port = l4->source;
	tuple->destination_port = l4->destination;
	return true;
}

/* As connection_key_of does; 1 if the source is addr[1]. */
static __always_inline __u32 fast_key(const struct fast_tuple *tuple,
				      struct connection_key *key)
{
	addr_words *first = (void *)&key->addr[0];
	addr_words *second = (void *)&key->addr[1];
	bool high;

	if (tuple->source[1] != tuple->destination[1])
		high = tuple->source[1] > tuple->destination[1];
	else if (tuple->source[0] != tuple->destination[0])
		high = tuple->source[0] > tuple->destination[0];
	else
		high = tuple->source_port > tuple->destination_port;
	if (high) {
		first[0] = tuple->destination[0];
		first[1] = tuple->destination[1];
		second[0] = tuple->source[0];
		second[1] = tuple->source[1];
		key->port[0] = tuple->destination_port;
		key->port[1] = tuple->source_port;
	} else {
		first[0] = tuple->source[0];
		first[1] = tuple->source[1];
		second[0] = tuple->destination[0];
		second[1] = tuple->destination[1];
		key->port[0] = tuple->source_port;
		key->port[1] = tuple->destination_port;
	}
	key->protocol = tuple->protocol;
	key->kind = CONNECTION_FLOW;
	key->pad[0] = 0;
	key->pad[1] = 0;
	return high;
}

/* The pod has this address. */
static __always_inline bool fast_has(const struct endpoint *endpoint,
				     const __u64 words[2], bool is_ipv6)
{
	const addr_words *own =
		(const void *)(is_ipv6 ? &endpoint->ipv6 : &endpoint->ipv4);

	return own[1] == words[1] && own[0] == words[0];
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
	    now - connection->last_report_jiffies >
		    seconds_to_jiffies(settings.flow_report_seconds))
		return false;
	connection->last_seen_jiffies = now;
	return true;
}

/* Nothing is to be told, translated or ended. */
static __always_inline bool fast_is_plain(const struct connection *connection,
					  __u32 side)
{
	return !(connection->flags &
		 (CONNECTION_CLOSING | CONNECTION_TRANSLATED |
		  CONNECTION_LOOPBACK)) &&
	       (!side || connection->flags & CONNECTION_REPLIED);
}

/* The device to redirect to, or 0: the ordinary way. */
static __always_inline __u32 fast_from_pod(struct __sk_buff *ctx,
					   struct fast *fast)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct endpoint *source, *destination;
	struct connection *connection;
	struct ethhdr *ethernet = data;
	struct fast_tuple tuple;
	__u32 side, id;

	fast->is_looked_up = false;
	fast->connection = NULL;
	fast->high = 0;
	if (!fast_parse(data, end, &tuple))
		return 0;
	id = ethernet->destination[4] << 8 | ethernet->destination[5];
	source = endpoint_by_id(id);
	if (!source || source->ifindex != ctx->ifindex || ctx->vlan_present ||
	    !fast_has(source, tuple.source, tuple.is_ipv6))
		return 0;

	fast->high = fast_key(&tuple, &fast->key);
	connection = bpf_map_lookup_elem(&connections, &fast->key);
	fast->connection = connection;
	fast->is_looked_up = true;
	if (!connection)
		return 0;
	side = fast->high ^ (connection->flags & CONNECTION_INITIATOR_HIGH);
	/* The verifier forgets what it knew of a number in memory. */
	barrier_var(side);
	side &= 1;
	if (!fast_is_plain(connection, side) ||
	    connection->endpoint[side] != id ||
	    !fast_is_current(source, side ? connection->ingress_epoch
					  : connection->egress_epoch))
		return 0;
	/* Id 0 is nobody's: a flow that ends elsewhere stops here. */
	destination = endpoint_by_id(connection->endpoint[side ^ 1]);
	if (!destination ||
	    !fast_has(destination,
		      (const void *)&fast->key.addr[fast->high ? 0 : 1],
		      tuple.is_ipv6) ||
	    !fast_is_current(destination, side ? connection->egress_epoch
					       : connection->ingress_epoch))
		return 0;
	if (!fast_is_recent(connection))
		return 0;
	__sync_fetch_and_add(&connection->packets[side], 1);
	__sync_fetch_and_add(&connection->bytes[side], ctx->len);
	if (tuple.tcp_flags & ~connection->tcp_flags[side])
		connection->tcp_flags[side] |= tuple.tcp_flags;
	metric_count(DROP_NONE, DIRECTION_EGRESS, ctx->len);
	return destination->ifindex;
}
