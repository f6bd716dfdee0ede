//! Prints maps for people and golden files: rows as JSON, addresses as text,
//! identities as numbers, flags as names. Reads the pins, so it needs no agent.

use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapHandle, libbpf_sys};
use serde_json::{Value, json};

use super::abi::{self, Plain, ip_of, optional_ip_of};
use super::counters::per_cpu;
use super::map::TypedMap;
use super::types::{
    address_flags, connection_flags, egress_flags, endpoint_flags, node_flags, policy_bits, prefix_flags,
    service_flags,
};
use crate::model::MacAddress;

/// The maps that can be dumped.
pub const MAP_NAMES: [&str; 23] = [
    "addresses",
    "affinity",
    "announced",
    "backends",
    "connections",
    "devices",
    "egress_pods",
    "egress_rules",
    "endpoints",
    "event_counts",
    "fragments",
    "l7_flows",
    "maglev",
    "metrics",
    "nat",
    "node_state",
    "policy_peers",
    "policy_rules",
    "prefixes",
    "services",
    "slots",
    "source_ranges",
    "this_node",
];

/// The rows of a pinned map, decoded, in the order of their keys.
pub fn dump(pins: &Path, map: &str) -> Result<Vec<Value>> {
    if !MAP_NAMES.contains(&map) {
        bail!("there is no map {map}; there are {}", MAP_NAMES.join(", "));
    }
    super::messages::collect_libbpf_messages();
    let path = super::pins::maps(pins).join(map);
    let handle = MapHandle::from_pinned_path_with_file_flags(&path, libbpf_sys::BPF_F_RDONLY)
        .with_context(|| format!("opening {}: has an agent run on this node?", path.display()))?;
    match map {
        "addresses" => rows(handle, address_row),
        "affinity" => rows(handle, affinity_row),
        "announced" => rows(handle, announced_row),
        "backends" => rows(handle, backend_row),
        "connections" => rows(handle, connection_row),
        "devices" => rows(handle, device_row),
        "egress_pods" => rows(handle, egress_pod_row),
        "egress_rules" => rows(handle, egress_rule_row),
        "endpoints" => rows(handle, endpoint_row),
        "event_counts" => event_counts(&handle),
        "fragments" => rows(handle, fragment_row),
        "l7_flows" => rows(handle, l7_flow_row),
        "maglev" => rows(handle, maglev_row),
        "metrics" => metrics(&handle),
        "nat" => rows(handle, nat_row),
        "node_state" => rows(handle, node_state_row),
        "policy_peers" => rows(handle, policy_peer_row),
        "policy_rules" => rows(handle, policy_rule_row),
        "prefixes" => rows(handle, prefix_row),
        "services" => rows(handle, service_row),
        "slots" => rows(handle, slot_row),
        "source_ranges" => rows(handle, source_range_row),
        _ => rows(handle, device_row),
    }
}

/// A decoded row behind what it is sorted by; `None`: an empty slot of an array.
type Row = Option<(Vec<u8>, Value)>;

fn rows<K: Plain, V: Plain>(handle: MapHandle, decode: fn(K, V) -> Row) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    TypedMap::new(handle)?.for_each(|key, value| rows.extend(decode(key, value)))?;
    rows.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// Names of the bits that are set; a bit without a name is printed as a number.
fn names(flags: u32, known: &[(u32, &str)]) -> Value {
    let named = known.iter().filter(|(bit, _)| flags & bit != 0);
    let unknown = known.iter().fold(flags, |rest, (bit, _)| rest & !bit);
    let unknown = (unknown != 0).then(|| format!("{unknown:#x}"));
    named.map(|(_, name)| (*name).to_owned()).chain(unknown).collect()
}

fn ip(addr: abi::Addr) -> Value {
    optional_ip_of(addr).map_or(Value::Null, |ip| json!(ip))
}

