/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Services: a frontend leads to one of its backends. The socket hooks do it
 * once for a connection; service_translate does it per packet, for the pods
 * whose sockets the hooks do not see, and keeps the choice in a connection of
 * its own kind.
 *
 * A client may reach one backend by several frontends at once, from one source
 * port: by two services, by two addresses of the node that have a host port, by
 * the backend's own address. The backend would see one connection. So the row of
 * the flow says by which frontend it came, and the second frontend's flow gets
 * another source port on the way. The port is kept in a SERVICE row, whose key
 * is the client and the frontend, as the client knows them. Pods' flows to
 * services always have a SERVICE row, since it holds the choice of the backend;
 * flows from outside have one only when they need a port of their own. A node
 * port, whose backend is chosen among many, needs the SERVICE row for each flow
 * from outside, under the same key.
 */
#pragma once

#include "connection.h"

/* Halvings that find one of as many backends as the map has room for. */
#define SERVICE_SEARCH_STEPS 19

/* Other source ports: 32768 to 49151, tried at random. */
#define SERVICE_PORT_MIN 32768
#define SERVICE_PORT_TRIES 8

/*
 * Copies the frontend's row: true if there is one. A copy, taken at once: a row
 * that the agent replaces or deletes may be another frontend's the next moment.
 */
static __always_inline bool service_find(const struct addr *addr, __be16 port,
					 __u8 protocol, struct service *service)
{
	struct service_key key = {
		.addr = *addr,
		.port = port,
		.protocol = protocol,
	};
	struct service *row = bpf_map_lookup_elem(&services, &key);

	if (!row)
		return false;
	*service = *row;
	return true;
}

/* Copies the backend of a number that is even over them all: true if there is
 * one. */
static __always_inline bool service_select(const struct service *service,
					   __u32 number,
					   struct backend *backend)
{
	struct backend_key key = {
		.service_id = service->service_id,
		.generation = service->generation,
		/* As even as a remainder, without division. */
		.slot = ((__u64)number * service->backend_count) >> 32,
	};
	struct backend *row;

	if (!service->backend_count)
		return false;
	row = bpf_map_lookup_elem(&backends, &key);
	if (!row)
		return false;
	*backend = *row;
	return backend->service_id == service->service_id;
}

/*
 * The same of the service with this frontend, whose row was copied. The set of
 * backends may have changed since: then the row is read once more.
 */
static __always_inline bool service_select_backend(const struct addr *addr,
						   __be16 port, __u8 protocol,
						   struct service *service,
						   __u32 number,
						   struct backend *backend)
{
	return service_select(service, number, backend) ||
	       (service_find(addr, port, protocol, service) &&
		service_select(service, number, backend));
}

/* Copies the pod that has a port of this node: true if there is one. */
static __always_inline bool service_host_port(const struct addr *addr,
					      __be16 port, __u8 protocol,
					      struct backend *pod)
{
	struct service service;

	/* Addresses of services are for the cluster only. */
	return service_find(addr, port, protocol, &service) &&
	       service.flags & SERVICE_HOST_PORT &&
	       !(service.flags & SERVICE_LOOPBACK) &&
	       service_select_backend(addr, port, protocol, &service, 0, pod);
}

/* The backend comes before this address and port, in the order of slots. */
static __always_inline bool backend_is_before(const struct backend *backend,
					      const struct addr *addr,
					      __be16 port)
{
	for (int i = 0; i < 4; i++)
		if (backend->addr.w[i] != addr->w[i])
			return bpf_ntohl(backend->addr.w[i]) <
			       bpf_ntohl(addr->w[i]);
	return bpf_ntohs(backend->port) < bpf_ntohs(port);
}

/* A backend that was chosen is still one of the service's. */
static __always_inline bool service_has_backend(const struct service *service,
						const struct addr *addr,
						__be16 port)
{
	struct backend_key key = {
		.service_id = service->service_id,
		.generation = service->generation,
	};
	__u32 low = 0, high = service->backend_count;
	struct backend *backend;

	for (int step = 0; step < SERVICE_SEARCH_STEPS && low < high; step++) {
		key.slot = low + (high - low) / 2;
		backend = bpf_map_lookup_elem(&backends, &key);
		if (!backend || backend->service_id != key.service_id)
			return false;
		if (backend_is_before(backend, addr, port))
			low = key.slot + 1;
		else if (backend->port == port &&
			 addr_equal(&backend->addr, addr))
			return true;
		else
			high = key.slot;
	}
	return false;
}

