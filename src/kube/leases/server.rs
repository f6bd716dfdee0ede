//! Leases of the API server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::sync::Notify;
use tracing::warn;

use super::{Meaning, Posted, Postings, announcer_name, meaning, name_of};
use crate::model::ObjectKey;

/// All these Leases have it.
const LABEL: &str = "weir.dev/announces";
/// Owner of the fields that we apply.
const FIELD_MANAGER: &str = "weir-agent";
/// The server ends a watch after this long; one that is silent is noticed then.
const WATCH_SECONDS: u32 = 120;

/// The Leases, as the agent of one node sees them.
pub struct Server {
    leases: Api<Lease>,
    node: String,
    duration: Duration,
    changed: Arc<Notify>,
    /// By name: holder and version; `None` before the first full list.
    known: Mutex<Option<BTreeMap<String, Posted>>>,
}

impl Server {
    pub fn new(client: &Client, node: &str, duration: Duration, changed: Arc<Notify>) -> Self {
        let leases = Api::default_namespaced(client.clone());
        Self { leases, node: node.to_owned(), duration, changed, known: Mutex::default() }
    }

    pub async fn follow(&self) {
        let config = Config::default().labels(LABEL).timeout(WATCH_SECONDS);
        let mut events = std::pin::pin!(watcher(self.leases.clone(), config).default_backoff());
        let mut listed = BTreeMap::new();
        let mut is_well = true;
        while let Some(event) = events.next().await {
            if let Err(error) = &event {
                // Once an outage.
                if std::mem::take(&mut is_well) {
                    warn!(%error, "watching who answers for Services' addresses");
                }
                continue;
            }
            is_well = true;
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(lease)) => drop(listed.insert(lease.name_any(), posted(&lease))),
                Ok(Event::InitDone) => self.take_list(std::mem::take(&mut listed)),
                Ok(Event::Apply(lease)) => self.take(&lease.name_any(), Some(posted(&lease))),
                Ok(Event::Delete(lease)) => self.take(&lease.name_any(), None),
                Err(_) => {}
            }
            self.changed.notify_one();
        }
    }

    pub fn read(&self) -> Option<Postings> {
        let known = self.lock();
        let mut all = Postings::default();
        for (name, posted) in known.as_ref()? {
            match meaning(name) {
                Some(Meaning::Service(service)) => drop(all.services.insert(service, posted.clone())),
                Some(Meaning::Node(node)) => drop(all.nodes.insert(node.to_owned(), posted.version.clone())),
                None => {}
            }
        }
        Some(all)
    }

    pub async fn renew(&self) -> Result<()> {
        let name = announcer_name(&self.node);
        let lease: Lease = serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { LABEL: "node" } },
            "spec": {
                "holderIdentity": self.node,
                "leaseDurationSeconds": self.duration.as_secs().max(1),
                "renewTime": now(),
            },
        }))
        .context("writing the Lease of this node")?;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let answer = self.leases.patch(&name, &parameters, &Patch::Apply(&lease)).await;
        let written = answer.with_context(|| format!("renewing the Lease {name}"))?;
        self.take(&name, Some(posted(&written)));
        Ok(())
    }

    pub async fn post(&self, service: &ObjectKey, old: Option<&Posted>, holder: &str) -> Result<bool> {
        let name = name_of(service);
        let answer = match old {
            None => {
                let lease: Lease = serde_json::from_value(json!({
                    "metadata": { "name": name, "labels": { LABEL: "service" } },
                    "spec": { "holderIdentity": holder, "acquireTime": now() },
                }))
                .context("writing the Lease of a Service")?;
                self.leases.create(&PostParams::default(), &lease).await
            }
            Some(old) => {
                let patch = Patch::Merge(json!({
                    "metadata": { "resourceVersion": old.version },
                    "spec": { "holderIdentity": holder, "acquireTime": now() },
                }));
                let parameters =
                    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
                self.leases.patch(&name, &parameters, &patch).await
            }
        };
        match answer {
            Ok(written) => {
                self.take(&name, Some(posted(&written)));
                Ok(true)
            }
            Err(error) if is_lost(&error) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("writing the Lease {name}")),
        }
    }

    pub async fn remove(&self, service: &ObjectKey, old: &Posted) -> Result<bool> {
        let name = name_of(service);
        let preconditions = Preconditions { resource_version: Some(old.version.clone()), uid: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.leases.delete(&name, &parameters).await {
            Ok(_) => {
                self.take(&name, None);
                Ok(true)
            }
            Err(error) if is_lost(&error) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("deleting the Lease {name}")),
        }
    }

    /// What is known already may be newer than what the watch says next.
    fn take(&self, name: &str, posted: Option<Posted>) {
        let mut known = self.lock();
        let Some(known) = known.as_mut() else { return };
        match posted {
            Some(posted) => {
                if known.get(name).is_none_or(|there| number(there) <= number(&posted)) {
                    known.insert(name.to_owned(), posted);
                }
            }
            None => drop(known.remove(name)),
        }
    }

    fn take_list(&self, mut listed: BTreeMap<String, Posted>) {
        let mut known = self.lock();
        for (name, there) in known.take().into_iter().flatten() {
            if let Some(new) = listed.get_mut(&name)
                && number(new) < number(&there)
            {
                *new = there;
            }
        }
        *known = Some(listed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<BTreeMap<String, Posted>>> {
        self.known.lock().expect("nobody panics while holding the lock")
    }
}

fn posted(lease: &Lease) -> Posted {
    let spec = lease.spec.as_ref();
    Posted {
        holder: spec.and_then(|spec| spec.holder_identity.clone()).unwrap_or_default(),
        version: lease.resource_version().unwrap_or_default(),
    }
}

/// Versions of one API server rise.
fn number(posted: &Posted) -> u64 {
    posted.version.parse().unwrap_or(u64::MAX)
}

/// Another write was first.
fn is_lost(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
}

fn now() -> MicroTime {
    MicroTime(jiff::Timestamp::now())
}
