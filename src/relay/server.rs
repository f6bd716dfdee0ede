//! What the relay answers: observer.Observer for all nodes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::{StreamExt, stream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::fan::Fan;
use super::metrics::Counts;
use super::nodes::{Link, Nodes};
use crate::hubble::filter::Filters;
use crate::hubble::mask::Mask;
use crate::hubble::page::Flows;
use crate::hubble::proto::observer::observer_client::ObserverClient;
use crate::hubble::proto::observer::observer_server::{Observer, ObserverServer};
use crate::hubble::proto::observer::{
    GetAgentEventsRequest, GetAgentEventsResponse, GetDebugEventsRequest, GetDebugEventsResponse,
    GetFlowsRequest, GetFlowsResponse, GetNamespacesRequest, GetNamespacesResponse, GetNodesRequest,
    GetNodesResponse, Namespace, Node, ServerStatusRequest, ServerStatusResponse, Tls,
};
use crate::hubble::proto::relay::NodeState;
use crate::hubble::serve::{REQUEST_BYTES_MAX, common_routes};
use crate::hubble::service::Answers;

/// Requests that are answered at once.
const STREAMS_MAX: usize = 128;
/// A node that takes longer is left out of an answer that is a list.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Nodes that are named as unavailable; the number is exact in any case.
const UNAVAILABLE_NAMED: usize = 10;

/// Answers for all nodes.
#[derive(Clone)]
pub struct Relay {
    nodes: Nodes,
    streams: Arc<Semaphore>,
    counts: Counts,
}

impl Relay {
    /// Asks these nodes.
    pub fn new(nodes: Nodes) -> Self {
        Self { nodes, streams: Arc::new(Semaphore::new(STREAMS_MAX)), counts: Counts::default() }
    }

    /// Every service of a relay.
    pub async fn routes(&self) -> Result<Routes> {
        let observer = ObserverServer::new(self.clone()).max_decoding_message_size(REQUEST_BYTES_MAX);
        Ok(common_routes().await?.add_service(observer))
    }

    fn up(&self) -> Vec<Channel> {
        let view = self.nodes.subscribe().borrow().clone();
        let channel = |node: super::nodes::Node| match node.link {
            Link::Up(channel) => Some(channel),
            _ => None,
        };
        view.into_values().filter_map(channel).collect()
    }

    /// What clients were told.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Requests that are being answered.
    pub fn busy(&self) -> usize {
        STREAMS_MAX - self.streams.available_permits()
    }

    fn answers(&self, request: GetFlowsRequest) -> Result<Answers<GetFlowsResponse>, Status> {
        let slot = self.slot()?;
        // A bad request is refused once, not by every node.
        let bad = |error: &dyn std::fmt::Display| Status::invalid_argument(error.to_string());
        Filters::new(&request.whitelist, &request.blacklist).map_err(|error| bad(&error))?;
        let paths = request.field_mask.as_ref().map(|mask| mask.paths.as_slice()).unwrap_or_default();
        Mask::new(paths).map_err(|error| bad(&error))?;
        if request.first && request.follow {
            return Err(Status::invalid_argument("first and follow exclude each other"));
        }
        let answers = ReceiverStream::new(Fan::start(self.nodes.subscribe(), request));
        let counts = self.counts.clone();
        Ok(answers
            .map(move |answer| {
                let _for_as_long = &slot;
                answer.inspect(|answer| counts.answer(answer))
            })
            .boxed())
    }

    fn slot(&self) -> Result<tokio::sync::OwnedSemaphorePermit, Status> {
        self.streams
            .clone()
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted(format!("{STREAMS_MAX} requests are being answered")))
    }
}

#[tonic::async_trait]
impl Flows for Relay {
    fn flows(&self, request: GetFlowsRequest) -> Result<Answers<GetFlowsResponse>, Status> {
        self.counts.requests.inc();
        self.answers(request).inspect_err(|_| {
            self.counts.refused.inc();
        })
    }

