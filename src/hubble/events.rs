//! The agent's own events, the newest in memory: it started, pods came and went, policies changed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use imbl::ordmap::DiffItem;
use jiff::Timestamp;
use tokio::sync::watch;

use super::proto::flow::agent_event::Notification;
use super::proto::flow::{
    AgentEvent, AgentEventType, EndpointUpdateNotification, PolicyUpdateNotification, TimeNotification,
};
use super::proto::timestamp;
use crate::kube::Tables;
use crate::model::{Endpoint, EndpointId, PolicyRef};
use crate::tables::Table;

/// Events that are kept.
const KEPT: usize = 1024;

/// A bounded list of events with sequence numbers.
pub struct AgentEvents {
    kept: Mutex<Kept>,
    next: watch::Sender<u64>,
}

#[derive(Default)]
struct Kept {
    events: VecDeque<(Timestamp, AgentEvent)>,
    next: u64,
}

impl Default for AgentEvents {
    fn default() -> Self {
        Self { kept: Mutex::default(), next: watch::Sender::new(0) }
    }
}

impl AgentEvents {
    /// Adds an event.
    pub fn add(&self, r#type: AgentEventType, notification: Notification) {
        let event = AgentEvent { r#type: r#type.into(), notification: Some(notification) };
        let next = {
            let mut kept = self.kept.lock().expect("nobody panics while it holds the events");
            if kept.events.len() == KEPT {
                kept.events.pop_front();
            }
            kept.events.push_back((Timestamp::now(), event));
            kept.next += 1;
            kept.next
        };
        self.next.send_replace(next);
    }

    /// The agent started now.
    pub fn started(&self) {
        let time = Some(timestamp(Timestamp::now()));
        self.add(AgentEventType::AgentStarted, Notification::AgentStart(TimeNotification { time }));
    }

    /// What there is from sequence number `from` on, and the number of the next.
    pub fn since(&self, from: u64) -> (Vec<(Timestamp, AgentEvent)>, u64) {
        let kept = self.kept.lock().expect("nobody panics while it holds the events");
        let oldest = kept.next - kept.events.len() as u64;
        let skipped = from.saturating_sub(oldest) as usize;
        (kept.events.iter().skip(skipped).cloned().collect(), kept.next)
    }

    /// The next sequence number, to await news.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// Follows pods and policies as long as the agent runs.
    pub async fn follow(
        self: Arc<Self>,
        tables: Arc<Tables>,
        endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    ) {
        let (mut pods, mut policies) = (endpoints.subscribe(), tables.policies.subscribe());
        let (mut known_pods, mut known_policies) = (endpoints.snapshot(), tables.policies.snapshot());
        loop {
            let gone = tokio::select! {
                changed = pods.changed() => changed.is_err(),
                changed = policies.changed() => changed.is_err(),
            };
            let (now_pods, now_policies) = (endpoints.snapshot(), tables.policies.snapshot());
            for change in known_pods.diff(&now_pods) {
                match change {
                    DiffItem::Add(_, pod) => self.pod(AgentEventType::EndpointCreated, pod),
                    DiffItem::Remove(_, pod) => self.pod(AgentEventType::EndpointDeleted, pod),
                    DiffItem::Update { .. } => {}
                }
            }
            for change in known_policies.diff(&now_policies) {
                match change {
                    DiffItem::Add(policy, _) | DiffItem::Update { new: (policy, _), .. } => {
                        self.policy(AgentEventType::PolicyUpdated, policy);
                    }
                    DiffItem::Remove(policy, _) => self.policy(AgentEventType::PolicyDeleted, policy),
                }
            }
            (known_pods, known_policies) = (now_pods, now_policies);
            if gone {
                return;
            }
        }
    }

    fn pod(&self, r#type: AgentEventType, pod: &Endpoint) {
        let update = EndpointUpdateNotification {
            id: pod.id.0.into(),
            pod_name: pod.pod.name.to_string(),
            namespace: pod.pod.namespace.to_string(),
            ..EndpointUpdateNotification::default()
        };
        self.add(r#type, Notification::EndpointUpdate(update));
    }

    fn policy(&self, r#type: AgentEventType, policy: &PolicyRef) {
        let namespace = policy.namespace.as_deref().unwrap_or_default();
        let labels = [("derived-from", policy.kind.name()), ("name", &policy.name), ("namespace", namespace)];
        let labels = labels.into_iter().filter(|(_, value)| !value.is_empty());
        let update = PolicyUpdateNotification {
            labels: labels.map(|(key, value)| format!("k8s:io.cilium.k8s.policy.{key}={value}")).collect(),
            rule_count: 1,
            ..PolicyUpdateNotification::default()
        };
        self.add(r#type, Notification::PolicyUpdate(update));
    }
}
