// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The far end of the devices on which fragments wait for their first one.
 */
#include "lib/wait.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* Gives a fragment back to the device that it came by. */
SEC("tcx/ingress")
int from_wait(struct __sk_buff *ctx)
{
	struct wait_note note = {};

	/* Nobody else has anything to send here. */
	if (!wait_read(ctx, &note))
		return TC_ACT_SHOT;
	return bpf_redirect(note.ifindex, BPF_F_INGRESS);
}
