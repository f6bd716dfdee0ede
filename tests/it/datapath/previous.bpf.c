/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Maps as another ABI version might have them: fields in another order, of
 * another width, some more and some fewer. Compiled by the tests of upgrades; no
 * part of the datapath.
 */
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef unsigned short __be16;
typedef unsigned int __be32;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name

enum map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
};

enum map_flag {
	BPF_F_NO_PREALLOC = 1,
};

struct addr {
	__be32 w[4];
};

struct endpoint {
	struct addr ipv6;
	struct addr ipv4;
	__u32 identity;
	__u32 ifindex;
	__u32 policy;
	__u32 epoch;
	__u32 flags;
	__u8 mac[6];
	__u8 colour[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

struct node_state {
	__u32 flags;
	__u32 address_epoch;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node_state);
} node_state SEC(".maps");

struct nat_key {
	__u8 direction;
	__u8 protocol;
	__be16 remote_port;
	__be16 local_port;
	__u8 pad[2];
	struct addr remote;
	struct addr local;
};

struct nat {
	__be16 port;
	__u8 pad[6];
	struct addr addr;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct nat_key);
	__type(value, struct nat);
} nat SEC(".maps");

struct service_key {
	struct addr addr;
	__be16 port;
	__u8 protocol;
	__u8 scope;
};

/* Without the number of backends: not to be carried over. */
struct service {
	__u32 service_id;
	__u32 generation;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps");

struct metric {
	__u64 packets;
	__u64 bytes;
};

/* As it is now: to be shared. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct metric);
} metrics SEC(".maps");
