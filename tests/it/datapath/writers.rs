//! The writers against real maps: what is desired goes in, a dump comes out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;
use serde_json::{Value, json};
use weir::datapath::abi::{NodeState, PolicyPeer, PolicyPeerKey, Slot, SlotKey};
use weir::datapath::{Datapath, EgressTables, MapSizes, Options, Writers, dump};
use weir::model::*;
use weir::tables::Snapshot;

use super::{isolated, options, private, small_maps};
use crate::require::require_lab;

type Addresses = Snapshot<IpAddr, AddressEntry>;
type Prefixes = BTreeMap<IpNet, PrefixEntry>;
type Policies = BTreeMap<PolicyId, Arc<CompiledPolicy>>;
type Frontends = Snapshot<FrontendKey, Frontend>;

fn pod(identity: u32, endpoint: Option<u16>) -> AddressEntry {
    let node = endpoint.is_none().then(|| IpAddr::from([192, 0, 2, 2]));
    let endpoint = endpoint.map(EndpointId);
    AddressEntry { identity: IdentityId(identity), node, endpoint, kind: AddressKind::Pod }
}

fn addresses() -> Result<Addresses> {
    let node =
        AddressEntry { identity: IdentityId::HOST, node: None, endpoint: None, kind: AddressKind::Node };
    Ok(Addresses::from_iter([
        ("10.0.0.1".parse::<IpAddr>()?, pod(256, Some(1))),
        ("fd00::2".parse()?, pod(257, None)),
        ("192.0.2.1".parse()?, node),
    ]))
}

fn prefixes() -> Result<Prefixes> {
    let node = Some(IpAddr::from([192, 0, 2, 2]));
    let cidr = PrefixEntry { is_pod_cidr: true, node, ..PrefixEntry::default() };
    let block = PrefixEntry { identity: IdentityId::FIRST_LOCAL, ..PrefixEntry::default() };
    let guarded = PrefixEntry { is_guarded: true, ..block };
    Ok([("10.0.0.0/8".parse()?, cidr), ("0.0.0.0/0".parse()?, block), ("2001:db8::/32".parse()?, guarded)]
        .into())
}

/// Class 1 may use TCP 80 and 8080 to 8095, class 0 nothing.
fn policy(origin: &str, peers: &[u32]) -> Arc<CompiledPolicy> {
    let origins = Origins::from([PolicyRef::network_policy(&ObjectKey::new("shop", origin))]);
    let rule = |port, port_prefix_length, protocol| {
        let key = CompiledRuleKey { class: 1, protocol, port, port_prefix_length };
        (key, CompiledRule { action: Action::Allow, origins: origins.clone(), is_audit: false, l7: None })
    };
    let ingress = CompiledDirection {
        peers: peers.iter().map(|identity| (IdentityId(*identity), 1_u32)).collect(),
        rules: [rule(80, 16, Some(6)), rule(8080, 12, Some(6)), rule(0, 0, Some(17))].into_iter().collect(),
        ..CompiledDirection::default()
    };
    Arc::new(CompiledPolicy { ingress: Some(ingress), egress: None })
}

fn endpoints(policy: PolicyId) -> BTreeMap<EndpointId, EndpointEntry> {
    let endpoint = Endpoint {
        id: EndpointId(1),
        container_id: "c1".to_owned(),
        interface: "eth0".to_owned(),
        netns: "/run/netns/c1".into(),
        pod: ObjectKey::new("shop", "frontend"),
        pod_uid: None,
        ipv4: Some([10, 0, 0, 1].into()),
        ipv6: None,
        host_interface: "weir1".to_owned(),
        host_ifindex: 11,
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        port_mappings: Vec::new(),
    };
    let entry = EndpointEntry {
        endpoint: Arc::new(endpoint),
        identity: IdentityId(256),
        policy,
        enforces_ingress: true,
        enforces_egress: false,
        refuses_strangers: false,
        rejects: false,
        has_gateway: false,
        shaping: Default::default(),
    };
    [(EndpointId(1), entry)].into()
}

