/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What BPF_PROG_TEST_RUN cannot say of a packet: that it came by a tunnel, or
 * with a VLAN tag. This sets it and goes on in the program under test. Compiled
 * by the test itself, with SECTION that of the programs under test; no part of
 * the datapath.
 */
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#define SEC(name) __attribute__((section(name), used))

struct tunnel_key {
	__u32 id;
	__u32 remote[4];
	__u8 tos;
	__u8 ttl;
	__u16 flags;
	__u32 label;
	__u32 local[4];
};

struct arrival {
	struct tunnel_key key;
	__u32 has_key;
	__u32 is_ipv6;
	__u32 vlan;
	__u32 device;
};

struct {
	int (*type)[2]; /* array */
	int (*max_entries)[1];
	__u32 *key;
	struct arrival *value;
} arrivals SEC(".maps");

struct {
	int (*type)[3]; /* programs */
	int (*max_entries)[1];
	__u32 *key;
	__u32 *value;
} next SEC(".maps");

static void *(*const lookup)(void *map, const void *key) = (void *)1;
static long (*const clone_redirect)(void *ctx, __u32 ifindex,
				    __u64 flags) = (void *)13;
static long (*const tail_call)(void *ctx, void *map, __u32 index) = (void *)12;
static long (*const vlan_push)(void *ctx, __u16 protocol,
			       __u16 tci) = (void *)18;
static long (*const set_tunnel_key)(void *ctx, void *key, __u32 size,
				    __u64 flags) = (void *)21;

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* What BPF_PROG_TEST_RUN costs by itself. */
SEC(SECTION)
int empty(void *ctx)
{
	return 0;
}

/* Sends the frame by a device; the copy that goes there is of no socket. */
SEC(SECTION)
int resend(void *ctx)
{
	struct arrival *arrival;
	__u32 zero = 0;

	arrival = lookup(&arrivals, &zero);
	return arrival ? clone_redirect(ctx, arrival->device, 0) : 255;
}

SEC(SECTION)
int arrive(void *ctx)
{
	struct arrival *arrival;
	__u32 zero = 0;

	arrival = lookup(&arrivals, &zero);
	if (!arrival)
		return 255;
	/* What is set as the local address is read back as the remote one. */
	if (arrival->has_key &&
	    set_tunnel_key(ctx, &arrival->key, sizeof(arrival->key),
			   arrival->is_ipv6 ? 1 : 0))
		return 254;
	if (arrival->vlan && vlan_push(ctx, 0x0081, arrival->vlan))
		return 253;
	tail_call(ctx, &next, 0);
	return 252;
}
