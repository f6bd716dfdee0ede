/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Per-CPU working memory of the tc programs. A chain of calls has 512 bytes of
 * stack, and Linux 6.1 counts every frame in steps of 32; the large structs of
 * the slow path live here instead.
 *
 * The tc hooks run with bottom halves disabled, so no other tc program runs on
 * this CPU before the current one returns. Programs of other hooks may run in
 * between: socket hooks, iterators and syscall programs must not use this map.
 * (On PREEMPT_RT this needs the kernel's per-CPU lock of bottom halves, which
 * Linux has unless PREEMPT_RT_NEEDS_BH_LOCK is off.)
 */
#pragma once

#include "policy.h"
#include "quota.h"

/* A packet's flow while its verdict is looked for. `source` and `destination`
 * are the packet's, egress and ingress the flow's. */
struct flow {
	struct connection_key key __attribute__((aligned(8)));
	struct peer source;
	struct peer destination;
	struct flow_verdict egress;
	struct flow_verdict ingress;
	__u32 source_index; /* of the packet's sender, in key.addr */
	__u32 side; /* 0: the packet is the initiator's */
};

/* A masqueraded flow's mapping while it is looked for: the keys and rows of
 * both directions. */
struct nat_mapping {
	struct nat_key out;
	struct nat_key back; /* without the port that is sought */
	struct nat node;     /* for the way out */
	struct nat pod;	     /* for the way back */
	__u32 tries;	     /* ports that were looked at */
	__u32 pad;
};

/* A backend is chosen for a flow to a service: who asks for what, and the one. */
struct service_choice {
	struct service_key frontend;
	__u32 number; /* evenly over all numbers */
	/* Addresses on the stack are compared by words of eight bytes. */
	struct service service __attribute__((aligned(8)));
	struct affinity_key client __attribute__((aligned(8)));
	struct backend backend __attribute__((aligned(8)));
	__u64 hash; /* of the flow, the same on every node; 0: chosen at random */
	__u32 id;   /* of the backend */
};

/* A question of DNS while it is read. */
struct dns_question {
	__u8 bytes[288]; /* header, name, type and class; then zeros */
	__u32 offset;	 /* of the message in the frame */
	__u32 length;	 /* of the message */
	__u32 end;	 /* of the question, in the message */
	__u32 left;	 /* bytes of the label that is read */
	__u32 first[3];	 /* automata: the two rule sets, the names that the proxy gets */
	__u32 at[3];	 /* their states */
	__u8 accepts[4];
	__u32 pad;
	__u64 question; /* hash */
	__u64 flow;	/* hash, with the id */
};

struct scratch {
	__u32 fence; /* 0; for order_reads() */
	__u32 pad;
	struct packet packet; /* the one that the program was called for */
	struct packet quoted; /* that an ICMP error quotes */
	struct fragment fragment; /* of the packet, as it is in the frame */
	struct fragment known_fragment; /* copy of a row of `fragments` */
	struct flow flow;
	struct nat_mapping mapping;
	struct connection_key service_key; /* of a CONNECTION_SERVICE row */
	struct service_choice choice;
	struct connection connection; /* to be inserted */
	struct share_room share;      /* who comes and who goes of an endpoint's own */
	struct ended ended;	      /* a connection on its way from or to `ended` */
	struct l7_flow_key l7_key;
	struct dns_question dns;
};

/* Never pinned, never read outside. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps") __weak;

/* NULL only for the verifier: the one row always exists. */
static __always_inline struct scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* The packet of a program that takes the slow path; zeroed. Not before that is
 * known: most packets never take it. */
static __always_inline struct packet *packet_begin(__u8 direction)
{
	struct scratch *room = scratch_get();

	if (!room)
		return NULL;
	__builtin_memset(&room->packet, 0, sizeof(room->packet));
	room->packet.direction = direction;
	return &room->packet;
}