fn frontends(backends: &[&str]) -> Result<Frontends> {
    let service = Arc::new(ObjectKey::new("shop", "frontend"));
    let address = "10.96.0.1".parse()?;
    let backends = backends.iter().map(|backend| backend.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
    let backends = backends.into_iter().map(Backend::at).collect();
    let tcp = FrontendKey::new(address, 80, Protocol::Tcp, Scope::Internal);
    let refusing = Frontend::refusing(service, FrontendKind::ClusterIp);
    Ok(Frontends::from_iter([
        (tcp, Frontend { backends, ..refusing.clone() }),
        (FrontendKey::rest_of(address), refusing),
    ]))
}

fn write_all(writers: &mut Writers, policy_id: PolicyId) -> Result<()> {
    let policies: Policies = [(policy_id, policy("web", &[257]))].into();
    let (addresses, prefixes, endpoints) = (addresses()?, prefixes()?, endpoints(policy_id));
    let frontends = frontends(&["10.0.0.1:8080", "[fd00::2]:8080"])?;
    assert!(writers.policies.write(&policies, &NOTHING_IN_FORCE).is_empty());
    writers.addresses.write(&addresses, &prefixes)?;
    writers.endpoints.write(&endpoints)?;
    writers.services.write(&frontends)?;
    writers.services.prune(&frontends)?;
    writers.endpoints.prune(&endpoints)?;
    writers.addresses.prune(&addresses, &prefixes)?;
    Ok(writers.policies.prune(&policies, &NOTHING_IN_FORCE)?)
}

const NOTHING_IN_FORCE: BTreeSet<PolicyId> = BTreeSet::new();

const WRITTEN: [&str; 8] =
    ["addresses", "prefixes", "endpoints", "policy_peers", "policy_rules", "services", "slots", "backends"];

fn dumps(pins: &Path, maps: &[&str]) -> Result<Vec<Vec<Value>>> {
    maps.iter().map(|map| dump(pins, map)).collect()
}

fn expected(policy: u32, first_rule: u32) -> Vec<Value> {
    // A row that matches any port is told from those that match some: it has a number of its own.
    let rule = |port: Value, protocol: &str| {
        let number = first_rule + u32::from(port == json!("any"));
        json!({ "policy": policy, "direction": "ingress", "class": 1, "protocol": protocol, "port": port,
                "verdict": "allow", "rule": number, "l7_set": 0 })
    };
    vec![
        json!([
            { "address": "10.0.0.1", "identity": 256, "node": null, "endpoint": 1, "flags": ["pod", "local"] },
            { "address": "192.0.2.1", "identity": 1, "node": null, "endpoint": 0, "flags": ["node", "local"] },
            { "address": "fd00::2", "identity": 257, "node": "192.0.2.2", "endpoint": 0, "flags": ["pod"] },
        ]),
        json!([
            { "prefix": "0.0.0.0/0", "identity": 16777216, "node": null, "flags": [] },
            { "prefix": "10.0.0.0/8", "identity": 0, "node": "192.0.2.2", "flags": ["pod-cidr"] },
            { "prefix": "2001:db8::/32", "identity": 16777216, "node": null, "flags": ["guarded"] },
        ]),
        json!([{ "id": 1, "epoch": 1, "policy": policy, "enforces": ["ingress"], "ipv4": "10.0.0.1", "ipv6": null,
                 "ifindex": 11, "identity": 256, "mac": "02:00:00:00:00:01", "priority": 0, "flags": ["ready"] }]),
        json!([{ "policy": policy, "direction": "ingress", "identity": 257, "class": 1 }]),
        json!([rule(json!(80), "TCP"), rule(json!("8080-8095"), "TCP"), rule(json!("any"), "UDP")]),
        json!([
            { "address": "10.96.0.1", "port": 0, "protocol": 0, "scope": "internal", "service": 1, "generation": 1,
              "backends": 0, "draining": 0, "affinity_seconds": 0, "kind": "ClusterIP", "algorithm": "random",
              "flags": ["wildcard"] },
            { "address": "10.96.0.1", "port": 80, "protocol": "TCP", "scope": "internal", "service": 2, "generation": 1,
              "backends": 2, "draining": 0, "affinity_seconds": 0, "kind": "ClusterIP", "algorithm": "random",
              "flags": [] },
        ]),
        json!([
            { "service": 2, "generation": 1, "slot": 0, "backend": 1 },
            { "service": 2, "generation": 1, "slot": 1, "backend": 2 },
        ]),
        json!([
            { "id": 1, "address": "10.0.0.1", "port": 8080, "protocol": "TCP" },
            { "id": 2, "address": "fd00::2", "port": 8080, "protocol": "TCP" },
        ]),
    ]
}

#[test]
fn maps_hold_what_is_desired_and_a_restart_changes_only_policy_ids() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        let mut writers = datapath.writers()?;
        assert_eq!(writers.policies.next_free_id(), PolicyId(1));
        assert_eq!(writers.next_free_local_identity(), IdentityId::FIRST_LOCAL);
        write_all(&mut writers, PolicyId(1))?;
        assert_eq!(
            Value::from(dumps(pins, &WRITTEN)?.into_iter().map(Value::from).collect::<Vec<_>>()),
            json!(expected(1, 1))
        );
        let fill: BTreeMap<_, _> =
            datapath.map_fill()?.into_iter().map(|fill| (fill.map, fill.used)).collect();
        assert_eq!(WRITTEN.map(|map| fill[map]), [3, 3, 1, 1, 3, 2, 2, 2]);
        let epoch = dump(pins, "node_state")?;
        drop((writers, datapath));

        let datapath = Datapath::load(&options(pins))?;
        let mut writers = datapath.writers()?;
        assert_eq!(writers.policies.next_free_id(), PolicyId(2));
        assert_eq!(writers.next_free_local_identity(), IdentityId(IdentityId::FIRST_LOCAL.0 + 1));
        // The same policy id stands for an unchanged desired state: nothing is written.
        write_all(&mut writers, PolicyId(1))?;
        assert_eq!(dump(pins, "node_state")?, epoch);
        assert_eq!(dump(pins, "endpoints")?[0]["epoch"], 1);
        // What an agent does: the same policy under a new id, old rows pruned.
        write_all(&mut writers, PolicyId(2))?;
        let mut after = expected(2, 3);
        after[2][0]["epoch"] = json!(2);
        assert_eq!(json!(dumps(pins, &WRITTEN)?), json!(after));
        for number in [1, 2] {
            assert_eq!(writers.policies.rule_origin(number), None, "a rule of the former process");
        }
        let web = PolicyRef::network_policy(&ObjectKey::new("shop", "web"));
        assert_eq!(writers.policies.rule_origin(3).as_deref(), Some(&[web][..]));

        let nothing = BTreeMap::new();
        writers.services.prune(&Frontends::new())?;
        writers.endpoints.prune(&BTreeMap::new())?;
        writers.addresses.prune(&Addresses::new(), &Prefixes::new())?;
        writers.policies.prune(&nothing, &NOTHING_IN_FORCE)?;
        assert_eq!(dumps(pins, &WRITTEN)?, vec![Vec::<Value>::new(); WRITTEN.len()]);
        let fill: BTreeMap<_, _> =
            datapath.map_fill()?.into_iter().map(|fill| (fill.map, fill.used)).collect();
        assert_eq!(WRITTEN.map(|map| fill[map]), [0; WRITTEN.len()]);
        Ok(())
    })
}