/* An earlier choice that still holds for this packet, or NULL. */
static __always_inline struct connection *
service_recall(const struct service *service, const struct packet *packet,
	       const struct connection_key *key, __u64 now)
{
	struct connection *chosen = bpf_map_lookup_elem(&connections, key);
	bool begins = packet->protocol != IPPROTO_TCP;

	if (!chosen || chosen->identity[0] != service->service_id ||
	    connection_is_expired(chosen, packet->protocol, now))
		return NULL;
	if (packet->tcp_flags & TCP_SYN) {
		/* A port used again, unless it is the first SYN once more. */
		if (chosen->flags & (CONNECTION_CLOSING | CONNECTION_REPLIED))
			return NULL;
		begins = true;
	}
	if (!begins || chosen->egress_epoch == service->generation)
		return chosen;
	if (!service_has_backend(service, &chosen->service,
				 chosen->service_port))
		return NULL;
	chosen->egress_epoch = service->generation;
	return chosen;
}

/*
 * The entry is of the flow that the packet becomes, or of what the backend sent
 * of its own accord after that one was forgotten (flow_note_clash).
 */
static __always_inline bool service_is_own(const struct connection *flow,
					   const struct packet *packet,
					   __u32 side, __be16 own_port)
{
	__be16 port = flow->other_port ? flow->other_port : packet->source_port;

	if (side && !(flow->flags & (CONNECTION_REPLIED |
				     CONNECTION_TRANSLATED |
				     CONNECTION_LOOPBACK)))
		return port == own_port;
	return flow->flags & (CONNECTION_TRANSLATED | CONNECTION_LOOPBACK) &&
	       port == own_port && flow->service_port == packet->service_port &&
	       addr_equal(&flow->service, &packet->service);
}

/*
 * The pod sees another destination than the backend does: it may use one source
 * port for several at once, to services with a backend in common or to the
 * backend itself. On the way each needs its own. The packet is translated
 * already, its source port is the pod's; 0 or a drop.
 */
static __always_inline int service_choose_port(struct packet *packet,
					       struct connection_key *key,
					       __u64 now)
{
	struct connection *flow;
	__be16 own_port = packet->source_port;
	__u32 high;

	for (int i = 0; i < SERVICE_PORT_TRIES; i++) {
		high = connection_key_of(packet, key);
		flow = bpf_map_lookup_elem(&connections, key);
		/* Or the SYN may meet a socket that is about to close. */
		if (!flow)
			flow = connection_ended(key);
		if (!flow ||
		    connection_is_expired(flow, packet->protocol, now) ||
		    service_is_own(flow, packet,
				   high ^ (flow->flags &
					   CONNECTION_INITIATOR_HIGH),
				   own_port)) {
			if (packet->source_port != own_port)
				packet->own_port = own_port;
			return 0;
		}
		packet->source_port =
			bpf_htons(SERVICE_PORT_MIN +
				  (bpf_get_prandom_u32() & 0x3fff));
	}
	return -DROP_NO_NAT_MAPPING;
}

/* Notes a packet of a choice that was made before, and its source port. */
static __always_inline void service_follow(struct connection *chosen,
					   struct packet *packet, __u64 now)
{
	chosen->last_seen_jiffies = now;
	chosen->tcp_flags[0] |= packet->tcp_flags;
	/* After its FIN the client may still receive, for as long as the server
	 * likes (connection_release_backend). */
	if (packet->tcp_flags & TCP_RST)
		chosen->flags |= CONNECTION_CLOSING;
	else if (!(packet->tcp_flags & TCP_SYN))
		chosen->flags |= CONNECTION_REPLIED;
	if (!chosen->other_port)
		return;
	packet->own_port = packet->source_port;
	packet->source_port = chosen->other_port;
	packet->flags |= PACKET_NEW_SOURCE;
}

/*
 * Keeps where a flow goes whose packet is translated for the first time, and
 * gives it its source port: 0 or a drop.
 */
