//! What this agent tells the others: identities that it claims, endpoints that it has, and
//! how its node is.
//!
//! All of it goes to where the objects come from. The API server, or the file system, is the
//! only arbiter of who owns a number: whoever creates the object of that name first.

mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::Mutex;
use tracing::{debug, info, warn};

pub use node::heartbeat_name;

use super::convert::is_object_name;
use super::crd::{Endpoint, Identity, IdentitySpec, NodeEndpointsSpec};
use super::files::{Claim, Files, to_yaml};
use super::{Source, Tables, crd};
use crate::identity;
use crate::model::{IdentityId, IdentityLabels, NodeEndpoints, ObjectKey, PublishedEndpoint};

/// Endpoints in one object at most: it stays far below what an API server stores.
const ENDPOINTS_PER_OBJECT: usize = 200;
/// Numbers to try for one set of labels. With a million identities in 2^24 numbers, 64
/// taken ones in a row have a probability below 10^-77.
const ATTEMPTS_MAX: u32 = 64;
/// What the source does not show again after this long is sent again.
const RESEND: Duration = Duration::from_secs(10);
/// Owner of the fields that we apply.
const FIELD_MANAGER: &str = "weir-agent";

/// Writes this agent's objects to where its source reads.
pub struct Publisher {
    target: Target,
    node: String,
    tables: Arc<Tables>,
    number: fn(&IdentityLabels, u32) -> IdentityId,
    packing: Mutex<Packing>,
}

// There is one.
#[allow(clippy::large_enum_variant)]
enum Target {
    Kubernetes {
        identities: Api<Identity>,
        endpoints: Api<crd::NodeEndpoints>,
        nodes: Api<crd::WeirNode>,
        heartbeats: Api<Lease>,
    },
    Manifests(Files),
}

impl Publisher {
    /// A publisher for `node` to where `source` reads; `tables` show claims at once.
    pub fn new(source: &Source, node: &str, tables: Arc<Tables>) -> Result<Self> {
        ensure!(is_object_name(node), "{node:?} is not a node's name");
        let target = match source {
            Source::Kubernetes(client, _) => Target::Kubernetes {
                identities: Api::all(client.clone()),
                endpoints: Api::all(client.clone()),
                nodes: Api::all(client.clone()),
                heartbeats: Api::default_namespaced(client.clone()),
            },
            Source::Manifests(directory) => Target::Manifests(Files::new(directory, node)?),
        };
        let node = node.to_owned();
        Ok(Self { target, node, tables, number: identity::number, packing: Mutex::default() })
    }

    /// The number that stands for `labels` in the whole cluster; claims one when there is
    /// none. It is in the identities table when this returns.
    pub async fn claim_identity(&self, labels: &IdentityLabels) -> Result<IdentityId> {
        let mut attempt = 0;
        let mut gone = 0;
        while attempt < ATTEMPTS_MAX {
            let id = (self.number)(labels, attempt);
            match self.tables.identities.get(&id) {
                Some(known) if *known != *labels => {
                    attempt += 1;
                    continue;
                }
                Some(_) if self.tables.to_claim.get(&id).is_none() => return Ok(id),
                Some(_) | None => {}
            }
            let claim = match &self.target {
                Target::Kubernetes { identities, .. } => create_object(identities, id, labels).await,
                Target::Manifests(files) => {
                    let (files, labels) = (files.clone(), labels.clone());
                    tokio::task::spawn_blocking(move || files.claim(id, &labels)).await?
                }
            };
            match claim.with_context(|| format!("claiming identity {id}"))? {
                Claim::Ours => {
                    self.tables.apply_claim(id, Arc::new(labels.clone()));
                    info!(identity = id.0, namespace = labels.namespace, "identity claimed");
                    return Ok(id);
                }
                Claim::Taken => attempt += 1,
                Claim::Gone if gone < ATTEMPTS_MAX => gone += 1,
                Claim::Gone => break,
            }
        }
        bail!("claiming an identity: no free number after {ATTEMPTS_MAX} attempts")
    }

    /// Makes the other nodes see exactly these endpoints of this node. Writes only what
    /// changed, or what is not shown by the source a while after it was written.
    pub async fn publish_endpoints(&self, all: &NodeEndpoints) -> Result<()> {
        ensure!(all.node == self.node, "publishing endpoints of {} as {}", all.node, self.node);
        let mut packing = self.packing.lock().await;
        let parts = packing.pack(all);
        match &self.target {
            Target::Kubernetes { endpoints, .. } => {
                // Somebody deleted or changed an object.
                if packing.sent_at.is_some_and(|at| at.elapsed() > RESEND) && !self.is_shown(all) {
                    packing.sent.clear();
                }
                self.send(endpoints, &mut packing, parts).await
            }
            Target::Manifests(files) => {
                let files = files.clone();
                let objects = parts.into_iter().enumerate().map(|(number, spec)| self.object(number, spec));
                let text = to_yaml(objects)?;
                tokio::task::spawn_blocking(move || files.publish(&text)).await?
            }
        }
    }

