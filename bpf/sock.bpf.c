// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The socket hooks: a service's address becomes a backend's when the
 * application connects (or sends its datagram), and the backend's becomes the
 * service's again when it asks whom it talks to. Packets then need no
 * translation. A socket that the hooks do not see is served by from_pod.
 */
#include "lib/socket.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* Backends that a datagram's service is asked for before one is used twice. */
#define SOCK_BACKEND_TRIES 4

enum sock_verdict {
	SOCK_REFUSE = 0,
	SOCK_PASS = 1,
};

/* The family is the hook's: the verifier lets each see its own fields only. */
static __always_inline void sock_get_address(const struct bpf_sock_addr *ctx,
					     struct addr *addr, bool is_ipv6)
{
	if (!is_ipv6) {
		addr_from_ipv4(addr, ctx->user_ip4);
		return;
	}
	addr->w[0] = ctx->user_ip6[0];
	addr->w[1] = ctx->user_ip6[1];
	addr->w[2] = ctx->user_ip6[2];
	addr->w[3] = ctx->user_ip6[3];
}

/* An IPv6 socket names an IPv4 address as v4-mapped, which ours are anyway. */
static __always_inline void sock_set_address(struct bpf_sock_addr *ctx,
					     const struct addr *addr,
					     __be16 port, bool is_ipv6)
{
	ctx->user_port = port;
	if (!is_ipv6) {
		ctx->user_ip4 = addr->w[3];
		return;
	}
	ctx->user_ip6[0] = addr->w[0];
	ctx->user_ip6[1] = addr->w[1];
	ctx->user_ip6[2] = addr->w[2];
	ctx->user_ip6[3] = addr->w[3];
}

static __always_inline __u8 sock_protocol(const struct bpf_sock_addr *ctx)
{
	if (ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP)
		return IPPROTO_TCP;
	if (ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP)
		return IPPROTO_UDP;
	return 0;
}

static __always_inline int sock_refuse(void)
{
	bpf_set_retval(-ECONNREFUSED);
	return SOCK_REFUSE;
}

/* A number that stays with the socket: its datagrams all go to one backend. */
static __always_inline __u32 sock_number(__u64 cookie)
{
	return hash_secret(cookie);
}

/* A loopback address means another thing in every namespace. */
static __always_inline bool sock_may_use(struct bpf_sock_addr *ctx,
					 const struct service *service)
{
	return !(service->flags & SERVICE_LOOPBACK) ||
	       (settings.netns_cookie &&
		bpf_get_netns_cookie(ctx) == settings.netns_cookie);
}

/*
 * Chooses a backend of the service for the socket: true if there is one. A
 * socket's own address is not known yet: with affinity all sockets of a
 * namespace are one client. Without affinity a socket that sends datagrams to
 * services (`own`, or NULL) gets a backend that no other service of the socket
 * leads to, if a few tries find one: what comes from the backend is an answer of
 * one service then.
 */
static __always_inline bool sock_choose(struct bpf_sock_addr *ctx,
					struct socket_services *own,
					struct service_choice *choice)
{
	__u64 netns = bpf_get_netns_cookie(ctx);

	__builtin_memcpy(&choice->client.client, &netns, sizeof(netns));
	choice->client.kind = AFFINITY_NAMESPACE;
	choice->number = own ? sock_number(bpf_get_socket_cookie(ctx))
			     : bpf_get_prandom_u32();
	/* A client's first sockets may choose at once, on several CPUs: before
	 * one of them has left a row, they choose the same. */
	if (choice->service.affinity_seconds)
		choice->number = hash_secret(netns + choice->service.service_id);
	for (int try = 0; try < SOCK_BACKEND_TRIES; try++) {
		if (!service_choose(choice))
			return false;
		if (!own || choice->service.affinity_seconds ||
		    choice->service.backend_count < 2 ||
		    socket_find_any(own, &choice->backend.addr,
				    choice->backend.port) >= SOCKET_SLOTS)
			return true;
		choice->number = hash_secret(choice->number + 1);
	}
	return true;
}

