/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The least that a pod network on tcx can do: every packet goes to the other pod
 * (PEER, the index of its device), unseen. What it costs against one veth pair,
 * no datapath on this hook saves. Compiled by the benchmark; no part of Weir.
 */
#define SEC(name) __attribute__((section(name), used))

static long (*const redirect_peer)(unsigned int ifindex,
				   unsigned long long flags) = (void *)155;

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("tcx/ingress")
int redirect(void *ctx)
{
	return redirect_peer(PEER, 0);
}
