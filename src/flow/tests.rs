//! From a record of the kernel to what people read, as whole values.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;
use crate::datapath::abi::addr_of;
use crate::datapath::types::{direction, event_flags, event_type};
use crate::model::{
    Endpoint, EndpointId, IdentityId, IdentityLabels, LocalIdentity, MacAddress, NodeEndpoints, ObjectKey,
    Origins, PolicyRef, PublishedEndpoint, Service,
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
        Some(LocalIdentity { base, prefixes: ["10.1.0.0/16".parse().expect("a prefix")].into() })
    }

    fn rule_origin(&self, rule_id: u32) -> Option<Origins> {
        let origin = PolicyRef::network_policy(&ObjectKey::new("shop", "backend-ingress"));
        (rule_id == 7).then(|| Arc::from([origin]))
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

fn line(event: &Event) -> String {
    compact(&Item::Flow(Box::new(names().flow(event, &clock()))), Colours::Off)
}

#[test]
fn a_record_becomes_a_flow_in_json_and_back() {
    let flow = names().flow(&forwarded(), &clock());
    let expected = json!({
        "time": "2026-11-22T19:20:13.123456789Z",
        "node_name": "a",
        "event_type": "NEW",
        "verdict": "FORWARDED",
        "traffic_direction": "EGRESS",
        "is_reply": false,
        "protocol": "TCP",
        "source": {
            "ip": "10.0.0.3", "port": 43210, "identity": 256, "ID": 3, "namespace": "shop", "pod_name": "frontend-1",
            "labels": [
                "k8s:app=frontend", "k8s:io.cilium.k8s.policy.serviceaccount=default",
                "k8s:io.kubernetes.pod.namespace=shop",
            ],
        },
        "destination": {
            "ip": "10.1.0.8", "port": 8080, "identity": 300, "namespace": "shop", "pod_name": "backend-1",
            "labels": [
                "k8s:app=backend", "k8s:io.cilium.k8s.policy.serviceaccount=default",
                "k8s:io.kubernetes.pod.namespace=shop",
            ],
        },
        "service": {"ip": "10.96.0.10", "port": 80, "namespace": "shop", "name": "backend"},
        "tcp_flags": ["SYN", "ACK"],
        "policies": [{"kind": "NetworkPolicy", "namespace": "shop", "name": "backend-ingress"}],
        "egress_allowed_by": [{"kind": "NetworkPolicy", "namespace": "shop", "name": "backend-ingress"}],
        "packets": {"source": 3, "destination": 2},
        "bytes": {"source": 300, "destination": 2000},
        "ifindex": 9,
    });
    assert_eq!(serde_json::to_value(&flow).expect("a flow is JSON"), expected);
    assert_eq!(serde_json::from_value::<Flow>(expected).expect("the JSON is a flow"), flow);
    let text = serde_json::to_string(&Item::Flow(Box::new(flow.clone()))).expect("an item is JSON");
    assert_eq!(serde_json::from_str::<Item>(&text).expect("and back"), Item::Flow(Box::new(flow)));
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
fn lines() {
    let at = "Nov 22 19:20:13.123  ";
    let reply = Event { flags: event_flags::EVENT_REPLY.0 as u8, ..forwarded() };
    let denied = Event { rule_id: 7, reason: 181, ..dropped() };
    let ping = Event {
        protocol: 58,
        icmp_type: 128,
        source: addr_of(ip("fd00::99")),
        destination: addr_of(ip("fd00::8")),
        source_identity: 0,
        ..dropped()
    };
    let udp = Event { protocol: 17, service: addr_of(ip("fd00::1")), direction: 0, ..forwarded() };
    for (event, expected) in [
        (
            forwarded(),
            "shop/frontend-1:43210 (256) -> shop/backend-1:8080 (300) [svc shop/backend:80]  new|EGRESS  FORWARDED  \
             (TCP Flags: SYN, ACK)",
        ),
        (
            reply,
            "shop/frontend-1:43210 (256) <- shop/backend-1:8080 (300)  new|EGRESS  FORWARDED  (TCP Flags: SYN, ACK)",
        ),
        (
            dropped(),
            "192.0.2.1:43210 (world) -> shop/backend-1:8080 (300)  Policy denied|INGRESS  DROPPED  \
             (TCP Flags: SYN; no rule allows it)",
        ),
        (
            denied,
            "192.0.2.1:43210 (world) -> shop/backend-1:8080 (300)  Denied by a deny rule|INGRESS  DROPPED  \
             (TCP Flags: SYN; denied by NetworkPolicy shop/backend-ingress)",
        ),
        (
            ping,
            "fd00::99 (unknown) -> shop/backend-6 (300)  Policy denied|INGRESS  DROPPED  \
             (ICMPv6 EchoRequest; no rule allows it)",
        ),
        (
            udp,
            "shop/frontend-1:43210 (256) -> shop/backend-1:8080 (300) [svc [fd00::1]:80]  new  FORWARDED  (UDP)",
        ),
    ] {
        assert_eq!(line(&event), format!("{at}{expected}"));
    }
    let lost = Item::LostEvents(Lost { source: LostSource::HubbleRingBuffer, num_events_lost: 5 });
    assert_eq!(compact(&lost, Colours::Off), "EVENTS LOST: 5 here: this reader did not keep up");
    assert_eq!(
        serde_json::to_value(&lost).expect("JSON"),
        json!({"lost_events": {"source": "HUBBLE_RING_BUFFER", "num_events_lost": 5}})
    );
}

#[test]
fn names_cannot_command_a_terminal() {
    let mut flow = names().flow(&forwarded(), &clock());
    flow.source.pod_name = "web\x1b[31m\u{9b}2J\u{202e}\n".into();
    let line = compact(&Item::Flow(Box::new(flow)), Colours::Off);
    assert!(line.contains(r"shop/web\u{1b}[31m\u{9b}2J\u{202e}\u{a}:43210"), "{line}");
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

fn asks(flags: &[&str]) -> Filter {
    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        filter: Filter,
    }
    <Flags as clap::Parser>::try_parse_from(["observe"].iter().chain(flags)).expect("valid flags").filter
}

/// Flags, and whether the forwarded and the dropped record match.
#[test]
fn filters() {
    for (flags, expected) in [
        ([""; 0].as_slice(), [true, true]),
        (&["--verdict", "forwarded"], [true, false]),
        (&["--verdict", "DROPPED"], [false, true]),
        (&["--verdict", "dropped", "--verdict", "forwarded"], [true, true]),
        (&["--drop-reason", "policy_denied"], [false, true]),
        (&["--protocol", "tcp"], [true, true]),
        (&["--protocol", "17"], [false, false]),
        (&["--direction", "ingress"], [false, true]),
        (&["--type", "new"], [true, false]),
        (&["--port", "8080"], [true, true]),
        (&["--port", "80"], [true, false]),
        (&["--from-port", "8080"], [false, false]),
        (&["--from-port", "43210"], [true, true]),
        (&["--to-port", "80"], [true, false]),
        (&["--ip", "10.96.0.10"], [true, false]),
        (&["--ip", "192.0.2.0/24"], [false, true]),
        (&["--to-ip", "192.0.2.0/24"], [false, false]),
        (&["--from-ip", "10.0.0.3", "--to-ip", "10.1.0.0/16"], [true, false]),
        (&["--identity", "300"], [true, true]),
        (&["--from-identity", "world"], [false, true]),
        (&["--to-identity", "reserved:world"], [false, false]),
        (&["--pod", "frontend"], [true, false]),
        (&["--pod", "shop/backend-1"], [true, true]),
        (&["--pod", "other/backend-1"], [false, false]),
        (&["--from-pod", "shop/"], [true, false]),
        (&["--to-pod", "/back"], [true, true]),
        (&["--namespace", "shop"], [true, true]),
        (&["--from-namespace", "shop"], [true, false]),
        (&["--to-namespace", "sho"], [false, false]),
        (&["--label", "app=frontend"], [true, false]),
        (&["--from-label", "reserved:world"], [false, true]),
        (&["--to-label", "app in (backend),!tier"], [true, true]),
        (&["--service", "shop/backend"], [true, false]),
        (&["--verdict", "dropped", "--pod", "backend"], [false, true]),
    ] {
        let filter = asks(flags);
        let text = serde_json::to_string(&filter).expect("a filter is JSON");
        assert_eq!(serde_json::from_str::<Filter>(&text).expect("and back"), filter, "{flags:?}");
        let query = Query { filter, ..Query::default() };
        let result = [forwarded(), dropped()]
            .map(|event| query.may_match(&event) && query.matches(&event, &names().flow(&event, &clock())));
        assert_eq!(result, expected, "{flags:?}");
    }
}

#[test]
fn exclusions_are_each_on_their_own() {
    for (not, expected) in [
        (["verdict=dropped"].as_slice(), [true, false]),
        (&["pod=shop/frontend"], [false, true]),
        (&["--pod=shop/frontend", "from-identity=world"], [false, false]),
        (&["label=app=frontend"], [false, true]),
    ] {
        let not = not.iter().map(|text| text.parse().expect("a filter")).collect();
        let query = Query { not, ..Query::default() };
        let result = [forwarded(), dropped()]
            .map(|event| query.may_match(&event) && query.matches(&event, &names().flow(&event, &clock())));
        assert_eq!(result, expected, "{:?}", query.not);
    }
    assert!("nonsense".parse::<Exclusion>().is_err());
    assert!("verdict=maybe".parse::<Exclusion>().is_err());
    assert!("colour=red".parse::<Exclusion>().is_err());
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

/// Source ports of flows; losses as negative numbers.
fn ports(items: Vec<Item>) -> Vec<i64> {
    let number = |item| match item {
        Item::Flow(flow) => i64::from(flow.source.port),
        Item::LostEvents(lost) => -(lost.num_events_lost as i64),
    };
    items.into_iter().map(number).collect()
}

async fn all(recorder: &Arc<Recorder>, query: Query) -> Vec<i64> {
    let mut stream = Stream::new(recorder.clone(), Arc::new(names()), query);
    let mut numbers = Vec::new();
    while let Some(items) = stream.next().await {
        numbers.extend(ports(items));
    }
    numbers
}

#[tokio::test]
async fn the_newest_that_match_are_answered_oldest_first() {
    let recorder = recorded(4096, 0..3000);
    assert_eq!(all(&recorder, Query::default()).await, (2980..3000).collect::<Vec<_>>());
    assert_eq!(all(&recorder, Query { last: Some(2), ..Query::default() }).await, [2998, 2999]);
    assert_eq!(all(&recorder, Query { all: true, ..Query::default() }).await, (0..3000).collect::<Vec<_>>());
    let filter = asks(&["--from-port", "7", "--from-port", "2500"]);
    assert_eq!(all(&recorder, Query { filter, ..Query::default() }).await, [7, 2500]);
    assert_eq!(all(&recorded(4, 0..10), Query::default()).await, [6, 7, 8, 9]);
    let future = Some(jiff::Timestamp::MAX);
    assert!(all(&recorder, Query { since: future, ..Query::default() }).await.is_empty());
    assert_eq!(all(&recorder, Query { until: future, ..Query::default() }).await.len(), 3000);
}

#[tokio::test]
async fn a15_looking_through_a_large_ring_leaves_the_worker_to_others() {
    let recorder = recorded(65_536, 0..u16::MAX);
    let filter = asks(&["--from-port", "7"]);
    let looking = tokio::spawn(async move { all(&recorder, Query { filter, ..Query::default() }).await });
    // One worker: this goes on only where the other lets it.
    let mut turns = 0;
    while !looking.is_finished() {
        turns += 1;
        tokio::task::yield_now().await;
    }
    assert_eq!(looking.await.expect("no panic"), [7]);
    assert!(turns > 50, "{turns} turns in 128 chunks");
}

#[tokio::test]
async fn a_follower_sees_each_once_and_learns_what_it_missed() {
    let recorder = recorded(8, 0..6);
    let query = Query { follow: true, last: Some(2), ..Query::default() };
    let mut stream = Stream::new(recorder.clone(), Arc::new(names()), query);
    assert_eq!(ports(stream.next().await.expect("what is kept")), [4, 5]);
    record(&recorder, 6..8);
    assert_eq!(ports(stream.next().await.expect("what came")), [6, 7]);
    record(&recorder, 8..20);
    recorder.set_undelivered(1, 2);
    // The loss in the kernel is a record, too, and took the place of one.
    let expected: Vec<i64> = [-5].into_iter().chain(13..20).chain([-3]).collect();
    assert_eq!(ports(stream.next().await.expect("after a gap")), expected);
    assert_eq!(recorder.counts().missed_by_readers, 5);

    let waiting = tokio::spawn(async move { stream.next().await });
    record(&recorder, 20..21);
    assert_eq!(ports(waiting.await.expect("no panic").expect("what woke it")), [20]);
}
