/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The kernel's types, as far as the programs read them: UAPI structs that are
 * fixed for ever (packet headers, program contexts, helper arguments) and
 * constants. Written down here rather than taken from a dump of one kernel, so
 * that the build needs no kernel headers and no BTF of the build machine.
 * Internal kernel structs, where one is needed, carry preserve_access_index.
 */
#pragma once

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef signed short __s16;
typedef unsigned int __u32;
typedef signed int __s32;
typedef unsigned long long __u64;
typedef signed long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u32 __wsum;
typedef __u16 __sum16;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

/* The map types and flags that maps.h names: include/uapi/linux/bpf.h. */
enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_SOCKMAP = 15,
	BPF_MAP_TYPE_SOCKHASH = 18,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_EXIST = 2,
	BPF_F_NO_PREALLOC = 1,
};

/* Flags of helpers: include/uapi/linux/bpf.h. */
enum {
	BPF_F_RECOMPUTE_CSUM = 1 << 0,
	BPF_F_HDR_FIELD_MASK = 0xf,
	BPF_F_PSEUDO_HDR = 1 << 4,
	BPF_F_MARK_MANGLED_0 = 1 << 5,
	BPF_F_IPV6 = 1 << 7,
	BPF_F_TUNINFO_IPV6 = 1 << 0,
	BPF_F_ZERO_CSUM_TX = 1 << 1,
	BPF_ADJ_ROOM_NET = 0,
	BPF_ADJ_ROOM_MAC = 1,
	BPF_F_ADJ_ROOM_FIXED_GSO = 1 << 0,
	BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 = 1 << 1,
	BPF_F_ADJ_ROOM_ENCAP_L4_UDP = 1 << 4,
	BPF_F_ADJ_ROOM_ENCAP_L2_ETH = 1 << 6,
	BPF_F_ADJ_ROOM_DECAP_L3_IPV6 = 1 << 8,
	BPF_RB_NO_WAKEUP = 1 << 0,
	BPF_RB_AVAIL_DATA = 0,
	BPF_SK_STORAGE_GET_F_CREATE = 1 << 0,
	BPF_FIB_LOOKUP_OUTPUT = 1 << 1,
	BPF_FIB_LOOKUP_SKIP_NEIGH = 1 << 2,
	BPF_FIB_LKUP_RET_SUCCESS = 0,
	BPF_FIB_LKUP_RET_NOT_FWDED = 4,
	BPF_FIB_LKUP_RET_FWD_DISABLED = 5,
	BPF_FIB_LKUP_RET_FRAG_NEEDED = 8,
	BPF_F_CURRENT_NETNS = -1,
	BPF_TCP_ESTABLISHED = 1, /* of UDP: connected */
	BPF_TCP_LISTEN = 10,
};

/* Length of the inner frame's Ethernet header. */
#define BPF_F_ADJ_ROOM_ENCAP_L2(length) ((__u64)(length) << 56)

/* What a tc program answers, and skb->pkt_type. */
enum {
	TC_ACT_OK = 0,
	TC_ACT_SHOT = 2,
	TC_ACT_REDIRECT = 7,
	BPF_F_INGRESS = 1, /* a flag of bpf_redirect */
	PACKET_HOST = 0,
	PACKET_BROADCAST = 1,
	PACKET_MULTICAST = 2,
	PACKET_OTHERHOST = 3,
};

enum {
	AF_INET = 2,
	AF_INET6 = 10,
	SOCK_STREAM = 1,
	SOCK_DGRAM = 2,
	EADDRINUSE = 98,
	ECONNREFUSED = 111,
};

/* What a program sees of a socket: include/uapi/linux/bpf.h. */
struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
	__u32 src_port;
	__be16 dst_port;
	__u16 pad;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state; /* of TCP: BPF_TCP_* */
	__s32 rx_queue_mapping;
};

