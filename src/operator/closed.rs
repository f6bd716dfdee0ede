//! Events on policies that a node cannot enforce, as the nodes' agents report them.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::ApiResource;
use kube::runtime::events::Recorder;
use kube::{Client, ResourceExt};
use tokio::time::Instant;
use tracing::warn;

use super::events::warning;
use super::nodes::View;
use crate::kube::Kind;
use crate::kube::crd::ClosedPolicy;

/// API servers forget events after an hour.
const AGAIN: Duration = Duration::from_secs(30 * 60);
/// What nodes say of more policies is not worth as many events.
const SAID_MAX: usize = 1000;

/// Says each once, and again while it lasts.
pub struct Closed {
    client: Client,
    recorder: Recorder,
    said: HashMap<ClosedPolicy, Instant>,
}

impl Closed {
    /// Nothing is said yet.
    pub fn new(client: &Client, recorder: Recorder) -> Self {
        Self { client: client.clone(), recorder, said: HashMap::new() }
    }

    /// Says what is new in what the nodes report.
    pub async fn round(&mut self, view: &View) {
        let statuses = view.weir_nodes.iter().filter_map(|(name, node)| Some((name, node.status.as_ref()?)));
        let mut reported: HashMap<&ClosedPolicy, _> = HashMap::new();
        for (policy, name) in statuses
            .flat_map(|(name, status)| status.closed_policies.iter().map(move |policy| (policy, name)))
        {
            if reported.len() < SAID_MAX {
                reported.entry(policy).or_insert(name);
            }
        }
        self.said.retain(|policy, _| reported.contains_key(policy));
        for (policy, node) in reported {
            if self.said.get(policy).is_some_and(|said| said.elapsed() < AGAIN) {
                continue;
            }
            if let Err(error) = self.say(policy, node).await {
                warn!(
                    name = policy.name,
                    error = crate::error::chain(&error),
                    "publishing an event on a policy"
                );
                // The next round tries again.
                return;
            }
            self.said.insert(policy.clone(), Instant::now());
        }
    }

    async fn say(&self, policy: &ClosedPolicy, node: &str) -> Result<()> {
        // A node may say anything: only kinds that we know are looked for.
        let Some(kind) = Kind::named(&policy.kind) else { return Ok(()) };
        let resource = ApiResource {
            group: kind.group().to_owned(),
            version: kind.api_version().rsplit('/').next().unwrap_or_default().to_owned(),
            api_version: kind.api_version(),
            kind: kind.name().to_owned(),
            plural: kind.meta().plural.to_owned(),
        };
        let api: Api<DynamicObject> = match &policy.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        let named = ListParams::default().fields(&format!("metadata.name={}", policy.name)).limit(1);
        let Some(object) = api.list(&named).await.context("looking for the policy")?.items.pop() else {
            return Ok(());
        };
        let regarding = ObjectReference {
            api_version: Some(kind.api_version()),
            kind: Some(kind.name().to_owned()),
            name: Some(object.name_any()),
            namespace: object.namespace(),
            uid: object.uid(),
            ..ObjectReference::default()
        };
        let event = warning("NotEnforced", "Enforce", &format!("Node {node}: {}", policy.reason));
        self.recorder.publish(&event, &regarding).await.context("publishing the event")
    }
}
