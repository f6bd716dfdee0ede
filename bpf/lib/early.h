/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What passes this node between a client outside and a backend elsewhere
 * (outside.h), before the kernel makes a packet of it. Nothing is decided here:
 * a flow that from_network has seen within the last quarter of a second goes on
 * as from_network would send it, and nothing is written but the frame. So
 * from_network sees the beginning and the end of each flow, and a packet of it
 * four times a second, which keeps its rows alive and asks again whose they are.
 * Everything else is XDP_PASS: what is not plain, or goes by another device, the
 * tunnel or to a neighbour that the kernel does not know.
 */
#pragma once

#include "nat_port.h"
#include "own.h"
#include "parse.h"
#include "service.h"

/* A flow's packets go on for so long without from_network. */
static __always_inline bool early_is_recent(__u64 seen_jiffies)
{
	return bpf_jiffies64() - seen_jiffies < settings.jiffies_per_second / 4;
}

/* Both ends of a packet. */
struct early_ends {
	struct addr source;
	struct addr destination;
	__be16 source_port;
	__be16 destination_port;
} __attribute__((aligned(8)));

static __always_inline void early_ends_of(const struct packet_tuple *tuple,
					  struct early_ends *ends)
{
	addr_words *source = (void *)&ends->source;
	addr_words *destination = (void *)&ends->destination;

	source[0] = tuple->source[0];
	source[1] = tuple->source[1];
	destination[0] = tuple->destination[0];
	destination[1] = tuple->destination[1];
	ends->source_port = tuple->source_port;
	ends->destination_port = tuple->destination_port;
}

/* The row already knows every flag of the packet. */
static __always_inline bool early_is_known(__u8 seen, __u8 tcp_flags)
{
	return (seen | tcp_flags) == seen;
}

/* From a backend to the client that `row` names: as nat_restore. */
static __always_inline bool early_answer(const struct nat *row, __u8 tcp_flags,
					 struct early_ends *to)
{
	if (!row->service_port || !row->is_answered ||
	    !early_is_recent(row->last_seen_jiffies) ||
	    !early_is_known(row->tcp_flags, tcp_flags) ||
	    row->tcp_flags & (TCP_FIN | TCP_RST))
		return false;
	addr_copy(&to->source, &row->service);
	addr_copy(&to->destination, &row->addr);
	to->source_port = row->service_port;
	to->destination_port = row->port;
	return true;
}

/* The row for the way back is this flow's: as outside_go_on. `to` has what is
 * sent on, `from` what the client has sent. */
static __always_inline bool early_has_way_back(const struct early_ends *from,
					       const struct early_ends *to,
					       __u8 protocol, __u8 tcp_flags)
{
	struct nat_key back __attribute__((aligned(8))) = {
		.local = to->source,
		.remote = to->destination,
		.local_port = to->source_port,
		.remote_port = to->destination_port,
		.protocol = protocol,
		.direction = DIRECTION_INGRESS,
	};
	struct nat *row = bpf_map_lookup_elem(&nat, &back);

	return row && nat_row_is(row, &from->source, from->source_port) &&
	       row->service_port == from->destination_port &&
	       addr_equal(&row->service, &from->destination) &&
	       early_is_recent(row->last_seen_jiffies) &&
	       early_is_known(row->client_flags, tcp_flags);
}

/* From a client to the backend that its flow has: as outside_translate. */
static __always_inline bool early_ask(const struct packet_tuple *tuple,
				      const struct early_ends *from,
				      struct early_ends *to)
{
	struct own_addresses *own = own_addresses_find();
	struct connection_key key __attribute__((aligned(8)));
	struct connection *chosen;
	struct service service;
	bool is_tcp = tuple->protocol == IPPROTO_TCP;

