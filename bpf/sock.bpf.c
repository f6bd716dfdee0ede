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

/* connect() and sendmsg(). */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx,
					  bool is_datagram, bool is_ipv6)
{
	struct socket_origin origin = {};
	struct socket_key key = {};
	struct service service;
	struct backend backend;
	__u32 number;

	key.protocol = sock_protocol(ctx);
	if (!settings.socket_lb || !key.protocol)
		return SOCK_PASS;
	sock_get_address(ctx, &origin.service, is_ipv6);
	origin.port = ctx->user_port;
	if (!service_find(&origin.service, origin.port, key.protocol,
			  &service)) {
		if (service_find(&origin.service, 0, 0, &service))
			return sock_refuse();
		return SOCK_PASS;
	}
	if (service.flags & SERVICE_WILDCARD)
		return sock_refuse();
	if (!sock_may_use(ctx, &service))
		return SOCK_PASS;

	key.cookie = bpf_get_socket_cookie(ctx);
	number = is_datagram ? sock_number(key.cookie) : bpf_get_prandom_u32();
	if (!service_select_backend(&origin.service, origin.port, key.protocol,
				    &service, number, &backend))
		return sock_refuse();

	key.backend = backend.addr;
	key.port = backend.port;
	origin.service_id = service.service_id;
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
