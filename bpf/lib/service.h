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
 * is the client and the frontend, as the client knows them. Flows to services
 * have a SERVICE row, since it holds the choice of the backend; flows to host
 * ports have one only when they need a port of their own.
 */
#pragma once

#include "connection.h"

/* Halvings that find one of as many backends as the map has room for. */
#define SERVICE_SEARCH_STEPS 19

/* Other source ports: 32768 to 49151, tried at random. */
#define SERVICE_PORT_MIN 32768
#define SERVICE_PORT_TRIES 8

static __always_inline bool service_find_key(const struct service_key *key,
					     struct service *service)
{
	struct service *row = bpf_map_lookup_elem(&services, key);

	if (!row)
		return false;
	*service = *row;
	return true;
}

/*
 * Copies the frontend's row: true if there is one. A copy, taken at once: a row
 * that the agent replaces or deletes may be another frontend's the next moment.
 */
static __always_inline bool service_find(const struct addr *addr, __be16 port,
					 __u8 protocol, __u8 scope,
					 struct service *service)
{
	struct service_key key = {
		.addr = *addr,
		.port = port,
		.protocol = protocol,
		.scope = scope,
	};

	return service_find_key(&key, service);
}

/* Copies the backend with an id: true if there is one. */
static __always_inline bool backend_copy(__u32 id, struct backend *backend)
{
	struct backend *row = bpf_map_lookup_elem(&backends, &id);

	if (!row)
		return false;
	*backend = *row;
	return backend->id == id;
}

