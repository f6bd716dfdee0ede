//! What an agent answers: observer.Observer and peer.Peer for its own node.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, stream};
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status};

use super::convert::DEFAULT_CLUSTER;
use super::events::AgentEvents;
use super::proto::observer::observer_server::Observer;
use super::proto::observer::{
    GetAgentEventsRequest, GetAgentEventsResponse, GetDebugEventsRequest, GetDebugEventsResponse,
    GetFlowsRequest, GetFlowsResponse, GetNamespacesRequest, GetNamespacesResponse, GetNodesRequest,
    GetNodesResponse, Namespace, Node, ServerStatusRequest, ServerStatusResponse, Tls,
};
use super::proto::peer::peer_server::Peer;
use super::proto::peer::{self, ChangeNotification, ChangeNotificationType, NotifyRequest};
use super::proto::relay::NodeState;
use super::proto::{time, timestamp};
use super::stream::{FlowStream, Source};
use crate::flow::monotonic_ns;

/// Streams that are answered at once; a relay needs one for each of its clients.
const STREAMS_MAX: usize = 256;
/// Namespaces are listed that had a flow since.
const NAMESPACES_NS: u64 = 3_600_000_000_000;
/// Records that the list of namespaces looks through at most, the newest.
const NAMESPACE_RECORDS_MAX: u64 = 200_000;

/// A stream of answers.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A node that has an observer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerNode {
    /// Host and port of its observer.
    pub address: String,
    /// The name of its certificate; `None`: plain text.
    pub server_name: Option<String>,
}

/// Every node's observer, by the node's name.
pub type Peers = BTreeMap<String, PeerNode>;

/// Answers for one node.
#[derive(Clone)]
pub struct NodeObserver {
    source: Source,
    events: Arc<AgentEvents>,
    peers: watch::Receiver<Peers>,
    streams: Arc<Semaphore>,
    started: Instant,
}

impl NodeObserver {
    /// Answers from `source`, and says which `peers` there are.
    pub fn new(source: Source, events: Arc<AgentEvents>, peers: watch::Receiver<Peers>) -> Self {
        Self {
            source,
            events,
            peers,
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            started: Instant::now(),
        }
    }

    /// The answers to GetFlows.
    pub fn flows(&self, request: GetFlowsRequest) -> Result<Answers<GetFlowsResponse>, Status> {
        let slot = self.slot()?;
        let flows = FlowStream::new(self.source.clone(), request)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let chunks = stream::unfold((flows, slot), async |(mut flows, slot)| {
            flows.next().await.map(|chunk| (chunk, (flows, slot)))
        });
        Ok(chunks.flat_map(|chunk| stream::iter(chunk.into_iter().map(Ok))).boxed())
    }

    fn slot(&self) -> Result<tokio::sync::OwnedSemaphorePermit, Status> {
        self.streams
            .clone()
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted(format!("{STREAMS_MAX} streams are being answered")))
    }

    /// How the observer is.
    pub fn status(&self) -> ServerStatusResponse {
        let counts = self.source.recorder.counts();
        ServerStatusResponse {
            num_flows: counts.held,
            max_flows: counts.capacity,
            seen_flows: counts.seen,
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            version: format!("Weir {}", env!("CARGO_PKG_VERSION")),
            flows_rate: self.source.recorder.rate(),
            ..ServerStatusResponse::default()
        }
    }

    fn this_node(&self) -> GetNodesResponse {
        let status = self.status();
        let name = self.source.converter.node.clone();
        let peer = self.peers.borrow().get(&name).cloned();
        let server_name = peer.as_ref().and_then(|peer| peer.server_name.clone());
        let node = Node {
            tls: Some(Tls { enabled: server_name.is_some(), server_name: server_name.unwrap_or_default() }),
            address: peer.map(|peer| peer.address).unwrap_or_default(),
            name,
            version: status.version,
            state: NodeState::NodeConnected.into(),
            uptime_ns: status.uptime_ns,
            num_flows: status.num_flows,
            max_flows: status.max_flows,
            seen_flows: status.seen_flows,
        };
        GetNodesResponse { nodes: vec![node] }
    }

    fn namespaces(&self) -> GetNamespacesResponse {
        let names = &self.source.names;
        names.refresh();
        let oldest = monotonic_ns().saturating_sub(NAMESPACES_NS);
        let kept = self.source.recorder.range();
        let mut records = Vec::new();
        let mut found = BTreeSet::new();
        let mut from = kept.start.max(kept.end.saturating_sub(NAMESPACE_RECORDS_MAX));
        while from < kept.end {
            let first = self.source.recorder.copy(from, 4096, &mut records);
            if records.is_empty() {
                break;
            }
            from = first + records.len() as u64;
            for record in &records {
                if let Some(event) = record.event()
                    && event.timestamp_ns >= oldest
                {
                    found.extend(names.pods_of(event).into_iter().flatten().map(|pod| pod.namespace));
                }
            }
        }
        let cluster = &self.source.converter.cluster;
        let namespace = |name: Arc<str>| Namespace { cluster: cluster.clone(), namespace: name.to_string() };
        GetNamespacesResponse { namespaces: found.into_iter().map(namespace).collect() }
    }
}

#[tonic::async_trait]
impl super::page::Flows for NodeObserver {
    fn flows(&self, request: GetFlowsRequest) -> Result<Answers<GetFlowsResponse>, Status> {
        Self::flows(self, request)
    }

    async fn status(&self) -> ServerStatusResponse {
        Self::status(self)
    }

    async fn nodes(&self) -> GetNodesResponse {
        self.this_node()
    }
}

