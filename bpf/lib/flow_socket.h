/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The service address that a socket hook translated, for the flow's records. */
#pragma once

#include "packet.h"
#include "socket.h"

/* The service that the socket hook translated, so that records name it. */
static __noinline void flow_find_socket(struct __sk_buff *ctx,
					struct packet *packet)
{
	struct socket_service *slot;
	struct socket_services *own;
	struct bpf_sock *socket;
	__u32 number;

	if (!settings.socket_lb || packet->flags & PACKET_HAS_SERVICE)
		return;
	socket = ctx->sk;
	if (!socket)
		return;
	socket = bpf_sk_fullsock(socket);
	if (!socket)
		return;
	slot = bpf_sk_storage_get(&socket_service, socket, NULL, 0);
	if (!slot || !socket_slot_leads_to(slot, &packet->destination,
					   packet->destination_port)) {
		own = bpf_sk_storage_get(&socket_services, socket, NULL, 0);
		if (!own)
			return;
		number = socket_find_backend(own, &packet->destination,
					     packet->destination_port);
		if (number >= SOCKET_SLOTS)
			return;
		slot = socket_slot(own, number);
	}
	packet->service = slot->service;
	packet->service_port = slot->service_port;
	packet->flags |= PACKET_HAS_SERVICE | PACKET_AT_SOCKET;
}
