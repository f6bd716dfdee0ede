//! Garbage collection of identities: never of one that a pod has.
//!
//! ```text
//! unused in two passes ──> marked (annotation) ──> unused and marked for the grace time ──> deleted
//!                              │ any agent that begins to use it takes the mark away first
//! ```
//!
//! A pass lists the identities, then the endpoints of all nodes, both as the API server has them
//! now. An identity is in use when a node publishes an endpoint with it; agents publish
//! what they have within some milliseconds, and what they have said stays while they are away.
//! What is left are identities that an agent is about to use, or has begun to use and not said:
//!
//! - An agent that sees the mark claims the identity again before its pod gets it: it takes
//!   the mark away, and goes on only when that is done. The deletion names the version of the object
//!   that has the mark, so one of the two is refused. If it is the agent, it makes the object anew.
//! - An agent that does not see the mark has not heard of the API server for the whole grace time. Its
//!   pods keep running: rows of identities that its pods have stay in its tables whatever becomes of
//!   the objects, and when it is back it makes the object again, of the same number, as numbers are
//!   hashes. No other node had an address with that identity meanwhile, since the agent could not publish one.
//! - An operator that has just started knows nothing: the grace time is counted by the operator that deletes,
//!   by its own clock, from when it first saw this mark on an unused identity. Clocks are not compared.
//! - A pass that cannot read one object of one node deletes nothing.
//!
//! An old leader that does not know that it is none any more follows the same rules: two collectors are
//! as safe as one. In a directory of manifests, where each agent collects ([`crate::kube::Collector`]),
//! they are as many as there are nodes.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use kube::api::{Api, DeleteParams, ListParams, PartialObjectMeta, Patch, PatchParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::FIELD_MANAGER;
use super::metrics::Metrics;
use crate::kube::Unused;
use crate::kube::crd::{Identity, NodeEndpoints, UNUSED_SINCE};

/// Objects in one page of a list.
const PAGE: u32 = 500;
/// Writes at a time.
const WRITES: usize = 8;

/// Deletes identities that nobody uses.
pub struct Collector {
    identities: Api<Identity>,
    endpoints: Api<NodeEndpoints>,
    metrics: Metrics,
    unused: Unused<Version>,
}

/// One state of one object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Version {
    name: String,
    uid: String,
    version: String,
}

impl From<&PartialObjectMeta<Identity>> for Version {
    fn from(object: &PartialObjectMeta<Identity>) -> Self {
        Self {
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            version: object.resource_version().unwrap_or_default(),
        }
    }
}

impl Collector {
    /// Knows nothing yet.
    pub fn new(client: &Client, grace: Duration, metrics: Metrics) -> Self {
        Self {
            identities: Api::all(client.clone()),
            endpoints: Api::all(client.clone()),
            metrics,
            unused: Unused::new(grace),
        }
    }

    /// One pass after the other. Never returns.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.pass().await {
                self.metrics.errors.inc();
                warn!(
                    error = crate::error::chain(&error),
                    "collecting unused identities: nothing is deleted"
                );
            }
            sleep(self.unused.pause()).await;
        }
    }

    async fn pass(&mut self) -> Result<()> {
        let all = self.list_identities().await.context("listing identities")?;
        // After the identities: what is in this list was in use when they were listed, or later.
        let used = self.used().await.context("listing the endpoints of nodes")?;
        self.metrics.identities.set(all.len() as i64);
        let unused = all.iter().filter(|identity| !used.contains(&identity.name_any()));
        let unused: Vec<_> = unused
            .map(|identity| (Version::from(identity), identity.annotations().contains_key(UNUSED_SINCE)))
            .collect();
        let marked = unused.iter().filter(|(_, is_marked)| *is_marked).count();
        self.metrics.identities_unused.set(marked as i64);
        let due = self.unused.pass(unused, Instant::now());
        let this = &*self;
        futures::stream::iter(due.delete).for_each_concurrent(WRITES, |version| this.delete(version)).await;
        futures::stream::iter(due.mark).for_each_concurrent(WRITES, |version| this.mark(version)).await;
        Ok(())
    }

    async fn list_identities(&self) -> Result<Vec<PartialObjectMeta<Identity>>> {
        let mut parameters = ListParams::default().limit(PAGE);
        let mut all = Vec::new();
        loop {
            let page = self.identities.list_metadata(&parameters).await?;
            parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            all.extend(page.items);
            if parameters.continue_token.is_none() {
                return Ok(all);
            }
        }
    }

    /// The names of identities that any node publishes.
    async fn used(&self) -> Result<HashSet<String>> {
        let mut parameters = ListParams::default().limit(PAGE);
        let mut used = HashSet::new();
        loop {
            let page = self.endpoints.list(&parameters).await?;
            let endpoints = page.items.iter().flat_map(|object| &object.spec.endpoints);
            used.extend(endpoints.map(|endpoint| endpoint.identity.to_string()));
            parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if parameters.continue_token.is_none() {
                return Ok(used);
            }
        }
    }

    async fn mark(&self, version: Version) {
        let metadata = json!({
            "uid": version.uid,
            "resourceVersion": version.version,
            "annotations": { UNUSED_SINCE: jiff::Timestamp::now().to_string() },
        });
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        let parameters =
            PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let marked = self.identities.patch_metadata(&version.name, &parameters, &patch).await;
        self.note("marking an unused identity", &version, marked.map(drop));
    }

    async fn delete(&self, version: Version) {
        let preconditions =
            Preconditions { uid: Some(version.uid.clone()), resource_version: Some(version.version.clone()) };
        let parameters = DeleteParams::default().preconditions(preconditions);
        let deleted = self.identities.delete(&version.name, &parameters).await;
        if self.note("deleting an unused identity", &version, deleted.map(drop)) {
            self.metrics.identities_deleted.inc();
            info!(identity = version.name, "deleted an identity that nobody used");
        }
    }

    /// True if it was done.
    fn note(&self, what: &str, version: &Version, outcome: Result<(), kube::Error>) -> bool {
        match outcome {
            Ok(()) => return true,
            // Somebody uses it, or it is gone: so it should be.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                debug!(identity = version.name, "{what}: it has changed");
            }
            Err(error) => {
                self.metrics.errors.inc();
                warn!(
                    identity = version.name,
                    error = crate::error::chain(&anyhow::Error::new(error)),
                    "{what}"
                );
            }
        }
        false
    }
}
