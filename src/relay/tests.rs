//! The relay before nodes that come, go, stall and lie about time. The nodes are real servers on loopback.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::nodes::{Link, Nodes, Target};
use super::server::Relay;
use crate::hubble::page::Flows;
use crate::hubble::proto::flow::Flow;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;
use crate::hubble::proto::observer::observer_server::{Observer, ObserverServer};
use crate::hubble::proto::observer::*;
use crate::hubble::proto::peer::peer_server::{Peer, PeerServer};
use crate::hubble::proto::peer::{ChangeNotification, NotifyRequest};
use crate::hubble::proto::relay::NodeState;
use crate::hubble::serve::{common_routes, serve_listener};
use crate::hubble::service::Answers;
use crate::hubble::tls::Identity;

/// A node that answers with flows of these seconds; then it ends, or stalls.
#[derive(Clone)]
struct TestNode {
    name: &'static str,
    seconds: Vec<i64>,
    stalls: bool,
    asked: Arc<Mutex<Vec<GetFlowsRequest>>>,
}

fn flow_at(name: &str, seconds: i64) -> GetFlowsResponse {
    let time = Some(prost_types::Timestamp { seconds, nanos: 0 });
    let flow = Flow { time, node_name: name.to_owned(), ..Flow::default() };
    GetFlowsResponse { response_types: Some(ResponseTypes::Flow(flow)), node_name: name.to_owned(), time }
}

#[tonic::async_trait]
impl Observer for TestNode {
    type GetFlowsStream = Answers<GetFlowsResponse>;
    type GetAgentEventsStream = Answers<GetAgentEventsResponse>;
    type GetDebugEventsStream = Answers<GetDebugEventsResponse>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        self.asked.lock().expect("no test panics with it").push(request.into_inner());
        let name = self.name;
        let flows = stream::iter(self.seconds.clone()).map(move |seconds| Ok(flow_at(name, seconds)));
        let then = if self.stalls { stream::pending().boxed() } else { stream::empty().boxed() };
        Ok(Response::new(flows.chain(then).boxed()))
    }

    async fn get_agent_events(
        &self,
        _: Request<GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        let event = GetAgentEventsResponse { node_name: self.name.to_owned(), ..Default::default() };
        Ok(Response::new(stream::iter([Ok(event)]).boxed()))
    }

    async fn get_debug_events(
        &self,
        _: Request<GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Ok(Response::new(stream::empty().boxed()))
    }

    async fn get_nodes(&self, _: Request<GetNodesRequest>) -> Result<Response<GetNodesResponse>, Status> {
        Err(Status::unimplemented("not asked"))
    }

    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        let of = |name: &str| Namespace { cluster: "default".to_owned(), namespace: name.to_owned() };
        Ok(Response::new(GetNamespacesResponse { namespaces: vec![of("shop"), of(self.name)] }))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        let num_flows = self.seconds.len() as u64;
        Ok(Response::new(ServerStatusResponse { num_flows, max_flows: 10, ..Default::default() }))
    }
}

/// Which nodes there are: what a test says.
#[derive(Clone)]
struct TestPeers(watch::Receiver<Vec<ChangeNotification>>);

#[tonic::async_trait]
impl Peer for TestPeers {
    type NotifyStream = Answers<ChangeNotification>;

    async fn notify(&self, _: Request<NotifyRequest>) -> Result<Response<Self::NotifyStream>, Status> {
        let state = (self.0.clone(), 0);
        let changes = stream::unfold(state, async |(mut all, told)| {
            let change = all.wait_for(|all| all.len() > told).await.ok()?[told].clone();
            Some((Ok(change), (all, told + 1)))
        });
        Ok(Response::new(changes.boxed()))
    }
}

/// A server of one node; dropping the sender ends it.
struct Served {
    node: TestNode,
    address: String,
    stop: watch::Sender<bool>,
}

async fn serve(name: &'static str, seconds: &[i64], stalls: bool) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    serve_at(listener, name, seconds, stalls, None).await
}

async fn serve_at(
    listener: TcpListener,
    name: &'static str,
    seconds: &[i64],
    stalls: bool,
    identity: Option<Arc<Identity>>,
) -> Served {
    let node = TestNode { name, seconds: seconds.to_vec(), stalls, asked: Arc::default() };
    let address = listener.local_addr().expect("bound").to_string();
    let (stop, stopping) = watch::channel(false);
    let routes = common_routes().await.expect("services").add_service(ObserverServer::new(node.clone()));
    tokio::spawn(serve_listener(listener, identity, routes, stopping));
    Served { node, address, stop }
}

