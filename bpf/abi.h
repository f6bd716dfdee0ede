/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every struct and enum that crosses between the kernel and the agent, and
 * nothing else. With maps.h this is the whole contract: Rust takes these types
 * from the skeleton. Fixed-width fields, widest first, padding written out.
 *
 * ABI_VERSION names the pin directory. bpf/abi.layout lists what a version
 * means; a test compares, and says when a change must raise the version.
 */
#pragma once

#include "kernel.h"

enum abi_version {
	ABI_VERSION = 2,
};

/* 16 bytes, network order; IPv4 is v4-mapped (::ffff:a.b.c.d). */
struct addr {
	__be32 w[4];
};

/* Seen from the endpoint; the numbers are Hubble's TrafficDirection. */
enum direction {
	DIRECTION_UNKNOWN = 0,
	DIRECTION_INGRESS = 1,
	DIRECTION_EGRESS = 2,
};

/* Reserved identities, with the numbers that Hubble's clients know. */
enum reserved_identity {
	IDENTITY_UNKNOWN = 0,
	IDENTITY_HOST = 1,
	IDENTITY_WORLD = 2,
	IDENTITY_UNMANAGED = 3,
	IDENTITY_HEALTH = 4,
	IDENTITY_INIT = 5,
	IDENTITY_REMOTE_NODE = 6,
	IDENTITY_KUBE_APISERVER = 7,
	IDENTITY_INGRESS = 8,
	IDENTITY_FIRST_CLUSTER = 256,
	IDENTITY_LAST_CLUSTER = 0xffffff,
	/* Node-local numbers (prefixes, pods covered by prefixes): never on the wire. */
	IDENTITY_FIRST_LOCAL = 0x1000000,
	IDENTITY_LAST_LOCAL = 0x1ffffff,
};

/*
 * Why a packet was dropped; the numbers are Hubble's DropReason, from 240 on our
 * own, which Hubble does not use. Functions return them negated. 0 is
 * "forwarded" in metrics and events.
 */
enum drop_reason {
	DROP_NONE = 0,
	DROP_INVALID_SOURCE_IP = 132,
	DROP_POLICY_DENIED = 133,
	DROP_INVALID_PACKET = 134,
	DROP_CONNECTION_TRUNCATED = 135,
	DROP_UNSUPPORTED_L3 = 139,
	DROP_WRITE_ERROR = 141,
	DROP_UNKNOWN_L4 = 142,
	DROP_UNSUPPORTED_ICMP = 143,
	DROP_UNROUTABLE_IP = 151,
	DROP_CONNECTION_INSERT = 155,
	DROP_INVALID_EXTENSION_HEADER = 156,
	DROP_FRAGMENT_UNSUPPORTED = 157,
	DROP_NO_SERVICE_BACKEND = 158,
	DROP_NO_TUNNEL_ENDPOINT = 160,
	DROP_UNSUPPORTED_L2 = 166,
	DROP_NO_NAT_MAPPING = 167,
	DROP_FIB_LOOKUP_FAILED = 169,
	DROP_ENCAPSULATION_PROHIBITED = 170,
	DROP_INVALID_IDENTITY = 171,
	DROP_UNKNOWN_SENDER = 172,
	DROP_IS_CLUSTER_IP = 174,
	DROP_FRAGMENT_NOT_FOUND = 175,
	DROP_FORBIDDEN_ICMPV6 = 176,
	DROP_SOURCE_RANGE = 177,
	DROP_POLICY_DENY_RULE = 181,
	DROP_INVALID_VNI = 183,
	DROP_NO_EGRESS_GATEWAY = 194,
	DROP_UNENCRYPTED = 195,
	DROP_TTL_EXCEEDED = 196,
	DROP_QUOTA_CONNECTIONS = 198,
	DROP_ENDPOINT_NOT_READY = 203,
	DROP_NO_EGRESS_IP = 204,
	DROP_QUOTA_NAT_PORTS = 240,
	DROP_NO_PROXY = 244,
	DROP_DNS_UNASKED = 245,
};

#include "abi/endpoint.h"
#include "abi/policy.h"
#include "abi/service.h"
#include "abi/flow.h"
#include "abi/l7.h"
#include "abi/usage.h"
#include "abi/node.h"
#include "abi/event.h"
#include "abi/collect.h"