/* Notes what was chosen. */
static __always_inline void sock_fill_slot(struct socket_service *slot,
					   const struct service_choice *choice)
{
	slot->service = choice->frontend.addr;
	slot->service_port = choice->frontend.port;
	slot->service_id = choice->service.service_id;
	slot->generation = choice->service.generation;
	slot->backend = choice->backend.addr;
	slot->backend_port = choice->backend.port;
}

/* connect(): each gets a backend of its own. */
static __always_inline int sock_connect(struct bpf_sock_addr *ctx,
					struct service_choice *choice,
					bool is_ipv6)
{
	struct socket_service *slot;

	if (!sock_choose(ctx, NULL, choice))
		return sock_refuse();
	/* Without a record, the peer would seem to be a stranger. */
	slot = bpf_sk_storage_get(&socket_service, ctx->sk, NULL,
				  BPF_SK_STORAGE_GET_F_CREATE);
	if (!slot)
		return sock_refuse();
	sock_fill_slot(slot, choice);
	sock_set_address(ctx, &choice->backend.addr, choice->backend.port,
			 is_ipv6);
	return SOCK_PASS;
}

/*
 * The socket's backend of a service is one still. With affinity the backend is
 * the client's, not the socket's: service_choose says which, and notes that the
 * client has used it.
 */
static __always_inline bool sock_keeps_backend(struct socket_service *slot,
					       const struct service *service)
{
	if (service->affinity_seconds)
		return false;
	if (slot->service_id == service->service_id &&
	    slot->generation == service->generation)
		return true;
	if (!service_has_backend(service, &slot->backend, slot->backend_port))
		return false;
	slot->service_id = service->service_id;
	slot->generation = service->generation;
	return true;
}

/* sendmsg(): a socket keeps its backend of a service while that is one. */
static __always_inline int sock_send(struct bpf_sock_addr *ctx,
				     struct service_choice *choice,
				     bool is_ipv6)
{
	struct socket_services *own;
	struct socket_service *slot;
	__u32 number;

	/* Without a record, answers would seem to come from a stranger. */
	own = bpf_sk_storage_get(&socket_services, ctx->sk, NULL,
				 BPF_SK_STORAGE_GET_F_CREATE);
	if (!own)
		return sock_refuse();
	number = socket_find_service(own, &choice->frontend.addr,
				     choice->frontend.port);
	slot = socket_slot(own, number);
	if (number >= SOCKET_SLOTS ||
	    !sock_keeps_backend(slot, &choice->service)) {
		if (!sock_choose(ctx, own, choice))
			return sock_refuse();
		if (number < SOCKET_SLOTS &&
		    !socket_slot_leads_to(slot, &choice->backend.addr,
					  choice->backend.port)) {
			/* It may still answer what it was asked. */
			slot->service_id = 0;
			number = SOCKET_SLOTS;
		}
		if (number >= SOCKET_SLOTS) {
			number = own->next & SOCKET_SLOT_MASK;
			own->next = number + 1;
		}
		slot = socket_slot(own, number);
		sock_fill_slot(slot, choice);
	}
	socket_note_question(own, number);
	sock_set_address(ctx, &slot->backend, slot->backend_port, is_ipv6);
	return SOCK_PASS;
}

/* connect() and sendmsg(). */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx,
					  bool is_datagram, bool is_ipv6)
{
	struct service_choice choice __attribute__((aligned(8))) = {};
	__u8 protocol = sock_protocol(ctx);

	if (!settings.socket_lb || !protocol)
		return SOCK_PASS;
	sock_get_address(ctx, &choice.frontend.addr, is_ipv6);
	choice.frontend.port = ctx->user_port;
	choice.frontend.protocol = protocol;
	if (!service_find_key(&choice.frontend, &choice.service)) {
		if (service_find(&choice.frontend.addr, 0, 0, SCOPE_INTERNAL,
				 &choice.service))
			return sock_refuse();
		return SOCK_PASS;
	}
	if (choice.service.flags & SERVICE_WILDCARD)
		return sock_refuse();
	if (!sock_may_use(ctx, &choice.service))
		return SOCK_PASS;
	return is_datagram ? sock_send(ctx, &choice, is_ipv6)
			   : sock_connect(ctx, &choice, is_ipv6);
}

