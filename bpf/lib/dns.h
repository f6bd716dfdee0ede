/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * DNS over UDP, judged where the proxy's namespace begins. A query is read as far
 * as its question. Its name goes through the automata of the rule sets; what they
 * allow goes on to the server past the proxy, and waits in dns_pending for its
 * answer. What they deny is turned into its own answer. Everything that is not a
 * plain query or its answer is the proxy's: fragments, options of IP, long
 * payloads of EDNS, compressed names, and the names whose addresses rules ask
 * for (dns_names).
 */
#pragma once

#include "connection.h"
#include "event.h"
#include "hash.h"
#include "scratch.h"

#define DNS_HEADER 12
#define DNS_NAME_MAX 255
#define DNS_QUESTION_MAX (DNS_HEADER + DNS_NAME_MAX + 4)
#define DNS_TIMEOUT_SECONDS 10ULL
#define DNS_FRAME_MAX 4096 /* a longer one is copied for nobody */

enum dns_automata {
	DNS_EGRESS = 0,
	DNS_INGRESS = 1,
	DNS_NAMES = 2,
	DNS_AUTOMATA = 3,
};

struct dns_header {
	__be16 id;
	__u8 flags[2];
	__be16 questions;
	__be16 answers;
	__be16 authorities;
	__be16 additional;
};

struct dns_opt {
	__u8 name; /* the root */
	__u8 type[2];
	__u8 payload[2];
	__u8 ttl[4];
	__u8 length[2];
} __attribute__((packed));

#define DNS_TYPE_OPT 41
#define DNS_IS_ANSWER 0x80
#define DNS_OPCODE 0x78
#define DNS_KEPT 0x79 /* opcode, and that recursion is desired */

/* The class of a byte of a name; upper case is lower case. */
static __always_inline __u32 dns_class_of(__u8 byte)
{
	__u8 letter = (byte | 0x20) - 'a', digit = byte - '0';

	if (letter < 26)
		return letter;
	if (digit < 10)
		return DNS_CLASS_DIGIT + digit;
	if (byte == '-')
		return DNS_CLASS_HYPHEN;
	return byte == '_' ? DNS_CLASS_UNDERSCORE : DNS_CLASS_OTHER;
}

static __always_inline void dns_feed(struct dns_question *dns, __u32 class)
{
	struct dns_state *state;
	__u32 index;

	/* The verifier has not seen where it comes from. */
	barrier_var(class);
	if (class >= DNS_CLASSES)
		return;
#pragma unroll
	for (int i = 0; i < DNS_AUTOMATA; i++) {
		if (!dns->first[i])
			continue;
		index = dns->first[i] + dns->at[i];
		state = bpf_map_lookup_elem(&dns_states, &index);
		dns->at[i] = state ? state->next[class] : 0;
	}
}

/* One byte of the name: 1 if the name has ended, -1 if it is none. */
static __always_inline int dns_step(struct dns_question *dns, __u32 place)
{
	__u32 at = DNS_HEADER + place;
	__u8 byte;

	if (at >= sizeof(dns->bytes) || at >= dns->length)
		return -1;
	byte = dns->bytes[at];
	if (dns->left) {
		dns->left--;
		if ((__u8)(byte - 'A') < 26)
			dns->bytes[at] = byte | 0x20;
		dns_feed(dns, dns_class_of(byte));
		return 0;
	}
	if (!byte) {
		dns->end = at + 1;
		return 1;
	}
	/* No pointers: nothing stands before the first name. */
	if (byte > 63)
		return -1;
	dns->left = byte;
	if (place)
		dns_feed(dns, DNS_CLASS_DOT);
	return 0;
}

/* What a loop has is on the stack. */
struct dns_loop {
	struct dns_question *dns;
};

static long dns_step_of_loop(__u32 place, void *context)
{
	struct dns_loop *loop = context;

	return dns_step(loop->dns, place) ? 1 : 0;
}

/* With the node's secret: nobody can compute another question of the same hash. */
static __always_inline void dns_hash_question(struct dns_question *dns)
{
	const __u64 *words = (const void *)dns->bytes;
	struct hash hash;

	hash_begin(&hash);
	for (__u32 i = 1; i < sizeof(dns->bytes) / 8; i++) {
		__u64 word = words[i];

		if (i * 8 >= dns->end)
			break;
		/* Of the second word the half that is the header's is left out. */
		hash_add(&hash, i == 1 ? word >> 32 : word);
	}
	dns->question = hash_end(&hash);
}

