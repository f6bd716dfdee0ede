//! The nodes, each with a connection that is kept and tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use crate::hubble::client::{connect, connect_socket};
use crate::hubble::proto::observer::observer_client::ObserverClient;
use crate::hubble::proto::observer::{ServerStatusRequest, ServerStatusResponse};
use crate::hubble::proto::peer::peer_client::PeerClient;
use crate::hubble::proto::peer::{ChangeNotification, ChangeNotificationType, NotifyRequest};
use crate::hubble::tls::Identity;

/// A node is asked so often how it is.
const HEALTH_EVERY: Duration = Duration::from_secs(5);
/// An answer that takes longer is none.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The waits between attempts to reach a node double from the first to the second.
const RETRY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];
/// The whole list of peers has come when nothing follows for so long.
const LISTED_WITHIN: Duration = Duration::from_secs(2);
/// A peer service that names more nodes than any cluster has is not believed.
const NODES_MAX: usize = 20_000;

/// Where nodes are learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Host and port, and the name of the certificate.
    Address(String, String),
    /// An agent's own socket.
    Socket(PathBuf),
}

/// How a node can be asked.
#[derive(Clone, Debug)]
pub enum Link {
    /// It has not been reached yet.
    Connecting,
    /// It answers.
    Up(Channel),
    /// It does not, and why.
    Down(String),
}

/// A node as requests see it.
#[derive(Clone, Debug)]
pub struct Node {
    /// Host and port of its observer.
    pub address: String,
    /// The name of its certificate; `None`: plain text.
    pub server_name: Option<String>,
    /// How it can be asked.
    pub link: Link,
    /// What it said of itself last.
    pub status: ServerStatusResponse,
}

/// Every node by its name.
pub type View = BTreeMap<String, Node>;

/// Follows the peers and keeps the connections.
#[derive(Clone)]
pub struct Nodes {
    view: Arc<watch::Sender<View>>,
    identity: Option<Arc<Identity>>,
}

impl Nodes {
    /// None yet. `identity` is for nodes with TLS.
    pub fn new(identity: Option<Arc<Identity>>) -> Self {
        Self { view: Arc::new(watch::Sender::new(View::new())), identity }
    }

    /// The nodes, now and as they change.
    pub fn subscribe(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// A node that stays, reached in plain text.
    pub fn add(&self, name: &str, address: &str) {
        let change = ChangeNotification {
            name: name.to_owned(),
            address: address.to_owned(),
            r#type: ChangeNotificationType::PeerAdded.into(),
            tls: None,
        };
        self.change(change, &mut BTreeMap::new());
    }

    /// Follows the list of nodes for ever.
    pub async fn follow(self, target: Target) {
        let mut kept = BTreeMap::new();
        let mut wait = RETRY[0];
        loop {
            match self.listen(&target, &mut kept).await {
                Ok(()) => wait = RETRY[0],
                Err(error) => {
                    tracing::warn!(error = crate::error::chain(&error), "the list of nodes is not to be had");
                }
            }
            sleep(wait).await;
            wait = (wait * 2).min(RETRY[1] / 6);
        }
    }

    async fn listen(&self, target: &Target, kept: &mut BTreeMap<String, AbortHandle>) -> Result<()> {
        let channel = match target {
            Target::Socket(path) => connect_socket(path).await?,
            Target::Address(address, name) => connect(address, self.identity.as_deref(), Some(name)).await?,
        };
        let answer = timeout(ANSWER_WITHIN, PeerClient::new(channel).notify(NotifyRequest {})).await;
        let mut changes =
            answer.context("asking for the nodes")?.context("asking for the nodes")?.into_inner();
        // What is not listed again is gone: it went while nobody listened.
        let mut unheard: BTreeSet<String> = kept.keys().cloned().collect();
        loop {
            let message = match unheard.is_empty() {
                true => Ok(changes.message().await),
                false => timeout(LISTED_WITHIN, changes.message()).await,
            };
            match message {
                Err(_) => {
                    for name in std::mem::take(&mut unheard) {
                        self.remove(&name, kept);
                    }
                }
                Ok(change) => {
                    let Some(change) = change.context("hearing of nodes")? else { return Ok(()) };
                    unheard.remove(&change.name);
                    self.change(change, kept);
                }
            }
        }
    }

    fn change(&self, change: ChangeNotification, kept: &mut BTreeMap<String, AbortHandle>) {
        if change.r#type == i32::from(ChangeNotificationType::PeerDeleted) {
            return self.remove(&change.name, kept);
        }
        let server_name = change.tls.map(|tls| tls.server_name);
        let is_same = self
            .view
            .borrow()
            .get(&change.name)
            .is_some_and(|node| node.address == change.address && node.server_name == server_name);
        if is_same || kept.len() >= NODES_MAX || change.name.is_empty() {
            return;
        }
        let node = Node {
            address: change.address,
            server_name,
            link: Link::Connecting,
            status: ServerStatusResponse::default(),
        };
        let keeping = tokio::spawn(self.clone().keep(change.name.clone(), node.clone())).abort_handle();
        if let Some(before) = kept.insert(change.name.clone(), keeping) {
            before.abort();
        }
        self.view.send_modify(|view| drop(view.insert(change.name, node)));
    }

    fn remove(&self, name: &str, kept: &mut BTreeMap<String, AbortHandle>) {
        if let Some(keeping) = kept.remove(name) {
            keeping.abort();
        }
        self.view.send_modify(|view| drop(view.remove(name)));
    }

    /// Keeps one node's connection for ever.
    async fn keep(self, name: String, node: Node) {
        let mut wait = RETRY[0];
        loop {
            let identity = self.identity.as_deref().filter(|_| node.server_name.is_some());
            let error = match connect(&node.address, identity, node.server_name.as_deref()).await {
                Ok(channel) => self.watch(&name, channel, &mut wait).await,
                Err(error) => crate::error::chain(&error),
            };
            self.set(&name, Link::Down(error), None);
            sleep(wait).await;
            wait = (wait * 2).min(RETRY[1]);
        }
    }

    /// Asks a node how it is until it does not answer; returns why.
    async fn watch(&self, name: &str, channel: Channel, wait: &mut Duration) -> String {
        let mut client = ObserverClient::new(channel.clone());
        loop {
            match timeout(ANSWER_WITHIN, client.server_status(ServerStatusRequest {})).await {
                Err(_) => return "it does not answer".to_owned(),
                Ok(Err(status)) => return status.message().to_owned(),
                Ok(Ok(status)) => self.set(name, Link::Up(channel.clone()), Some(status.into_inner())),
            }
            *wait = RETRY[0];
            sleep(HEALTH_EVERY).await;
        }
    }

    /// Wakes requests only where the link has changed: a status is news for nobody.
    fn set(&self, name: &str, link: Link, status: Option<ServerStatusResponse>) {
        self.view.send_if_modified(|view| {
            let Some(node) = view.get_mut(name) else { return false };
            let is_same = match (&node.link, &link) {
                (Link::Up(_), Link::Up(_)) => true,
                (Link::Down(before), Link::Down(now)) => before == now,
                _ => false,
            };
            if !is_same {
                node.link = link;
            }
            if let Some(status) = status {
                node.status = status;
            }
            !is_same
        });
    }
}