#[test]
fn many_rows_are_written_and_deleted_at_once_and_one_by_one_where_they_cannot() -> Result<()> {
    require_lab!();
    for has_batches in [true, false] {
        let datapath = private(small_maps().with("policy_peers", 10_000))?;
        let map = datapath.typed::<PolicyPeerKey, PolicyPeer>("policy_peers")?;
        let map = if has_batches { map } else { map.without_batches() };
        let key = |identity| PolicyPeerKey { policy_id: 1, identity, direction: 0 };
        let rows = |identities: std::ops::Range<u32>, class| -> (Vec<_>, Vec<_>) {
            identities.map(|identity| (key(identity), PolicyPeer { class })).unzip()
        };
        let insert = |(keys, values): (Vec<_>, Vec<_>)| map.insert_all(&keys, &values);
        assert!(matches!(insert(rows(0..9_000, 1)), (9_000, Ok(()))));
        assert!(matches!(insert(rows(4_000..9_000, 2)), (5_000, Ok(()))), "rows that are there");
        let (written, result) = insert(rows(8_000..12_000, 3));
        assert_eq!(written, 2_000, "{result:?}");
        assert_eq!(
            result.map_err(|error| error.to_string()),
            Err("map policy_peers is full (10000 rows): raise it with --map-size policy_peers=20000".into())
        );
        let mut classes = BTreeMap::<u32, u32>::new();
        map.for_each(|_, peer| *classes.entry(peer.class).or_default() += 1)?;
        assert_eq!(classes, [(1, 4_000), (2, 4_000), (3, 2_000)].into());
        // Each second one is there, and those at the end are not.
        let (gone, _) = rows(0..10_000, 0);
        let (some, _): (Vec<_>, Vec<_>) = gone.into_iter().partition(|key| key.identity % 2 == 0);
        assert!(matches!(map.remove_all(&some), (5_000, Ok(()))));
        assert!(matches!(map.remove_all(&rows(0..12_000, 0).0), (5_000, Ok(()))), "half of them are gone");
        assert!(map.rows()?.is_empty());
    }
    Ok(())
}

