/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Addresses: IPv4 ones are v4-mapped, so that both families share all code. */
#pragma once

#include "basics.h"
#include "../abi.h"

#include <bpf/bpf_endian.h>

/* Words of an address at once: no strict aliasing between them and w[]. */
typedef __u64 __attribute__((may_alias)) addr_words;

static __always_inline bool addr_equal(const struct addr *a,
				       const struct addr *b)
{
	const addr_words *x = (const void *)a, *y = (const void *)b;

	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline bool addr_is_zero(const struct addr *a)
{
	const addr_words *x = (const void *)a;

	return !(x[0] | x[1]);
}

static __always_inline void addr_copy(struct addr *to, const struct addr *from)
{
	addr_words *x = (void *)to;
	const addr_words *y = (const void *)from;

	x[0] = y[0];
	x[1] = y[1];
}

/* The second of the words of a v4-mapped address; the first is 0. */
static __always_inline __u64 addr_low_word_of_ipv4(__be32 ipv4)
{
	struct addr addr = {.w = {0, 0, bpf_htonl(0xffff), ipv4}};

	return ((const addr_words *)&addr)[1];
}

static __always_inline void addr_from_ipv4(struct addr *addr, __be32 ipv4)
{
	addr->w[0] = 0;
	addr->w[1] = 0;
	addr->w[2] = bpf_htonl(0xffff);
	addr->w[3] = ipv4;
}

static __always_inline void addr_from_ipv6(struct addr *addr,
					   const __be32 *ipv6)
{
	addr->w[0] = ipv6[0];
	addr->w[1] = ipv6[1];
	addr->w[2] = ipv6[2];
	addr->w[3] = ipv6[3];
}

static __always_inline bool addr_is_ipv4(const struct addr *addr)
{
	return !addr->w[0] && !addr->w[1] && addr->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_is_multicast(const struct addr *addr)
{
	const __u8 *byte = (const void *)addr;

	return addr_is_ipv4(addr) ? byte[12] >> 4 == 0xe : byte[0] == 0xff;
}

static __always_inline bool addr_words_are_ipv4(const __u64 words[2])
{
	return !words[0] && (__u32)words[1] == bpf_htonl(0xffff);
}
