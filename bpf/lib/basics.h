/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What every part needs and Linux' headers for BPF lack. */
#pragma once

#include "../kernel.h"

#include <bpf/bpf_helpers.h>

/* 2^64 divided by the golden ratio, odd. */
#define HASH_MULTIPLIER 0x9e3779b97f4a7c15

/*
 * The upper half of a product (Knuth's multiplicative hashing). A bit of a
 * product depends on the bits below it only, so the upper half of the input is
 * folded into the lower half first. No secret: whoever knows the bits can
 * compute the hash.
 */
static __always_inline __u32 hash64(__u64 bits)
{
	return ((bits ^ bits >> 32) * HASH_MULTIPLIER) >> 32;
}

/* An index of an array of two. The verifier knows no bound of a number that was
 * in memory; the barrier keeps clang from leaving the mask out. */
static __always_inline __u32 index_of_two(__u32 number)
{
	barrier_var(number);
	return number & 1;
}

/* Inserts or replaces: 0 or an error. Kernels before 6.15 may find every free
 * entry of an LRU map busy although the map is not full, so ask twice. */
static __always_inline long map_insert(void *map, const void *key,
				       const void *value)
{
	long ret = bpf_map_update_elem(map, key, value, BPF_ANY);

	return ret ? bpf_map_update_elem(map, key, value, BPF_ANY) : 0;
}