#[test]
fn the_address_epoch_rises_when_an_identity_may_have_changed() -> Result<()> {
    require_lab!();
    let datapath = private(small_maps())?;
    let mut writer = datapath.writers()?.addresses;
    let state = datapath.typed::<u32, NodeState>("node_state")?;
    let mut epoch = state.get(&0)?.context("the row of node_state")?.address_epoch;
    assert!(epoch > 1_700_000_000, "a new map does not begin where an old connection may have been judged");
    let mut risen = || -> Result<bool> {
        let before =
            std::mem::replace(&mut epoch, state.get(&0)?.context("the row of node_state")?.address_epoch);
        Ok(before != epoch)
    };
    let (mut addresses, mut prefixes) = (addresses()?, prefixes()?);
    writer.write(&addresses, &prefixes)?;
    assert!(risen()?, "new addresses");
    writer.write(&addresses, &prefixes)?;
    assert!(!risen()?, "nothing new");
    addresses
        .insert("fd00::2".parse()?, AddressEntry { node: Some([192, 0, 2, 3].into()), ..pod(257, None) });
    writer.write(&addresses, &prefixes)?;
    assert!(!risen()?, "another node, the same identity");
    addresses.insert("fd00::2".parse()?, pod(258, None));
    writer.write(&addresses, &prefixes)?;
    assert!(risen()?, "another identity");
    prefixes.remove(&"10.0.0.0/8".parse()?);
    writer.write(&addresses, &prefixes)?;
    assert!(!risen()?, "writing removes nothing");
    writer.prune(&addresses, &prefixes)?;
    assert!(risen()?, "a prefix removed");
    addresses.remove(&"10.0.0.1".parse::<IpAddr>()?);
    writer.prune(&addresses, &prefixes)?;
    assert!(risen()?, "an address removed");
    writer.prune(&addresses, &prefixes)?;
    assert!(!risen()?, "nothing to remove");
    Ok(())
}

