// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The driver of a network device (XDP). from_wire sends on what passes this node
 * between clients outside and backends of other nodes; from_network stands behind
 * it, and sees all else.
 */
#include "lib/early.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

SEC("xdp")
int from_wire(struct xdp_md *ctx)
{
	return early_forward(ctx);
}
