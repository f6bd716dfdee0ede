//! The wire, byte by byte from the field numbers; then the services over real sockets.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use super::certs;
use super::convert::Converter;
use super::events::AgentEvents;
use super::json;
use super::mask::Mask;
use super::proto::flow::{Flow, FlowFilter, Verdict};
use super::proto::observer::get_flows_response::ResponseTypes;
use super::proto::observer::observer_client::ObserverClient;
use super::proto::observer::{
    GetAgentEventsRequest, GetFlowsRequest, GetFlowsResponse, GetNamespacesRequest, GetNodesRequest,
    ServerStatusRequest,
};
use super::proto::peer::NotifyRequest;
use super::proto::peer::peer_client::PeerClient;
use super::serve::{agent_routes, serve_listener, serve_socket};
use super::service::{NodeObserver, PeerNode, Peers, server_name};
use super::stream::{FlowStream, Source};
use super::tls::Identity;
use crate::flow::tests::{clock, dropped, forwarded, names, record, recorded, request};
use crate::flow::{Event, Recorder};
use crate::model::l7;

/// A node named `a` whose flows go by the tunnel.
pub(crate) fn converter() -> Converter {
    Converter::new("default", "a", vec!["zone=1".to_owned()], true)
}

pub(crate) fn flow(event: &Event) -> Flow {
    converter().flow(event, &names(), &clock())
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A field that is a number.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// A field that is text or a message.
fn bytes(field: u64, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    [varint(field << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}

/// A dropped SYN, as the numbers of Hubble's API have it.
#[test]
fn a_dropped_packet_has_the_bytes_of_the_wire() {
    let flow = Flow { weir: None, uuid: String::new(), emitter: None, ..flow(&dropped()) };
    let flags = [number(2, 1)].concat();
    let expected = [
        bytes(1, [number(1, 1_795_375_213), number(2, 123_456_789)].concat()),
        number(2, 2),
        number(3, 133),
        bytes(5, [bytes(1, "192.0.2.1"), bytes(2, "10.1.0.8"), number(3, 1)].concat()),
        bytes(6, bytes(1, [number(1, 43210), number(2, 8080), bytes(3, flags)].concat())),
        bytes(8, [number(2, 2), bytes(4, "reserved:world")].concat()),
        bytes(
            9,
            [
                number(2, 300),
                bytes(3, "shop"),
                bytes(4, "k8s:app=backend"),
                bytes(4, "k8s:io.cilium.k8s.policy.serviceaccount=default"),
                bytes(4, "k8s:io.kubernetes.pod.namespace=shop"),
                bytes(5, "backend-1"),
                bytes(6, [bytes(1, "backend"), bytes(2, "Deployment")].concat()),
                bytes(7, "default"),
            ]
            .concat(),
        ),
        number(10, 1),
        bytes(11, "a"),
        bytes(19, [number(1, 1), number(2, 133)].concat()),
        number(22, 1),
        number(25, 133),
        bytes(28, number(1, 9)),
        bytes(37, "zone=1"),
        bytes(100_000, "TCP Flags: SYN"),
    ]
    .concat();
    assert_eq!(Flow::decode(expected.as_slice()).expect("a flow"), flow_without_interface_name(flow.clone()));
    assert_eq!(flow_without_interface_name(flow).encode_to_vec(), expected);
}

/// Which interface has index 9 depends on the machine.
fn flow_without_interface_name(mut flow: Flow) -> Flow {
    if let Some(interface) = &mut flow.interface {
        interface.name.clear();
    }
    flow
}

#[test]
fn a_reply_goes_from_the_server_to_the_client() {
    let reply = Event {
        flags: crate::datapath::types::event_flags::EVENT_REPLY.0 as u8
            | crate::datapath::types::event_flags::EVENT_SERVICE.0 as u8,
        r#type: 2,
        ..forwarded()
    };
    let flow = flow(&reply);
    let ip = flow.ip.expect("addresses");
    assert_eq!((ip.source.as_str(), ip.destination.as_str()), ("10.1.0.8", "10.0.0.3"));
    assert_eq!(flow.source_service.expect("the service").name, "backend");
    assert_eq!((flow.is_reply, flow.destination_service), (Some(true), None));
    assert_eq!(flow.event_type.map(|event| (event.r#type, event.sub_type)), Some((4, 0)), "to-endpoint");
    assert_eq!(flow.trace_observation_point, 101);
}

#[test]
fn a_new_connection_names_the_policy_that_let_it_out() {
    let flow = flow(&forwarded());
    assert_eq!(flow.event_type.map(|event| event.r#type), Some(5));
    assert_eq!(flow.verdict, i32::from(Verdict::Forwarded));
    let policy = &flow.egress_allowed_by[0];
    assert_eq!((policy.kind.as_str(), policy.name.as_str()), ("NetworkPolicy", "backend-ingress"));
    assert_eq!(flow.weir.expect("counters").bytes_received, 2000);
    let decided_by_nobody = super::tests::flow(&Event { rule_id: 0, ..forwarded() });
    assert_eq!(
        decided_by_nobody.event_type.map(|event| (event.r#type, event.sub_type)),
        Some((4, 4)),
        "to-overlay"
    );
}

#[test]
fn a_record_has_the_same_number_whenever_it_is_read() {
    let first = flow(&forwarded());
    assert_eq!(first.uuid, flow(&forwarded()).uuid);
    assert_ne!(first.uuid, flow(&Event { timestamp_ns: 1, ..forwarded() }).uuid);
    assert_eq!(first.uuid.len(), 36);
    assert_eq!(first.uuid.as_bytes()[14], b'8', "version 8: {}", first.uuid);
}

#[test]
fn json_has_the_names_of_the_wire_and_reads_back() {
    let flow = flow(&dropped());
    let value = json::to_value(&flow);
    assert_eq!(value["time"], "2026-11-22T19:20:13.123456789Z");
    assert_eq!(value["verdict"], "DROPPED");
    assert_eq!(value["drop_reason_desc"], "POLICY_DENIED");
    assert_eq!(value["l4"]["TCP"]["destination_port"], 8080);
    assert_eq!(value["destination"]["pod_name"], "backend-1");
    assert_eq!(value["IP"]["source"], "192.0.2.1");
    assert_eq!(value["Summary"], "TCP Flags: SYN");
    let text = json::to_string(&flow);
    assert_eq!(json::from_str::<Flow>(&text).expect("a flow"), flow);
    assert!(json::from_str_strict::<Flow>("{\"verdict\":\"MAYBE\"}").is_err());
    assert!(json::from_str::<Flow>("{\"verdict\":").is_err());
    assert!(json::from_str::<Flow>("{\"of_another_version\":1}").is_ok());
    assert!(json::from_str::<Flow>("{} {}").is_err());
}

#[test]
fn a_mask_keeps_what_it_names() {
    let mask = |paths: &[&str]| Mask::new(&paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>());
    let kept = mask(&["time", "source.identity", "destination.pod_name", "destination.labels", "l4"])
        .expect("fields of a flow")
        .apply(flow(&dropped()));
    assert_eq!((kept.time.is_some(), kept.verdict, kept.l4.is_some()), (true, 0, true));
    let (source, destination) = (kept.source.expect("kept"), kept.destination.expect("kept"));
    assert_eq!((source.identity, source.labels.len()), (2, 0));
    assert_eq!((destination.pod_name.as_str(), destination.labels.len()), ("backend-1", 3));
    assert_eq!((destination.identity, destination.namespace.as_str()), (0, ""));
    let whole = mask(&["source.identity", "source", "source.namespace"]).expect("fields");
    assert_eq!(whole.apply(flow(&dropped())).source, flow(&dropped()).source);
    assert_eq!(mask(&[]).expect("everything").apply(flow(&dropped())), flow(&dropped()));
    assert!(mask(&["source.colour"]).is_err());
    assert!(mask(&["time.seconds.more"]).is_err());
}

/// A request and its answer, as every reader gets them.
#[tokio::test]
async fn requests_are_flows_of_layer_7() {
    let recorder = recorded(64, 0..2);
    let answer = l7::Record {
        kind: l7::RecordKind::Response,
        latency_us: Some(3500),
        message: match request("/pay").message {
            l7::L7Message::Http(http) => l7::L7Message::Http(l7::HttpMessage { status: Some(201), ..http }),
            other => other,
        },
        ..request("/pay")
    };
    let denied =
        l7::Record { verdict: l7::L7Verdict::Denied, denied_by: Some(l7::RuleSetId(5)), ..request("/admin") };
    recorder.append_requests(vec![request("/pay"), answer, denied]);
    let asked = async |filter: FlowFilter| {
        let request = GetFlowsRequest { whitelist: vec![filter], ..asks(u64::MAX) };
        let mut stream = FlowStream::new(source(recorder.clone()), request).expect("a good request");
        let mut flows = Vec::new();
        while let Some(answers) = stream.next().await {
            flows.extend(answers.into_iter().filter_map(|answer| match answer.response_types {
                Some(ResponseTypes::Flow(flow)) => Some(flow),
                _ => None,
            }));
        }
        flows
    };
    let http = FlowFilter { protocol: vec!["http".to_owned()], ..FlowFilter::default() };
    let flows = asked(http).await;
    let summaries: Vec<&str> = flows.iter().map(|flow| flow.summary.as_str()).collect();
    assert_eq!(
        summaries,
        [
            "HTTP/1.1 GET http://backend/pay",
            "HTTP/1.1 201 3ms (GET http://backend/pay)",
            "HTTP/1.1 GET http://backend/admin"
        ]
    );
    let [first, second, third] = &flows[..] else { panic!("{}", flows.len()) };
    assert_eq!(json::to_value(first)["l7"]["http"]["url"], "http://backend/pay");
    assert_eq!(
        json::to_value(first)["trace_context"]["parent"]["trace_id"],
        "4bf92f3577b34da6a3ce929d0e0e4736"
    );
    assert_eq!(first.ingress_allowed_by[0].name, "backend-l7");
    assert_eq!(first.weir.as_ref().expect("Weir's own").packets_sent, 0);
    let ends = |flow: &Flow| flow.ip.as_ref().map(|ip| (ip.source.clone(), ip.destination.clone()));
    assert_eq!(ends(second), ends(first).map(|(from, to)| (to, from)), "an answer comes from the server");
    assert_eq!(second.l7.as_ref().map(|l7| l7.latency_ns), Some(3_500_000));
    assert_eq!((third.verdict(), third.drop_reason_desc), (Verdict::Dropped, 133));
    assert_ne!(first.uuid, second.uuid);
    let style = super::text::Style {
        time: Default::default(),
        colours: crate::flow::Colours::Off,
        node: false,
        policies: false,
        numeric: false,
    };
    let line = |flow: &Flow| {
        let response_types = Some(ResponseTypes::Flow(flow.clone()));
        super::text::compact(&GetFlowsResponse { response_types, ..GetFlowsResponse::default() }, style)
    };
    assert!(
        line(second).contains("<- shop/backend-1:8080 (ID:300) http-response FORWARDED"),
        "{}",
        line(second)
    );
    assert!(
        line(third).ends_with("/admin; no rule allows it, isolated by NetworkPolicy shop/backend-l7)"),
        "{}",
        line(third)
    );
    let path = FlowFilter { http_path: vec!["^/admin$".to_owned()], ..FlowFilter::default() };
    assert_eq!(asked(path).await.len(), 1);
    let trace = FlowFilter {
        trace_id: vec!["4bf92f3577b34da6a3ce929d0e0e4736".to_owned()],
        source_ip: vec!["10.0.0.0/16".to_owned()],
        ..FlowFilter::default()
    };
    assert_eq!(asked(trace).await.len(), 2, "the answer comes from elsewhere");
    let packets = FlowFilter { source_port: vec!["1".to_owned()], ..FlowFilter::default() };
    assert_eq!(asked(packets).await.len(), 1);
}

#[test]
fn flows_say_what_made_their_pods() {
    let destination = flow(&forwarded()).destination.expect("the backend");
    let workload = &destination.workloads[0];
    assert_eq!((workload.kind.as_str(), workload.name.as_str()), ("Deployment", "backend"));
    let filter = |name: &str| FlowFilter {
        destination_workload: vec![super::proto::flow::Workload {
            name: name.to_owned(),
            ..super::proto::flow::Workload::default()
        }],
        ..FlowFilter::default()
    };
    let matches = |name| {
        let filters = super::filter::Filters::new(&[filter(name)], &[]).expect("a filter");
        filters.matches(&flow(&forwarded()))
    };
    assert_eq!((matches("backend"), matches("other")), (true, false));
}

fn source(recorder: Arc<Recorder>) -> Source {
    Source { recorder, names: Arc::new(names()), converter: Arc::new(converter()), history: None }
}

/// Source ports of flows; losses as negative numbers.
fn ports(answers: Vec<GetFlowsResponse>) -> Vec<i64> {
    let port = |answer: GetFlowsResponse| match answer.response_types.expect("something") {
        ResponseTypes::Flow(flow) => match flow.l4.and_then(|l4| l4.protocol) {
            Some(super::proto::flow::layer4::Protocol::Tcp(tcp)) => i64::from(tcp.source_port),
            other => panic!("not TCP: {other:?}"),
        },
        ResponseTypes::LostEvents(lost) => -(lost.num_events_lost as i64),
        ResponseTypes::NodeStatus(status) => panic!("of one node: {status:?}"),
    };
    answers.into_iter().map(port).collect()
}

async fn all(recorder: &Arc<Recorder>, request: GetFlowsRequest) -> Vec<i64> {
    let mut stream = FlowStream::new(source(recorder.clone()), request).expect("a good request");
    let mut found = Vec::new();
    while let Some(answers) = stream.next().await {
        found.extend(ports(answers));
    }
    found
}

fn asks(number: u64) -> GetFlowsRequest {
    GetFlowsRequest { number, ..GetFlowsRequest::default() }
}

#[tokio::test]
async fn the_first_the_last_all_and_those_of_a_time() {
    let recorder = recorded(4096, 0..3000);
    assert_eq!(all(&recorder, asks(0)).await, (2980..3000).collect::<Vec<_>>());
    assert_eq!(all(&recorder, asks(2)).await, [2998, 2999]);
    assert_eq!(all(&recorder, GetFlowsRequest { first: true, ..asks(3) }).await, [0, 1, 2]);
    assert_eq!(all(&recorder, asks(u64::MAX)).await, (0..3000).collect::<Vec<_>>());
    let from_ports = |ports: &[&str]| FlowFilter {
        source_port: ports.iter().map(|port| (*port).to_owned()).collect(),
        ..FlowFilter::default()
    };
    let filtered = GetFlowsRequest { whitelist: vec![from_ports(&["7", "2500"])], ..asks(20) };
    assert_eq!(all(&recorder, filtered.clone()).await, [7, 2500]);
    let first = GetFlowsRequest { first: true, number: 1, ..filtered.clone() };
    assert_eq!(all(&recorder, first).await, [7]);
    let excluded = GetFlowsRequest { blacklist: vec![from_ports(&["7"])], ..filtered };
    assert_eq!(all(&recorder, excluded).await, [2500]);
    let past = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    assert_eq!(
        all(&recorder, GetFlowsRequest { since: past, ..asks(1) }).await.len(),
        3000,
        "a time counts before a number"
    );
    assert!(all(&recorder, GetFlowsRequest { until: past, ..asks(1) }).await.is_empty());
    let both = GetFlowsRequest { first: true, follow: true, ..asks(1) };
    assert!(FlowStream::new(source(recorder), both).is_err());
}

/// What memory has no more is read on disk, and nothing comes twice.
#[tokio::test]
async fn queries_go_on_behind_memory() {
    let directory = tempfile::tempdir().expect("a directory");
    let segments = crate::flow::disk::Segments::open(directory.path(), 1 << 20).expect("segments");
    let history = segments.history();
    let recorder = recorded(64, 0..0);
    let keeping = tokio::spawn(crate::flow::disk::keep(segments, recorder.clone()));
    for round in 0..2 {
        tokio::task::yield_now().await;
        record(&recorder, round * 50..(round + 1) * 50);
        let empty = crate::flow::Recorder::new(16);
        while history.before(&empty).expect("readable").0.len() < u64::from(round + 1) * 50 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
    keeping.abort();
    let ask = async |request: GetFlowsRequest, most: usize| {
        let source = Source { history: Some(history.clone()), ..source(recorder.clone()) };
        let mut stream = FlowStream::new(source, request).expect("a good request");
        let mut found = Vec::new();
        while found.len() < most
            && let Some(answers) = stream.next().await
        {
            found.extend(ports(answers));
        }
        found
    };
    assert_eq!(ask(asks(u64::MAX), usize::MAX).await, (0..100).collect::<Vec<_>>());
    assert_eq!(ask(asks(90), usize::MAX).await, (10..100).collect::<Vec<_>>());
    assert_eq!(ask(asks(20), usize::MAX).await, (80..100).collect::<Vec<_>>());
    assert_eq!(ask(GetFlowsRequest { first: true, ..asks(5) }, usize::MAX).await, [0, 1, 2, 3, 4]);
    let past = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    assert_eq!(ask(GetFlowsRequest { since: past, ..asks(1) }, usize::MAX).await.len(), 100);
    assert!(ask(GetFlowsRequest { until: past, ..asks(1) }, usize::MAX).await.is_empty());
    let following = GetFlowsRequest { follow: true, ..asks(95) };
    assert_eq!(ask(following, 95).await, (5..100).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_follower_sees_each_once_and_learns_what_it_missed() {
    let recorder = recorded(8, 0..6);
    let request = GetFlowsRequest { follow: true, ..asks(2) };
    let mut stream = FlowStream::new(source(recorder.clone()), request).expect("a good request");
    assert_eq!(ports(stream.next().await.expect("what is kept")), [4, 5]);
    record(&recorder, 6..8);
    assert_eq!(ports(stream.next().await.expect("what came")), [6, 7]);
    record(&recorder, 8..20);
    recorder.set_undelivered(1, 2);
    // The loss in the kernel is a record, too, and took the place of one.
    let expected: Vec<i64> = [-5].into_iter().chain(13..20).chain([-3]).collect();
    assert_eq!(ports(stream.next().await.expect("after a gap")), expected);
    let waiting = tokio::spawn(async move { stream.next().await });
    record(&recorder, 20..21);
    assert_eq!(ports(waiting.await.expect("no panic").expect("what woke it")), [20]);
}

pub(crate) fn observer(recorder: Arc<Recorder>) -> (NodeObserver, watch::Sender<Peers>) {
    let (told, peers) = watch::channel(Peers::new());
    let events = Arc::new(AgentEvents::default());
    events.started();
    (NodeObserver::new(source(recorder), events, peers), told)
}

/// An observer at a TCP socket of loopback; dropping the sender ends it.
async fn served(identity: Option<Arc<Identity>>) -> (std::net::SocketAddr, watch::Sender<bool>) {
    let (observer, _) = observer(recorded(64, 0..10));
    let (stop, stopping) = watch::channel(false);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let routes = agent_routes(observer).await.expect("services");
    tokio::spawn(serve_listener(listener, identity, routes, stopping));
    (address, stop)
}

#[tokio::test]
async fn every_service_answers_on_the_unix_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("hubble.sock");
    let (observer, told) = observer(recorded(64, 0..10));
    let (stop, stopping) = watch::channel(false);
    let routes = agent_routes(observer).await.expect("services");
    let serving = {
        let path = path.clone();
        tokio::spawn(async move { serve_socket(&path, routes, stopping).await })
    };
    let channel = loop {
        let endpoint = Endpoint::try_from(format!("unix:{}", path.display())).expect("a path");
        match endpoint.connect().await {
            Ok(channel) => break channel,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let mut client = ObserverClient::new(channel.clone());
    let mut flows = client.get_flows(asks(3)).await.expect("flows").into_inner();
    let mut found = Vec::new();
    while let Some(answer) = flows.message().await.expect("a message") {
        assert_eq!((answer.node_name.as_str(), answer.time.is_some()), ("a", true));
        found.push(answer);
    }
    assert_eq!(ports(found), [7, 8, 9]);
    let status = client.server_status(ServerStatusRequest {}).await.expect("a status").into_inner();
    assert_eq!((status.num_flows, status.max_flows, status.seen_flows), (10, 64, 10));
    let nodes = client.get_nodes(GetNodesRequest {}).await.expect("nodes").into_inner().nodes;
    assert_eq!((nodes.len(), nodes[0].name.as_str(), nodes[0].state), (1, "a", 1));
    let namespaces = client.get_namespaces(GetNamespacesRequest {}).await.expect("namespaces").into_inner();
    // The records' time is long ago for this machine's clock, or not: either way the question is answered.
    assert!(namespaces.namespaces.len() <= 1);
    let events = client.get_agent_events(GetAgentEventsRequest::default()).await.expect("events");
    let event = events.into_inner().message().await.expect("a message").expect("the start");
    assert_eq!(event.agent_event.expect("an event").r#type, 2);
    let bad = FlowFilter { source_ip: vec!["nowhere".to_owned()], ..FlowFilter::default() };
    let refused = client.get_flows(GetFlowsRequest { whitelist: vec![bad], ..asks(1) }).await;
    let refused = refused.expect_err("a bad filter");
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("source_ip"), "{refused}");
    peers_are_told(channel.clone(), told).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let asked = tonic_health::pb::HealthCheckRequest { service: super::serve::HEALTH_SERVICE.to_owned() };
    assert_eq!(health.check(asked).await.expect("health").into_inner().status, 1);
    stop.send(true).expect("it runs");
    serving.await.expect("no panic").expect("served");
    assert!(!path.exists());
}

async fn peers_are_told(channel: Channel, told: watch::Sender<Peers>) {
    let mut changes = PeerClient::new(channel).notify(NotifyRequest {}).await.expect("peers").into_inner();
    let peer = |address: &str| PeerNode { address: address.to_owned(), server_name: Some("a.b".to_owned()) };
    for (address, kind) in [(Some("10.0.0.1:4244"), 1), (Some("10.0.0.2:4244"), 3), (None, 2)] {
        told.send_replace(address.map(|address| ("b".to_owned(), peer(address))).into_iter().collect());
        let change = changes.message().await.expect("a message").expect("a change");
        assert_eq!((change.name.as_str(), change.r#type), ("b", kind));
        assert_eq!(change.tls.expect("with TLS").server_name, "a.b");
    }
}

/// Writes a certificate for `name`, signed by `authority`, as a mounted Secret has it.
pub(crate) fn write_identity(directory: &std::path::Path, authority: &certs::Pair, name: &str) {
    let leaf = certs::leaf("test", &authority.key, &[name.to_owned()], jiff::SignedDuration::from_hours(1));
    let leaf = leaf.expect("a certificate");
    for (file, text) in
        [("ca.crt", &authority.certificate), ("tls.crt", &leaf.certificate), ("tls.key", &leaf.key)]
    {
        std::fs::write(directory.join(file), text).expect("the test's own directory");
    }
}

pub(crate) fn authority() -> certs::Pair {
    certs::authority("test", jiff::SignedDuration::from_hours(1)).expect("an authority")
}

async fn asked_with(
    address: std::net::SocketAddr,
    identity: Option<&Identity>,
    name: &str,
) -> Result<u64, String> {
    let channel = super::client::connect(&address.to_string(), identity, Some(name))
        .await
        .map_err(|error| crate::error::chain(&error))?;
    let asking = ObserverClient::new(channel).server_status(ServerStatusRequest {}).await;
    asking.map(|status| status.into_inner().num_flows).map_err(|error| error.to_string())
}

#[tokio::test]
async fn only_who_has_the_authoritys_certificate_may_ask() {
    let [ours, theirs, strangers] = [(); 3].map(|()| tempfile::tempdir().expect("a directory"));
    let authority = authority();
    let name = server_name("node.one", "default");
    assert_eq!(name, "node-one.default.hubble-grpc.cilium.io");
    write_identity(ours.path(), &authority, "*.default.hubble-grpc.cilium.io");
    write_identity(theirs.path(), &authority, "relay");
    write_identity(strangers.path(), &super::tests::authority(), "relay");
    let (address, _stop) = served(Some(Arc::new(Identity::new(ours.path())))).await;
    let relay = Identity::new(theirs.path());
    assert_eq!(asked_with(address, Some(&relay), &name).await, Ok(10));
    let wrong_name = asked_with(address, Some(&relay), "node.elsewhere.example").await;
    assert!(wrong_name.is_err(), "a server of another name");
    let stranger = Identity::new(strangers.path());
    assert!(asked_with(address, Some(&stranger), &name).await.is_err(), "a client of another authority");
    assert!(asked_with(address, None, &name).await.is_err(), "a client without TLS");
    // The server's certificate is replaced, and nothing restarted.
    let replaced = super::tests::authority();
    write_identity(ours.path(), &replaced, "*.default.hubble-grpc.cilium.io");
    assert!(asked_with(address, Some(&relay), &name).await.is_err(), "the authority is another");
    write_identity(theirs.path(), &replaced, "relay");
    assert_eq!(asked_with(address, Some(&relay), &name).await, Ok(10));
    std::fs::write(ours.path().join("tls.key"), "half").expect("the test's own directory");
    assert_eq!(asked_with(address, Some(&relay), &name).await, Ok(10), "the files of before stay in use");
}

#[tokio::test]
async fn plain_text_is_served_where_it_was_asked_for() {
    let (address, stop) = served(None).await;
    let asked = asked_with(address, None, "").await;
    assert_eq!(asked, Ok(10));
    drop(stop);
    tokio::time::timeout(Duration::from_secs(10), async {
        while asked_with(address, None, "").await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it ends when nobody can stop it any more");
}

/// The stock command line, where `scripts/hubble` has built it.
#[tokio::test]
async fn the_stock_command_line_reads_our_flows() {
    let hubble = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/hubble/hubble");
    if !hubble.is_file() {
        eprintln!("SKIPPED: there is no stock hubble program: scripts/hubble builds it");
        return;
    }
    let (address, _stop) = served(None).await;
    let ask = |arguments: &'static [&'static str]| {
        let (hubble, address) = (hubble.clone(), address.to_string());
        async move {
            let mut command = tokio::process::Command::new(hubble);
            command.args(arguments).args(["--server", &address]);
            let output = command.output().await.expect("it starts");
            let [out, error] =
                [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            assert!(output.status.success(), "hubble {arguments:?}: {error}");
            out
        }
    };
    let compact = ask(&["observe", "--last", "3"]).await;
    assert_eq!(compact.lines().count(), 3, "{compact}");
    assert!(
        compact.contains("shop/frontend-1:9 (ID:256) -> shop/backend-1:8080 (ID:300) policy-verdict:"),
        "{compact}"
    );
    assert!(compact.contains("ALLOWED (TCP Flags: SYN, ACK)"), "{compact}");
    let json =
        ask(&["observe", "--all", "--from-port", "7", "-o", "json", "--from-pod", "shop/frontend"]).await;
    let answer: GetFlowsResponse = json::from_str(json.trim()).expect("one line");
    assert_eq!(ports(vec![answer]), [7]);
    assert!(ask(&["observe", "--all", "--verdict", "DROPPED"]).await.trim().is_empty());
    let status = ask(&["status"]).await;
    assert!(status.contains("Ok") && status.contains("10/64"), "{status}");
    assert!(ask(&["list", "nodes"]).await.contains("Connected"));
    assert!(ask(&["observe", "agent-events"]).await.contains("AGENT_STARTED"));
}
