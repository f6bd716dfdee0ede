// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* The links of pods. */
#include "config.h"
#include "maps.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

SEC("tcx/ingress")
int from_pod(struct __sk_buff *ctx)
{
	return settings.flow_events;
}
