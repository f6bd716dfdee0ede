/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Both ends of a wire on which a node forwards: `generate` makes frames out of the
 * one that it is given, and sends them by the device DEVICE; `pass` lets a node's
 * device take them; the sinks count what the node sends back, and drop it.
 * Compiled by the benchmark; no part of Weir.
 */
#define SEC(name) __attribute__((section(name), used))

enum { XDP_DROP = 1, XDP_PASS = 2, TC_ACT_OK = 0, TC_ACT_SHOT = 2 };

#ifndef DEVICE
#define DEVICE 0
#endif

static void *(*const map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const redirect_to)(unsigned int ifindex,
				 unsigned long long flags) = (void *)23;

struct {
	int (*type)[2]; /* array */
	int (*max_entries)[1];
	unsigned int *key;
	unsigned long long *value;
} arrived SEC(".maps");

/* The beginning of the frame that is sent: the node writes into it, and the kernel
 * uses its memory again. */
struct beginning {
	unsigned long long words[6];
};

struct {
	int (*type)[2]; /* array */
	int (*max_entries)[1];
	unsigned int *key;
	struct beginning *value;
} beginnings SEC(".maps");

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The beginning of both contexts, as far as it is used. */
struct frame {
	unsigned int data;
	unsigned int data_end;
};

struct packet {
	unsigned int unused[19];
	unsigned int data;
	unsigned int data_end;
};

/* IPv4 with UDP. */
static inline void count(unsigned char *data, unsigned char *end)
{
	unsigned int zero = 0;
	unsigned long long *number;

	if (data + 34 > end || data[12] != 8 || data[13] || data[23] != 17)
		return;
	number = map_lookup_elem(&arrived, &zero);
	if (number)
		__sync_fetch_and_add(number, 1);
}

SEC("xdp")
int generate(struct frame *ctx)
{
	void *data = (void *)(long)ctx->data;
	struct beginning *beginning;
	unsigned int zero = 0;

	beginning = map_lookup_elem(&beginnings, &zero);
	if (!beginning || data + sizeof(*beginning) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	__builtin_memcpy(data, beginning, sizeof(*beginning));
	return redirect_to(DEVICE, 0);
}

SEC("xdp")
int pass(void *ctx)
{
	return XDP_PASS;
}

SEC("xdp")
int sink_frames(struct frame *ctx)
{
	count((void *)(long)ctx->data, (void *)(long)ctx->data_end);
	return XDP_DROP;
}

SEC("tcx/ingress")
int sink_packets(struct packet *ctx)
{
	count((void *)(long)ctx->data, (void *)(long)ctx->data_end);
	return TC_ACT_SHOT;
}