/* What a tc program sees of a packet: include/uapi/linux/bpf.h, fixed for ever. */
struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys __attribute__((aligned(8)));
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	struct bpf_sock *sk __attribute__((aligned(8)));
	__u32 gso_size;
	__u8 tstamp_type;
	__u8 pad[3];
	__u64 hwtstamp;
};

/* What bpf_skb_get_xfrm_state fills: include/uapi/linux/bpf.h. */
struct bpf_xfrm_state {
	__u32 reqid;
	__u32 spi;
	__u16 family;
	__u16 ext;
	__u32 remote[4]; /* the sender's address; IPv4: the first word */
};

#define BPF_HDR_START_NET 1

#define AF_INET 2
#define AF_INET6 10

/* Packet headers, as they stand on the wire; no bit fields. */
struct ethhdr {
	__u8 destination[6];
	__u8 source[6];
	__be16 protocol;
} __attribute__((packed));

struct iphdr {
	__u8 version_length; /* version << 4 | header length in words */
	__u8 tos;
	__be16 total_length;
	__be16 id;
	__be16 fragment; /* flags and offset: enum ip_fragment */
	__u8 ttl;
	__u8 protocol;
	__sum16 check;
	__be32 source;
	__be32 destination;
};

struct ipv6hdr {
	__be32 version_class_label;
	__be16 payload_length;
	__u8 next_header;
	__u8 hop_limit;
	__be32 source[4];
	__be32 destination[4];
};

struct tcphdr {
	__be16 source;
	__be16 destination;
	__be32 sequence;
	__be32 acknowledgment;
	__u8 offset; /* header length in words << 4 */
	__u8 flags;  /* enum tcp_flag */
	__be16 window;
	__sum16 check;
	__be16 urgent;
};

struct udphdr {
	__be16 source;
	__be16 destination;
	__be16 length;
	__sum16 check;
};

struct sctphdr {
	__be16 source;
	__be16 destination;
	__be32 tag;
	__u32 checksum;
};

/* RFC 7348, 5. */
struct vxlanhdr {
	__be32 flags;
	__be32 vni; /* << 8 */
};

#define VXLAN_HAS_VNI 0x08000000

/* ICMP and ICMPv6. */
struct icmphdr {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be16 id;
	__be16 sequence;
};

