// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Ending connected sockets whose backend is gone. Nothing else would tell the
 * application soon: UDP would send into the void for as long as it lives, TCP
 * finds out when its data was sent again for minutes. A UDP socket ends when its
 * service leads to the backend no more, a TCP socket when the backend exists no
 * more. Walks the sockets of the network namespace of the thread that opens the
 * iterator, and writes each that is ended. Kernels before 6.5 have no
 * bpf_sock_destroy: there the agent ends what is written.
 */
#include "lib/socket.h"

#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* The state of a socket that is connected, also by UDP. */
#define TCP_ESTABLISHED 1

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
} __attribute__((preserve_access_index));

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	int skc_bound_dev_if;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct inet_sock {
	struct sock sk;
} __attribute__((preserve_access_index));

struct udp_sock {
	struct inet_sock inet;
} __attribute__((preserve_access_index));

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
} __attribute__((preserve_access_index));

int bpf_sock_destroy(struct sock_common *sock) __ksym __weak;

static __always_inline void addr_from_in6(struct addr *addr,
					  const struct in6_addr *ipv6)
{
	addr->w[0] = ipv6->in6_u.u6_addr32[0];
	addr->w[1] = ipv6->in6_u.u6_addr32[1];
	addr->w[2] = ipv6->in6_u.u6_addr32[2];
	addr->w[3] = ipv6->in6_u.u6_addr32[3];
}

static __always_inline void socket_name(struct sock_common *common,
					struct stale_socket *name)
{
	name->remote_port = common->skc_dport;
	name->local_port = bpf_htons(common->skc_num);
	name->ifindex = common->skc_bound_dev_if;
	if (common->skc_family == AF_INET) {
		addr_from_ipv4(&name->local, common->skc_rcv_saddr);
		addr_from_ipv4(&name->remote, common->skc_daddr);
	} else if (bpf_core_field_exists(common->skc_v6_daddr)) {
		addr_from_in6(&name->local, &common->skc_v6_rcv_saddr);
		addr_from_in6(&name->remote, &common->skc_v6_daddr);
	}
}

struct search {
	const struct socket_service *wanted;
	struct slot_key key;
	bool is_found;
};

static long search_slot(__u32 slot, struct search *search)
{
	struct backend *backend;
	__u32 id;

	search->key.slot = slot;
	id = slot_backend(&search->key);
	backend = bpf_map_lookup_elem(&backends, &id);
	search->is_found = backend &&
			   backend->port == search->wanted->backend_port &&
			   addr_equal(&backend->addr, &search->wanted->backend);
	return search->is_found;
}

/*
 * The service that the socket was connected to still leads to its peer. True in
 * doubt: when the set changes during the search, or the row is another one's.
 */
static __always_inline bool socket_is_current(const struct socket_service *of,
					      __u8 protocol)
{
	struct search search = {.wanted = of};
	struct service service;

	if (!service_find(&of->service, of->service_port, protocol,
			  SCOPE_INTERNAL, &service))
		return false;
	search.key.service_id = service.service_id;
	search.key.generation = service.generation;
	/* A backend that drains keeps what it has. */
	bpf_loop(service.backend_count + service.draining_count, search_slot,
		 &search, 0);
	if (search.is_found)
		return true;
	return service_find(&of->service, of->service_port, protocol,
			    SCOPE_INTERNAL, &service) &&
	       (service.service_id != search.key.service_id ||
		service.generation != search.key.generation);
}

/* Copies what the socket was told of its peer: true if it was told anything. */
static __always_inline bool socket_origin(struct sock_common *common,
					  const struct stale_socket *name,
					  struct socket_service *origin)
{
	struct socket_service *slot =
		bpf_sk_storage_get(&socket_service, common, NULL, 0);

	if (!slot ||
	    !socket_slot_leads_to(slot, &name->remote, name->remote_port))
		return false;
	*origin = *slot;
	return true;
}

static __always_inline bool backend_is_gone(const struct socket_service *of)
{
	struct gone_backend key = {
		.addr = of->backend,
		.port = of->backend_port,
	};

	return bpf_map_lookup_elem(&gone_backends, &key);
}

static __always_inline void socket_end(struct seq_file *seq,
				       struct sock_common *common,
				       struct stale_socket *name)
{
	if (!bpf_ksym_exists(bpf_sock_destroy) || !bpf_sock_destroy(common))
		bpf_seq_write(seq, name, sizeof(*name));
}

SEC("iter/udp")
int destroy_sockets(struct bpf_iter__udp *ctx)
{
	struct sock_common *common = (struct sock_common *)ctx->udp_sk;
	struct socket_service origin = {};
	struct stale_socket name = {};

	if (!common || common->skc_state != TCP_ESTABLISHED)
		return 0;
	socket_name(common, &name);
	if (!socket_origin(common, &name, &origin) ||
	    socket_is_current(&origin, IPPROTO_UDP))
		return 0;
	name.cookie = bpf_get_socket_cookie(common);
	name.protocol = IPPROTO_UDP;
	socket_end(ctx->meta->seq, common, &name);
	return 0;
}

SEC("iter/tcp")
int destroy_tcp_sockets(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct socket_service origin = {};
	struct stale_socket name = {};

	if (!common || common->skc_state != TCP_ESTABLISHED)
		return 0;
	socket_name(common, &name);
	if (!socket_origin(common, &name, &origin) ||
	    !backend_is_gone(&origin) ||
	    socket_is_current(&origin, IPPROTO_TCP))
		return 0;
	name.cookie = bpf_get_socket_cookie(common);
	name.protocol = IPPROTO_TCP;
	socket_end(ctx->meta->seq, common, &name);
	return 0;
}
