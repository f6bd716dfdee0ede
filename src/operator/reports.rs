//! Says on an object, by an event, what Weir cannot take of it.
//!
//! Agents keep the last good state of a broken object, or close what a broken policy selects, and say so in
//! their own status; who wrote the object looks at the object. So the leader reads what agents read, with the same words for what is
//! wrong, and keeps nothing but what it has said. Events are forgotten after an hour: it says it again.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{BoxFuture, join_all};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::events::{Event, Recorder};
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Resource, ResourceExt};
use tokio::time::{Instant, interval_at};
use tracing::warn;

use super::events::warning;
use super::metrics::{KindLabel, Metrics};
use super::recorder;
use crate::kube::{FieldError, ObjectKind, Visitor, Watched, visit_all};

/// Objects in a page of the first list: as much text as is in memory at a time.
const PAGE: u32 = 50;
/// The server ends a watch after this long; one that is silent is noticed then.
const WATCH_SECONDS: u32 = 290;
/// API servers forget events after an hour.
const AGAIN: Duration = Duration::from_secs(50 * 60);

/// Follows every kind that agents read and that somebody may have written wrong. Never returns.
pub async fn run(client: &Client, name: &str, metrics: &Metrics) {
    let mut all = All { client, name, metrics, reports: Vec::new() };
    visit_all(&mut all);
    join_all(all.reports).await;
}

struct All<'a> {
    client: &'a Client,
    name: &'a str,
    metrics: &'a Metrics,
    reports: Vec<BoxFuture<'static, ()>>,
}

impl Visitor for All<'_> {
    fn visit<K: ObjectKind>(&mut self) {
        if K::META.is_reported {
            let reports = Reports::<K>::new(self.client, self.name, self.metrics);
            self.reports.push(Box::pin(reports.run()));
        }
    }
}

struct Reports<K: ObjectKind> {
    api: Api<Watched<K>>,
    recorder: Recorder,
    metrics: Metrics,
    /// By UID.
    said: HashMap<String, (ObjectReference, Event)>,
}

impl<K: ObjectKind> Reports<K> {
    fn new(client: &Client, name: &str, metrics: &Metrics) -> Self {
        Self {
            api: Api::all(client.clone()),
            recorder: recorder(client, name),
            metrics: metrics.clone(),
            said: HashMap::new(),
        }
    }

    async fn run(mut self) {
        let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        let mut changes = Box::pin(watcher(self.api.clone(), config).default_backoff());
        let mut again = interval_at(Instant::now() + AGAIN, AGAIN);
        let mut is_silent = false;
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(change)) => {
                        is_silent = false;
                        self.take(change).await;
                    }
                    // Once per outage; the watch goes on by itself.
                    Some(Err(error)) if !is_silent && !is_absent::<K>(&error) => {
                        is_silent = true;
                        warn!(kind = %K::KIND, %error, "watching what agents read");
                    }
                    Some(Err(_)) => {}
                    None => return,
                },
                _ = again.tick() => self.say_again().await,
            }
        }
    }

    async fn take(&mut self, change: watcher::Event<Watched<K>>) {
        match change {
            watcher::Event::Apply(object) | watcher::Event::InitApply(object) => self.look_at(&object).await,
            watcher::Event::Delete(object) => drop(object.uid().and_then(|uid| self.said.remove(&uid))),
            watcher::Event::Init | watcher::Event::InitDone => {}
        }
        self.metrics
            .objects_reported
            .get_or_create(&KindLabel { kind: K::KIND.name() })
            .set(self.said.len() as i64);
    }

    async fn look_at(&mut self, object: &Watched<K>) {
        let Some(uid) = object.uid() else { return };
        let Some(event) = complaint(object) else {
            self.said.remove(&uid);
            return;
        };
        if self.said.get(&uid).is_some_and(|(_, said)| said.note == event.note) {
            return;
        }
        let regarding = ObjectReference {
            api_version: Some(K::KIND.api_version()),
            kind: Some(K::KIND.name().to_owned()),
            name: object.meta().name.clone(),
            namespace: object.namespace(),
            uid: Some(uid.clone()),
            ..ObjectReference::default()
        };
        self.say(&regarding, &event).await;
        self.said.insert(uid, (regarding, event));
    }

    async fn say_again(&self) {
        for (regarding, event) in self.said.values() {
            self.say(regarding, event).await;
        }
    }

    async fn say(&self, regarding: &ObjectReference, event: &Event) {
        if let Err(error) = self.recorder.publish(event, regarding).await {
            self.metrics.errors.inc();
            warn!(kind = %K::KIND, name = regarding.name, %error, "publishing an event");
        }
    }
}

fn joined(errors: &[FieldError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The cluster is without a kind that it may be without.
fn is_absent<K: ObjectKind>(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(kube::Error::Api(status))
    | watcher::Error::WatchStartFailed(kube::Error::Api(status))
    | watcher::Error::WatchFailed(kube::Error::Api(status))) = error
    else {
        return false;
    };
    K::META.is_optional && status.code == 404
}

/// What is to be said of an object, if anything is.
fn complaint<K: ObjectKind>(object: &Watched<K>) -> Option<Event> {
    let (reason, text) = match &object.outcome {
        Err(error) => ("Malformed", format!("Weir keeps its last good state: {error}")),
        Ok(converted) if !converted.doubts.is_empty() => {
            ("Malformed", format!("{}: {}", K::META.doubt, joined(&converted.doubts)))
        }
        Ok(converted) => ("PartlyIgnored", joined(&converted.warnings)),
    };
    if text.is_empty() {
        return None;
    }
    Some(warning(reason, "Read", &text))
}
