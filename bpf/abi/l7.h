/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what the programs share with the proxy.
 */
#pragma once

/*
 * l7_flows: a flow that both ends speak to the proxy about, by the addresses and
 * ports that its packets have there; the proxy asks who speaks, and by which
 * rules it judges. The connection has the same key, and CONNECTION_PROXY.
 */
struct l7_flow_key {
	struct addr client;
	struct addr server;
	__be16 client_port;
	__be16 server_port;
	__u8 protocol;
	__u8 pad[3];
};
_Static_assert(sizeof(struct l7_flow_key) == 40, "l7_flow_key");

struct l7_flow {
	__u32 client_identity;
	__u32 server_identity;
	__u16 client_endpoint; /* of this node, else 0 */
	__u16 server_endpoint;
	__u16 egress_set; /* rules of the client's pod; 0: they let everything pass */
	__u16 ingress_set; /* of the server's pod */
};
_Static_assert(sizeof(struct l7_flow) == 16, "l7_flow");

/* proxy[0]: the veth pair whose other end is in the proxy's namespace. */
struct proxy_device {
	__u32 ifindex; /* of the node's end; 0: there is no proxy */
	__u8 mac[6];   /* of the other end */
	__u8 pad[2];
};
_Static_assert(sizeof(struct proxy_device) == 12, "proxy_device");

/* The rows of l7_listeners. */
enum l7_listener {
	L7_LISTENER_TCP_IPV4 = 0,
	L7_LISTENER_TCP_IPV6 = 1,
	L7_LISTENER_UDP_IPV4 = 2,
	L7_LISTENER_UDP_IPV6 = 3,
	L7_LISTENERS = 4,
};
