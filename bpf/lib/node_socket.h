/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What the node itself has of a port: sockets of its own network namespace, and
 * ports of its addresses that are pods'. Masquerading takes no packet from
 * either.
 */
#pragma once

#include "service.h"

enum node_socket {
	NODE_SOCKET_NONE = 0,
	NODE_SOCKET_LISTENS = 1, /* for whoever connects or sends */
	NODE_SOCKET_TALKS = 2,	 /* to this remote end */
};

/*
 * The socket of the node that a packet from the remote end to this address and
 * port of the node would reach: enum node_socket. Sockets of the namespace that
 * the packet's device is in (BPF_F_CURRENT_NETNS).
 */
__weak __noinline int node_socket_find(struct __sk_buff *ctx,
				       const struct nat_key *back)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = sizeof(tuple.ipv6);
	struct bpf_sock *socket;
	bool listens;

	if (!back)
		return NODE_SOCKET_NONE;
	if (addr_is_ipv4(&back->local)) {
		size = sizeof(tuple.ipv4);
		tuple.ipv4.source = back->remote.w[3];
		tuple.ipv4.destination = back->local.w[3];
		tuple.ipv4.source_port = back->remote_port;
		tuple.ipv4.destination_port = back->local_port;
	} else {
		__builtin_memcpy(tuple.ipv6.source, back->remote.w, 16);
		__builtin_memcpy(tuple.ipv6.destination, back->local.w, 16);
		tuple.ipv6.source_port = back->remote_port;
		tuple.ipv6.destination_port = back->local_port;
	}
	if (back->protocol == IPPROTO_UDP) {
		socket = bpf_sk_lookup_udp(ctx, &tuple, size,
					   BPF_F_CURRENT_NETNS, 0);
		if (!socket)
			return NODE_SOCKET_NONE;
		listens = socket->state != BPF_TCP_ESTABLISHED;
		bpf_sk_release(socket);
		return listens ? NODE_SOCKET_LISTENS : NODE_SOCKET_TALKS;
	}
	if (back->protocol != IPPROTO_TCP)
		return NODE_SOCKET_NONE;
	socket = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return NODE_SOCKET_NONE;
	listens = socket->state == BPF_TCP_LISTEN;
	bpf_sk_release(socket);
	return listens ? NODE_SOCKET_LISTENS : NODE_SOCKET_TALKS;
}

/* Answers to this address and port of the node are not masquerading's to have:
 * the node has a socket for them, a tunnel ends there, or a service begins. */
static __always_inline bool node_has_port(struct __sk_buff *ctx,
					  const struct nat_key *back)
{
	struct service service;

	return (back->protocol == IPPROTO_UDP &&
		back->local_port == bpf_htons(settings.tunnel_port)) ||
	       service_find(&back->local, back->local_port, back->protocol,
			    SCOPE_EXTERNAL, &service) ||
	       node_socket_find(ctx, back);
}
