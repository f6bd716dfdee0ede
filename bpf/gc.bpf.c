// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Collecting what has expired. The agent walks a map and names the keys that it
 * has found, some thousand in a call; each entry is looked at here before it is
 * deleted, so a flow that came back a moment ago stays. On the way the flows
 * that rest are reported: what came since their last record would wait for
 * their next packet. Not iterators of maps: there are kernels that refuse those
 * to everybody, and for_each holds a processor until it has seen the whole map.
 */
#include "lib/connection.h"
#include "lib/nat_port.h"

char LICENSE[] SEC("license") __weak = "Dual BSD/GPL";

/* A request while it is worked on. */
struct collection {
	__u64 keys;
	__u32 deleted;
	bool is_unreadable;
};

/* The key of this number, from the agent's memory. */
static __always_inline bool collection_read(struct collection *of, void *key,
					    __u32 size, __u32 number)
{
	of->is_unreadable = bpf_copy_from_user(
		key, size, (void *)(of->keys + (__u64)number * size));
	return !of->is_unreadable;
}

/* What the program returns: 0, or 1 if a key could not be read. */
static __always_inline int collection_end(const struct collection *of,
					  struct collect_request *request)
{
	request->deleted = of->deleted;
	return of->is_unreadable;
}

/* Without a packet: of a flow that has ended, or rests. */
static __always_inline void report(const struct connection *connection,
				   const struct connection_key *key, __u8 type)
{
	struct event *event = event_of_flow(connection, key, type, 0, 0);

	if (event)
		bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

/*
 * A TCP connection that was answered, or more, since its last record, and has
 * no packet to take the next one along; what else there is ends within a
 * minute.
 */
static __always_inline bool rests_unreported(const struct connection *of,
					     __u8 protocol, __u64 now)
{
	return protocol == IPPROTO_TCP && of->flags & CONNECTION_REPLIED &&
	       (__s32)((__u32)of->last_seen_jiffies -
		       of->last_report_jiffies) >= 0 &&
	       jiffies_since(of->last_report_jiffies, now) >
		       seconds_to_jiffies(settings.flow_report_seconds);
}

/* The entry stays, and counts as its owner's. */
static __always_inline void recount_connection(__u32 owner, __u16 flags)
{
	struct recount *recount = bpf_map_lookup_elem(&recounts, &owner);

	if (!recount)
		return;
	recount->found[QUOTA_CONNECTIONS]++;
	if (flags & CONNECTION_OPENING)
		recount->found[QUOTA_OPENING]++;
}

/*
 * True if the pod whose share the entry is of is gone, and another one has its
 * number: that one would pay for it. An empty row of endpoints says nothing: a
 * new agent may not have written them yet.
 */
static __always_inline bool connection_is_orphan(const struct connection *of,
						 const struct connection_key *key)
{
	__u32 owner = connection_owner(of);
	struct endpoint *endpoint = endpoint_by_id(owner);

	if (!owner || !endpoint || !endpoint->ifindex)
		return false;
	/* Of a client outside the pod is the backend. */
	if (key->kind == CONNECTION_SERVICE &&
	    (addr_equal(&of->service, &endpoint->ipv4) ||
	     addr_equal(&of->service, &endpoint->ipv6)))
		return false;
	return !addr_equal(&key->addr[0], &endpoint->ipv4) &&
	       !addr_equal(&key->addr[0], &endpoint->ipv6) &&
	       !addr_equal(&key->addr[1], &endpoint->ipv4) &&
	       !addr_equal(&key->addr[1], &endpoint->ipv6);
}

static long collect_connection(__u32 number, struct collection *of)
{
	struct connection_key key __attribute__((aligned(8)));
	struct connection *connection;
	__u64 now = bpf_jiffies64();
	bool is_reported;
	__u32 owner;
	__u16 flags;

	if (!collection_read(of, &key, sizeof(key), number))
		return 1;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection)
		return 0;
	is_reported = key.kind == CONNECTION_FLOW && settings.flow_events &&
		      !(connection->flags & CONNECTION_ENDED);
	owner = connection_owner(connection);
	flags = connection->flags;
	if (!connection_is_expired(connection, key.protocol, now) &&
	    !connection_is_orphan(connection, &key)) {
		recount_connection(owner, flags);
		if (is_reported &&
		    rests_unreported(connection, key.protocol, now)) {
			connection->last_report_jiffies = now;
			report(connection, &key, EVENT_FLOW_UPDATE);
		}
		return 0;
	}
	if (is_reported)
		report(connection, &key, EVENT_FLOW_END);
	if (key.kind == CONNECTION_FLOW)
		connection_release_backend(connection, &key);
	if (connection_delete(&key, owner, flags))
		of->deleted++;
	return 0;
}

SEC("syscall")
int collect_connections(struct collect_request *request)
{
	struct collection of = {.keys = request->keys};

	bpf_loop(request->count, collect_connection, &of, 0);
	return collection_end(&of, request);
}

