/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Hashes, most of them with the node's secret. Pods choose their own ports and peers; what
 * such a tuple decides beyond the pod (a port of the node, a slot that pods
 * share) must not be a number that a pod can compute.
 */
#pragma once

#include "packet.h"

/* SipHash-1-3 (Aumasson, Bernstein: SipHash, 2012) over words of 8 bytes. */
struct hash {
	__u64 v0;
	__u64 v1;
	__u64 v2;
	__u64 v3;
};

static __always_inline __u64 rotate_left(__u64 word, __u32 bits)
{
	return word << bits | word >> (64 - bits);
}

static __always_inline void hash_round(struct hash *hash)
{
	hash->v0 += hash->v1;
	hash->v1 = rotate_left(hash->v1, 13) ^ hash->v0;
	hash->v0 = rotate_left(hash->v0, 32);
	hash->v2 += hash->v3;
	hash->v3 = rotate_left(hash->v3, 16) ^ hash->v2;
	hash->v0 += hash->v3;
	hash->v3 = rotate_left(hash->v3, 21) ^ hash->v0;
	hash->v2 += hash->v1;
	hash->v1 = rotate_left(hash->v1, 17) ^ hash->v2;
	hash->v2 = rotate_left(hash->v2, 32);
}

static __always_inline void hash_begin(struct hash *hash)
{
	hash->v0 = settings.secret[0] ^ 0x736f6d6570736575;
	hash->v1 = settings.secret[1] ^ 0x646f72616e646f6d;
	hash->v2 = settings.secret[0] ^ 0x6c7967656e657261;
	hash->v3 = settings.secret[1] ^ 0x7465646279746573;
}

/* Without the secret: for what every node must come to alike. */
static __always_inline void hash_begin_public(struct hash *hash)
{
	hash->v0 = 0x736f6d6570736575;
	hash->v1 = 0x646f72616e646f6d;
	hash->v2 = 0x6c7967656e657261;
	hash->v3 = 0x7465646279746573;
}

static __always_inline void hash_add(struct hash *hash, __u64 word)
{
	hash->v3 ^= word;
	hash_round(hash);
	hash->v0 ^= word;
}

static __always_inline void hash_add_addr(struct hash *hash,
					  const struct addr *addr)
{
	const addr_words *words = (const void *)addr;

	hash_add(hash, words[0]);
	hash_add(hash, words[1]);
}

static __always_inline __u64 hash_end(struct hash *hash)
{
	hash->v2 ^= 0xff;
	hash_round(hash);
	hash_round(hash);
	hash_round(hash);
	return hash->v0 ^ hash->v1 ^ hash->v2 ^ hash->v3;
}

/*
 * One word with the secret, cheaply: for slots of caches, where who finds a
 * collision costs another flow some nanoseconds and no more.
 */
static __always_inline __u32 hash_secret(__u64 word)
{
	return hash64((word ^ settings.secret[0]) * (settings.secret[1] | 1));
}