	if (!own || !service_find(&from->destination, from->destination_port,
				  tuple->protocol, SCOPE_EXTERNAL, &service))
		return false;
	if (service.flags & (SERVICE_LOOPBACK | SERVICE_WILDCARD) ||
	    service.kind == SERVICE_HOST_PORT)
		return false;
	connection_key_fill((const void *)&from->source,
			    (const void *)&from->destination, from->source_port,
			    from->destination_port, tuple->protocol, &key);
	key.kind = CONNECTION_SERVICE;
	chosen = bpf_map_lookup_elem(&connections, &key);
	if (!chosen || chosen->identity[1] != service.service_id ||
	    chosen->flags & (CONNECTION_SOCKET | CONNECTION_DIRECT |
			     CONNECTION_CLOSING) ||
	    !early_is_recent(chosen->last_seen_jiffies) ||
	    !early_is_known(chosen->tcp_flags[0], tuple->tcp_flags))
		return false;
	/* A datagram may go to a backend only while that is one. */
	if (is_tcp ? !(chosen->flags & CONNECTION_REPLIED)
		   : chosen->egress_epoch != service.generation)
		return false;
	/* The tunnel's headers are not written here. */
	if (chosen->route[1] != ROUTE_STACK &&
	    (chosen->route[1] != ROUTE_NODE || settings.tunnel_ifindex))
		return false;
	addr_copy(&to->source, own_addr(own, tuple->is_ipv6));
	addr_copy(&to->destination, &chosen->service);
	to->source_port = chosen->other_port ? chosen->other_port
					     : from->source_port;
	to->destination_port = chosen->service_port;
	return !addr_is_zero(&to->source) &&
	       early_has_way_back(from, to, tuple->protocol, tuple->tcp_flags);
}

/* What the packet becomes: false if from_network is to say. */
static __always_inline bool early_find(const struct packet_tuple *tuple,
				       const struct early_ends *from,
				       struct early_ends *to)
{
	struct nat_key back __attribute__((aligned(8))) = {
		.local = from->destination,
		.remote = from->source,
		.local_port = from->destination_port,
		.remote_port = from->source_port,
		.protocol = tuple->protocol,
		.direction = DIRECTION_INGRESS,
	};
	struct nat *row;

	if (tuple->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST))
		return false;
	if (nat_may_have_port(from->destination_port)) {
		row = bpf_map_lookup_elem(&nat, &back);
		if (row)
			return early_answer(row, tuple->tcp_flags, to);
	}
	return early_ask(tuple, from, to);
}

static __always_inline __u16 early_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The frame came for this device, and the way leads back by it; false if not, or
 * if the kernel would not send the packet that way as it is. */
static __always_inline bool early_find_way(struct xdp_md *ctx,
					   const struct early_ends *to,
					   bool is_ipv6, __u16 length,
					   struct bpf_fib_lookup *fib)
{
	/* Read once: the verifier knows no pointer into a context. */
	__u32 ifindex = *(volatile __u32 *)&ctx->ingress_ifindex;

	fib->ifindex = ifindex;
	fib->tot_len = length;
	if (is_ipv6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->source, to->source.w, 16);
		__builtin_memcpy(fib->destination, to->destination.w, 16);
	} else {
		fib->family = AF_INET;
		fib->source[0] = to->source.w[3];
		fib->destination[0] = to->destination.w[3];
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib), 0) ==
		       BPF_FIB_LKUP_RET_SUCCESS &&
	       fib->ifindex == ifindex;
}

/* The addresses, the hop and the header's checksum of IPv4; false if the packet
 * is at its last hop. */
static __always_inline bool early_write_ipv4(struct iphdr *ip,
					     const struct early_ends *from,
					     const struct early_ends *to)
{
	__u64 sum;

	if (ip->ttl <= 1)
		return false;
	sum = bpf_csum_diff((__be32 *)from, 32, (__be32 *)to, 32,
			    (__u16)~ip->check);
	/* RFC 1624: the word with the TTL has 0x100 less. */
	sum = early_fold(sum) + bpf_htons(0xfeff);
	ip->check = ~early_fold(sum);
	ip->ttl--;
	ip->source = to->source.w[3];
	ip->destination = to->destination.w[3];
	return true;
}