#[test]
fn a_policy_that_does_not_fit_leaves_nothing_behind() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let map_sizes = small_maps().with("policy_rules", 5).with("policy_peers", 4);
        let datapath = Datapath::load(&Options { map_sizes, ..options(pins) })?;
        let mut writer = datapath.writers()?.policies;
        let mut policies: Policies = [(PolicyId(1), policy("a", &[300, 301]))].into();
        assert!(writer.write(&policies, &NOTHING_IN_FORCE).is_empty());
        let held = dumps(pins, &["policy_peers", "policy_rules"])?;
        policies.insert(PolicyId(2), policy("b", &[300, 301]));
        let refused = writer.write(&policies, &NOTHING_IN_FORCE);
        let error = refused.get(&PolicyId(2)).context("the sixth rule of five")?;
        assert_eq!(
            error.to_string(),
            "map policy_rules is full (5 rows): raise it with --map-size policy_rules=10"
        );
        assert_eq!(dumps(pins, &["policy_peers", "policy_rules"])?, held);
        // Peers are written last; three new ones do not fit.
        let grown: Policies = [(PolicyId(1), policy("a", &[300, 301, 302, 303, 304]))].into();
        assert_eq!(writer.write(&grown, &NOTHING_IN_FORCE).len(), 1);
        assert_eq!(dumps(pins, &["policy_peers", "policy_rules"])?, held);
        assert!(writer.write(&grown_less(&grown), &NOTHING_IN_FORCE).is_empty());
        Ok(())
    })
}

/// The same policy with two peers fewer.
fn grown_less(grown: &Policies) -> Policies {
    grown.keys().map(|id| (*id, policy("a", &[300, 301, 302]))).collect()
}

#[test]
fn a1_a_full_map_is_emptied_of_what_no_endpoint_has_and_then_written() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let map_sizes = small_maps().with("policy_rules", 7);
        let datapath = Datapath::load(&Options { map_sizes, ..options(pins) })?;
        let mut writer = datapath.writers()?.policies;
        let one: Policies = [(PolicyId(1), policy("a", &[300])), (PolicyId(2), policy("b", &[301]))].into();
        assert!(writer.write(&one, &NOTHING_IN_FORCE).is_empty());
        let in_force = BTreeSet::from([PolicyId(2)]);
        let next: Policies = [(PolicyId(3), policy("c", &[300]))].into();
        assert!(writer.write(&next, &in_force).is_empty(), "the rows of policy 1 make room");
        let ids = |rows: Vec<Value>| rows.into_iter().map(|row| row["policy"].clone()).collect::<Vec<_>>();
        assert_eq!(ids(dump(pins, "policy_peers")?), [2, 3]);
        // A new process finds the map full of rows of the old one. It keeps what is in force.
        drop((writer, datapath));
        let map_sizes = small_maps().with("policy_rules", 7);
        let datapath = Datapath::load(&Options { map_sizes, ..options(pins) })?;
        let mut writer = datapath.writers()?.policies;
        let id = writer.next_free_id();
        assert_eq!(id, PolicyId(4));
        let after: Policies = [(id, policy("c", &[300]))].into();
        assert!(writer.write(&after, &in_force).is_empty());
        assert_eq!(ids(dump(pins, "policy_peers")?), [2, 4]);
        writer.prune(&after, &NOTHING_IN_FORCE)?;
        assert_eq!(ids(dump(pins, "policy_peers")?), [4]);
        Ok(())
    })
}

#[test]
fn a17_numbers_that_were_used_up_are_free_again_at_the_next_start() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        let mut writer = datapath.writers()?.policies;
        let last: Policies = [(PolicyId(PolicyId::CLOSED.0 - 1), policy("a", &[300]))].into();
        assert!(writer.write(&last, &NOTHING_IN_FORCE).is_empty());
        drop(writer);
        assert_eq!(datapath.writers()?.policies.next_free_id(), PolicyId(1));
        Ok(())
    })
}

