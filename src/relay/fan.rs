//! One request to every node, and their answers merged by time.
//!
//! Each node has a lane with a bounded queue. The oldest head of all lanes goes out when every lane has a head, or
//! when it has waited long enough: a node that stalls, or whose clock is wrong, holds the others up for a moment only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tonic::Status;
use tonic::transport::Channel;

use super::nodes::{Link, View};
use crate::hubble::client::ANSWER_BYTES_MAX;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;
use crate::hubble::proto::observer::observer_client::ObserverClient;
use crate::hubble::proto::observer::{GetFlowsRequest, GetFlowsResponse};
use crate::hubble::proto::relay::{NodeState, NodeStatusEvent};
use crate::hubble::proto::{time, timestamp};

/// Answers of one node that wait.
const LANE: usize = 64;
/// Answers that a slow client lets wait.
const OUT: usize = 128;
/// A follower sees a flow at most so much later as others' clocks are behind.
const WINDOW: Duration = Duration::from_millis(500);
/// A node that gives no answer for so long, while the end is awaited, is left out.
const STALLED: Duration = Duration::from_secs(10);

/// A follower asks a node again that has broken off, after so long.
const AGAIN: Duration = Duration::from_secs(1);

type Answer = Result<GetFlowsResponse, Status>;

/// A request that is being answered.
pub struct Fan {
    nodes: watch::Receiver<View>,
    request: GetFlowsRequest,
    lanes: BTreeMap<String, Lane>,
    told: BTreeMap<String, NodeState>,
    /// When a node that is back goes on.
    seen: BTreeMap<String, Timestamp>,
    asking: JoinSet<()>,
    news: Arc<Notify>,
    out: mpsc::Sender<Answer>,
    is_first: bool,
    /// When a node whose answers ended too early is asked again.
    retry: Option<Instant>,
}

/// One node's answers.
struct Lane {
    answers: mpsc::Receiver<Answer>,
    head: Option<(GetFlowsResponse, Instant)>,
    heard: Instant,
}

/// The client went away.
struct Gone;

impl Fan {
    /// Starts to answer; the answers come from the receiver.
    pub fn start(nodes: watch::Receiver<View>, request: GetFlowsRequest) -> mpsc::Receiver<Answer> {
        let (out, answers) = mpsc::channel(OUT);
        let fan = Self {
            nodes,
            request,
            lanes: BTreeMap::new(),
            told: BTreeMap::new(),
            seen: BTreeMap::new(),
            asking: JoinSet::new(),
            news: Arc::new(Notify::new()),
            out,
            is_first: true,
            retry: None,
        };
        tokio::spawn(fan.run());
        answers
    }

    async fn run(mut self) {
        let gone = self.out.clone();
        // Whoever goes away while nothing happens ends it, too. An error is the client's absence alone.
        tokio::select! {
            _ = self.answer() => {}
            () = gone.closed() => {}
        }
    }