/* The id of the backend in a slot; 0: there is none. */
static __always_inline __u32 slot_backend(const struct slot_key *key)
{
	const volatile __u64 *row = bpf_map_lookup_elem(&slots, key);
	struct slot slot;
	__u64 word;

	if (!row)
		return 0;
	word = *row;
	__builtin_memcpy(&slot, &word, sizeof(slot));
	return slot.service_id == key->service_id ? slot.backend : 0;
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

/* A backend that was chosen is one that new flows may go to. */
__weak __noinline int service_has_backend(const struct service *service,
					  const struct addr *addr, __u32 port)
{
	struct backend *backend;
	struct slot_key key = {};
	__u32 low = 0, high, id;

	if (!service || !addr)
		return 0;
	key.service_id = service->service_id;
	key.generation = service->generation;
	high = service->backend_count;
	for (int step = 0; step < SERVICE_SEARCH_STEPS && low < high; step++) {
		key.slot = low + (high - low) / 2;
		id = slot_backend(&key);
		backend = bpf_map_lookup_elem(&backends, &id);
		if (!backend || backend->id != id)
			return 0;
		if (backend_is_before(backend, addr, port))
			low = key.slot + 1;
		else if (backend->port == (__be16)port &&
			 addr_equal(&backend->addr, addr))
			return 1;
		else
			high = key.slot;
	}
	return 0;
}

/* The backend that this client has had last, while affinity says so. */
static __always_inline bool service_stay(struct service_choice *choice)
{
	/* By a copy: older verifiers take no key out of an argument. */
	struct affinity_key key = choice->client;
	struct affinity *row = bpf_map_lookup_elem(&affinity, &key);
	__u64 now = bpf_jiffies64();
	struct affinity last;

	if (!row)
		return false;
	last = *row;
	if ((__s64)(now - last.used_jiffies) >
		    (__s64)seconds_to_jiffies(choice->service.affinity_seconds) ||
	    !backend_copy(last.backend, &choice->backend) ||
	    !service_has_backend(&choice->service, &choice->backend.addr,
				 choice->backend.port))
		return false;
	row->used_jiffies = now;
	return true;
}

/* By the table that is the same on every node. */
static __always_inline __u32 service_by_table(const struct service *service,
					      __u64 hash)
{
	__u32 place = (hash >> 32) * settings.maglev_size >> 32;
	struct maglev_key key = {
		.service_id = service->service_id,
		.generation = service->generation,
		.piece = place / MAGLEV_PIECE,
	};
	struct maglev_piece *piece = bpf_map_lookup_elem(&maglev, &key);
	__u32 id;

	place %= MAGLEV_PIECE;
	/* Or clang leaves out what the verifier does not know. */
	barrier_var(place);
	if (!piece || place >= MAGLEV_PIECE)
		return 0;
	id = piece->backends[place];
	return piece->service_id == service->service_id ? id : 0;
}

/* The backend of a number that is even over them all. */
static __always_inline __u32 service_by_number(const struct service *service,
					       __u32 number)
{
	struct slot_key key = {
		.service_id = service->service_id,
		.generation = service->generation,
		/* As even as a remainder, without division. */
		.slot = ((__u64)number * service->backend_count) >> 32,
	};

	return slot_backend(&key);
}

static __always_inline bool service_choose_in(struct service_choice *choice)
{
	const struct service *service = &choice->service;

	if (!service->backend_count)
		return false;
	choice->client.service_id = service->service_id;
	if (service->affinity_seconds && service_stay(choice))
		return true;
	choice->id = choice->hash && service->algorithm == SERVICE_MAGLEV
			     ? service_by_table(service, choice->hash)
			     : service_by_number(service, choice->number);
	return choice->id && backend_copy(choice->id, &choice->backend);
}

/*
 * Chooses a backend of the service whose row is in `choice`: 1 if there is one.
 * The set of backends may have changed since the row was read: then it is read
 * once more.
 */
__weak __noinline int service_choose(struct service_choice *choice)
{
	struct affinity chosen = {};
	struct affinity_key client;
	struct service_key key;

	if (!choice)
		return 0;
	choice->id = 0;
	if (!service_choose_in(choice)) {
		key = choice->frontend;
		if (!service_find_key(&key, &choice->service) ||
		    !service_choose_in(choice))
			return 0;
	}
	if (!choice->service.affinity_seconds || !choice->id)
		return 1;
	chosen.used_jiffies = bpf_jiffies64();
	chosen.backend = choice->id;
	client = choice->client;
	map_insert(&affinity, &client, &chosen);
	return 1;
}

/* The same for a packet to `packet->service`: makes its destination the
 * backend. */
static __always_inline bool service_choose_for(struct packet *packet,
					       struct service_choice *choice)
{
	if (!service_choose(choice))
		return false;
	addr_copy(&packet->destination, &choice->backend.addr);
	packet->destination_port = choice->backend.port;
	return true;
}

/*
 * Of a packet's client and frontend: the same on every node, and with affinity
 * the same for all of a client's flows. No secret: a client that computes it
 * chooses its backend, which it can by trying, too.
 */
static __always_inline __u64 service_hash(const struct packet *packet,
					  const struct service *service)
{
	__u64 ports = (__u64)packet->service_port << 8 | packet->protocol;
	struct hash hash;

	if (!service->affinity_seconds)
		ports |= (__u64)packet->source_port << 32;
	hash_begin_public(&hash);
	hash_add_addr(&hash, &packet->source);
	hash_add_addr(&hash, &packet->service);
	hash_add(&hash, ports);
	return hash_end(&hash) | 1;
}

/* What a choice for the packet needs; its service is set. */
static __always_inline void service_prepare(const struct packet *packet,
					    const struct service *service,
					    __u8 scope,
					    struct service_choice *choice)
{
	__u64 hash;

	addr_copy(&choice->frontend.addr, &packet->service);
	choice->frontend.port = packet->service_port;
	choice->frontend.protocol = packet->protocol;
	choice->frontend.scope = scope;
	choice->service = *service;
	addr_copy(&choice->client.client, &packet->source);
	choice->client.kind = AFFINITY_ADDRESS;
	choice->number = bpf_get_prandom_u32();
	choice->hash = 0;
	if (!service->affinity_seconds &&
	    service->algorithm != SERVICE_MAGLEV)
		return;
	hash = service_hash(packet, service);
	if (service->algorithm == SERVICE_MAGLEV)
		choice->hash = hash;
	/* A client's first packets may come on several CPUs at once: before one
	 * of them has left a row of affinity, they choose the same. */
	if (service->affinity_seconds)
		choice->number = hash >> 32;
}

/* Copies the pod that has a port of this node: true if one has. */
static __always_inline bool service_host_port(const struct addr *addr,
					      __be16 port, __u8 protocol,
					      struct backend *pod)
{
	struct service service;
	__u32 id;

	if (!service_find(addr, port, protocol, SCOPE_EXTERNAL, &service) ||
	    service.kind != SERVICE_HOST_PORT ||
	    service.flags & SERVICE_LOOPBACK)
		return false;
	id = service_by_number(&service, 0);
	return id && backend_copy(id, pod);
}

/* An earlier choice that still holds for this packet, or NULL. */
static __always_inline struct connection *
service_recall(const struct service *service, const struct packet *packet,
	       const struct connection_key *key, __u64 now)
{
	struct connection *chosen = bpf_map_lookup_elem(&connections, key);
	bool begins = packet->protocol != IPPROTO_TCP;

	/* A former agent's choice says no service: its backend is looked for. */
	if (!chosen ||
	    (chosen->identity[1] &&
	     chosen->identity[1] != service->service_id) ||
	    connection_is_expired(chosen, packet->protocol, now))
		return NULL;
	if (packet->tcp_flags & TCP_SYN) {
		/* A port used again, unless it is the first SYN once more. */
		if (chosen->flags & (CONNECTION_CLOSING | CONNECTION_REPLIED))
			return NULL;
		begins = true;
	}
	if (!begins || (chosen->identity[1] &&
			chosen->egress_epoch == service->generation))
		return chosen;
	if (!service_has_backend(service, &chosen->service,
				 chosen->service_port))
		return NULL;
	chosen->egress_epoch = service->generation;
	chosen->identity[1] = service->service_id;
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
	__u32 source_index;

	for (int i = 0; i < SERVICE_PORT_TRIES; i++) {
		source_index = connection_key_of(packet, key);
		flow = bpf_map_lookup_elem(&connections, key);
		/* Or the SYN may meet a socket that is about to close. */
		if (!flow)
			flow = connection_ended(key);
		if (!flow ||
		    connection_is_expired(flow, packet->protocol, now) ||
		    service_is_own(flow, packet,
				   source_index ^ (flow->flags &
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
	__u32 source_index;
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
			 packet->protocol,
			 packet->choice ? SCOPE_EXTERNAL : SCOPE_INTERNAL,
			 &service)) {
		chosen->egress_epoch = service.generation;
		chosen->identity[1] = service.service_id;
	}
	chosen->endpoint[0] = packet->source_endpoint;
	chosen->endpoint[1] = packet->destination_endpoint;
	chosen->tcp_flags[0] = packet->tcp_flags;
	if (packet->own_port) {
		chosen->other_port = packet->source_port;
		packet->flags |= PACKET_NEW_SOURCE;
	}

	/* Under the name that the pod knows. */
	source_index = connection_key_fill(
		packet->flags & PACKET_LOOPBACK
			? (const void *)&packet->destination
			: (const void *)&packet->source,
		(const void *)&packet->service,
		packet->own_port ? packet->own_port : packet->source_port,
		packet->service_port, packet->protocol, key);
	key->kind = CONNECTION_SERVICE;
	chosen->flags = source_index ? CONNECTION_INITIATOR_HIGH : 0;
	return connection_insert(key, chosen, false);
}

/* The flow of a choice that service_keep has kept just now is denied: it leaves
 * nothing. */
static __always_inline void service_forget(const struct packet *packet)
{
	struct scratch *room = scratch_get();

	if (room)
		connection_delete(&room->service_key,
				  packet->source_endpoint
					  ? packet->source_endpoint
					  : room->connection.endpoint[1],
				  0);
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

/* What service_translate leaves to service_translate_new: a chain of calls has
 * little stack. */
#define SERVICE_TO_CHOOSE 2

/*
 * If the packet goes to a service: makes its destination the backend, and its
 * source the loopback address when that is the sender itself. 0,
 * SERVICE_TO_CHOOSE if its flow has no backend, or a drop.
 */
__weak __noinline int service_translate(struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct connection_key *key;
	struct connection *chosen;
	struct service service;
	__u64 now = bpf_jiffies64();

	if (!packet || !room)
		return -DROP_INVALID_PACKET;
	key = &room->service_key;
	if (!service_find(&packet->destination, packet->destination_port,
			  packet->protocol, SCOPE_INTERNAL, &service))
		return service_find(&packet->destination, 0, 0, SCOPE_INTERNAL,
				    &service)
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
	service_prepare(packet, &service, SCOPE_INTERNAL, &room->choice);
	return SERVICE_TO_CHOOSE;
}

/* The same with a backend that is chosen now: 1, for service_keep, or a drop. */
static __always_inline int service_translate_new(struct packet *packet)
{
	struct scratch *room = scratch_get();

	if (!room || !service_choose_for(packet, &room->choice))
		return -DROP_NO_SERVICE_BACKEND;
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
