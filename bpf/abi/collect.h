/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Part of abi.h: what programs that the agent runs are given, and what they
 * answer.
 */
#pragma once

/* What collect_usage is run with, before and after the rows are counted. */
struct recount_request {
	__u32 is_end;	     /* 0: begin */
	__u32 lease_seconds; /* limits count for so long */
};

/* What destroy_sockets and destroy_tcp_sockets write: a connected socket whose
 * backend is gone. */
struct stale_socket {
	__u64 cookie;
	struct addr local;
	struct addr remote;
	__be16 local_port;
	__be16 remote_port;
	__u32 ifindex; /* that it is bound to, or 0 */
	__u8 protocol;
	__u8 pad[7];
};
_Static_assert(sizeof(struct stale_socket) == 56, "stale_socket");

/* What collect_connections and collect_nat are run with. */
struct collect_request {
	__u64 keys;    /* where they are, in the memory of who runs the program */
	__u32 count;
	__u32 deleted; /* the program's answer */
};