    async fn answer(&mut self) -> Result<(), Gone> {
        self.take_nodes().await?;
        loop {
            self.fill().await?;
            while let Some(name) = self.ready() {
                self.emit(&name).await?;
                self.fill().await?;
            }
            if self.lanes.is_empty() && !self.request.follow {
                return Ok(());
            }
            let wake = self
                .lanes
                .values()
                .filter_map(|lane| lane.head.as_ref())
                .map(|(_, at)| *at + self.patience());
            let wake = wake.chain(self.retry).min().unwrap_or_else(|| Instant::now() + STALLED);
            tokio::select! {
                () = self.news.notified() => {}
                () = tokio::time::sleep_until(wake.into()) => {
                    self.drop_stalled().await?;
                    if self.retry.take_if(|at| *at <= Instant::now()).is_some() {
                        self.take_nodes().await?;
                    }
                }
                changed = self.nodes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    if self.request.follow {
                        self.take_nodes().await?;
                    }
                }
            }
        }
    }

    fn patience(&self) -> Duration {
        if self.request.follow { WINDOW } else { STALLED }
    }

    /// Asks nodes that are new or back, and tells what has changed.
    async fn take_nodes(&mut self) -> Result<(), Gone> {
        let view = self.nodes.borrow_and_update().clone();
        let mut changes: BTreeMap<NodeState, Vec<(String, String)>> = BTreeMap::new();
        for (name, node) in &view {
            let (state, why) = match &node.link {
                Link::Up(channel) => {
                    if !self.lanes.contains_key(name)
                        && self.told.get(name) != Some(&NodeState::NodeConnected)
                    {
                        self.ask(name, channel.clone());
                    }
                    (NodeState::NodeConnected, String::new())
                }
                Link::Down(why) => (NodeState::NodeUnavailable, why.clone()),
                // A relay that has just started: the node's state comes next.
                Link::Connecting if self.request.follow => continue,
                Link::Connecting => (NodeState::NodeUnavailable, "it is being connected to".to_owned()),
            };
            if self.told.insert(name.clone(), state) != Some(state) {
                changes.entry(state).or_default().push((name.clone(), why));
            }
        }
        let gone: Vec<String> = self.told.keys().filter(|name| !view.contains_key(*name)).cloned().collect();
        for name in gone {
            self.told.remove(&name);
            changes.entry(NodeState::NodeGone).or_default().push((name, String::new()));
        }
        self.is_first = false;
        for (state, nodes) in changes {
            let message =
                nodes.iter().filter(|(_, why)| !why.is_empty()).map(|(name, why)| format!("{name}: {why}"));
            let message = message.collect::<Vec<_>>().join("; ");
            self.tell(state, nodes.into_iter().map(|(name, _)| name).collect(), message).await?;
        }
        Ok(())
    }

    /// A lane for a node. One that joins later shows what came since the request began or since it was last heard.
    fn ask(&mut self, name: &str, channel: Channel) {
        let mut request = self.request.clone();
        if !self.is_first && self.request.follow {
            let from = self
                .seen
                .get(name)
                .and_then(|seen| seen.checked_add(jiff::SignedDuration::from_nanos(1)).ok());
            request.since = Some(timestamp(from.unwrap_or_else(Timestamp::now)));
        }
        let (into, answers) = mpsc::channel(LANE);
        let news = self.news.clone();
        self.asking.spawn(async move {
            ask_node(channel, request, &into, &news).await;
            drop(into);
            news.notify_one();
        });
        self.lanes.insert(name.to_owned(), Lane { answers, head: None, heard: Instant::now() });
    }

    /// Takes a head for each lane that has none; ends lanes that are over.
    async fn fill(&mut self) -> Result<(), Gone> {
        while self.asking.try_join_next().is_some() {}
        let names: Vec<String> =
            self.lanes.iter().filter(|(_, lane)| lane.head.is_none()).map(|(name, _)| name.clone()).collect();
        for name in names {
            while let Some(lane) = self.lanes.get_mut(&name).filter(|lane| lane.head.is_none()) {
                match lane.answers.try_recv() {
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => self.end(&name),
                    Ok(Err(status)) => {
                        self.end(&name);
                        self.tell(NodeState::NodeError, vec![name.clone()], status.message().to_owned())
                            .await?;
                    }
                    Ok(Ok(answer)) => {
                        lane.heard = Instant::now();
                        match answer.response_types {
                            Some(ResponseTypes::Flow(_)) => lane.head = Some((answer, Instant::now())),
                            // Of no time that would have to be waited for.
                            _ => self.send(answer).await?,
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// A node's answers are over. A follower asks again: the channel may have mended itself.
    fn end(&mut self, name: &str) {
        self.lanes.remove(name);
        if self.request.follow && self.told.remove(name).is_some() {
            self.retry.get_or_insert_with(|| Instant::now() + AGAIN);
        }
    }

    /// The lane whose head goes out now, if one does.
    fn ready(&self) -> Option<String> {
        let heads = self.lanes.iter().filter_map(|(name, lane)| Some((name, lane.head.as_ref()?)));
        let stamp = |answer: &GetFlowsResponse| answer.time.map(|time| (time.seconds, time.nanos));
        let (name, (_, since)) = heads.min_by_key(|(_, (answer, _))| stamp(answer))?;
        let is_complete = self.lanes.values().all(|lane| lane.head.is_some());
        let oldest_wait =
            self.lanes.values().filter_map(|lane| lane.head.as_ref()).map(|(_, at)| at.elapsed()).max();
        let has_waited = since.elapsed() >= self.patience() || oldest_wait >= Some(self.patience());
        (is_complete || has_waited).then(|| name.clone())
    }

    async fn emit(&mut self, name: &str) -> Result<(), Gone> {
        let head = self.lanes.get_mut(name).and_then(|lane| lane.head.take());
        let Some((mut answer, _)) = head else { return Ok(()) };
        if let Some(at) = answer.time.as_ref().and_then(time) {
            self.seen.insert(name.to_owned(), at);
        }
        // A node speaks for itself alone.
        if answer.node_name != name {
            name.clone_into(&mut answer.node_name);
            if let Some(ResponseTypes::Flow(flow)) = &mut answer.response_types {
                name.clone_into(&mut flow.node_name);
            }
        }
        self.send(answer).await
    }

    /// Where the end is awaited, a node that is silent must not be.
    async fn drop_stalled(&mut self) -> Result<(), Gone> {
        if self.request.follow {
            return Ok(());
        }
        let is_stalled = |lane: &Lane| lane.head.is_none() && lane.heard.elapsed() >= STALLED;
        let stalled: Vec<String> =
            self.lanes.iter().filter(|(_, lane)| is_stalled(lane)).map(|(name, _)| name.clone()).collect();
        for name in stalled {
            self.lanes.remove(&name);
            let words = format!("no answer for {} s", STALLED.as_secs());
            self.tell(NodeState::NodeError, vec![name], words).await?;
        }
        Ok(())
    }

    async fn tell(&self, state: NodeState, node_names: Vec<String>, message: String) -> Result<(), Gone> {
        let event = NodeStatusEvent { state_change: state.into(), node_names, message };
        self.send(GetFlowsResponse {
            response_types: Some(ResponseTypes::NodeStatus(event)),
            node_name: String::new(),
            time: Some(timestamp(Timestamp::now())),
        })
        .await
    }

    async fn send(&self, answer: GetFlowsResponse) -> Result<(), Gone> {
        self.out.send(Ok(answer)).await.map_err(|_| Gone)
    }
}

/// Passes one node's answers on until they end.
async fn ask_node(channel: Channel, request: GetFlowsRequest, into: &mpsc::Sender<Answer>, news: &Notify) {
    let mut client = ObserverClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    let mut answers = match client.get_flows(request).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return drop(into.send(Err(status)).await),
    };
    loop {
        let answer = match answers.message().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => return,
            Err(status) => Err(status),
        };
        let is_last = answer.is_err();
        if into.send(answer).await.is_err() || is_last {
            return;
        }
        news.notify_one();
    }
}
