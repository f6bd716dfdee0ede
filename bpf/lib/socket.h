/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What a socket is told of services: the backend that it talks to, and the name
 * by which it asked for it. Both are kept in the socket's own storage, so no
 * other socket can take the room. A datagram socket that asks more services than
 * there are slots forgets the oldest.
 */
#pragma once

#include "service.h"

#define SOCKET_SLOT_MASK (SOCKET_SLOTS - 1)

/* A question in socket_services.order is the number of a slot. */
#define SOCKET_ORDER_BITS 4
#define SOCKET_ORDER_MAX 16

_Static_assert(1 << SOCKET_ORDER_BITS == SOCKET_SLOTS, "socket_services.order");

static __always_inline struct socket_service *
socket_slot(struct socket_services *of, __u32 number)
{
	barrier_var(number);
	return &of->slot[number & SOCKET_SLOT_MASK];
}

static __always_inline bool
socket_slot_leads_to(const struct socket_service *slot,
		     const struct addr *backend, __be16 port)
{
	return slot->backend_port == port && slot->service_port &&
	       addr_equal(&slot->backend, backend);
}

/* The service of the slot, and the slot still counts for new questions. */
static __always_inline bool socket_slot_is_of(const struct socket_service *slot,
					      const struct addr *service,
					      __be16 port)
{
	return slot->service_port == port && slot->service_id &&
	       addr_equal(&slot->service, service);
}

/* A search among the slots of a socket. */
struct socket_search {
	struct socket_services *of;
	struct addr addr;
	__be16 port;
	__u32 found;   /* the number of a slot, or SOCKET_SLOTS */
	__u32 place;   /* of the question in `order` */
};

static __always_inline void socket_search_begin(struct socket_search *search,
						struct socket_services *of,
						const struct addr *addr,
						__be16 port)
{
	search->of = of;
	search->addr = *addr;
	search->port = port;
	search->found = SOCKET_SLOTS;
	search->place = SOCKET_ORDER_MAX;
}

static long socket_search_service(__u32 number, struct socket_search *search)
{
	if (!socket_slot_is_of(socket_slot(search->of, number), &search->addr,
			       search->port))
		return 0;
	search->found = number;
	return 1;
}

static long socket_search_backend(__u32 number, struct socket_search *search)
{
	if (!socket_slot_leads_to(socket_slot(search->of, number),
				  &search->addr, search->port))
		return 0;
	search->found = number;
	return 1;
}

static long socket_search_question(__u32 place, struct socket_search *search)
{
	__u32 number;

	if (place >= search->of->order_count)
		return 1;
	number = search->of->order >> (place * SOCKET_ORDER_BITS & 63) &
		 SOCKET_SLOT_MASK;
	if (!socket_slot_leads_to(socket_slot(search->of, number),
				  &search->addr, search->port))
		return 0;
	search->found = number;
	search->place = place;
	return 1;
}

/* The slot of a service: its number, or SOCKET_SLOTS. */
static __always_inline __u32 socket_find_service(struct socket_services *of,
						 const struct addr *service,
						 __be16 port)
{
	struct socket_search search;

	if (socket_slot_is_of(socket_slot(of, of->last), service, port))
		return of->last;
	socket_search_begin(&search, of, service, port);
	bpf_loop(SOCKET_SLOTS, socket_search_service, &search, 0);
	return search.found;
}

/* A slot whose service led to a backend: its number, or SOCKET_SLOTS. */
static __always_inline __u32 socket_find_any(struct socket_services *of,
					     const struct addr *backend,
					     __be16 port)
{
	struct socket_search search;

	socket_search_begin(&search, of, backend, port);
	bpf_loop(SOCKET_SLOTS, socket_search_backend, &search, 0);
	return search.found;
}

/* The slot whose service led to a backend, the one asked last if it did: its
 * number, or SOCKET_SLOTS. */
static __always_inline __u32 socket_find_backend(struct socket_services *of,
						 const struct addr *backend,
						 __be16 port)
{
	__u32 last = of->last;

	if (socket_slot_leads_to(socket_slot(of, last), backend, port))
		return last;
	return socket_find_any(of, backend, port);
}

/*
 * Notes that a service was asked: where several services lead to one backend,
 * answers come in the order of the questions. A question of more than a second
 * ago is not waited for any more.
 */
static __always_inline void socket_note_question(struct socket_services *of,
						 __u32 number)
{
	__u64 now = bpf_jiffies64();

	of->last = number;
	if (now - of->asked_jiffies > seconds_to_jiffies(1))
		of->order_count = 0;
	of->asked_jiffies = now;
	if (of->order_count >= SOCKET_ORDER_MAX) {
		of->order >>= SOCKET_ORDER_BITS;
		of->order_count = SOCKET_ORDER_MAX - 1;
	}
	of->order &= (1ULL << (of->order_count * SOCKET_ORDER_BITS & 63)) - 1;
	of->order |= (__u64)number
		     << (of->order_count * SOCKET_ORDER_BITS & 63);
	of->order_count++;
}

/*
 * The slot of the service whose answer comes from a backend: where several lead
 * there, of the one that was asked first. Its number, or SOCKET_SLOTS.
 */
static __always_inline __u32 socket_take_answer(struct socket_services *of,
						const struct addr *backend,
						__be16 port)
{
	struct socket_search search;
	__u32 shift;

	socket_search_begin(&search, of, backend, port);
	bpf_loop(SOCKET_ORDER_MAX, socket_search_question, &search, 0);
	if (search.found >= SOCKET_SLOTS)
		return socket_find_backend(of, backend, port);
	/* The later questions move up. */
	shift = search.place * SOCKET_ORDER_BITS & 63;
	of->order = (of->order & ((1ULL << shift) - 1)) |
		    (of->order >> shift >> SOCKET_ORDER_BITS << shift);
	of->order_count--;
	return search.found;
}