/// A relay whose list of nodes a test writes.
struct TestRelay {
    relay: Relay,
    nodes: Nodes,
    told: watch::Sender<Vec<ChangeNotification>>,
    _stop: watch::Sender<bool>,
}

impl TestRelay {
    async fn start() -> Self {
        let (told, peers) = watch::channel(Vec::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let (stop, stopping) = watch::channel(false);
        let routes = common_routes().await.expect("services").add_service(PeerServer::new(TestPeers(peers)));
        tokio::spawn(serve_listener(listener, None, routes, stopping));
        let nodes = Nodes::new(None);
        tokio::spawn(nodes.clone().follow(Target::Address(address, String::new())));
        Self { relay: Relay::new(nodes.clone()), nodes, told, _stop: stop }
    }

    fn tell(&self, name: &str, address: &str, kind: i32) {
        let change = ChangeNotification {
            name: name.to_owned(),
            address: address.to_owned(),
            r#type: kind,
            tls: None,
        };
        self.told.send_modify(|all| all.push(change));
    }

    /// Waits until a node's link is as `wanted` says.
    async fn wait(&self, name: &str, wanted: impl Fn(Option<&Link>) -> bool) {
        let mut view = self.nodes.subscribe();
        let waiting = view.wait_for(|view| wanted(view.get(name).map(|node| &node.link)));
        tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("in time").expect("it lives");
    }

    async fn with(nodes: &[&Served]) -> Self {
        let relay = Self::start().await;
        for served in nodes {
            relay.tell(served.node.name, &served.address, 1);
            relay.wait(served.node.name, is_up).await;
        }
        relay
    }

    fn ask(&self, request: GetFlowsRequest) -> Answers<GetFlowsResponse> {
        self.relay.flows(request).expect("a good request")
    }
}

fn is_up(link: Option<&Link>) -> bool {
    matches!(link, Some(Link::Up(_)))
}

/// What an answer says: a flow by its node and second, a status by its state and nodes.
fn words(answer: Result<GetFlowsResponse, Status>) -> String {
    let answer = answer.expect("an answer");
    match answer.response_types.expect("something") {
        ResponseTypes::Flow(flow) => format!("{}{}", flow.node_name, flow.time.expect("a time").seconds),
        ResponseTypes::NodeStatus(status) => {
            let state = NodeState::try_from(status.state_change).expect("a state");
            format!("{} {}", state.as_str_name(), status.node_names.join(","))
        }
        ResponseTypes::LostEvents(lost) => format!("lost {}", lost.num_events_lost),
    }
}

async fn next(answers: &mut Answers<GetFlowsResponse>) -> String {
    let next = tokio::time::timeout(Duration::from_secs(30), answers.next());
    words(next.await.expect("in time").expect("not the end"))
}

#[tokio::test]
async fn flows_of_all_nodes_come_in_the_order_of_time() {
    let (a, b) = (serve("a", &[1, 4, 5], false).await, serve("b", &[2, 3, 9], false).await);
    let relay = TestRelay::with(&[&a, &b]).await;
    let all: Vec<String> = relay.ask(GetFlowsRequest::default()).map(words).collect().await;
    assert_eq!(all, ["NODE_CONNECTED a,b", "a1", "b2", "b3", "a4", "a5", "b9"]);
    let status = Flows::status(&relay.relay).await;
    assert_eq!((status.num_flows, status.max_flows), (6, 20));
    assert_eq!((status.num_connected_nodes, status.num_unavailable_nodes), (Some(2), Some(0)));
    let found = relay.relay.get_namespaces(Request::new(GetNamespacesRequest {})).await.expect("an answer");
    let names: Vec<String> = found.into_inner().namespaces.into_iter().map(|found| found.namespace).collect();
    assert_eq!(names, ["a", "b", "shop"]);
    let bad = GetFlowsRequest {
        whitelist: vec![crate::hubble::proto::flow::FlowFilter {
            source_ip: vec!["nowhere".to_owned()],
            ..Default::default()
        }],
        ..GetFlowsRequest::default()
    };
    assert!(relay.relay.flows(bad).is_err());
}

#[tokio::test]
async fn a_node_that_is_away_is_named_and_the_others_are_shown() {
    let a = serve("a", &[1], false).await;
    let relay = TestRelay::with(&[&a]).await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = nobody.local_addr().expect("bound").to_string();
    drop(nobody);
    relay.tell("b", &address, 1);
    relay.wait("b", |link| matches!(link, Some(Link::Down(_)))).await;
    let all: Vec<String> = relay.ask(GetFlowsRequest::default()).map(words).collect().await;
    assert_eq!(all, ["NODE_CONNECTED a", "NODE_UNAVAILABLE b", "a1"]);
    let status = Flows::status(&relay.relay).await;
    assert_eq!((status.num_unavailable_nodes, status.unavailable_nodes), (Some(1), vec!["b".to_owned()]));
    let nodes = Flows::nodes(&relay.relay).await.nodes;
    assert_eq!(nodes.iter().map(|node| node.state).collect::<Vec<_>>(), [1, 2]);
}

/// A node's future times come when they have waited, and hold nobody's flows back for longer than that.
#[tokio::test]
async fn a_node_that_stalls_or_lies_about_time_holds_nobody_up() {
    let (a, b) = (serve("a", &[4_000_000_000, 5], true).await, serve("b", &[2, 3], true).await);
    let c = serve("c", &[], true).await;
    let relay = TestRelay::with(&[&a, &b, &c]).await;
    let mut answers = relay.ask(GetFlowsRequest { follow: true, ..GetFlowsRequest::default() });
    assert_eq!(next(&mut answers).await, "NODE_CONNECTED a,b,c");
    let mut found = Vec::new();
    while found.len() < 4 {
        found.push(next(&mut answers).await);
    }
    assert_eq!(found[..2], ["b2", "b3"]);
    found.sort();
    assert_eq!(found, ["a4000000000", "a5", "b2", "b3"]);
}

#[tokio::test]
async fn a_follower_sees_nodes_come_and_go_and_come_back() {
    let (a, b) = (serve("a", &[1], true).await, serve("b", &[7], true).await);
    let relay = TestRelay::with(&[&a]).await;
    let mut answers = relay.ask(GetFlowsRequest { follow: true, number: 5, ..GetFlowsRequest::default() });
    assert_eq!(next(&mut answers).await, "NODE_CONNECTED a");
    assert_eq!(next(&mut answers).await, "a1");
    relay.tell("b", &b.address, 1);
    let mut found = [next(&mut answers).await, next(&mut answers).await];
    found.sort();
    assert_eq!(found, ["NODE_CONNECTED b", "b7"]);
    let joined = b.node.asked.lock().expect("no test panics with it")[0].clone();
    assert!(joined.since.is_some_and(|since| since.seconds > 1_000_000_000), "from now on: {joined:?}");
    relay.tell("b", &b.address, 2);
    let mut gone = next(&mut answers).await;
    while gone.starts_with("NODE_ERROR") {
        gone = next(&mut answers).await;
    }
    assert_eq!(gone, "NODE_GONE b");
    // a's server ends and another one answers at its address: the request goes on behind what was seen.
    drop(a.stop);
    let mut states = vec![next(&mut answers).await];
    assert!(states[0].ends_with(" a"), "{states:?}");
    let listener = loop {
        match TcpListener::bind(&a.address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let again = serve_at(listener, "a", &[2], true, None).await;
    while states.last().map(String::as_str) != Some("a2") {
        states.push(next(&mut answers).await);
    }
    assert!(states.contains(&"NODE_CONNECTED a".to_owned()), "{states:?}");
    let asked = again.node.asked.lock().expect("no test panics with it")[0].clone();
    assert_eq!(asked.since.map(|since| (since.seconds, since.nanos)), Some((1, 1)), "behind a1");
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_requests_to_the_nodes() {
    let a = serve("a", &[1], true).await;
    let relay = TestRelay::with(&[&a]).await;
    let mut answers = relay.ask(GetFlowsRequest { follow: true, ..GetFlowsRequest::default() });
    assert_eq!(next(&mut answers).await, "NODE_CONNECTED a");
    drop(answers);
    // All slots are free again when the request has ended.
    tokio::time::timeout(Duration::from_secs(30), async {
        while relay.relay.busy() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it ends");
}
