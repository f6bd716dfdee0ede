//! What the operator sees of nodes: Node objects, WeirNodes, heartbeats.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use ipnet::IpNet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::reflector::{Store, store};
use kube::runtime::watcher::{Config, watcher};
use kube::runtime::{WatchStreamExt, reflector::store::Writer};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::warn;

use crate::kube::crd::WeirNode;
use crate::kube::heartbeat_name;

/// The server ends a watch after this long; one that is silent is noticed then.
const WATCH_SECONDS: u32 = 120;

/// Stores that watches keep filling, from full lists that are as new as the API server.
pub struct Stores {
    nodes: Store<Node>,
    weir_nodes: Store<WeirNode>,
    heartbeats: Store<Lease>,
}

/// Everything at one moment, by the node's name.
pub struct View {
    /// Node objects.
    pub nodes: BTreeMap<Arc<str>, Arc<Node>>,
    /// Those of agents and of the operator.
    pub weir_nodes: BTreeMap<Arc<str>, Arc<WeirNode>>,
    heartbeats: BTreeMap<String, Arc<Lease>>,
}

impl Stores {
    /// The stores, and what fills them until it is dropped. `changed` is told of nodes, not of heartbeats.
    pub fn follow(client: &Client, changed: Arc<Notify>) -> (Self, impl Future<Output = ()> + use<>) {
        let (nodes, to_nodes) = store();
        let (weir_nodes, to_weir_nodes) = store();
        let (heartbeats, to_heartbeats) = store();
        let drop_images = |node: &mut Node| {
            if let Some(status) = &mut node.status {
                status.images = None;
            }
        };
        let filling = [
            Box::pin(follow(Api::all(client.clone()), to_nodes, Some(changed.clone()), drop_images))
                as futures::future::BoxFuture<'static, ()>,
            Box::pin(follow(Api::all(client.clone()), to_weir_nodes, Some(changed), |_: &mut WeirNode| {})),
            Box::pin(follow(
                Api::default_namespaced(client.clone()),
                to_heartbeats,
                None,
                |_: &mut Lease| {},
            )),
        ];
        let filling = async { drop(futures::future::join_all(filling).await) };
        (Self { nodes, weir_nodes, heartbeats }, filling)
    }

    /// Waits for the first full lists.
    pub async fn wait(&self) -> Result<()> {
        let told = "the watches are running";
        self.nodes.wait_until_ready().await.context(told)?;
        self.weir_nodes.wait_until_ready().await.context(told)?;
        self.heartbeats.wait_until_ready().await.context(told)
    }

    /// Everything as it is now.
    pub fn view(&self) -> View {
        View {
            nodes: by_name(&self.nodes),
            weir_nodes: by_name(&self.weir_nodes),
            heartbeats: self.heartbeats.state().into_iter().map(|lease| (lease.name_any(), lease)).collect(),
        }
    }
}

fn by_name<K>(store: &Store<K>) -> BTreeMap<Arc<str>, Arc<K>>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.state().into_iter().map(|object| (object.name_any().into(), object)).collect()
}

/// Keeps a store as the API has it, for ever; a kind of somebody else's may be missing.
pub(super) async fn follow<K>(api: Api<K>, writer: Writer<K>, changed: Option<Arc<Notify>>, strip: fn(&mut K))
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let strip = move |object: &mut K| {
        object.meta_mut().managed_fields = None;
        strip(object);
    };
    let events = watcher(api, Config::default().timeout(WATCH_SECONDS)).default_backoff();
    let mut events = std::pin::pin!(events.modify(strip).reflect(writer));
    let mut is_well = true;
    while let Some(event) = events.next().await {
        match event {
            Ok(_) => {
                is_well = true;
                changed.iter().for_each(|changed| changed.notify_one());
            }
            // Once an outage.
            Err(error) => {
                if std::mem::take(&mut is_well) {
                    let error = crate::error::chain(&anyhow::Error::new(error));
                    warn!(kind = %K::kind(&()), error, "watching the API is interrupted");
                }
            }
        }
    }
    std::future::pending().await
}

impl View {
    /// The nodes of which there is anything.
    pub fn names(&self) -> BTreeSet<Arc<str>> {
        self.nodes.keys().chain(self.weir_nodes.keys()).cloned().collect()
    }

    /// `spec.podCIDRs` of the Node object.
    pub fn own_cidrs(&self, name: &str) -> Vec<IpNet> {
        let spec = self.nodes.get(name).and_then(|node| node.spec.as_ref());
        let many = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
        let one = spec.and_then(|spec| spec.pod_cidr.clone()).filter(|_| many.is_empty());
        parsed(many.iter().chain(&one))
    }

    /// `spec.podCIDRs` of the WeirNode: what an operator gave.
    pub fn given_cidrs(&self, name: &str) -> Vec<IpNet> {
        self.weir_nodes.get(name).map_or_else(Vec::new, |node| parsed(&node.spec.pod_cidrs))
    }

    /// What the agent says that its pods have addresses from.
    pub fn cidrs_in_use(&self, name: &str) -> Vec<IpNet> {
        let status = self.weir_nodes.get(name).and_then(|node| node.status.as_ref());
        status.map_or_else(Vec::new, |status| parsed(&status.pod_cidrs))
    }

    /// What the agent says it waits for.
    pub fn message(&self, name: &str) -> String {
        let status = self.weir_nodes.get(name).and_then(|node| node.status.as_ref());
        status.map(|status| status.message.clone()).unwrap_or_default()
    }

    /// The version of the heartbeat.
    fn heartbeat(&self, name: &str) -> Option<String> {
        self.heartbeats.get(&heartbeat_name(name))?.resource_version()
    }
}

fn parsed<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpNet> {
    texts.into_iter().filter_map(|text| Some(text.parse::<IpNet>().ok()?.trunc())).collect()
}

/// Whether the agent of a node lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// This operator heard of it in time.
    Alive,
    /// This operator has not heard of it, but has not listened for long enough to say so.
    Unknown,
    /// It has said nothing for too long.
    Silent,
}

/// Heartbeats as this operator heard them, by its own clock.
pub struct Heartbeats {
    stale_after: Duration,
    /// The last one, since when, and whether it was heard and not only found.
    heard: HashMap<Arc<str>, (Option<String>, Instant, bool)>,
}

impl Heartbeats {
    /// Found, not heard: what was sent before this operator listened.
    pub fn new(view: &View, stale_after: Duration) -> Self {
        let found = |name: Arc<str>| {
            let heartbeat = view.heartbeat(&name);
            (name, (heartbeat, Instant::now(), false))
        };
        Self { stale_after, heard: view.names().into_iter().map(found).collect() }
    }

    /// Listens, and says whether the agent of `name` lives.
    pub fn life(&mut self, view: &View, name: &Arc<str>) -> Life {
        let now = view.heartbeat(name);
        let known = self.heard.entry(name.clone()).or_insert_with(|| (None, Instant::now(), false));
        if known.0 != now && now.is_some() {
            *known = (now, Instant::now(), true);
        }
        match known {
            (_, since, _) if since.elapsed() >= self.stale_after => Life::Silent,
            (_, _, true) => Life::Alive,
            _ => Life::Unknown,
        }
    }

    /// The version of the last heartbeat.
    pub fn version(&self, name: &str) -> Option<String> {
        self.heard.get(name).and_then(|(version, _, _)| version.clone())
    }

    /// Forgets a node.
    pub fn forget(&mut self, name: &str) {
        self.heard.remove(name);
    }
}
