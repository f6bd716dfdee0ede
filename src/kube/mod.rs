//! Sources: the Kubernetes API, or a directory of the same YAML.
//!
//! Both fill the same [`Tables`]; nothing behind them can tell which it was. A table is
//! reset only by a complete list, and a source that is away changes nothing. What the
//! agent itself has to say (identities, endpoints) goes out through the [`Publisher`],
//! to the same place. Identities that nobody uses are deleted by the operator, and from a
//! directory by the agents' [`Collector`]s.
//!
//! ```text
//! API server ── api ────┐
//!                       ├─ kinds ── rows ──> Tables
//! directory ─ manifests ┘                      │ apply (claims)
//! API server, directory <── publish <── Publisher
//! ```

mod api;
pub mod args;
pub mod bootstrap;
pub mod check;
mod cilium;
mod claims;
mod collect;
mod convert;
pub mod crd;
mod document;
mod files;
pub mod foreign;
mod health;
mod joined;
mod kind;
mod kinds;
mod leases;
mod manifests;
mod publish;
mod rows;
mod unused;
pub mod upstream;
mod watched;

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

pub use collect::Collector;
pub use convert::FieldError;
pub use health::{Health, KindHealth, Report};
pub use kind::Kind;
pub(crate) use kind::ObjectKind;
pub(crate) use kinds::{Node as NodeKind, Service as ServiceKind, Visitor, visit_all};
pub use leases::{Board, Posted, Postings, announcer_name};
pub use publish::{Publisher, heartbeat_name};
pub(crate) use unused::Unused;
pub(crate) use watched::Watched;

use crate::model::{
    Allocation, Announcement, EgressPolicy, EndpointSlice, IdentityId, IdentityLabels, LocalRedirect,
    Namespace, Node, NodeEndpoints, ObjectKey, Pod, Policy, PolicyRef, Service,
};
use crate::policy;
use crate::tables::{Snapshot, State, Table};

/// Everything that the sources know, one table per kind.
#[derive(Default)]
pub struct Tables {
    /// By name.
    pub namespaces: Arc<Table<Arc<str>, Arc<Namespace>>>,
    /// From the Kubernetes API only this node's pods; from a directory all of them.
    pub pods: Arc<Table<ObjectKey, Arc<Pod>>>,
    /// By name: Node objects, with the operator's pod CIDRs where they have none of their own.
    pub nodes: Arc<Table<Arc<str>, Arc<Node>>>,
    /// Those with cluster IPs, and headless ones.
    pub services: Arc<Table<ObjectKey, Arc<Service>>>,
    /// By the slice's own name.
    pub slices: Arc<Table<ObjectKey, Arc<EndpointSlice>>>,
    /// NetworkPolicies; [`Tables::policy_sources`] has those of every kind.
    pub policies: Arc<Table<PolicyRef, Arc<Policy>>>,
    /// Those that any node claimed; this node's own at once.
    pub identities: Arc<Table<IdentityId, Arc<IdentityLabels>>>,
    /// By node, put together from as many objects as the node needs.
    pub node_endpoints: Arc<Table<Arc<str>, Arc<NodeEndpoints>>>,
    /// By node: what the operator gave.
    pub allocations: Arc<Table<Arc<str>, Arc<Allocation>>>,
    /// Identities that are to be claimed before a pod begins to use them, although they are in
    /// `identities`: they are marked as unused, or their object is gone while pods have them.
    pub to_claim: Arc<Table<IdentityId, ()>>,
    /// Policies that are not enforced, by where they were found.
    pub foreign: Arc<foreign::ForeignPolicies>,
    claims: claims::Claims,
    joining: joined::Joining,
    /// Of kinds that no field above names.
    others: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
}

/// A table with a row an object.
type ObjectTable<R> = Table<ObjectKey, Arc<R>>;

impl Tables {
    /// Empty tables, none of them synced.
    pub fn new() -> Self {
        Self::default()
    }

    /// Policies that lead what is for a Service to pods of the client's node.
    pub fn redirects(&self) -> Snapshot<ObjectKey, Arc<LocalRedirect>> {
        self.of::<kinds::CiliumLocalRedirectPolicy>().snapshot()
    }

