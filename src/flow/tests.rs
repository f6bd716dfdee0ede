//! From a record of the kernel to what people read, as whole values.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use super::*;
use crate::datapath::abi::addr_of;
use crate::datapath::types::{direction, event_flags, event_type};
use crate::model::l7;
use crate::model::{
    Endpoint, EndpointId, IdentityId, IdentityLabels, LocalIdentity, MacAddress, MatchType, NodeEndpoints,
    ObjectKey, Origins, PolicyRef, PublishedEndpoint, Service,
};

/// A cluster of three pods, one Service and one policy, whose tables a test may change.
struct Cluster {
    tables: Mutex<NameTables>,
}

impl NameSource for Cluster {
    fn tables(&self) -> NameTables {
        self.tables.lock().expect("no test panics with it").clone()
    }

    fn identity(&self, id: IdentityId) -> Option<Arc<IdentityLabels>> {
        let app = match id.0 {
            256 => "frontend",
            300 => "backend",
            _ => return None,
        };
        Some(Arc::new(IdentityLabels {
            namespace: "shop".into(),
            service_account: "default".into(),
            pod_labels: [("app".to_owned(), app.to_owned())].into(),
            ..IdentityLabels::default()
        }))
    }

    fn local_identity(&self, id: IdentityId) -> Option<LocalIdentity> {
        let base = match id.0 {
            0x100_0000 => None,
            0x100_0001 => Some(IdentityId(300)),
            _ => return None,
        };
        Some(LocalIdentity {
            base,
            prefixes: ["10.1.0.0/16".parse().expect("a prefix")].into(),
            names: Arc::default(),
        })
    }

    fn rule_origin(&self, rule_id: u32) -> Option<Origins> {
        let origin = PolicyRef::network_policy(&ObjectKey::new("shop", "backend-ingress"));
        [7, 8].contains(&rule_id).then(|| Arc::from([origin]))
    }

    fn is_audit(&self, rule_id: u32) -> bool {
        rule_id == 8
    }

    fn match_type(&self, rule_id: u32) -> MatchType {
        if [7, 8].contains(&rule_id) { MatchType::PeerAndPort } else { MatchType::None }
    }