    async fn send(
        &self,
        api: &Api<crd::NodeEndpoints>,
        packing: &mut Packing,
        parts: Vec<NodeEndpointsSpec>,
    ) -> Result<()> {
        let count = parts.len();
        for (number, spec) in parts.into_iter().enumerate() {
            if packing.sent.get(number) == Some(&spec) {
                continue;
            }
            let object = self.object(number, spec.clone());
            let name = format!("{}-{number}", self.node);
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            api.patch(&name, &parameters, &Patch::Apply(&object))
                .await
                .with_context(|| format!("applying {name}"))?;
            match packing.sent.get_mut(number) {
                Some(sent) => *sent = spec,
                None => packing.sent.push(spec),
            }
            packing.sent_at = Some(Instant::now());
            debug!(object = name, "endpoints published");
        }
        // An earlier run of the agent may have left more objects: they are numbered without a gap.
        let mut number = count;
        while number < packing.sent.len() || !packing.is_clean {
            let name = format!("{}-{number}", self.node);
            match api.delete(&name, &DeleteParams::default()).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    packing.is_clean |= number >= packing.sent.len();
                }
                Err(error) => return Err(error).with_context(|| format!("deleting {name}")),
            }
            number += 1;
        }
        packing.sent.truncate(count);
        Ok(())
    }

    /// Sends everything again with the next `publish_endpoints`.
    pub async fn forget_sent(&self) {
        self.packing.lock().await.sent.clear();
    }

    /// Whether the source shows what was published.
    pub fn is_shown(&self, all: &NodeEndpoints) -> bool {
        let shown = self.tables.node_endpoints.get(&Arc::from(self.node.as_str()));
        // A definition of before drops workloads, which nothing but flows' names needs.
        let told = |endpoint: &PublishedEndpoint| PublishedEndpoint { workload: None, ..endpoint.clone() };
        let sorted = |all: &NodeEndpoints| {
            let endpoints: BTreeMap<_, _> =
                all.endpoints.iter().map(|endpoint| (endpoint.pod.clone(), told(endpoint))).collect();
            let addresses: BTreeSet<_> = all.internal_addresses.iter().copied().collect();
            (endpoints, addresses)
        };
        shown.is_some_and(|shown| sorted(&shown) == sorted(all))
    }

    fn object(&self, number: usize, spec: NodeEndpointsSpec) -> crd::NodeEndpoints {
        crd::NodeEndpoints::new(&format!("{}-{number}", self.node), spec)
    }
}

/// Which object each pod is in. A pod stays in its object, so that one pod's event
/// rewrites one object.
#[derive(Default)]
struct Packing {
    part_of: BTreeMap<ObjectKey, usize>,
    sent: Vec<NodeEndpointsSpec>,
    /// No object of an earlier run is left.
    is_clean: bool,
    sent_at: Option<Instant>,
}

impl Packing {
    /// The objects for these endpoints; the first is always there.
    fn pack(&mut self, all: &NodeEndpoints) -> Vec<NodeEndpointsSpec> {
        let wanted: BTreeMap<&ObjectKey, _> =
            all.endpoints.iter().map(|endpoint| (&endpoint.pod, endpoint)).collect();
        self.part_of.retain(|pod, _| wanted.contains_key(pod));
        let mut counts = vec![0];
        for part in self.part_of.values() {
            counts.resize(counts.len().max(part + 1), 0);
            counts[*part] += 1;
        }
        for pod in wanted.keys() {
            if !self.part_of.contains_key(*pod) {
                let part =
                    counts.iter().position(|count| *count < ENDPOINTS_PER_OBJECT).unwrap_or(counts.len());
                counts.resize(counts.len().max(part + 1), 0);
                counts[part] += 1;
                self.part_of.insert((*pod).clone(), part);
            }
        }
        let empty =
            NodeEndpointsSpec { node: all.node.clone(), internal_addresses: vec![], endpoints: vec![] };
        let mut parts = vec![empty; counts.len()];
        parts[0].internal_addresses = all.internal_addresses.iter().map(ToString::to_string).collect();
        for (pod, part) in &self.part_of {
            parts[*part].endpoints.extend(wanted.get(pod).map(|endpoint| Endpoint::from(*endpoint)));
        }
        parts
    }
}

async fn create_object(api: &Api<Identity>, id: IdentityId, labels: &IdentityLabels) -> Result<Claim> {
    let object = Identity::new(&id.to_string(), IdentitySpec::from(labels));
    let parameters = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    match api.create(&parameters, &object).await {
        Ok(_) => return Ok(Claim::Ours),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(error) => return Err(error).context("creating the object"),
    }
    match api.get_opt(&id.to_string()).await {
        Ok(Some(there)) if there.spec == object.spec => keep_object(api, &there).await,
        Ok(Some(_)) => Ok(Claim::Taken),
        Ok(None) => Ok(Claim::Gone),
        Err(kube::Error::SerdeError(error)) => {
            warn!(identity = id.0, %error, "an identity is unreadable; taking another number");
            Ok(Claim::Taken)
        }
        Err(error) => Err(error).context("reading the object that is there"),
    }
}

/// Takes the operator's mark away, so that its deletion of the object as it was cannot succeed.
async fn keep_object(api: &Api<Identity>, there: &Identity) -> Result<Claim> {
    if !there.annotations().contains_key(crd::UNUSED_SINCE) {
        return Ok(Claim::Ours);
    }
    let metadata = json!({
        "uid": there.uid(),
        "resourceVersion": there.resource_version(),
        "annotations": { crd::UNUSED_SINCE: null },
    });
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    match api.patch(&there.name_any(), &parameters, &patch).await {
        Ok(_) => Ok(Claim::Ours),
        // Deleted, or changed by another: look again.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(Claim::Gone),
        Err(error) => Err(error).context("taking the mark of the operator away"),
    }
}

#[cfg(test)]
mod tests;