static __always_inline bool early_write_ipv6(struct ipv6hdr *ip,
					     const struct early_ends *to)
{
	if (ip->hop_limit <= 1)
		return false;
	ip->hop_limit--;
	__builtin_memcpy(ip->source, to->source.w, 16);
	__builtin_memcpy(ip->destination, to->destination.w, 16);
	return true;
}

/* Ports and the checksum of layer 4, which covers the addresses, too. */
static __always_inline void early_write_ports(void *l4, __sum16 *check,
					      bool is_udp,
					      const struct early_ends *from,
					      const struct early_ends *to)
{
	__be16 *ports = l4;
	__u16 sum;

	ports[0] = to->source_port;
	ports[1] = to->destination_port;
	/* A UDP checksum of 0 means: none; it stays none. */
	if (is_udp && !*check)
		return;
	sum = ~early_fold(bpf_csum_diff((__be32 *)from, 36, (__be32 *)to, 36,
					(__u16)~*check));
	*check = is_udp && !sum ? 0xffff : sum;
}

/* Writes the packet that is sent on; false, and nothing written, if the stack is
 * to say something to its sender. */
static __always_inline bool early_write(void *data, void *end,
					const struct packet_tuple *tuple,
					const struct early_ends *from,
					const struct early_ends *to,
					const struct bpf_fib_lookup *fib)
{
	struct ethhdr *ethernet = data;
	bool is_udp = tuple->protocol == IPPROTO_UDP;
	void *ip = data + ETHERNET_LENGTH;
	void *l4 = ip + (tuple->is_ipv6 ? sizeof(struct ipv6hdr)
					: sizeof(struct iphdr));
	__sum16 *check = l4 + (is_udp ? __builtin_offsetof(struct udphdr, check)
				      : __builtin_offsetof(struct tcphdr, check));

	if (ip + sizeof(struct ipv6hdr) > end && tuple->is_ipv6)
		return false;
	if (ip + sizeof(struct iphdr) > end || (void *)(check + 1) > end ||
	    l4 + 4 > end)
		return false;
	if (tuple->is_ipv6 ? !early_write_ipv6(ip, to)
			   : !early_write_ipv4(ip, from, to))
		return false;
	early_write_ports(l4, check, is_udp, from, to);
	__builtin_memcpy(ethernet->destination, fib->destination_mac, 6);
	__builtin_memcpy(ethernet->source, fib->source_mac, 6);
	return true;
}

/* The length of the packet by its own header, as the way's MTU counts it. */
static __always_inline __u16 early_length(void *data, void *end, bool is_ipv6)
{
	struct ipv6hdr *ipv6 = data + ETHERNET_LENGTH;
	struct iphdr *ip = data + ETHERNET_LENGTH;

	if (!is_ipv6)
		return (void *)(ip + 1) > end ? 0
					      : bpf_ntohs(ip->total_length);
	return (void *)(ipv6 + 1) > end ? 0
					: bpf_ntohs(ipv6->payload_length) +
						  sizeof(*ipv6);
}

static __always_inline bool early_mac_equal(const __u8 a[6], const __u8 b[6])
{
	for (int i = 0; i < 6; i++)
		if (a[i] != b[i])
			return false;
	return true;
}

/* An action of XDP. */
static __always_inline int early_forward(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct early_ends from, to;
	struct bpf_fib_lookup fib = {};
	struct ethhdr *ethernet = data;
	struct packet_tuple tuple;

	if (settings.encrypt_ifindex || !packet_parse_plain(data, end, &tuple))
		return XDP_PASS;
	early_ends_of(&tuple, &from);
	if (!early_find(&tuple, &from, &to) ||
	    !early_find_way(ctx, &to, tuple.is_ipv6,
			    early_length(data, end, tuple.is_ipv6), &fib))
		return XDP_PASS;
	/* By the device that it came by: its own address is the sender's now.
	 * What is for other machines is not ours. */
	if (!early_mac_equal(ethernet->destination, fib.source_mac) ||
	    !early_write(data, end, &tuple, &from, &to, &fib))
		return XDP_PASS;
	metric_count(DROP_NONE, DIRECTION_INGRESS, end - data);
	return XDP_TX;
}