/* Nothing is behind the question but what EDNS has: false if there is. */
static __always_inline bool dns_ends_well(struct __sk_buff *ctx,
					  const struct dns_question *dns,
					  __be16 additional)
{
	struct dns_opt opt;

	if (!additional)
		return dns->end == dns->length;
	if (additional != bpf_htons(1) ||
	    bpf_skb_load_bytes(ctx, dns->offset + dns->end, &opt, sizeof(opt)))
		return false;
	return !opt.name && !opt.type[0] && opt.type[1] == DNS_TYPE_OPT &&
	       (opt.payload[0] << 8 | opt.payload[1]) <= DNS_PAYLOAD_MAX &&
	       dns->end + sizeof(opt) + (opt.length[0] << 8 | opt.length[1]) ==
		       dns->length;
}

/*
 * Reads the message: 0, or -1 if its question cannot be read. The caller has set
 * the automata.
 */
__weak __noinline int dns_read(struct __sk_buff *ctx, struct packet *packet)
{
	struct scratch *room = scratch_get();
	struct dns_question *dns;
	struct dns_loop loop;
	__u32 length, end;

	if (!packet || !room)
		return -1;
	dns = &room->dns;
	dns->left = 0;
	dns->end = 0;
	length = dns->length;
	if (length <= DNS_HEADER)
		return -1;
	if (length > DNS_QUESTION_MAX)
		length = DNS_QUESTION_MAX;
	barrier_var(length);
	if (length > DNS_QUESTION_MAX || !length)
		return -1;
	if (bpf_skb_load_bytes(ctx, dns->offset, dns->bytes, length))
		return -1;
	loop.dns = dns;
	bpf_loop(DNS_NAME_MAX, dns_step_of_loop, &loop, 0);
	end = dns->end;
	if (!end || end + 4 > length || end + 4 > DNS_QUESTION_MAX)
		return -1;
	end += 4;
	dns->end = end;
	/* What is behind the question is not part of its hash. */
	for (__u32 i = 0; i < 8; i++) {
		if (end + i < sizeof(dns->bytes))
			dns->bytes[end + i] = 0;
	}
	dns_hash_question(dns);
	return 0;
}

/* The flow and the id of its query, with the node's secret. */
static __always_inline void dns_hash_flow(struct scratch *room)
{
	const struct dns_header *header = (const void *)room->dns.bytes;
	const struct l7_flow_key *key = &room->l7_key;
	struct hash hash;

	hash_begin(&hash);
	hash_add_addr(&hash, &key->client);
	hash_add_addr(&hash, &key->server);
	hash_add(&hash, (__u64)key->client_port << 32 |
				(__u64)key->server_port << 16 | header->id);
	room->dns.flow = hash_end(&hash);
}

/* The slot of a flow's question: one of two of the pod that asks, or of the pod
 * that others ask. */
static __always_inline struct dns_pending *
dns_slot(const struct dns_question *dns, const struct l7_flow *flow, __u32 way)
{
	__u32 endpoint = flow->client_endpoint ? flow->client_endpoint
					       : flow->server_endpoint;
	__u32 index = endpoint * DNS_SLOTS +
		      (((__u32)dns->flow ^ way) & (DNS_SLOTS - 1));

	return bpf_map_lookup_elem(&dns_pending, &index);
}

/* Another processor may have asked later than this one's `now`. */
static __always_inline bool dns_is_over(__u64 asked, __u64 now)
{
	return !asked ||
	       (__s64)(now - asked) >
		       (__s64)(DNS_TIMEOUT_SECONDS * 1000000000ULL);
}

/* Remembers a question: false if there is no room. */
static __always_inline bool dns_remember(const struct dns_question *dns,
					 const struct l7_flow *flow, __u64 now)
{
	struct dns_pending *slot, *room = NULL;
	__u64 asked, over = 0;

	for (__u32 way = 0; way < 2; way++) {
		slot = dns_slot(dns, flow, way);
		if (!slot)
			return false;
		asked = slot->asked_ns;
		if (slot->flow == dns->flow && asked) {
			room = slot;
			over = asked;
			break;
		}
		if (!room && dns_is_over(asked, now)) {
			room = slot;
			over = asked;
		}
	}
	/* One processor takes it; the others' questions are the proxy's. */
	if (!room ||
	    __sync_val_compare_and_swap(&room->asked_ns, over, now) != over)
		return false;
	room->question = dns->question;
	room->flow = dns->flow;
	return true;
}

/* When the question of an answer was asked, which waits no more; 0: it was not. */
static __always_inline __u64 dns_recall(const struct dns_question *dns,
					const struct l7_flow *flow, __u64 now)
{
	struct dns_pending *slot;
	__u64 asked;

	for (__u32 way = 0; way < 2; way++) {
		slot = dns_slot(dns, flow, way);
		if (!slot || slot->flow != dns->flow)
			continue;
		asked = slot->asked_ns;
		if (slot->question != dns->question || dns_is_over(asked, now))
			return 0;
		/* One answer to one question. */
		if (__sync_val_compare_and_swap(&slot->flow, dns->flow, 0) !=
		    dns->flow)
			return 0;
		slot->asked_ns = 0;
		return asked;
	}
	return 0;
}

