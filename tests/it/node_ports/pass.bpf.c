// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Passes every frame. With it a veth takes what the driver of its other end sends. */
__attribute__((section("xdp"), used)) int pass(void *ctx)
{
	return 2; /* XDP_PASS */
}

char LICENSE[] __attribute__((section("license"), used)) = "Dual BSD/GPL";
