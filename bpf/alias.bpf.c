// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * A proxy that is not ours can take a client's address to the server but not its
 * port. In the proxy's namespace each client of a listener of rules has an
 * address of its own, its alias, for as long as its flow runs: the proxy hears
 * the alias where it accepts the connection, and a socket that it binds to the
 * alias is bound to the client's address and port. No packet has an alias. Where
 * clients have addresses of these ranges, sockets of weir proxy are left alone:
 * those of the other proxy have a mark.
 */
#include "lib/addr.h"
#include "lib/basics.h"
#include "maps.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* 240.0.0.0/5, which is reserved, and 100::/64, which is for nobody (RFC 6666). */
#define ALIAS_IPV4 0xf0000000
#define ALIAS_IPV4_MASK 0xf8000000
#define ALIAS_IPV6 0x01000000
/* SO_MARK of the sockets that the other proxy binds (resources.rs). */
#define ALIAS_SOCKET_MARK 0x57454952
/* Numbers that are tried before a client goes without. */
#define ALIAS_TRIES 4

/* True for sockets of the proxy's namespace. */
static __always_inline bool alias_has_place(struct bpf_sock_addr *ctx)
{
	__u32 zero = 0;
	struct proxy_device *device = bpf_map_lookup_elem(&proxy, &zero);

	return device && device->netns_cookie &&
	       ctx->protocol == IPPROTO_TCP &&
	       device->netns_cookie == bpf_get_netns_cookie(ctx);
}

/* True for the sockets by which the other proxy speaks to servers. */
static __always_inline bool alias_is_bound(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *socket = ctx->sk;

	return socket && socket->mark == ALIAS_SOCKET_MARK &&
	       alias_has_place(ctx);
}

static __always_inline void alias_addr(struct addr *addr, __u32 number,
				       bool is_ipv6)
{
	if (!is_ipv6) {
		addr_from_ipv4(addr, bpf_htonl(ALIAS_IPV4 | number));
		return;
	}
	addr->w[0] = bpf_htonl(ALIAS_IPV6);
	addr->w[1] = 0;
	addr->w[2] = 0;
	addr->w[3] = bpf_htonl(number);
}

/* The alias of the flow's client, which gets one: its number, or 0. */
static __always_inline __u32 alias_of(struct l7_flow *flow,
				      const struct l7_flow_key *key,
				      bool is_ipv6)
{
	struct addr addr __attribute__((aligned(8)));

	if (flow->alias)
		return flow->alias;
	for (int try = 0; try < ALIAS_TRIES; try++) {
		__u32 number = bpf_get_prandom_u32() & ~ALIAS_IPV4_MASK;

		if (!number)
			continue;
		alias_addr(&addr, number, is_ipv6);
		/* First, so that the row is never one without a flow. */
		flow->alias = number;
		if (!bpf_map_update_elem(&l7_aliases, &addr, key, BPF_NOEXIST))
			return number;
		flow->alias = 0;
	}
	return 0;
}

SEC("cgroup/getpeername4")
int alias_peer4(struct bpf_sock_addr *ctx)
{
	struct l7_flow_key key __attribute__((aligned(8))) = {};
	struct bpf_sock *socket = ctx->sk;
	struct l7_flow *flow;
	__u32 number;

	if (!socket || !alias_has_place(ctx))
		return 1;
	addr_from_ipv4(&key.client, ctx->user_ip4);
	addr_from_ipv4(&key.server, socket->src_ip4);
	key.client_port = ctx->user_port;
	key.server_port = bpf_htons(socket->src_port);
	key.protocol = IPPROTO_TCP;
	flow = bpf_map_lookup_elem(&l7_flows, &key);
	if (!flow || !flow->listener_set)
		return 1;
	number = alias_of(flow, &key, false);
	if (number)
		ctx->user_ip4 = bpf_htonl(ALIAS_IPV4 | number);
	return 1;
}

SEC("cgroup/getpeername6")
int alias_peer6(struct bpf_sock_addr *ctx)
{
	struct l7_flow_key key __attribute__((aligned(8))) = {};
	struct bpf_sock *socket = ctx->sk;
	struct l7_flow *flow;
	__u32 number;

	if (!socket || !alias_has_place(ctx))
		return 1;
	key.client.w[0] = ctx->user_ip6[0];
	key.client.w[1] = ctx->user_ip6[1];
	key.client.w[2] = ctx->user_ip6[2];
	key.client.w[3] = ctx->user_ip6[3];
	key.server.w[0] = socket->src_ip6[0];
	key.server.w[1] = socket->src_ip6[1];
	key.server.w[2] = socket->src_ip6[2];
	key.server.w[3] = socket->src_ip6[3];
	key.client_port = ctx->user_port;
	key.server_port = bpf_htons(socket->src_port);
	key.protocol = IPPROTO_TCP;
	flow = bpf_map_lookup_elem(&l7_flows, &key);
	if (!flow || !flow->listener_set)
		return 1;
	number = alias_of(flow, &key, true);
	if (!number)
		return 1;
	ctx->user_ip6[0] = bpf_htonl(ALIAS_IPV6);
	ctx->user_ip6[1] = 0;
	ctx->user_ip6[2] = 0;
	ctx->user_ip6[3] = bpf_htonl(number);
	return 1;
}

SEC("cgroup/bind4")
int alias_bind4(struct bpf_sock_addr *ctx)
{
	struct addr addr __attribute__((aligned(8)));
	struct l7_flow_key *key;

	if ((ctx->user_ip4 & bpf_htonl(ALIAS_IPV4_MASK)) !=
		    bpf_htonl(ALIAS_IPV4) ||
	    !alias_is_bound(ctx))
		return 1;
	addr_from_ipv4(&addr, ctx->user_ip4);
	key = bpf_map_lookup_elem(&l7_aliases, &addr);
	if (!key)
		return 0;
	ctx->user_ip4 = key->client.w[3];
	ctx->user_port = key->client_port;
	return 1;
}

SEC("cgroup/bind6")
int alias_bind6(struct bpf_sock_addr *ctx)
{
	struct addr addr __attribute__((aligned(8)));
	struct l7_flow_key *key;

	if (ctx->user_ip6[0] != bpf_htonl(ALIAS_IPV6) || !alias_is_bound(ctx))
		return 1;
	addr.w[0] = ctx->user_ip6[0];
	addr.w[1] = ctx->user_ip6[1];
	addr.w[2] = ctx->user_ip6[2];
	addr.w[3] = ctx->user_ip6[3];
	key = bpf_map_lookup_elem(&l7_aliases, &addr);
	if (!key)
		return 0;
	ctx->user_ip6[0] = key->client.w[0];
	ctx->user_ip6[1] = key->client.w[1];
	ctx->user_ip6[2] = key->client.w[2];
	ctx->user_ip6[3] = key->client.w[3];
	ctx->user_port = key->client_port;
	return 1;
}
