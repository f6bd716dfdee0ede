//! Events on Services that name an address or port of another Service, or of pods.
//!
//! Every agent decides this the same way (`service::Frontends`); the leader decides once more and says it on
//! the object. Of the nodes it takes one address for all: node ports are alike on every node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::Api;
use kube::runtime::events::Recorder;
use kube::runtime::reflector::{Store, store};
use kube::{Client, ResourceExt};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::events::warning;
use super::metrics::Metrics;
use super::{RETRY, nodes, recorder};
use crate::kube::{NodeKind, ServiceKind, Watched};
use crate::model::ObjectKey;
use crate::service::{Frontends, Place, Services, Slices};

/// Changes within this time are one round.
const BATCH: Duration = Duration::from_secs(1);
/// API servers forget events after an hour.
const AGAIN: Duration = Duration::from_secs(50 * 60);
/// More Services than this are not worth as many events.
const SAID_MAX: usize = 1000;

/// Says conflicts until it is dropped.
pub async fn run(client: &Client, name: &str, metrics: &Metrics) {
    let changed = Arc::new(Notify::new());
    let (services, to_services) = store::<Watched<ServiceKind>>();
    let (nodes, to_nodes) = store::<Watched<NodeKind>>();
    let filling = join(
        nodes::follow(Api::all(client.clone()), to_services, Some(changed.clone()), |_| {}),
        nodes::follow(Api::all(client.clone()), to_nodes, Some(changed.clone()), |_| {}),
    );
    let mut conflicts =
        Conflicts { recorder: recorder(client, name), frontends: Frontends::default(), said: HashMap::new() };
    let rounds = async {
        let are_ready = join(services.wait_until_ready(), nodes.wait_until_ready()).await;
        if are_ready.0.is_err() || are_ready.1.is_err() {
            return;
        }
        loop {
            if let Err(error) = conflicts.round(&services, &nodes).await {
                metrics.errors.inc();
                warn!(error = crate::error::chain(&error), "publishing an event on a Service");
                sleep(RETRY).await;
            }
            tokio::select! {
                () = changed.notified() => sleep(BATCH).await,
                () = sleep(AGAIN / 10) => {}
            }
        }
    };
    tokio::select! {
        () = rounds => {}
        _ = filling => {}
    }
}

struct Conflicts {
    recorder: Recorder,
    frontends: Frontends,
    /// By Service: what was said of it, and when.
    said: HashMap<ObjectKey, (String, Instant)>,
}

impl Conflicts {
    async fn round(
        &mut self,
        services: &Store<Watched<ServiceKind>>,
        nodes: &Store<Watched<NodeKind>>,
    ) -> anyhow::Result<()> {
        let mut references = HashMap::new();
        let mut all = Services::new();
        for object in services.state() {
            let Ok(Some(row)) = object.outcome.as_ref().map(|converted| converted.row.clone()) else {
                continue;
            };
            references.insert(row.key.clone(), object.clone());
            all.insert(row.key.clone(), row);
        }
        let output = self.frontends.update(&all, &Slices::new(), &place(nodes));
        let texts: HashMap<ObjectKey, String> = output
            .conflicts
            .iter()
            .take(SAID_MAX)
            .map(|(key, all)| {
                (key.clone(), all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
            })
            .collect();
        self.said.retain(|key, _| texts.contains_key(key));
        for (key, text) in texts {
            if self.said.get(&key).is_some_and(|(said, at)| *said == text && at.elapsed() < AGAIN) {
                continue;
            }
            let Some(object) = references.get(&key) else { continue };
            let regarding = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Service".to_owned()),
                name: Some(object.name_any()),
                namespace: object.namespace(),
                uid: object.uid(),
                ..ObjectReference::default()
            };
            self.recorder.publish(&warning("AddressConflict", "Serve", &text), &regarding).await?;
            self.said.insert(key, (text, Instant::now()));
        }
        Ok(())
    }
}

fn place(nodes: &Store<Watched<NodeKind>>) -> Place {
    let mut place = Place::default();
    for object in nodes.state() {
        let Ok(Some(node)) = object.outcome.as_ref().map(|converted| converted.row.clone()) else { continue };
        place.pod_cidrs.extend(&node.pod_cidrs);
        if place.own.is_empty() {
            place.own.extend(&node.addresses);
        }
    }
    place
}
