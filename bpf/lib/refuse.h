/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Drops of a pod's packets that the pod is told of at once. */
#pragma once

#include "event.h"

__weak __noinline int refuse(struct __sk_buff *ctx, struct packet *packet,
			     int reason)
{
	if (!packet)
		return TC_ACT_SHOT;
	return finish(ctx, packet, reason);
}