#[test]
fn a_class_is_added_and_removed_within_one_policy_id() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        let mut writer = datapath.writers()?.policies;
        let peers = || -> Result<Vec<Value>> {
            Ok(dump(pins, "policy_peers")?.into_iter().map(|row| row["identity"].clone()).collect())
        };
        let write = |writer: &mut weir::datapath::PolicyWriter, identities: &[u32]| -> Result<Policies> {
            let policies: Policies = [(PolicyId(7), policy("a", identities))].into();
            assert!(writer.write(&policies, &NOTHING_IN_FORCE).is_empty());
            Ok(policies)
        };
        write(&mut writer, &[300])?;
        write(&mut writer, &[300, 301])?;
        assert_eq!(peers()?, [300, 301]);
        let policies = write(&mut writer, &[301])?;
        assert_eq!(peers()?, [300, 301], "writing removes nothing");
        writer.prune(&policies, &NOTHING_IN_FORCE)?;
        assert_eq!(peers()?, [301]);
        // Removed and desired again before a prune: the row must stay.
        write(&mut writer, &[])?;
        let policies = write(&mut writer, &[301])?;
        writer.prune(&policies, &NOTHING_IN_FORCE)?;
        assert_eq!(peers()?, [301]);
        Ok(())
    })
}

#[test]
fn a_changed_set_of_backends_is_a_new_generation() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        let mut writer = datapath.writers()?.services;
        let slots = || -> Result<Vec<(u64, String)>> {
            let (rows, backends) = (dump(pins, "slots")?, dump(pins, "backends")?);
            let address = |id: &Value| backends.iter().find(|row| row["id"] == *id)?["address"].as_str();
            let slot =
                |row: &Value| Some((row["generation"].as_u64()?, address(&row["backend"])?.to_owned()));
            rows.iter().map(|row| slot(row).context("a row of backends")).collect()
        };
        assert_eq!(writer.write(&frontends(&["10.0.0.1:8080", "10.0.0.2:8080"])?)?, []);
        assert_eq!(slots()?, [(1, "10.0.0.1".to_owned()), (1, "10.0.0.2".to_owned())]);
        let removed = writer.write(&frontends(&["10.0.0.2:8080", "10.0.0.3:8080"])?)?;
        assert_eq!(removed, ["10.0.0.1:8080".parse()?]);
        assert_eq!(slots()?, [(2, "10.0.0.2".to_owned()), (2, "10.0.0.3".to_owned())]);
        assert_eq!(writer.write(&frontends(&["10.0.0.2:8080", "10.0.0.3:8080"])?)?, []);
        assert_eq!(slots()?.len(), 2, "an unchanged set is not written again");
        drop(writer);
        // Rows of a generation that never came into force.
        let rows = datapath.typed::<SlotKey, Slot>("slots")?;
        let stray = SlotKey { service_id: 2, generation: 3, slot: 0 };
        rows.insert(&stray, &Default::default())?;
        let mut writer = datapath.writers()?.services;
        writer.write(&frontends(&["10.0.0.2:8080", "10.0.0.3:8080"])?)?;
        assert_eq!(slots()?, [(2, "10.0.0.2".to_owned()), (2, "10.0.0.3".to_owned())]);
        assert_eq!(writer.prune(&Frontends::new())?, ["10.0.0.2:8080".parse()?, "10.0.0.3:8080".parse()?]);
        assert_eq!((slots()?, dump(pins, "services")?), (vec![], vec![]));
        assert_eq!(dump(pins, "backends")?, Vec::<Value>::new());
        Ok(())
    })
}

