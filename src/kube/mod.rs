//! Sources: the Kubernetes API, or a directory of the same YAML.
//!
//! Both fill the same [`Tables`]; nothing behind them can tell which it was. A table is
//! reset only by a complete list, and a source that is away changes nothing. What the
//! agent itself has to say (identities, endpoints) goes out through the [`Publisher`],
//! to the same place. Identities that nobody uses are deleted by the operator, and from a
//! directory by the agents' [`Collector`]s.
//!
//! ```text
//! API server ── api ──┐
//!                     ├─ convert ── sink ──> Tables
//! directory ─ manifests ┘                      │ apply (claims)
//! API server, directory <── publish <── Publisher
//! ```

mod api;
pub mod bootstrap;
mod claims;
mod collect;
mod convert;
pub mod crd;
mod document;
mod files;
mod health;
mod joined;
mod manifests;
mod publish;
mod sink;
mod unused;
mod watched;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

pub use collect::Collector;
pub use convert::{FieldError, Kind};
pub use health::{Health, KindHealth, Report};
pub use publish::{Publisher, heartbeat_name};
pub(crate) use unused::Unused;
pub(crate) use watched::{Watchable, Watched};

use crate::model::{
    Allocation, EndpointSlice, IdentityId, IdentityLabels, Namespace, Node, NodeEndpoints, ObjectKey, Pod,
    Policy, PolicyRef, Service,
};
use crate::tables::{State, Table};

/// Everything that the sources know, one table per kind.
#[derive(Default)]
pub struct Tables {
    /// By name.
    pub namespaces: Table<Arc<str>, Arc<Namespace>>,
    /// From the Kubernetes API only this node's pods; from a directory all of them.
    pub pods: Table<ObjectKey, Arc<Pod>>,
    /// By name: Node objects, with the operator's pod CIDRs where they have none of their own.
    pub nodes: Table<Arc<str>, Arc<Node>>,
    /// Those with cluster IPs, and headless ones.
    pub services: Table<ObjectKey, Arc<Service>>,
    /// By the slice's own name.
    pub slices: Table<ObjectKey, Arc<EndpointSlice>>,
    /// Of every kind.
    pub policies: Table<PolicyRef, Arc<Policy>>,
    /// Those that any node claimed; this node's own at once.
    pub identities: Table<IdentityId, Arc<IdentityLabels>>,
    /// By node, put together from as many objects as the node needs.
    pub node_endpoints: Table<Arc<str>, Arc<NodeEndpoints>>,
    /// By node: what the operator gave.
    pub allocations: Table<Arc<str>, Arc<Allocation>>,
    /// Identities that are to be claimed before a pod begins to use them, although they are in
    /// `identities`: they are marked as unused, or their object is gone while pods have them.
    pub to_claim: Table<IdentityId, ()>,
    claims: claims::Claims,
    joining: joined::Joining,
}

impl Tables {
    /// Empty tables, none of them synced.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every source has delivered its first full list.
    pub fn all_synced(&self) -> bool {
        self.receivers().iter().all(|table| table.borrow().is_synced)
    }

    /// Waits until every source has delivered its first full list.
    pub async fn wait_synced(&self) {
        for mut table in self.receivers() {
            // The sender lives as long as `self`.
            let _ = table.wait_for(|state| state.is_synced).await;
        }
    }

    /// Returns after the next change of any table. Take it before the snapshots that the
    /// change is to be compared with, and await it afterwards: then no change is missed.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut tables = self.receivers();
        async move {
            let changes = tables.iter_mut().map(|table| Box::pin(table.changed()));
            let _ = futures::future::select_all(changes).await;
        }
    }

    fn receivers(&self) -> [watch::Receiver<State>; 9] {
        [
            self.namespaces.subscribe(),
            self.pods.subscribe(),
            self.nodes.subscribe(),
            self.services.subscribe(),
            self.slices.subscribe(),
            self.policies.subscribe(),
            self.identities.subscribe(),
            self.node_endpoints.subscribe(),
            self.to_claim.subscribe(),
        ]
    }
}

/// Where objects come from, and where the agent's own go.
#[derive(Clone)]
pub enum Source {
    /// An API server, and the node whose pods are wanted.
    Kubernetes(kube::Client, String),
    /// A directory of YAML files.
    Manifests(PathBuf),
}

/// Keeps `tables` equal to what the source says. Never returns.
pub async fn run(source: Source, tables: Arc<Tables>, health: Arc<Health>) {
    match source {
        Source::Kubernetes(client, node) => api::run(client, &node, tables, health).await,
        Source::Manifests(directory) => manifests::run(directory, tables, health).await,
    }
}