/* getpeername(), and recvmsg() of a connected socket. */
static __always_inline int sock_name_peer(struct bpf_sock_addr *ctx,
					  const struct addr *backend,
					  bool is_ipv6)
{
	struct socket_service *slot =
		bpf_sk_storage_get(&socket_service, ctx->sk, NULL, 0);

	if (slot && socket_slot_leads_to(slot, backend, ctx->user_port))
		sock_set_address(ctx, &slot->service, slot->service_port,
				 is_ipv6);
	return SOCK_PASS;
}

static __always_inline int sock_get_peer(struct bpf_sock_addr *ctx,
					 bool is_ipv6)
{
	struct addr backend;

	if (!settings.socket_lb || !sock_protocol(ctx))
		return SOCK_PASS;
	sock_get_address(ctx, &backend, is_ipv6);
	return sock_name_peer(ctx, &backend, is_ipv6);
}

/* recvmsg(). */
static __always_inline int sock_receive(struct bpf_sock_addr *ctx, bool is_ipv6)
{
	struct socket_service *slot;
	struct socket_services *own;
	struct addr backend;
	__u32 number;

	if (!settings.socket_lb || !sock_protocol(ctx))
		return SOCK_PASS;
	sock_get_address(ctx, &backend, is_ipv6);
	own = bpf_sk_storage_get(&socket_services, ctx->sk, NULL, 0);
	if (!own)
		return sock_name_peer(ctx, &backend, is_ipv6);
	number = socket_take_answer(own, &backend, ctx->user_port);
	if (number >= SOCKET_SLOTS)
		return sock_name_peer(ctx, &backend, is_ipv6);
	slot = socket_slot(own, number);
	sock_set_address(ctx, &slot->service, slot->service_port, is_ipv6);
	return SOCK_PASS;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return sock_translate(ctx, false, false);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return sock_translate(ctx, false, true);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return sock_translate(ctx, true, false);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return sock_translate(ctx, true, true);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return sock_receive(ctx, false);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return sock_receive(ctx, true);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return sock_get_peer(ctx, false);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return sock_get_peer(ctx, true);
}

/* This address and port of the node is a node port. */
static __always_inline bool sock_is_node_port(const struct addr *addr,
					      __u16 port, __u8 protocol)
{
	struct service service;

	return service_find(addr, bpf_htons(port), protocol, SCOPE_EXTERNAL,
			    &service) &&
	       service.kind == SERVICE_NODE_PORT;
}

/*
 * After bind(), to an address or to all of them. Who has bound a node port would
 * wait for packets that never come: they are the service's.
 */
static __always_inline int sock_bound(struct bpf_sock *ctx,
				      const struct addr *addr, bool is_any)
{
	__u32 zero = 0;
	struct own_addresses *own = bpf_map_lookup_elem(&this_node, &zero);
	__u8 protocol = ctx->protocol;
	__u16 port = ctx->src_port;
	bool is_taken;

	if (!port || !own || !settings.netns_cookie ||
	    bpf_get_netns_cookie(ctx) != settings.netns_cookie)
		return SOCK_PASS;
	is_taken = is_any ? sock_is_node_port(&own->ipv4, port, protocol) ||
				    sock_is_node_port(&own->ipv6, port,
						      protocol)
			  : sock_is_node_port(addr, port, protocol);
	if (!is_taken)
		return SOCK_PASS;
	bpf_set_retval(-EADDRINUSE);
	return SOCK_REFUSE;
}

SEC("cgroup/post_bind4")
int bound4(struct bpf_sock *ctx)
{
	struct addr addr __attribute__((aligned(8)));

	addr_from_ipv4(&addr, ctx->src_ip4);
	return sock_bound(ctx, &addr, !addr.w[3]);
}

SEC("cgroup/post_bind6")
int bound6(struct bpf_sock *ctx)
{
	struct addr addr __attribute__((aligned(8)));

	addr.w[0] = ctx->src_ip6[0];
	addr.w[1] = ctx->src_ip6[1];
	addr.w[2] = ctx->src_ip6[2];
	addr.w[3] = ctx->src_ip6[3];
	return sock_bound(ctx, &addr, addr_is_zero(&addr));
}