struct arphdr {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

enum ethernet_protocol {
	ETH_P_IP = 0x0800,
	ETH_P_ARP = 0x0806,
	ETH_P_IPV6 = 0x86dd,
};

enum ip_protocol {
	IPPROTO_HOPOPTS = 0,
	IPPROTO_ICMP = 1,
	IPPROTO_TCP = 6,
	IPPROTO_UDP = 17,
	IPPROTO_ROUTING = 43,
	IPPROTO_FRAGMENT = 44,
	IPPROTO_AH = 51,
	IPPROTO_ICMPV6 = 58,
	IPPROTO_NONE = 59,
	IPPROTO_DSTOPTS = 60,
	IPPROTO_SCTP = 132,
	IPPROTO_MOBILITY = 135,
};

enum ip_fragment {
	IP_DONT_FRAGMENT = 0x4000,
	IP_MORE_FRAGMENTS = 0x2000,
	IP_FRAGMENT_OFFSET = 0x1fff,
};

enum tcp_flag {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
};

enum icmp_type {
	ICMP_ECHO_REPLY = 0,
	ICMP_UNREACHABLE = 3,
	ICMP_REDIRECT = 5,
	ICMP_ECHO = 8,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETER_PROBLEM = 12,
	ICMP_TIMESTAMP = 13,
	ICMP_TIMESTAMP_REPLY = 14,
	ICMP_INFORMATION = 15,
	ICMP_INFORMATION_REPLY = 16,
	ICMP_ADDRESS_MASK = 17,
	ICMP_ADDRESS_MASK_REPLY = 18,
	ICMP_EXTENDED_ECHO = 42,
	ICMP_EXTENDED_ECHO_REPLY = 43,
	ICMPV6_UNREACHABLE = 1,
	ICMPV6_PACKET_TOO_BIG = 2,
	ICMPV6_TIME_EXCEEDED = 3,
	ICMPV6_PARAMETER_PROBLEM = 4,
	ICMPV6_ECHO = 128,
	ICMPV6_ECHO_REPLY = 129,
	ICMPV6_MLD_QUERY = 130,
	ICMPV6_MLD_REPORT = 131,
	ICMPV6_MLD_DONE = 132,
	ICMPV6_ROUTER_SOLICITATION = 133,
	ICMPV6_ROUTER_ADVERTISEMENT = 134,
	ICMPV6_NEIGHBOUR_SOLICITATION = 135,
	ICMPV6_NEIGHBOUR_ADVERTISEMENT = 136,
	ICMPV6_REDIRECT = 137,
	ICMPV6_MLD2_REPORT = 143,
	ICMPV6_EXTENDED_ECHO = 160,
	ICMPV6_EXTENDED_ECHO_REPLY = 161,
};

/* What a driver's program is given, and what it answers. */
struct xdp_md {
	__u32 data;
	__u32 data_end;
	__u32 data_meta;
	__u32 ingress_ifindex;
	__u32 rx_queue_index;
	__u32 egress_ifindex;
};

enum xdp_action {
	XDP_ABORTED = 0,
	XDP_DROP = 1,
	XDP_PASS = 2,
	XDP_TX = 3,
	XDP_REDIRECT = 4,
};

/* Arguments of helpers: include/uapi/linux/bpf.h. */
struct bpf_tunnel_key {
	__u32 tunnel_id;
	union {
		__u32 remote_ipv4;
		__u32 remote_ipv6[4];
	};
	__u8 tunnel_tos;
	__u8 tunnel_ttl;
	__u16 tunnel_ext;
	__u32 tunnel_label;
	union {
		__u32 local_ipv4;
		__u32 local_ipv6[4];
	};
};

struct bpf_fib_lookup {
	__u8 family;
	__u8 l4_protocol;
	__be16 sport;
	__be16 dport;
	__u16 tot_len; /* 0: not compared with the MTU; out: the MTU of the way */
	__u32 ifindex;
	__be32 flowinfo; /* IPv4: tos in the first byte; out: metric */
	__u32 source[4];
	__u32 destination[4]; /* out: the next hop */
	__be16 vlan_protocol;
	__be16 vlan_tci;
	__u8 source_mac[6];
	__u8 destination_mac[6];
};

struct bpf_sock_tuple {
	union {
		struct {
			__be32 source;
			__be32 destination;
			__be16 source_port;
			__be16 destination_port;
		} ipv4;
		struct {
			__be32 source[4];
			__be32 destination[4];
			__be16 source_port;
			__be16 destination_port;
		} ipv6;
	};
};

struct bpf_redir_neigh {
	__u32 nh_family;
	__u32 nexthop[4];
};

struct bpf_sk_lookup {
	union {
		struct bpf_sock *sk __attribute__((aligned(8)));
		__u64 cookie __attribute__((aligned(8)));
	};
	__u32 family;
	__u32 protocol;
	__u32 remote_ip4;
	__u32 remote_ip6[4];
	__be16 remote_port;
	__u16 : 16;
	__u32 local_ip4;
	__u32 local_ip6[4];
	__u32 local_port;
	__u32 ingress_ifindex;
};

enum sk_action {
	SK_DROP = 0,
	SK_PASS = 1,
};

struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port; /* network order in the low half */
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	struct bpf_sock *sk __attribute__((aligned(8)));
};

/* Part of an iterator's context: internal, relocated at load. */
struct bpf_iter_meta {
	void *seq;
	__u64 session_id;
	__u64 seq_num;
} __attribute__((preserve_access_index));
