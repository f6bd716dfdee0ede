/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Services: a frontend leads to one of its backends. The socket hooks do it
 * once for a connection; service_translate does it per packet, for the pods
 * whose sockets the hooks do not see, and keeps the choice in a connection of
 * its own kind.
 */
#pragma once

#include "connection.h"

/* How many slots are searched for a backend when the set has changed. */
#define SERVICE_SEARCH_SLOTS 256

static __always_inline struct service *service_find(const struct addr *addr,
						    __be16 port, __u8 protocol)
{
	struct service_key key = {
		.addr = *addr,
		.port = port,
		.protocol = protocol,
	};

	return bpf_map_lookup_elem(&services, &key);
}

/* The backend of a number that is even over them all. */
static __always_inline struct backend *
service_select_backend(const struct service *service, __u32 number)
{
	struct backend_key key = {
		.service_id = service->service_id,
		.generation = *(const volatile __u32 *)&service->generation,
	};
	__u32 count = *(const volatile __u32 *)&service->backend_count;

	if (!count)
		return NULL;
	/* A multiplication spreads as evenly as a remainder, without division.
	 */
	key.slot = ((__u64)number * count) >> 32;
	return bpf_map_lookup_elem(&backends, &key);
}

/* The pod that has a port of this node, or NULL. */
static __always_inline struct backend *
service_host_port(const struct addr *addr, __be16 port, __u8 protocol)
{
	struct service *service = service_find(addr, port, protocol);

	/* Addresses of services are for the cluster only. */
	if (!service || !(service->flags & SERVICE_HOST_PORT) ||
	    service->flags & SERVICE_LOOPBACK)
		return NULL;
	return service_select_backend(service, 0);
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
	struct backend *backend;

	for (__u32 slot = 0; slot < SERVICE_SEARCH_SLOTS; slot++) {
		if (slot >= service->backend_count)
			return false;
		key.slot = slot;
		backend = bpf_map_lookup_elem(&backends, &key);
		if (backend && backend->port == port &&
		    addr_equal(&backend->addr, addr))
			return true;
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
 * If the packet goes to a service: makes its destination the backend, and its
 * source the loopback address when that is the sender itself. 0 or a drop.
 */
__weak __noinline int service_translate(struct packet *packet)
{
	struct connection_key key __attribute__((aligned(8)));
	struct connection *chosen;
	struct service *service;
	struct backend *backend;
	__u64 now = bpf_jiffies64();
	__u32 zero = 0;
	bool high;

	if (!packet)
		return -DROP_INVALID_PACKET;
	service = service_find(&packet->destination, packet->destination_port,
			       packet->protocol);
	/* Nobody sends packets to loopback addresses in good faith. */
	if (service && service->flags & SERVICE_LOOPBACK)
		return 0;
	if (!service) {
		if (service_find(&packet->destination, 0, 0))
			return -DROP_IS_CLUSTER_IP;
		return 0;
	}
	addr_copy(&packet->service, &packet->destination);
	packet->service_port = packet->destination_port;
	packet->flags |= PACKET_HAS_SERVICE;
	if (service->flags & SERVICE_WILDCARD)
		return -DROP_IS_CLUSTER_IP;

	high = connection_key_of(packet, &key);
	key.kind = CONNECTION_SERVICE;
	chosen = service_recall(service, packet, &key, now);
	if (chosen) {
		chosen->last_seen_jiffies = now;
		chosen->tcp_flags[0] |= packet->tcp_flags;
		if (packet->tcp_flags & (TCP_FIN | TCP_RST))
			chosen->flags |= CONNECTION_CLOSING;
		else if (!(packet->tcp_flags & TCP_SYN))
			chosen->flags |= CONNECTION_REPLIED;
	} else {
		/* Once more: the set may have changed between the two reads. */
		backend =
			service_select_backend(service, bpf_get_prandom_u32());
		if (!backend)
			backend = service_select_backend(service, 0);
		if (!backend)
			return -DROP_NO_SERVICE_BACKEND;
		chosen = bpf_map_lookup_elem(&scratch, &zero);
		if (!chosen)
			return -DROP_CONNECTION_INSERT;
		__builtin_memset(chosen, 0, sizeof(*chosen));
		chosen->last_seen_jiffies = now;
		chosen->last_report_jiffies = now;
		chosen->service = backend->addr;
		chosen->service_port = backend->port;
		chosen->egress_epoch = service->generation;
		chosen->identity[0] = service->service_id;
		chosen->endpoint[0] = packet->source_endpoint;
		chosen->tcp_flags[0] = packet->tcp_flags;
		chosen->flags = high ? CONNECTION_INITIATOR_HIGH : 0;
		if (bpf_map_update_elem(&connections, &key, chosen, BPF_ANY) &&
		    bpf_map_update_elem(&connections, &key, chosen, BPF_ANY))
			return -DROP_CONNECTION_INSERT;
	}

	packet->destination = chosen->service;
	packet->destination_port = chosen->service_port;
	packet->flags |= PACKET_NEW_DESTINATION;
	if (addr_equal(&packet->source, &packet->destination)) {
		packet->source = packet->flags & PACKET_IPV6
					 ? settings.loopback_ipv6
					 : settings.loopback_ipv4;
		packet->flags |= PACKET_NEW_SOURCE | PACKET_LOOPBACK;
	}
	return 0;
}
