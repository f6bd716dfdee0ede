/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Policy by peer class: one hash lookup makes the remote identity a class,
 * one trie lookup makes class, protocol and port a verdict. Tiers, precedence
 * and ranges were decided when the rows were compiled.
 */
#pragma once

#include "endpoint.h"

/* What policy says at one end of a flow, and in which epoch. */
struct flow_verdict {
	__u32 direction;
	__u32 epoch;
	__u32 rule_id;
	__u16 l7_set; /* 0: nothing is left to judge */
};

/* 0 or a drop; notes the rule. The port is the responder's. `policy` is the
 * endpoint's. */
static __always_inline int policy_check(__u32 policy,
					struct flow_verdict *verdict,
					__u32 identity, struct packet *packet)
{
	__u32 direction = verdict->direction;
	__u32 enforced = direction == DIRECTION_EGRESS ? POLICY_ENFORCE_EGRESS
						       : POLICY_ENFORCE_INGRESS;
	struct policy_peer_key peer_key = {
		.policy_id = policy & POLICY_ID_MASK,
		.identity = identity,
		.direction = direction,
	};
	struct policy_rule_key rule_key = {
		.prefix_length = POLICY_RULE_PREFIX_PORT,
		.policy_id = bpf_htonl(policy & POLICY_ID_MASK),
		.direction = direction,
		.protocol = packet->protocol,
		.port = packet->flags & PACKET_REPLY ? packet->source_port
						     : packet->destination_port,
	};
	struct policy_peer *peer;
	struct policy_rule *rule;

	if (!(policy & enforced))
		return 0;
	/* An ICMP identifier is no port: rules name types. */
	if (packet->protocol == IPPROTO_ICMP ||
	    packet->protocol == IPPROTO_ICMPV6)
		rule_key.port = bpf_htons(icmp_asked(packet));
	peer = bpf_map_lookup_elem(&policy_peers, &peer_key);
	if (peer)
		rule_key.class = bpf_htonl(peer->class);
	else if (policy & POLICY_REFUSE_STRANGERS &&
		 packet->flags & PACKET_STRANGER &&
		 direction == DIRECTION_INGRESS)
		return -DROP_POLICY_DENIED;
	rule = bpf_map_lookup_elem(&policy_rules, &rule_key);
	if (!rule)
		return -DROP_POLICY_DENIED;
	verdict->rule_id = rule->rule_id;
	packet->rule_id = rule->rule_id;
	verdict->l7_set = rule->l7_set;
	return rule->verdict == POLICY_ALLOW ? 0 : -DROP_POLICY_DENY_RULE;
}