/// A port for the network, by Maglev and for these clients.
fn outside(backends: &[&str], draining: &[&str], ranges: &[&str]) -> Result<Frontends> {
    let inside = frontends(backends)?;
    let inside = inside.values().next_back().cloned().context("the port")?;
    let key = FrontendKey::new("192.0.2.1".parse()?, 80, Protocol::Tcp, Scope::External);
    let draining = draining.iter().map(|backend| backend.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
    let ranges = ranges.iter().map(|range| range.parse()).collect::<Result<Vec<IpNet>, _>>()?;
    let frontend = Frontend {
        algorithm: Algorithm::Maglev,
        draining: draining.into(),
        source_ranges: ranges.into(),
        ..inside
    };
    Ok(Frontends::from_iter([(key, frontend)]))
}

#[test]
fn what_drains_is_not_removed_and_tables_and_ranges_go_with_their_frontend() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        let mut writer = datapath.writers()?.services;
        let ranges = |expected: &[&str]| -> Result<()> {
            let rows = dump(pins, "source_ranges")?;
            assert_eq!(
                rows.iter().map(|row| row["range"].as_str()).collect::<Vec<_>>(),
                expected.iter().copied().map(Some).collect::<Vec<_>>()
            );
            Ok(())
        };
        let both = ["10.0.0.1:80", "10.0.0.2:80"];
        assert_eq!(writer.write(&outside(&both, &[], &["198.51.100.0/24"])?)?, []);
        ranges(&["198.51.100.0/24"])?;
        let pieces = dump(pins, "maglev")?;
        assert_eq!(pieces.len(), 17);
        for id in ["1", "2"] {
            let places: u64 = pieces.iter().filter_map(|piece| piece["places"][id].as_u64()).sum();
            assert!((8190..=8191).contains(&places), "{id} has {places} places");
        }
        let one_drains = outside(&both[1..], &both[..1], &["2001:db8::/32"])?;
        assert_eq!(writer.write(&one_drains)?, [], "a backend that drains is there");
        ranges(&["2001:db8::/32"])?;
        let row = &dump(pins, "services")?[0];
        assert_eq!(
            (&row["backends"], &row["draining"], &row["kind"]),
            (&json!(1), &json!(1), &json!("ClusterIP"))
        );
        assert_eq!(dump(pins, "maglev")?[0]["places"], json!({ "2": 984 }));
        // A new process knows it all.
        drop(writer);
        let mut writer = datapath.writers()?.services;
        assert_eq!(writer.write(&one_drains)?, []);
        assert_eq!(dump(pins, "services")?[0]["generation"], 2);
        assert_eq!(writer.write(&outside(&both[1..], &[], &[])?)?, ["10.0.0.1:80".parse()?]);
        ranges(&[])?;
        assert_eq!(dump(pins, "backends")?.len(), 1);
        assert_eq!(writer.prune(&Frontends::new())?, ["10.0.0.2:80".parse()?]);
        for map in ["services", "slots", "backends", "maglev", "source_ranges"] {
            assert_eq!(dump(pins, map)?, Vec::<Value>::new(), "{map}");
        }
        Ok(())
    })
}

#[test]
fn a_set_of_backends_that_does_not_fit_leaves_the_old_one_in_force() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let map_sizes = small_maps().with("slots", 4);
        let datapath = Datapath::load(&Options { map_sizes, ..options(pins) })?;
        let mut writer = datapath.writers()?.services;
        writer.write(&frontends(&["10.0.0.1:80", "10.0.0.2:80"])?)?;
        let before = dumps(pins, &["services", "slots", "backends"])?;
        let many: Vec<String> = (1..=5).map(|host| format!("10.0.1.{host}:80")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        writer.write(&frontends(&many)?)?;
        let (key, cause) = writer.refused().next().context("seven backends in a map of four")?;
        assert_eq!(key.port, 80);
        assert!(cause.starts_with("map slots is full (4 rows)"), "{cause}");
        assert_eq!(dumps(pins, &["services", "slots", "backends"])?, before);
        // It recovers as soon as it fits.
        writer.write(&frontends(&["10.0.0.3:80"])?)?;
        assert_eq!(writer.refused().count(), 0);
        assert_eq!(dump(pins, "backends")?[0]["address"], "10.0.0.3");
        Ok(())
    })
}

#[test]
fn unknown_sizes_and_maps_are_refused() -> Result<()> {
    require_lab!();
    let error = private(MapSizes::default().with("conections", 1)).err().context("a misspelt map")?;
    assert_eq!(error.to_string(), "there is no map conections to set the size of");
    isolated(|pins| {
        let error = dump(pins, "conections").err().context("a misspelt map")?;
        assert!(
            error.to_string().starts_with("there is no map conections; there are addresses, "),
            "{error:#}"
        );
        let error = dump(pins, "connections").err().context("a node without Weir")?;
        assert!(error.to_string().ends_with("has an agent run on this node?"), "{error:#}");
        Ok(())
    })
}

