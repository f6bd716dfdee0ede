/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: frontends, their backends, and what sockets are told of them.
 */
#pragma once

/*
 * services: frontends. Port 0, protocol 0: the address is a service's; other
 * ports are refused. One address and port may lead elsewhere for who asks from
 * inside than for who asks from outside: two rows.
 */
struct service_key {
	struct addr addr;
	__be16 port;
	__u8 protocol;
	__u8 scope; /* enum service_scope */
};

enum service_scope {
	SCOPE_INTERNAL = 0, /* pods and the node's own sockets ask */
	SCOPE_EXTERNAL = 1, /* packets from the network ask */
};

struct service {
	__u32 service_id;
	__u32 generation;     /* which slots rows are in force */
	__u32 backend_count;  /* that new flows may go to; 0: refused at once */
	__u32 draining_count; /* further slots: running flows alone */
	__u32 affinity_seconds; /* one client stays at one backend; 0: it need not */
	__u16 flags;	      /* enum service_flags */
	__u8 kind;	      /* enum service_kind */
	__u8 algorithm;	      /* enum service_algorithm */
};
_Static_assert(sizeof(struct service) == 24, "service");

enum service_flags {
	SERVICE_WILDCARD = 1 << 0, /* the port 0 entry */
	SERVICE_LOOPBACK = 1 << 1, /* of a loopback address: for sockets of the node's own namespace only */
	SERVICE_HAS_OTHERS = 1 << 2, /* without a backend it is silent: another node may have one */
	SERVICE_RANGES = 1 << 3,   /* only for who is in source_ranges */
	SERVICE_DSR = 1 << 4,	   /* the backend's node answers the client */
};

enum service_kind {
	SERVICE_CLUSTER_IP = 0,
	SERVICE_NODE_PORT = 1,
	SERVICE_LOAD_BALANCER = 2,
	SERVICE_EXTERNAL_IP = 3,
	SERVICE_HOST_PORT = 4, /* a port of this node that is a pod's */
};

enum service_algorithm {
	SERVICE_RANDOM = 0,
	SERVICE_MAGLEV = 1, /* of packets from the network, by the rows of maglev */
};

/*
 * slots: the backends of a service. A new set is written under the next
 * generation, then service.generation flips.
 */
struct slot_key {
	__u32 service_id;
	__u32 generation;
	__u32 slot; /* backends for new flows first; each part in the order of addresses as numbers, then ports */
};

struct slot {
	__u32 backend;
	__u32 service_id; /* the key's: a row that was freed meanwhile may be another's */
};
_Static_assert(sizeof(struct slot) == 8, "read as one word");

/* backends[id], for all services that have it. An id is never 0, and means one
 * backend until no slot and no table says it. */
struct backend {
	struct addr addr;
	__u32 id; /* the key: a row that was freed meanwhile may be another's */
	__be16 port;
	__u8 protocol;
	__u8 pad;
};
_Static_assert(sizeof(struct backend) == 24, "backend");

/* maglev: a service's table of backends, in pieces, under the generation of its
 * set. */
struct maglev_key {
	__u32 service_id;
	__u32 generation;
	__u32 piece;
};

enum maglev_size {
	MAGLEV_PIECE = 984, /* a row takes the kernel 4096 bytes */
};

struct maglev_piece {
	__u32 service_id; /* the key's, as a slot's */
	__u32 backends[MAGLEV_PIECE];
};

/* affinity: the backend that a client has had last. */
struct affinity_key {
	struct addr client; /* from a socket hook: its network namespace's cookie */
	__u32 service_id;
	__u32 kind;	    /* enum affinity_kind */
};

enum affinity_kind {
	AFFINITY_ADDRESS = 0,
	AFFINITY_NAMESPACE = 1,
};

struct affinity {
	__u64 used_jiffies;
	__u32 backend;
	__u32 pad;
};

/* source_ranges: who may use a service from outside; IPv4 at 128 + n. */
struct source_range_key {
	__u32 prefix_length;
	__be32 service_id;
	struct addr addr;
};

/* announced: where the node answers ARP and neighbour discovery for an address. */
struct announced_key {
	struct addr addr;
	__u32 ifindex;
};

struct announced {
	__u8 mac[6];	/* of the device */
	__u8 is_yielded; /* another node has announced the address since */
	__u8 pad;
};

/* announcing: how long the rows of `announced` count, by CLOCK_BOOTTIME. */
struct announcing {
	__u64 until_ns;	    /* the agent lives; behind it nothing is answered */
	__u64 led_until_ns; /* this node leads; behind it another may */
};

/*
 * socket_service: the service that a socket is connected to, and the backend that
 * it got, for getpeername, flows and stale sockets. In the socket's own storage.
 */
struct socket_service {
	struct addr service; /* the address that the application used */
	struct addr backend;
	__u32 service_id;    /* 0: no new question goes to this backend, answers may come */
	__u32 generation;    /* of the service's backends, in which the backend was found last */
	__be16 service_port; /* 0: an empty slot */
	__be16 backend_port;
};

/* socket_services: those that a socket sends datagrams to, for recvmsg and flows. */
enum socket_slots {
	SOCKET_SLOTS = 16,
};

struct socket_services {
	struct socket_service slot[SOCKET_SLOTS];
	__u64 asked_jiffies;
	__u64 order;	/* slots of questions that wait for answers, four bits each, the oldest lowest */
	__u32 order_count;
	__u32 last;	/* the slot that was asked last */
	__u32 next;	/* the slot that the next service gets */
	__u32 pad;
};

/* gone_backends: those that exist no more, while destroy_tcp_sockets runs. */
struct gone_backend {
	struct addr addr;
	__be16 port;
	__u8 pad[6];
};