/* The mapping stays, and counts as its pod's. */
static __always_inline void recount_mapping(const struct nat_key *key,
					    const struct nat *row)
{
	__u32 owner;
	struct recount *recount;

	if (key->direction != DIRECTION_INGRESS || row->service_port ||
	    nat_is_nodes(row, key))
		return;
	owner = nat_owner(&row->addr);
	recount = bpf_map_lookup_elem(&recounts, &owner);
	if (owner && recount)
		recount->found[QUOTA_NAT_PORTS]++;
}

/* Deletes a row; `pod` is whose it is, NULL: a client's of a service. */
static __always_inline void delete_mapping(const struct nat_key *key,
					   const struct addr *pod,
					   struct collection *of)
{
	if (bpf_map_delete_elem(&nat, key))
		return;
	of->deleted++;
	if (pod && key->direction == DIRECTION_INGRESS)
		nat_give_port(pod);
}

/* Both rows go at once: one alone would be taken for a half that was lost. */
static long collect_mapping(__u32 number, struct collection *of)
{
	struct nat_key key __attribute__((aligned(8)));
	struct nat_key turned __attribute__((aligned(8)));
	struct nat *mapping, *other;
	bool is_clients;

	if (!collection_read(of, &key, sizeof(key), number))
		return 1;
	mapping = bpf_map_lookup_elem(&nat, &key);
	if (!mapping)
		return 0;
	if (!nat_is_over(&key, mapping, bpf_jiffies64(),
			 settings.tcp_closing_seconds)) {
		recount_mapping(&key, mapping);
		return 0;
	}
	nat_key_turn(&key, mapping, &turned);
	is_clients = mapping->service_port;
	other = bpf_map_lookup_elem(&nat, &turned);
	if (other && nat_row_is(other, &key.local, key.local_port))
		delete_mapping(&turned, &key.local, of);
	delete_mapping(&key, is_clients ? NULL : &turned.local, of);
	return 0;
}

SEC("syscall")
int collect_nat(struct collect_request *request)
{
	struct collection of = {.keys = request->keys};

	bpf_loop(request->count, collect_mapping, &of, 0);
	return collection_end(&of, request);
}

/* Notes what an endpoint has now. */
static long recount_begin(__u32 endpoint, void *unused)
{
	struct recount *recount = bpf_map_lookup_elem(&recounts, &endpoint);
	struct usage *of = bpf_map_lookup_elem(&usage, &endpoint);

	if (!recount || !of)
		return 1;
	for (int kind = 0; kind < QUOTA_KINDS; kind++) {
		recount->found[kind] = 0;
		recount->in_use[kind] = of->in_use[kind];
		recount->taken[kind] = of->taken[kind];
	}
	return 0;
}

/*
 * What a counter is off by. Rows that came and went while they were counted may
 * have been found or not; only what these do not explain is wrong.
 */
static __always_inline __s32 recount_drift(__s32 found, __s32 in_use,
					   __s32 before, __s32 came)
{
	__s32 gone = came - (in_use - before);
	__s32 unsure = came + (gone > 0 ? gone : -gone);
	__s32 drift = found - in_use;

	if (drift > unsure)
		return drift - unsure;
	if (drift < -unsure)
		return drift + unsure;
	return 0;
}

struct recount_end {
	__u32 sum[QUOTA_KINDS];
};

/* Corrects what an endpoint has by what was found. */
static long recount_endpoint(__u32 endpoint, struct recount_end *end)
{
	struct recount *recount = bpf_map_lookup_elem(&recounts, &endpoint);
	struct usage *of = bpf_map_lookup_elem(&usage, &endpoint);

	if (!recount || !of)
		return 1;
	for (int kind = 0; kind < QUOTA_KINDS; kind++) {
		__s32 in_use = of->in_use[kind];
		__s32 drift = recount_drift(
			recount->found[kind], in_use, recount->in_use[kind],
			of->taken[kind] - recount->taken[kind]);

		if (drift)
			__sync_fetch_and_add(&of->in_use[kind], drift);
		end->sum[kind] += in_use + drift;
	}
	return 0;
}

/* Before and after the rows of connections and nat are collected. */
SEC("syscall")
int collect_usage(struct recount_request *request)
{
	struct recount_end end = {};
	struct quota_total *total;

	if (!request->is_end) {
		bpf_loop(USAGE_ENTRIES, recount_begin, &end, 0);
		return 0;
	}
	bpf_loop(USAGE_ENTRIES, recount_endpoint, &end, 0);
	for (__u32 kind = 0; kind < QUOTA_KINDS; kind++) {
		__u32 index = kind;

		total = bpf_map_lookup_elem(&quota_totals, &index);
		if (!total)
			return 1;
		__sync_fetch_and_add(&total->in_use,
				     end.sum[kind] - total->in_use);
		total->enforced_until_jiffies =
			bpf_jiffies64() +
			seconds_to_jiffies(request->lease_seconds);
	}
	return 0;
}