    fn rule_set_origin(&self, id: l7::RuleSetId) -> Option<Origins> {
        let origin = PolicyRef::network_policy(&ObjectKey::new("shop", "backend-l7"));
        (id.0 == 5).then(|| Arc::from([origin]))
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn endpoint(id: u16, name: &str, ipv4: &str) -> (EndpointId, Arc<Endpoint>) {
    let endpoint = Endpoint {
        id: EndpointId(id),
        container_id: name.to_owned(),
        interface: "eth0".to_owned(),
        netns: "/run/netns/x".into(),
        pod: ObjectKey::new("shop", name),
        pod_uid: None,
        ipv4: Some(ipv4.parse().expect("an address")),
        ipv6: None,
        host_interface: "weir0".to_owned(),
        host_ifindex: 9,
        mac: MacAddress::default(),
        port_mappings: Vec::new(),
    };
    (EndpointId(id), Arc::new(endpoint))
}

fn node(name: &str, pods: &[(&str, &str, u32)]) -> (Arc<str>, Arc<NodeEndpoints>) {
    let endpoints = pods.iter().map(|(pod, address, identity)| PublishedEndpoint {
        pod: ObjectKey::new("shop", *pod),
        addresses: vec![ip(address)],
        identity: IdentityId(*identity),
        workload: crate::model::Workload::parse("Deployment/backend").filter(|_| pod.starts_with("backend")),
        host_ports: Vec::new(),
    });
    let node =
        NodeEndpoints { node: name.into(), internal_addresses: vec![], endpoints: endpoints.collect() };
    (name.into(), Arc::new(node))
}

fn cluster() -> Arc<Cluster> {
    let service =
        Service { addresses: vec![ip("10.96.0.10")], ..Service::new(ObjectKey::new("shop", "backend")) };
    let tables = NameTables {
        endpoints: [endpoint(3, "frontend-1", "10.0.0.3")].into_iter().collect(),
        node_endpoints: [
            node("a", &[("frontend-1", "10.0.0.3", 256)]),
            node("b", &[("backend-1", "10.1.0.8", 300), ("backend-6", "fd00::8", 300)]),
        ]
        .into_iter()
        .collect(),
        services: [(service.key.clone(), Arc::new(service))].into_iter().collect(),
    };
    Arc::new(Cluster { tables: Mutex::new(tables) })
}

/// Names that have been refreshed at time 0, before any event.
pub(crate) fn names() -> Names {
    let names = Names::new("a", cluster());
    names.refresh_at(0);
    names
}

pub(crate) fn clock() -> Clock {
    Clock::starting_at("2026-11-22T19:20:13Z".parse().expect("a timestamp"))
}

/// frontend-1 reaches backend-1 through the Service.
pub(crate) fn forwarded() -> Event {
    Event {
        timestamp_ns: 123_456_789,
        packets: [3, 2],
        bytes: [300, 2000],
        source: addr_of(ip("10.0.0.3")),
        destination: addr_of(ip("10.1.0.8")),
        service: addr_of(ip("10.96.0.10")),
        source_identity: 256,
        destination_identity: 300,
        rule_id: 7,
        ifindex: 9,
        source_port: 43210_u16.to_be(),
        destination_port: 8080_u16.to_be(),
        service_port: 80_u16.to_be(),
        source_endpoint: 3,
        protocol: 6,
        r#type: event_type::EVENT_FLOW_NEW.0 as u8,
        direction: direction::DIRECTION_EGRESS.0 as u8,
        tcp_flags: 0x12,
        flags: event_flags::EVENT_SERVICE.0 as u8,
        ..Event::default()
    }
}

/// Somebody of the outside is denied at the backend.
pub(crate) fn dropped() -> Event {
    Event {
        source: addr_of(ip("192.0.2.1")),
        source_identity: 2,
        source_endpoint: 0,
        rule_id: 0,
        reason: 133,
        r#type: event_type::EVENT_DROP.0 as u8,
        direction: direction::DIRECTION_INGRESS.0 as u8,
        tcp_flags: 0x02,
        flags: 0,
        ..forwarded()
    }
}

/// Which policies a record names: the one that decided, at the source, at the destination.
#[test]
fn policies_of_either_end_are_named() {
    let of = |event: Event| {
        let flow = names().flow(&event, &clock());
        [flow.policies, flow.egress_allowed_by, flow.ingress_allowed_by].map(|policies| !policies.is_empty())
    };
    let (ingress, egress) = (direction::DIRECTION_INGRESS.0 as u8, direction::DIRECTION_EGRESS.0 as u8);
    let event =
        |end: u8, rule_id, ingress_rule_id| Event { direction: end, rule_id, ingress_rule_id, ..forwarded() };
    assert_eq!(of(event(egress, 7, 0)), [true, true, false], "the source's policy alone");
    assert_eq!(of(event(egress, 0, 7)), [true, false, true], "the destination's, both on this node");
    assert_eq!(of(event(egress, 7, 7)), [true, true, true]);
    assert_eq!(of(event(ingress, 7, 7)), [true, false, true], "from another node");
    assert_eq!(of(event(egress, 0, 0)), [false, false, false]);
    assert_eq!(of(Event { reason: 181, ..event(ingress, 7, 0) }), [true, false, false], "a deny rule");
}

#[test]
fn local_identities_have_their_prefixes_and_their_pods_labels() {
    let names = names();
    let labels = |id| names.labels_of(IdentityId(id)).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(labels(0x100_0000), ["cidr:10.1.0.0/16", "reserved:world"]);
    assert_eq!(labels(0x100_0001)[..2], ["cidr:10.1.0.0/16", "k8s:app=backend"]);
    assert_eq!(labels(2), ["reserved:world"]);
    assert!(labels(999).is_empty());
}

/// 10.1.0.8 goes from backend-1 to backend-2 at 1000 s: records of before keep the old name.
#[test]
fn an_address_is_named_after_who_had_it_then() {
    const SECOND: u64 = 1_000_000_000;
    let cluster = cluster();
    let names = Names::new("a", cluster.clone());
    names.refresh_at(100 * SECOND);
    let pod_at = |time: u64| {
        let event = Event { timestamp_ns: time * SECOND, ..forwarded() };
        names.flow(&event, &clock()).destination.pod_name.to_string()
    };
    assert_eq!(pod_at(50), "backend-1", "packets may come before the row");
    let publish = |rows| {
        let (name, node) = node("b", rows);
        cluster.tables.lock().expect("the test's own").node_endpoints.insert(name, node);
    };
    publish(&[]);
    names.refresh_at(900 * SECOND);
    assert_eq!(pod_at(910), "backend-1", "its last packets come after the row is gone");
    assert_eq!(pod_at(990), "", "nobody has it");
    publish(&[("backend-2", "10.1.0.8", 300)]);
    names.refresh_at(1000 * SECOND);
    assert_eq!([pod_at(800), pod_at(910), pod_at(1001)], ["backend-1", "backend-2", "backend-2"]);
    names.refresh_at(5000 * SECOND);
    assert_eq!(pod_at(800), "backend-2", "forgotten after an hour");
}

/// A recorder with events whose source ports count from 0.
pub(crate) fn recorded(capacity: usize, ports: std::ops::Range<u16>) -> Arc<Recorder> {
    let recorder = Arc::new(Recorder::new(capacity));
    record(&recorder, ports);
    recorder
}

pub(crate) fn record(recorder: &Recorder, ports: std::ops::Range<u16>) {
    let event = |port: u16| Event { source_port: port.to_be(), ..forwarded() };
    recorder.append(&ports.map(event).collect::<Vec<_>>());
}

/// The frontend asks the backend for a path.
pub(crate) fn request(path: &str) -> l7::Record {
    l7::Record {
        time: "2026-11-22T19:20:13.5Z".parse().expect("a timestamp"),
        protocol: crate::model::Protocol::Tcp,
        client: "10.0.0.3:43210".parse().expect("an address"),
        server: "10.1.0.8:8080".parse().expect("an address"),
        source: IdentityId(256),
        destination: IdentityId(300),
        source_endpoint: Some(EndpointId(3)),
        destination_endpoint: None,
        egress: None,
        ingress: Some(l7::RuleSetId(5)),
        denied_by: None,
        kind: l7::RecordKind::Request,
        verdict: l7::L7Verdict::Forwarded,
        note: String::new(),
        latency_us: None,
        message: l7::L7Message::Http(l7::HttpMessage {
            version: "HTTP/1.1".to_owned(),
            method: "GET".to_owned(),
            path: path.to_owned(),
            host: "backend".to_owned(),
            trace_parent: Some(format!("00-{}-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736")),
            ..l7::HttpMessage::default()
        }),
    }
}