fn protocol(number: u8) -> Value {
    match number {
        1 => json!("ICMP"),
        6 => json!("TCP"),
        17 => json!("UDP"),
        58 => json!("ICMPv6"),
        132 => json!("SCTP"),
        _ => json!(number),
    }
}

fn direction(number: u32) -> Value {
    match number {
        0 => json!("unknown"),
        1 => json!("ingress"),
        2 => json!("egress"),
        _ => json!(number),
    }
}

/// Big endian bytes of native words, so that rows sort as the numbers do.
fn sort_key(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn endpoint_row(id: u32, row: abi::Endpoint) -> Row {
    if row.ifindex == 0 && row.flags == 0 {
        return None;
    }
    let value = json!({
        "id": id,
        "epoch": row.epoch,
        "policy": row.policy & policy_bits::POLICY_ID_MASK.0,
        "enforces": names(row.policy & !policy_bits::POLICY_ID_MASK.0, &[
            (policy_bits::POLICY_ENFORCE_INGRESS.0, "ingress"),
            (policy_bits::POLICY_ENFORCE_EGRESS.0, "egress"),
            (policy_bits::POLICY_REFUSE_STRANGERS.0, "strangers"),
            (policy_bits::POLICY_REJECT.0, "reject"),
        ]),
        "ipv4": ip(row.ipv4),
        "ipv6": ip(row.ipv6),
        "ifindex": row.ifindex,
        "identity": row.identity,
        "mac": MacAddress(row.mac).to_string(),
        "priority": u32::from(row.flags) / endpoint_flags::ENDPOINT_PRIORITY.0,
        "flags": names(u32::from(row.flags) % endpoint_flags::ENDPOINT_PRIORITY.0, &[
            (endpoint_flags::ENDPOINT_READY.0, "ready"),
            (endpoint_flags::ENDPOINT_EGRESS.0, "egress"),
            (endpoint_flags::ENDPOINT_LIMITED.0, "limited"),
        ]),
    });
    Some((sort_key(&[id]), value))
}

fn address_row(key: abi::Addr, row: abi::Address) -> Row {
    let value = json!({
        "address": ip_of(key),
        "identity": row.identity,
        "node": ip(row.node),
        "endpoint": row.endpoint_id,
        "flags": names(row.flags.into(), &[
            (address_flags::ADDRESS_POD.0, "pod"),
            (address_flags::ADDRESS_NODE.0, "node"),
            (address_flags::ADDRESS_LOCAL.0, "local"),
            (address_flags::ADDRESS_INTERNAL.0, "internal"),
        ]),
    });
    Some((key.as_bytes().to_vec(), value))
}

/// A length below 96 with a mapped address can only be IPv6's.
fn prefix_text(addr: abi::Addr, length: u32) -> String {
    match length.checked_sub(96).filter(|_| ip_of(addr).is_ipv4()) {
        Some(length) => format!("{}/{length}", ip_of(addr)),
        None => format!("{}/{length}", ipv6_text(addr)),
    }
}

fn egress_rule_row(key: abi::EgressRuleKey, row: abi::EgressRule) -> Row {
    let value = json!({
        "set": key.set,
        "destination": prefix_text(key.destination, key.prefix_length.saturating_sub(32)),
        "node": optional_ip_of(row.node),
        "address": optional_ip_of(row.address),
        "ifindex": row.ifindex,
        "flags": names(row.flags, &[
            (egress_flags::EGRESS_HERE.0, "here"),
            (egress_flags::EGRESS_ORDINARY.0, "ordinary"),
            (egress_flags::EGRESS_OF_DEVICE.0, "of-device"),
        ]),
    });
    let order =
        [&sort_key(&[key.set])[..], key.destination.as_bytes(), &sort_key(&[key.prefix_length])].concat();
    Some((order, value))
}

fn egress_pod_row(key: abi::Addr, set: u32) -> Row {
    Some((key.as_bytes().to_vec(), json!({"pod": ip_of(key), "set": set})))
}

fn prefix_row(key: abi::PrefixKey, row: abi::Prefix) -> Row {
    let value = json!({
        "prefix": prefix_text(key.addr, key.prefix_length),
        "identity": row.identity,
        "node": optional_ip_of(row.node),
        "flags": names(row.flags, &[
            (prefix_flags::PREFIX_POD_CIDR.0, "pod-cidr"),
            (prefix_flags::PREFIX_GUARDED.0, "guarded"),
        ]),
    });
    Some(([key.addr.as_bytes(), &sort_key(&[key.prefix_length])].concat(), value))
}

fn ipv6_text(addr: abi::Addr) -> String {
    match ip_of(addr) {
        std::net::IpAddr::V4(address) => address.to_ipv6_mapped().to_string(),
        std::net::IpAddr::V6(address) => address.to_string(),
    }
}

fn l7_flow_row(key: abi::L7FlowKey, row: abi::L7Flow) -> Row {
    let value = json!({
        "protocol": protocol(key.protocol),
        "client": ip_of(key.client),
        "client_port": u16::from_be(key.client_port),
        "client_identity": row.client_identity,
        "client_endpoint": row.client_endpoint,
        "server": ip_of(key.server),
        "server_port": u16::from_be(key.server_port),
        "server_identity": row.server_identity,
        "server_endpoint": row.server_endpoint,
        "egress_set": row.egress_set,
        "ingress_set": row.ingress_set,
        "dns_by_proxy": row.asked_jiffies != 0,
        "listener_set": row.listener_set,
    });
    Some((key.as_bytes().to_vec(), value))
}

fn policy_peer_row(key: abi::PolicyPeerKey, row: abi::PolicyPeer) -> Row {
    let value = json!({
        "policy": key.policy_id,
        "direction": direction(key.direction),
        "identity": key.identity,
        "class": row.class,
    });
    Some((sort_key(&[key.policy_id, key.direction, key.identity]), value))
}

fn policy_rule_row(key: abi::PolicyRuleKey, row: abi::PolicyRule) -> Row {
    let port = u16::from_be(key.port);
    let bits = key.prefix_length.saturating_sub(80).min(16);
    let ports = match bits {
        0 => json!("any"),
        16 => json!(port),
        _ => json!(format!("{port}-{}", u32::from(port) + (1 << (16 - bits)) - 1)),
    };
    let value = json!({
        "policy": u32::from_be(key.policy_id),
        "direction": direction(key.direction.into()),
        "class": u32::from_be(key.class),
        "protocol": if key.prefix_length < 80 { json!("any") } else { protocol(key.protocol) },
        "port": ports,
        "verdict": match row.verdict { 1 => json!("allow"), 2 => json!("deny"), other => json!(other) },
        "rule": row.rule_id,
        "l7_set": row.l7_set,
    });
    let order =
        [u32::from_be(key.policy_id), key.direction.into(), u32::from_be(key.class), key.protocol.into()];
    Some(([sort_key(&order), sort_key(&[port.into(), key.prefix_length])].concat(), value))
}

fn service_row(key: abi::ServiceKey, row: abi::Service) -> Row {
    const KINDS: [&str; 5] = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalIP", "HostPort"];
    let named =
        |names: &[&str], number: u8| names.get(usize::from(number)).map_or(json!(number), |name| json!(name));
    let value = json!({
        "address": ip_of(key.addr),
        "port": u16::from_be(key.port),
        "protocol": protocol(key.protocol),
        "scope": named(&["internal", "external"], key.scope),
        "service": row.service_id,
        "generation": row.generation,
        "backends": row.backend_count,
        "draining": row.draining_count,
        "affinity_seconds": row.affinity_seconds,
        "kind": named(&KINDS, row.kind),
        "algorithm": named(&["random", "maglev"], row.algorithm),
        "flags": names(row.flags.into(), &[
            (service_flags::SERVICE_WILDCARD.0, "wildcard"),
            (service_flags::SERVICE_LOOPBACK.0, "loopback"),
            (service_flags::SERVICE_HAS_OTHERS.0, "has-others"),
            (service_flags::SERVICE_RANGES.0, "source-ranges"),
            (service_flags::SERVICE_DSR.0, "dsr"),
        ]),
    });
    Some((key.as_bytes().to_vec(), value))
}

fn slot_row(key: abi::SlotKey, row: abi::Slot) -> Row {
    let value = json!({
        "service": key.service_id,
        "generation": key.generation,
        "slot": key.slot,
        "backend": row.backend,
    });
    Some((sort_key(&[key.service_id, key.generation, key.slot]), value))
}

fn backend_row(id: u32, row: abi::Backend) -> Row {
    let value = json!({
        "id": id,
        "address": ip_of(row.addr),
        "port": u16::from_be(row.port),
        "protocol": protocol(row.protocol),
    });
    Some((sort_key(&[id]), value))
}

/// A table is long: of each backend how many places it has in the piece.
fn maglev_row(key: abi::MaglevKey, row: abi::MaglevPiece) -> Row {
    let mut places = std::collections::BTreeMap::<u32, u32>::new();
    for id in row.backends.into_iter().filter(|id| *id != 0) {
        *places.entry(id).or_default() += 1;
    }
    let value = json!({
        "service": key.service_id,
        "generation": key.generation,
        "piece": key.piece,
        "places": places,
    });
    Some((sort_key(&[key.service_id, key.generation, key.piece]), value))
}

fn affinity_row(key: abi::AffinityKey, row: abi::Affinity) -> Row {
    let words = key.client.w;
    let cookie = u64::from(words[1]) << 32 | u64::from(words[0]);
    let client = match key.kind {
        0 => json!(ip_of(key.client)),
        _ => json!(format!("namespace {cookie}")),
    };
    let value = json!({
        "service": key.service_id,
        "client": client,
        "backend": row.backend,
        "used_jiffies": row.used_jiffies,
    });
    Some(([sort_key(&[key.service_id]), key.as_bytes().to_vec()].concat(), value))
}

fn source_range_row(key: abi::SourceRangeKey, _row: u32) -> Row {
    let address = ip_of(key.addr);
    let before = if address.is_ipv4() { 32 + 96 } else { 32 };
    let id = u32::from_be(key.service_id);
    let value = json!({
        "service": id,
        "range": format!("{address}/{}", key.prefix_length.saturating_sub(before)),
    });
    Some(([sort_key(&[id]), key.as_bytes().to_vec()].concat(), value))
}

fn connection_row(key: abi::ConnectionKey, row: abi::Connection) -> Row {
    // Printed from the initiator's side.
    let is_high = u32::from(row.flags) & connection_flags::CONNECTION_INITIATOR_HIGH.0 != 0;
    let (from, to) = if is_high { (1, 0) } else { (0, 1) };
    let value = json!({
        "source": ip_of(key.addr[from]),
        "source_port": u16::from_be(key.port[from]),
        "destination": ip_of(key.addr[to]),
        "destination_port": u16::from_be(key.port[to]),
        "protocol": protocol(key.protocol),
        "kind": if key.kind == 0 { "flow" } else { "service" },
        "packets": row.packets,
        "bytes": row.bytes,
        "service": ip(row.service),
        "service_port": u16::from_be(row.service_port),
        "other_port": u16::from_be(row.other_port),
        "identities": row.identity,
        "endpoints": row.endpoint,
        "egress_epoch": row.egress_epoch,
        "ingress_epoch": row.ingress_epoch,
        "egress_rule": row.egress_rule,
        "ingress_rule": row.ingress_rule,
        "tcp_flags": row.tcp_flags,
        "last_seen_jiffies": row.last_seen_jiffies,
        "flags": names(row.flags.into(), &[
            (connection_flags::CONNECTION_INITIATOR_HIGH.0, "initiator-high"),
            (connection_flags::CONNECTION_TRANSLATED.0, "translated"),
            (connection_flags::CONNECTION_LOOPBACK.0, "loopback"),
            (connection_flags::CONNECTION_SOCKET.0, "socket"),
            (connection_flags::CONNECTION_CLOSING.0, "closing"),
            (connection_flags::CONNECTION_REPLIED.0, "replied"),
            (connection_flags::CONNECTION_ENDED.0, "ended"),
            (connection_flags::CONNECTION_RESET.0, "reset"),
            (connection_flags::CONNECTION_REVERSED.0, "reversed"),
            (connection_flags::CONNECTION_OPENING.0, "opening"),
            (connection_flags::CONNECTION_PROXY.0, "proxy"),
        ]),
    });
    Some((key.as_bytes().to_vec(), value))
}

fn nat_row(key: abi::NatKey, row: abi::Nat) -> Row {
    let value = json!({
        "direction": direction(key.direction.into()),
        "local": ip_of(key.local),
        "local_port": u16::from_be(key.local_port),
        "remote": ip_of(key.remote),
        "remote_port": u16::from_be(key.remote_port),
        "protocol": protocol(key.protocol),
        "address": ip_of(row.addr),
        "port": u16::from_be(row.port),
        "last_seen_jiffies": row.last_seen_jiffies,
    });
    Some(([&[key.direction], key.as_bytes()].concat(), value))
}

fn announced_row(key: abi::AnnouncedKey, row: abi::Announced) -> Row {
    let value = json!({
        "address": ip_of(key.addr),
        "ifindex": key.ifindex,
        "mac": MacAddress(row.mac).to_string(),
        "is_yielded": row.is_yielded != 0,
    });
    Some((key.as_bytes().to_vec(), value))
}

fn device_row(ifindex: u32, row: abi::OwnAddresses) -> Row {
    let value = json!({
        "ifindex": ifindex,
        "ipv4": abi::optional_ip_of(row.ipv4),
        "ipv6": abi::optional_ip_of(row.ipv6),
    });
    Some((ifindex.to_be_bytes().to_vec(), value))
}

fn fragment_row(slot: u32, row: abi::Fragment) -> Row {
    let value = json!({
        "source": ip_of(row.source),
        "destination": ip_of(row.destination),
        "id": row.id,
        "device": row.way / 2,
        "protocol": protocol(row.protocol),
        "source_port": u16::from_be(row.source_port),
        "destination_port": u16::from_be(row.destination_port),
    });
    (row.check != 0).then(|| (slot.to_be_bytes().to_vec(), value))
}

fn node_state_row(_: u32, row: abi::NodeState) -> Row {
    let flags = names(
        row.flags,
        &[(node_flags::NODE_PAST_STACK.0, "past stack"), (node_flags::NODE_ENCRYPT_SECOND.0, "second key")],
    );
    Some((Vec::new(), json!({ "address_epoch": row.address_epoch, "flags": flags })))
}

fn metrics(handle: &MapHandle) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    per_cpu(handle, |index, values: Vec<abi::Metric>| {
        let packets: u64 = values.iter().map(|value| value.packets).sum();
        let bytes: u64 = values.iter().map(|value| value.bytes).sum();
        if packets != 0 {
            rows.push(json!({
                "reason": index / 4,
                "direction": direction(index % 4),
                "packets": packets,
                "bytes": bytes,
            }));
        }
    })?;
    Ok(rows)
}

fn event_counts(handle: &MapHandle) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    per_cpu(handle, |_, values: Vec<abi::EventCount>| {
        let offered: u64 = values.iter().map(|value| value.offered).sum();
        let lost: u64 = values.iter().map(|value| value.lost).sum();
        let suppressed: u64 = values.iter().map(|value| value.suppressed).sum();
        rows.push(json!({ "offered": offered, "lost": lost, "suppressed": suppressed }));
    })?;
    Ok(rows)
}