__weak __noinline int service_keep(struct packet *packet)
{
	struct connection_key *key;
	struct scratch *room = scratch_get();
	struct connection *chosen;
	struct service service;
	__u64 now = bpf_jiffies64();
	__u32 high;
	int ret;

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	/* The port that was chosen before is another flow's now. */
	if (packet->own_port) {
		packet->source_port = packet->own_port;
		packet->own_port = 0;
	}
	key = &room->service_key;
	ret = service_choose_port(packet, key, now);
	if (ret)
		return ret;
	chosen = &room->connection;
	__builtin_memset(chosen, 0, sizeof(*chosen));
	chosen->last_seen_jiffies = now;
	chosen->last_report_jiffies = now;
	addr_copy(&chosen->service, &packet->destination);
	chosen->service_port = packet->destination_port;
	if (service_find(&packet->service, packet->service_port,
			 packet->protocol, &service)) {
		chosen->egress_epoch = service.generation;
		chosen->identity[0] = service.service_id;
	}
	chosen->endpoint[0] = packet->source_endpoint;
	chosen->tcp_flags[0] = packet->tcp_flags;
	if (packet->own_port) {
		chosen->other_port = packet->source_port;
		packet->flags |= PACKET_NEW_SOURCE;
	}

	/* Under the name that the pod knows. */
	high = connection_key_fill(
		packet->flags & PACKET_LOOPBACK
			? (const void *)&packet->destination
			: (const void *)&packet->source,
		(const void *)&packet->service,
		packet->own_port ? packet->own_port : packet->source_port,
		packet->service_port, packet->protocol, key);
	key->kind = CONNECTION_SERVICE;
	chosen->flags = high ? CONNECTION_INITIATOR_HIGH : 0;
	return connection_insert(key, chosen, false);
}

/* To itself a pod speaks from the loopback address. */
static __always_inline void service_use_loopback(struct packet *packet)
{
	if (!addr_equal(&packet->source, &packet->destination))
		return;
	packet->source = packet->flags & PACKET_IPV6 ? settings.loopback_ipv6
						     : settings.loopback_ipv4;
	packet->flags |= PACKET_NEW_SOURCE | PACKET_LOOPBACK;
}

/*
 * If the packet goes to a service: makes its destination the backend, and its
 * source the loopback address when that is the sender itself. 0, 1 if the choice
 * is new (service_keep), or a drop.
 */
__weak __noinline int service_translate(struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection_key *key;
	struct connection *chosen;
	struct service service;
	struct backend backend;
	__u64 now = bpf_jiffies64();

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	key = &room->service_key;
	if (!service_find(&packet->destination, packet->destination_port,
			  packet->protocol, &service))
		return service_find(&packet->destination, 0, 0, &service)
			       ? -DROP_IS_CLUSTER_IP
			       : 0;
	/* A port of the node's own loopback address is for its sockets. */
	if (service.flags & SERVICE_LOOPBACK)
		return 0;
	addr_copy(&packet->service, &packet->destination);
	packet->service_port = packet->destination_port;
	packet->flags |= PACKET_HAS_SERVICE;
	if (service.flags & SERVICE_WILDCARD)
		return -DROP_IS_CLUSTER_IP;

	connection_key_of(packet, key);
	key->kind = CONNECTION_SERVICE;
	packet->flags |= PACKET_NEW_DESTINATION;
	chosen = service_recall(&service, packet, key, now);
	if (chosen) {
		addr_copy(&packet->destination, &chosen->service);
		packet->destination_port = chosen->service_port;
		service_use_loopback(packet);
		service_follow(chosen, packet, now);
		return 0;
	}
	if (!service_select_backend(&packet->service, packet->service_port,
				    packet->protocol, &service,
				    bpf_get_prandom_u32(), &backend))
		return -DROP_NO_SERVICE_BACKEND;
	packet->destination = backend.addr;
	packet->destination_port = backend.port;
	service_use_loopback(packet);
	return 1;
}

/*
 * A flow to a backend, by the backend's own address or by a host port, while one
 * by another frontend has the same source port: it takes another port on the
 * way, and is translated from then on, also to where it goes anyway. 0, 1 if
 * that is new (service_keep), or a drop.
 */
__weak __noinline int service_avoid_clash(struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection_key *key;
	struct connection *chosen;
	__u64 now = bpf_jiffies64();

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	key = &room->service_key;
	if (packet->flags & PACKET_HAS_SERVICE)
		connection_key_fill((const void *)&packet->source,
				    (const void *)&packet->service,
				    packet->source_port, packet->service_port,
				    packet->protocol, key);
	else
		connection_key_of(packet, key);
	key->kind = CONNECTION_SERVICE;
	chosen = bpf_map_lookup_elem(&connections, key);
	if (chosen && (connection_is_expired(chosen, packet->protocol, now) ||
		       (packet->tcp_flags & TCP_SYN &&
			chosen->flags &
				(CONNECTION_CLOSING | CONNECTION_REPLIED))))
		chosen = NULL;
	if (!chosen && !(packet->flags & PACKET_CLASHES))
		return 0;
	if (!(packet->flags & PACKET_HAS_SERVICE)) {
		addr_copy(&packet->service, &packet->destination);
		packet->service_port = packet->destination_port;
		packet->flags |= PACKET_HAS_SERVICE;
	}
	if (!chosen)
		return 1;
	service_follow(chosen, packet, now);
	return 0;
}