#[tonic::async_trait]
impl Observer for NodeObserver {
    type GetFlowsStream = Answers<GetFlowsResponse>;
    type GetAgentEventsStream = Answers<GetAgentEventsResponse>;
    type GetDebugEventsStream = Answers<GetDebugEventsResponse>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        Ok(versioned(self.flows(request.into_inner())?))
    }

    async fn get_agent_events(
        &self,
        request: Request<GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        let slot = self.slot()?;
        let request = request.into_inner();
        let node = self.source.converter.node.clone();
        let (kept, next) = self.events.since(0);
        let chosen = choose(kept, &request);
        let response = move |(at, event)| GetAgentEventsResponse {
            agent_event: Some(event),
            node_name: node.clone(),
            time: Some(timestamp(at)),
        };
        let past = stream::iter(chosen);
        if !request.follow {
            return Ok(versioned(past.map(move |event| Ok(response(event))).boxed()));
        }
        let state = (self.events.clone(), self.events.subscribe(), next, slot);
        let coming = stream::unfold(state, async |(events, mut news, next, slot)| {
            news.wait_for(|there| *there > next).await.ok()?;
            let (new, next) = events.since(next);
            Some((new, (events, news, next, slot)))
        });
        Ok(versioned(past.chain(coming.flat_map(stream::iter)).map(move |event| Ok(response(event))).boxed()))
    }

    async fn get_debug_events(
        &self,
        request: Request<GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        // The programs make none; a follower waits for the end of its own patience.
        let follow = request.into_inner().follow;
        let nothing = if follow { stream::pending().boxed() } else { stream::empty().boxed() };
        Ok(versioned(nothing))
    }

    async fn get_nodes(&self, _: Request<GetNodesRequest>) -> Result<Response<GetNodesResponse>, Status> {
        Ok(versioned(self.this_node()))
    }

    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        let this = self.clone();
        let found = tokio::task::spawn_blocking(move || this.namespaces()).await;
        Ok(versioned(found.map_err(|error| Status::internal(error.to_string()))?))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        Ok(versioned(self.status()))
    }
}

#[tonic::async_trait]
impl Peer for NodeObserver {
    type NotifyStream = Answers<ChangeNotification>;

    async fn notify(&self, _: Request<NotifyRequest>) -> Result<Response<Self::NotifyStream>, Status> {
        let state = (self.peers.clone(), None::<Peers>, self.slot()?);
        let changes = stream::unfold(state, async |(mut peers, told, slot)| {
            if told.is_some() {
                peers.changed().await.ok()?;
            }
            let now = peers.borrow_and_update().clone();
            let news = differences(told.as_ref().unwrap_or(&Peers::new()), &now);
            Some((news, (peers, Some(now), slot)))
        });
        Ok(versioned(changes.flat_map(|news| stream::iter(news.into_iter().map(Ok))).boxed()))
    }
}

/// The changes that lead from `told` to `now`.
fn differences(told: &Peers, now: &Peers) -> Vec<ChangeNotification> {
    let change = |name: &String, node: &PeerNode, r#type: ChangeNotificationType| ChangeNotification {
        name: name.clone(),
        address: node.address.clone(),
        r#type: r#type.into(),
        tls: node.server_name.clone().map(|server_name| peer::Tls { server_name }),
    };
    let gone = told.iter().filter(|(name, _)| !now.contains_key(*name));
    let gone = gone.map(|(name, node)| change(name, node, ChangeNotificationType::PeerDeleted));
    let there = now.iter().filter_map(|(name, node)| match told.get(name) {
        None => Some(change(name, node, ChangeNotificationType::PeerAdded)),
        Some(before) if before != node => Some(change(name, node, ChangeNotificationType::PeerUpdated)),
        Some(_) => None,
    });
    gone.chain(there).collect()
}

type DatedEvent = (jiff::Timestamp, super::proto::flow::AgentEvent);

/// The events that were asked for, of those that are kept.
fn choose(kept: Vec<DatedEvent>, request: &GetAgentEventsRequest) -> Vec<DatedEvent> {
    let since = request.since.as_ref().and_then(time);
    let until = request.until.as_ref().and_then(time);
    let is_bounded = since.is_some() || until.is_some();
    let is_in_time = |(at, _): &DatedEvent| {
        since.is_none_or(|since| *at >= since) && until.is_none_or(|until| *at <= until)
    };
    let mut chosen: Vec<DatedEvent> = kept.into_iter().filter(is_in_time).collect();
    let number = match request.number {
        _ if is_bounded => usize::MAX,
        0 if !request.follow => usize::MAX,
        number => usize::try_from(number).unwrap_or(usize::MAX),
    };
    let skipped = chosen.len().saturating_sub(number);
    if request.first {
        chosen.truncate(number);
    } else {
        chosen.drain(..skipped);
    }
    chosen
}

/// The answer with the header that says which version answered.
fn versioned<T>(answer: T) -> Response<T> {
    let mut response = Response::new(answer);
    if let Ok(version) = env!("CARGO_PKG_VERSION").parse() {
        response.metadata_mut().insert("weir-version", version);
    }
    response
}

/// The name of a node's certificate.
pub fn server_name(node: &str, cluster: &str) -> String {
    format!("{}.{cluster}.hubble-grpc.cilium.io", node.replace('.', "-"))
}

/// A node's name on the wire.
pub fn node_name(node: &str, cluster: &str) -> String {
    if cluster == DEFAULT_CLUSTER { node.to_owned() } else { format!("{cluster}/{node}") }
}

/// Often enough for whoever waits for new peers.
pub const PEERS_WITHIN: Duration = Duration::from_secs(2);
