/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * SCTP's checksum (RFC 9260, appendix A), a CRC of the whole packet, when a port
 * changes. A CRC is linear: the checksum changes by the CRC of the change, which
 * is the two bytes of the port and as many zeros as there are bytes behind it.
 * Zeros are not counted off one by one: n of them multiply by x^8n, modulo the
 * polynomial. A checksum that the device is still to write takes no harm.
 */
#pragma once

#include "packet.h"

#define SCTP_POLYNOMIAL 0x82f63b78U /* CRC32c; the lowest bit is x^31 */

/* `number` if the lowest bit of `word` is set, else 0. By multiplication: clang
 * makes a branch of everything else, or the verifier does of a mask that is 0 or
 * -1 (Linux 6.18), and looks at both ways again and again. */
static __always_inline __u32 sctp_if(__u32 word, __u32 number)
{
	__u32 bit = word & 1;

	barrier_var(bit);
	return bit * number;
}

static __always_inline __u32 sctp_shift(__u32 state)
{
	return state >> 1 ^ sctp_if(state, SCTP_POLYNOMIAL);
}

/* `factor` is a constant: what is left of it is a shift for each of its bits. */
static __always_inline __u32 sctp_multiply(__u32 factor, __u32 state)
{
	__u32 product = 0;

#pragma unroll
	for (int i = 31; i >= 0; i--) {
		if (factor >> i & 1)
			product ^= state;
		state = sctp_shift(state);
	}
	return product;
}

/* 2^k zero bytes, if there are so many among `bytes`: they multiply by
 * `factor`. */
static __always_inline __u32 sctp_skip_some(__u32 state, __u32 bytes, __u32 k,
					    __u32 factor)
{
	return state ^
	       sctp_if(bytes >> k, sctp_multiply(factor, state) ^ state);
}

/* The CRC of a state and so many zero bytes behind it. Each factor is the square
 * of the one before, the first is x^8. No function of its own: a chain of calls
 * has no room for one more. */
static __always_inline __u32 sctp_skip(__u32 state, __u32 bytes)
{
	state = sctp_skip_some(state, bytes, 0, 0x00800000U);
	state = sctp_skip_some(state, bytes, 1, 0x00008000U);
	state = sctp_skip_some(state, bytes, 2, 0x82f63b78U);
	state = sctp_skip_some(state, bytes, 3, 0x6ea2d55cU);
	state = sctp_skip_some(state, bytes, 4, 0x18b8ea18U);
	state = sctp_skip_some(state, bytes, 5, 0x510ac59aU);
	state = sctp_skip_some(state, bytes, 6, 0xb82be955U);
	state = sctp_skip_some(state, bytes, 7, 0xb8fdb1e7U);
	state = sctp_skip_some(state, bytes, 8, 0x88e56f72U);
	state = sctp_skip_some(state, bytes, 9, 0x74c360a4U);
	state = sctp_skip_some(state, bytes, 10, 0xe4172b16U);
	state = sctp_skip_some(state, bytes, 11, 0x0d65762aU);
	state = sctp_skip_some(state, bytes, 12, 0x35d73a62U);
	state = sctp_skip_some(state, bytes, 13, 0x28461564U);
	state = sctp_skip_some(state, bytes, 14, 0xbf455269U);
	state = sctp_skip_some(state, bytes, 15, 0xe2ea32dcU);
	return state;
}

/* The checksum covers `change`, which is the old port ^ the new one, `offset`
 * behind the header's start: 0 or a drop. */
static __always_inline int sctp_mend(struct __sk_buff *ctx,
				     const struct packet *packet,
				     __u32 offset, __be16 change)
{
	__u32 at = packet->l4_offset +
		   __builtin_offsetof(struct sctphdr, checksum);
	__u32 behind = packet_ip_length(ctx, packet) -
		       (packet->l4_offset - ETHERNET_LENGTH) - offset - 2;
	__u16 bytes = bpf_ntohs(change);
	__u32 state = bytes >> 8, checksum;

	/* A fragment does not say how long the packet is. */
	if (packet->flags & PACKET_FRAGMENT ||
	    bpf_skb_load_bytes(ctx, at, &checksum, sizeof(checksum)))
		return -DROP_WRITE_ERROR;
	for (int i = 0; i < 8; i++)
		state = sctp_shift(state);
	state ^= bytes & 0xff;
	for (int i = 0; i < 8; i++)
		state = sctp_shift(state);
	/* It is on the wire with the lowest byte first. */
	checksum ^= bpf_htonl(__builtin_bswap32(sctp_skip(state, behind)));
	return bpf_skb_store_bytes(ctx, at, &checksum, sizeof(checksum), 0)
		       ? -DROP_WRITE_ERROR
		       : 0;
}