    /// Policies that lead what pods send out of the cluster by a gateway.
    pub fn egress_policies(&self) -> Snapshot<ObjectKey, Arc<EgressPolicy>> {
        self.of::<kinds::CiliumEgressGatewayPolicy>().snapshot()
    }

    /// Which addresses of Services are answered on the link.
    pub fn announcements(&self) -> [Snapshot<ObjectKey, Arc<Announcement>>; 2] {
        [
            self.of::<kinds::LoadBalancerPool>().snapshot(),
            self.of::<kinds::CiliumL2AnnouncementPolicy>().snapshot(),
        ]
    }

    /// The table of a kind that has no field here.
    pub(crate) fn of<K: ObjectKind>(&self) -> Arc<ObjectTable<K::Row>> {
        let mut others = self.others.lock().expect("nobody panics while holding the lock");
        let table = others.entry(TypeId::of::<K>()).or_insert_with(|| Arc::new(ObjectTable::<K::Row>::new()));
        table.clone().downcast().expect("a kind has one type of rows")
    }

    /// The policies of every kind, as they were read.
    pub fn policy_sources(&self) -> policy::Sources {
        policy::Sources {
            network: self.policies.snapshot(),
            others: vec![
                self.of::<kinds::CiliumNetworkPolicy>().snapshot(),
                self.of::<kinds::CiliumClusterwideNetworkPolicy>().snapshot(),
                self.of::<kinds::ClusterNetworkPolicy>().snapshot(),
            ],
        }
    }

    /// What the names in policies stand for.
    pub fn policy_references(&self) -> policy::References {
        policy::References {
            groups: self.of::<kinds::CiliumCIDRGroup>().snapshot(),
            services: self.services.snapshot(),
            slices: self.slices.snapshot(),
            nodes: self.nodes.snapshot(),
            node_endpoints: self.node_endpoints.snapshot(),
        }
    }

    /// Every source has delivered its first full list.
    pub fn all_synced(self: &Arc<Self>) -> bool {
        self.receivers().iter().all(|table| table.borrow().is_synced)
    }

    /// Waits until every source has delivered its first full list.
    pub async fn wait_synced(self: &Arc<Self>) {
        for mut table in self.receivers() {
            // The sender lives as long as `self`.
            let _ = table.wait_for(|state| state.is_synced).await;
        }
    }

    /// Returns after the next change of any table. Take it before the snapshots that the
    /// change is to be compared with, and await it afterwards: then no change is missed.
    pub fn changed(self: &Arc<Self>) -> impl Future<Output = ()> + Send + use<> {
        let mut tables = self.receivers();
        async move {
            let changes = tables.iter_mut().map(|table| Box::pin(table.changed()));
            let _ = futures::future::select_all(changes).await;
        }
    }

    fn receivers(self: &Arc<Self>) -> Vec<watch::Receiver<State>> {
        let of_kinds = Kind::ALL.iter().map(|kind| kind.rows(self).subscribe());
        of_kinds.chain([self.to_claim.subscribe()]).collect()
    }
}

/// The policies that a file of manifests holds, of every kind; an error where something of it is no
/// policy, or cannot be read.
pub fn read_policies(text: &str) -> Result<Vec<crate::model::Policy>, String> {
    let documents = document::read(text).map_err(|error| error.to_string())?;
    let mut policies = Vec::new();
    for document::Document { line, content, .. } in documents {
        let object = match content {
            document::Content::Object(_, converted) => converted.row,
            document::Content::BrokenObject(id, error) => return Err(format!("line {line}: {id}: {error}")),
            document::Content::Broken(error) => return Err(format!("line {line}: {error}")),
            document::Content::Unknown(_) | document::Content::Foreign(_) => None,
        };
        let policy = object.and_then(|object| object.row::<Policy>());
        policies.extend(policy.map(|policy| Policy::clone(&policy)));
    }
    match policies.is_empty() {
        true => Err("holds no policy of a kind that is enforced".to_owned()),
        false => Ok(policies),
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
        Source::Kubernetes(client, node) => {
            let looking = foreign::run(client.clone(), tables.foreign.clone());
            tokio::join!(looking, api::run(client, &node, tables, health));
        }
        Source::Manifests(directory) => manifests::run(directory, tables, health).await,
    }
}