/* A message's record; what has no room, or is over the pod's share, is counted. */
struct dns_full_record {
	struct dns_record head;
	__u8 bytes[DNS_RECORD_BYTES];
};

/* As quota_take_record: as many a second, of a pod's own. */
static __always_inline bool dns_may_note(const struct l7_flow *flow)
{
	__u32 endpoint = flow->client_endpoint ? flow->client_endpoint
					       : flow->server_endpoint;
	__u64 now = bpf_jiffies64() << 10, due;
	struct usage *of;

	if (!settings.drop_record_cost)
		return true;
	of = bpf_map_lookup_elem(&usage, &endpoint);
	if (!of)
		return true;
	due = of->dns_records_due;
	if ((__s64)(due - now) < 0)
		due = now;
	if (due - now >= (__u64)settings.jiffies_per_second << 10)
		return false;
	/* Two processors may take one for the same moment. */
	of->dns_records_due = due + settings.drop_record_cost;
	return true;
}

static __always_inline void dns_note(struct __sk_buff *ctx,
				     const struct scratch *room,
				     const struct l7_flow *flow, __u64 now,
				     __u64 asked, __u16 denied_by)
{
	struct dns_full_record *record;
	struct event_count *count;
	__u32 zero = 0, length = room->dns.length;

	if (!settings.flow_events)
		return;
	count = bpf_map_lookup_elem(&dns_counts, &zero);
	if (!count)
		return;
	count->offered++;
	if (!dns_may_note(flow)) {
		count->suppressed++;
		return;
	}
	record = bpf_ringbuf_reserve(&dns_records, sizeof(*record), 0);
	if (!record) {
		count->lost++;
		return;
	}
	record->head.timestamp_ns = now;
	record->head.asked_ns = asked;
	record->head.key = room->l7_key;
	record->head.flow = *flow;
	record->head.length = length;
	record->head.denied_by = denied_by;
	__builtin_memset(record->head.pad, 0, sizeof(record->head.pad));
	/* One less, so that one comparison gives both bounds. */
	length = length > DNS_RECORD_BYTES ? DNS_RECORD_BYTES - 1 : length - 1;
	barrier_var(length);
	if (length >= DNS_RECORD_BYTES ||
	    bpf_skb_load_bytes(ctx, room->dns.offset, record->bytes,
			       length + 1)) {
		bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		count->lost++;
		return;
	}
	/* What was denied is an answer by now; the record has what was asked. */
	__builtin_memcpy(record->bytes + 2, room->dns.bytes + 2, 2);
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

/* The automata of the rule sets: false if the proxy has to judge by one of them. */
static __always_inline bool dns_choose(struct dns_question *dns,
				       const struct l7_flow *flow)
{
	__u32 egress = flow->egress_set, ingress = flow->ingress_set;
	__u32 client = flow->client_endpoint;
	struct dns_automaton *automaton;

	__builtin_memset(dns->first, 0, sizeof(dns->first));
	for (int i = 0; i < DNS_AUTOMATA; i++)
		dns->at[i] = 1;
	if (!egress && !ingress)
		return false;
	if (egress) {
		automaton = bpf_map_lookup_elem(&dns_rules, &egress);
		if (!automaton || !automaton->first)
			return false;
		dns->first[DNS_EGRESS] = automaton->first;
	}
	if (ingress) {
		automaton = bpf_map_lookup_elem(&dns_rules, &ingress);
		if (!automaton || !automaton->first)
			return false;
		dns->first[DNS_INGRESS] = automaton->first;
	}
	if (!client)
		return true;
	automaton = bpf_map_lookup_elem(&dns_names, &client);
	if (!automaton || automaton->first == 1)
		return false;
	dns->first[DNS_NAMES] = automaton->first;
	return true;
}

/* The name has come to a state that one of the automata accepts. */
static __always_inline bool dns_accepts(const struct dns_question *dns,
					__u32 automaton)
{
	__u32 index = dns->first[automaton] + dns->at[automaton];
	struct dns_state *state = bpf_map_lookup_elem(&dns_states, &index);

	return state && state->accepts;
}

enum dns_verdict {
	DNS_PASSES = 0,
	DNS_TO_PROXY = 1,
	DNS_DENIED = 2,
	DNS_UNASKED = 3,
};

/* A query: enum dns_verdict. Notes the rule set that denies it. */
static __always_inline int dns_judge_query(struct __sk_buff *ctx,
					   struct packet *packet,
					   struct scratch *room,
					   const struct l7_flow *flow,
					   __u64 now, __u16 *denied_by)
{
	const struct dns_header *header = (const void *)room->dns.bytes;
	struct dns_question *dns = &room->dns;

	if (!dns_choose(dns, flow) || dns_read(ctx, packet))
		return DNS_TO_PROXY;
	if (header->flags[0] & (DNS_IS_ANSWER | DNS_OPCODE) ||
	    header->questions != bpf_htons(1) || header->answers ||
	    header->authorities ||
	    !dns_ends_well(ctx, dns, header->additional))
		return DNS_TO_PROXY;
	if (dns->first[DNS_EGRESS] && !dns_accepts(dns, DNS_EGRESS)) {
		*denied_by = flow->egress_set;
		return DNS_DENIED;
	}
	if (dns->first[DNS_INGRESS] && !dns_accepts(dns, DNS_INGRESS)) {
		*denied_by = flow->ingress_set;
		return DNS_DENIED;
	}
	if (dns->first[DNS_NAMES] && dns_accepts(dns, DNS_NAMES))
		return DNS_TO_PROXY;
	dns_hash_flow(room);
	return dns_remember(dns, flow, now) ? DNS_PASSES : DNS_TO_PROXY;
}

/* An answer: enum dns_verdict; says when it was asked for. The proxy has the
 * answers to what it was asked itself. */
static __always_inline int dns_judge_answer(struct __sk_buff *ctx,
					    struct packet *packet,
					    struct scratch *room,
					    const struct l7_flow *flow,
					    __u64 now, __u64 *asked)
{
	const struct dns_header *header = (const void *)room->dns.bytes;
	struct dns_question *dns = &room->dns;
	bool is_judged;

	__builtin_memset(dns->first, 0, sizeof(dns->first));
	if (!dns_read(ctx, packet) && header->flags[0] & DNS_IS_ANSWER &&
	    header->questions == bpf_htons(1)) {
		dns_hash_flow(room);
		*asked = dns_recall(dns, flow, now);
		if (*asked)
			return DNS_PASSES;
	}
	is_judged = dns_choose(dns, flow);
	if (!is_judged ||
	    (flow->asked_jiffies &&
	     jiffies_since(flow->asked_jiffies, bpf_jiffies64()) <=
		     seconds_to_jiffies(DNS_TIMEOUT_SECONDS)))
		return DNS_TO_PROXY;
	return DNS_UNASKED;
}

/* Turns a query into its own answer: the same message with a response code. 0 or
 * a drop. */
static __always_inline int dns_deny(struct __sk_buff *ctx,
				    const struct packet *packet,
				    const struct dns_question *dns)
{
	__u32 udp = packet->l4_offset;
	struct {
		__be16 source;
		__be16 destination;
	} ports = {packet->destination_port, packet->source_port};
	__be16 before, after;
	__u8 flags[2];
	int ret;

	if (bpf_skb_load_bytes(ctx, dns->offset + 2, flags, 2))
		return -DROP_INVALID_PACKET;
	__builtin_memcpy(&before, flags, 2);
	flags[0] = DNS_IS_ANSWER | (flags[0] & DNS_KEPT);
	flags[1] = 0x80 | (settings.dns_denied & 15);
	__builtin_memcpy(&after, flags, 2);
	if (packet->flags & PACKET_IPV6)
		ret = bpf_skb_store_bytes(
			      ctx,
			      ETHERNET_LENGTH + __builtin_offsetof(
							struct ipv6hdr, source),
			      packet->destination.w, 16, 0) ||
		      bpf_skb_store_bytes(
			      ctx,
			      ETHERNET_LENGTH +
				      __builtin_offsetof(struct ipv6hdr,
							 destination),
			      packet->source.w, 16, 0);
	else
		ret = bpf_skb_store_bytes(
			      ctx,
			      ETHERNET_LENGTH +
				      __builtin_offsetof(struct iphdr, source),
			      &packet->destination.w[3], 4, 0) ||
		      bpf_skb_store_bytes(
			      ctx,
			      ETHERNET_LENGTH + __builtin_offsetof(
							struct iphdr,
							destination),
			      &packet->source.w[3], 4, 0);
	/* Swapped words leave every sum as it is. */
	if (ret || bpf_skb_store_bytes(ctx, udp, &ports, sizeof(ports), 0) ||
	    bpf_skb_store_bytes(ctx, dns->offset + 2, flags, 2, 0) ||
	    bpf_l4_csum_replace(
		    ctx, udp + __builtin_offsetof(struct udphdr, check), before,
		    after, sizeof(after) | BPF_F_MARK_MANGLED_0))
		return -DROP_WRITE_ERROR;
	return 0;
}