/// What a set of egress rules leads to, for IPv4.
fn table(destinations: &[&str], gateway: u8) -> Result<Arc<EgressTable>> {
    let away = EgressRoute::Away(IpAddr::from([192, 0, 2, gateway]));
    let mut table = EgressTable::from([("0.0.0.0/0".parse()?, EgressRoute::Ordinary)]);
    for destination in destinations {
        table.insert(destination.parse()?, away);
    }
    Ok(Arc::new(table))
}

fn pods(count: u16) -> impl Iterator<Item = IpAddr> {
    (0..count).map(|number| {
        let [high, low] = number.to_be_bytes();
        IpAddr::from([10, 1, high, low])
    })
}

fn rows_of(pins: &Path) -> Result<(usize, usize)> {
    Ok((dump(pins, "egress_pods")?.len(), dump(pins, "egress_rules")?.len()))
}

#[test]
fn pods_with_the_same_egress_rules_share_them_also_after_a_restart() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let (first, second) =
            (table(&["203.0.113.0/24", "198.51.100.0/24"], 2)?, table(&["203.0.113.0/24"], 3)?);
        let mut desired: EgressTables = pods(300).map(|pod| (pod, first.clone())).collect();
        desired.extend(pods(100).map(|pod| (pod, second.clone())));
        let mut writers = Datapath::load(&options(pins))?.writers()?;
        assert!(writers.egress.write(&desired)?.is_empty());
        assert_eq!(rows_of(pins)?, (300, 5));
        let before = dump(pins, "egress_pods")?;

        let again: EgressTables = desired.iter().map(|(pod, it)| (*pod, Arc::new((**it).clone()))).collect();
        let mut writers = Datapath::load(&options(pins))?.writers()?;
        assert!(writers.egress.write(&again)?.is_empty());
        writers.egress.prune(&again)?;
        assert_eq!(dump(pins, "egress_pods")?, before, "equal sets have one number");

        // All leave by another gateway: by a set of its own, and the old ones go.
        let third = table(&["203.0.113.0/24"], 4)?;
        let moved: EgressTables = pods(300).map(|pod| (pod, third.clone())).collect();
        assert!(writers.egress.write(&moved)?.is_empty());
        assert_eq!(rows_of(pins)?, (300, 7));
        writers.egress.prune(&moved)?;
        assert_eq!(rows_of(pins)?, (300, 2));
        Ok(())
    })
}

#[test]
fn pods_whose_egress_rules_do_not_fit_have_none_and_all_others_keep_theirs() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let map_sizes = small_maps().with("egress_rules", 4).with("egress_pods", 3);
        let mut writers = Datapath::load(&Options { map_sizes, ..options(pins) })?.writers()?;
        let (small, large) = (
            table(&["203.0.113.0/24"], 2)?,
            table(&["203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24"], 2)?,
        );
        let [a, b, c, d] = [1, 2, 3, 4].map(|number| IpAddr::from([10, 1, 0, number]));
        let mut desired: EgressTables = [(a, small.clone()), (b, small.clone())].into();
        assert!(writers.egress.write(&desired)?.is_empty());
        // What a pod had is no excuse: its rules of now are others.
        desired.insert(b, large.clone());
        let unfit = writers.egress.write(&desired)?;
        assert_eq!(unfit.keys().copied().collect::<Vec<_>>(), [b]);
        assert_eq!(rows_of(pins)?, (1, 2), "the other pod keeps its rules, and nothing is left of the rest");
        // The first rules are nobody's any more: their rows are room.
        let desired: EgressTables = [(b, large)].into();
        assert!(writers.egress.write(&desired)?.is_empty());
        assert_eq!(rows_of(pins)?, (1, 4));
        let desired: EgressTables = [a, b, c, d].map(|pod| (pod, small.clone())).into();
        assert_eq!(writers.egress.write(&desired)?.len(), 1, "there is no row for the fourth pod");
        Ok(())
    })
}