    async fn status(&self) -> ServerStatusResponse {
        let view = self.nodes.subscribe().borrow().clone();
        let is_up = |link: &Link| matches!(link, Link::Up(_));
        let mut sum = ServerStatusResponse {
            version: format!("Weir {}", env!("CARGO_PKG_VERSION")),
            ..ServerStatusResponse::default()
        };
        for node in view.values().filter(|node| is_up(&node.link)) {
            sum.num_flows += node.status.num_flows;
            sum.max_flows += node.status.max_flows;
            sum.seen_flows += node.status.seen_flows;
            sum.flows_rate += node.status.flows_rate;
            sum.uptime_ns = sum.uptime_ns.max(node.status.uptime_ns);
        }
        let away: Vec<&String> =
            view.iter().filter(|(_, node)| !is_up(&node.link)).map(|(name, _)| name).collect();
        let number = |count: usize| Some(u32::try_from(count).unwrap_or(u32::MAX));
        sum.num_connected_nodes = number(view.len() - away.len());
        sum.num_unavailable_nodes = number(away.len());
        sum.unavailable_nodes = away.into_iter().take(UNAVAILABLE_NAMED).cloned().collect();
        sum
    }

    async fn nodes(&self) -> GetNodesResponse {
        let view = self.nodes.subscribe().borrow().clone();
        let node = |(name, node): (String, super::nodes::Node)| Node {
            name,
            version: node.status.version,
            address: node.address,
            state: match node.link {
                Link::Up(_) => NodeState::NodeConnected,
                Link::Down(_) | Link::Connecting => NodeState::NodeUnavailable,
            }
            .into(),
            tls: Some(Tls {
                enabled: node.server_name.is_some(),
                server_name: node.server_name.unwrap_or_default(),
            }),
            uptime_ns: node.status.uptime_ns,
            num_flows: node.status.num_flows,
            max_flows: node.status.max_flows,
            seen_flows: node.status.seen_flows,
        };
        GetNodesResponse { nodes: view.into_iter().map(node).collect() }
    }
}

#[tonic::async_trait]
impl Observer for Relay {
    type GetFlowsStream = Answers<GetFlowsResponse>;
    type GetAgentEventsStream = Answers<GetAgentEventsResponse>;
    type GetDebugEventsStream = Answers<GetDebugEventsResponse>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<Self::GetFlowsStream>, Status> {
        Ok(Response::new(self.flows(request.into_inner())?))
    }

    async fn get_agent_events(
        &self,
        request: Request<GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        let slot = self.slot()?;
        let request = request.into_inner();
        let mut streams = Vec::new();
        for channel in self.up() {
            let mut client = ObserverClient::new(channel);
            if let Ok(Ok(answers)) = timeout(ANSWER_WITHIN, client.get_agent_events(request)).await {
                streams.push(answers.into_inner());
            }
        }
        let all = stream::select_all(streams).map(move |answer| {
            let _for_as_long = &slot;
            answer
        });
        Ok(Response::new(all.boxed()))
    }

    async fn get_debug_events(
        &self,
        request: Request<GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        let follow = request.into_inner().follow;
        Ok(Response::new(if follow { stream::pending().boxed() } else { stream::empty().boxed() }))
    }

    async fn get_nodes(&self, _: Request<GetNodesRequest>) -> Result<Response<GetNodesResponse>, Status> {
        Ok(Response::new(Flows::nodes(self).await))
    }

    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        let ask = |channel: Channel| async move {
            let mut client = ObserverClient::new(channel);
            timeout(ANSWER_WITHIN, client.get_namespaces(GetNamespacesRequest {})).await
        };
        let answers = futures::future::join_all(self.up().into_iter().map(ask)).await;
        let all = answers.into_iter().flatten().flatten().flat_map(|answer| answer.into_inner().namespaces);
        let all: BTreeSet<(String, String)> = all.map(|found| (found.cluster, found.namespace)).collect();
        let namespaces = all.into_iter().map(|(cluster, namespace)| Namespace { cluster, namespace });
        Ok(Response::new(GetNamespacesResponse { namespaces: namespaces.collect() }))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        Ok(Response::new(Flows::status(self).await))
    }
}
