/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The service address that a socket hook translated, for the flow's records. */
#pragma once

#include "packet.h"

/* The service that the socket hook translated, so that records name it. */
static __noinline void flow_find_socket(struct __sk_buff *ctx,
					struct packet *packet)
{
	struct socket_key key = {
		.backend = packet->destination,
		.port = packet->destination_port,
		.protocol = packet->protocol,
	};
	struct socket_origin *origin;
	struct bpf_sock *socket;

	if (!settings.socket_lb || packet->flags & PACKET_HAS_SERVICE)
		return;
	socket = ctx->sk;
	if (!socket)
		return;
	socket = bpf_sk_fullsock(socket);
	if (!socket || !bpf_sk_storage_get(&service_sockets, socket, NULL, 0))
		return;
	key.cookie = bpf_get_socket_cookie(ctx);
	if (!key.cookie)
		return;
	origin = bpf_map_lookup_elem(&sockets, &key);
	if (!origin)
		return;
	packet->service = origin->service;
	packet->service_port = origin->port;
	packet->flags |= PACKET_HAS_SERVICE | PACKET_AT_SOCKET;
}
