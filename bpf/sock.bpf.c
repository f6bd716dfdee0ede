// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The socket hooks: a service's address becomes a backend's when the
 * application connects (or sends its datagram), and the backend's becomes the
 * service's again when it asks whom it talks to. Packets then need no
 * translation. A socket that the hooks do not see is served by from_pod.
 */
#include "lib/service.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

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
 * Chooses a backend of the service for the socket: 1 if there is one. A socket's
 * own address is not known yet: with affinity all sockets of a namespace are one
 * client.
 */
static __always_inline int sock_choose(struct bpf_sock_addr *ctx,
				       struct service_choice *choice,
				       __u64 cookie, bool is_datagram)
{
	__u64 netns = bpf_get_netns_cookie(ctx);

	__builtin_memcpy(&choice->client.client, &netns, sizeof(netns));
	choice->client.kind = AFFINITY_NAMESPACE;
	choice->number = is_datagram ? sock_number(cookie)
				     : bpf_get_prandom_u32();
	return service_choose(choice);
}

/* connect() and sendmsg(). */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx,
					  bool is_datagram, bool is_ipv6)
{
	struct service_choice choice __attribute__((aligned(8))) = {};
	struct socket_origin origin = {};
	struct socket_key key = {};

	key.protocol = sock_protocol(ctx);
	if (!settings.socket_lb || !key.protocol)
		return SOCK_PASS;
	sock_get_address(ctx, &origin.service, is_ipv6);
	origin.port = ctx->user_port;
	choice.frontend.addr = origin.service;
	choice.frontend.port = origin.port;
	choice.frontend.protocol = key.protocol;
	if (!service_find_key(&choice.frontend, &choice.service)) {
		if (service_find(&origin.service, 0, 0, SCOPE_INTERNAL,
				 &choice.service))
			return sock_refuse();
		return SOCK_PASS;
	}
	if (choice.service.flags & SERVICE_WILDCARD)
		return sock_refuse();
	if (!sock_may_use(ctx, &choice.service))
		return SOCK_PASS;

	key.cookie = bpf_get_socket_cookie(ctx);
	if (!sock_choose(ctx, &choice, key.cookie, is_datagram))
		return sock_refuse();
	key.backend = choice.backend.addr;
	key.port = choice.backend.port;
	origin.service_id = choice.service.service_id;
	/* Without a record, answers would seem to come from a stranger. */
	if (!bpf_sk_storage_get(&service_sockets, ctx->sk, NULL,
				BPF_SK_STORAGE_GET_F_CREATE))
		return sock_refuse();
	if (map_insert(&sockets, &key, &origin))
		return sock_refuse();
	sock_set_address(ctx, &key.backend, key.port, is_ipv6);
	return SOCK_PASS;
}

/* getpeername() and recvmsg(). */
static __always_inline int sock_restore(struct bpf_sock_addr *ctx, bool is_ipv6)
{
	struct socket_origin *origin;
	struct socket_key key = {};

	key.protocol = sock_protocol(ctx);
	if (!settings.socket_lb || !key.protocol ||
	    !bpf_sk_storage_get(&service_sockets, ctx->sk, NULL, 0))
		return SOCK_PASS;
	key.cookie = bpf_get_socket_cookie(ctx);
	sock_get_address(ctx, &key.backend, is_ipv6);
	key.port = ctx->user_port;
	origin = bpf_map_lookup_elem(&sockets, &key);
	if (origin)
		sock_set_address(ctx, &origin->service, origin->port, is_ipv6);
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
	return sock_restore(ctx, false);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return sock_restore(ctx, true);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return sock_restore(ctx, false);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return sock_restore(ctx, true);
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
