//! The Kubernetes API as a source: one watch per kind.
//!
//! A watch begins with a full list, streamed where the server does that and in pages
//! where it does not; both are consistent reads, so that an agent that restarts never
//! sees a past that it has left behind. Only a complete list resets a table. After that
//! the watch goes on from the last version seen, over any number of broken connections,
//! until the server has forgotten that version: then it lists again, with every row
//! standing until the new list is there.
//!
//! (`kube::runtime::watcher` streams its first list from the server's cache, however old,
//! tells nobody that it is connected again, and asks again at once when a stream ends at once.)

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use futures::{Stream, StreamExt};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::watch::Bookmark;
use kube::{Client, ResourceExt};
use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::Tables;
use super::convert::{Converted, FieldError, ObjectId};
use super::health::{Health, Report, closed};
use super::kind::{Kind, ObjectKind};
use super::kinds::{self, Visitor};
use super::rows::Rows;
use super::watched::Watched;
use crate::backoff::{Backoff, jittered};

/// Objects in one page of a list: as much text as is in memory at a time.
const PAGE: u32 = 250;
/// The server ends a watch after this long, and less by chance, so that not all nodes come back at once.
const WATCH_SECONDS: u32 = 290;
/// Servers send a bookmark every minute; a connection that is silent for longer is dead.
const SILENCE_MAX: Duration = Duration::from_secs(150);
/// A server that streams a list begins within this time; one that does not know how stays silent.
const LIST_SILENCE_MAX: Duration = Duration::from_secs(30);
/// Delays between attempts, doubled each time.
const DELAY_MIN: Duration = Duration::from_millis(200);
const DELAY_MAX: Duration = Duration::from_secs(10);
/// While a definition of ours is missing: the operator writes it within seconds of its start.
const DEFINITION_DELAY_MAX: Duration = Duration::from_secs(2);
/// While the cluster is without a kind that it may be without.
const NO_KIND_DELAY: Duration = Duration::from_secs(30);
/// So many refusals to go on from a version mean that the version is wrong.
const REFUSALS_MAX: u32 = 3;

/// Keeps `tables` equal to what the API server says. Never returns.
pub async fn run(client: Client, node: &str, tables: Arc<Tables>, health: Arc<Health>) {
    let answered = Arc::new(Notify::new());
    let mut watches = Watches { client, node: node.to_owned(), tables, health, answered, all: Vec::new() };
    kinds::visit_all(&mut watches);
    join_all(watches.all).await;
}

/// The watches of all kinds.
struct Watches {
    client: Client,
    node: String,
    tables: Arc<Tables>,
    health: Arc<Health>,
    answered: Arc<Notify>,
    all: Vec<BoxFuture<'static, ()>>,
}

impl Visitor for Watches {
    fn visit<K: ObjectKind>(&mut self) {
        let fields = K::fields(&self.node);
        let watch = Watch::<K>::new(&self.client, fields, &self.tables, &self.health, &self.answered);
        self.all.push(Box::pin(watch.run()));
    }
}

/// Why a watch has to be started again.
#[derive(Debug, Error)]
enum Interruption {
    #[error("the server has forgotten the version to go on from")]
    Expired,
    #[error("the server does not stream lists: {0}")]
    NoStreaming(String),
    #[error("the connection was silent for too long")]
    Silent,
    #[error("the watch ended at once")]
    EndedAtOnce,
    #[error("waiting: the API server does not know the kind yet; weir operator defines it when it starts")]
    NoDefinition,
    #[error("the API server does not know the kind: there are no such objects")]
    NoKind,
    #[error("the list has no version")]
    NoVersion,
    #[error(transparent)]
    Api(#[from] kube::Error),
}

impl Interruption {
    /// There is no server, or it cannot answer now: every watch has the same trouble.
    fn is_absence(&self) -> bool {
        match self {
            Self::Api(kube::Error::Api(status)) => matches!(status.code, 429 | 500..=503),
            _ => self.is_silence(),
        }
    }

    /// No server says anything.
    fn is_silence(&self) -> bool {
        match self {
            Self::Api(error) => !matches!(error, kube::Error::Api(_)),
            error => matches!(error, Self::Silent),
        }
    }

    /// The server is well and will not go on from this version: 504 is how it says that
    /// the version is one that it has yet to see, as after its data was restored.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Api(kube::Error::Api(status)) => matches!(status.code, 400..=428 | 430..=499 | 504),
            _ => false,
        }
    }
}

/// What an error means. A server whose storage is too old to stream lists says so with
/// 500 in the stream, others with 400 or 422.
fn refused(error: kube::Error, is_streaming_list: bool, kind: Kind) -> Interruption {
    match error {
        kube::Error::Api(status) if status.code == 404 && kind.is_own() => Interruption::NoDefinition,
        kube::Error::Api(status) if status.code == 404 && kind.meta().is_optional => Interruption::NoKind,
        kube::Error::Api(status) if status.code == 410 => Interruption::Expired,
        kube::Error::Api(status) if is_streaming_list && !matches!(status.code, 429 | 501..=599) => {
            Interruption::NoStreaming(status.message)
        }
        error => error.into(),
    }
}

struct Watch<K: ObjectKind> {
    api: Api<Watched<K>>,
    fields: Option<String>,
    /// Where to go on; `None`: with a full list.
    version: Option<String>,
    does_stream: bool,
    rows: Box<dyn Rows<K::Row>>,
    health: Arc<Health>,
    /// Shared by all watches: told by the first that is answered by a server that was away.
    answered: Arc<Notify>,
    /// The server was away, and nobody has said that it is back.
    is_searching: bool,
    /// What is wrong with objects.
    reports: BTreeMap<ObjectId, Vec<String>>,
}

impl<K: ObjectKind> Watch<K> {
    fn new(
        client: &Client,
        fields: Option<String>,
        tables: &Arc<Tables>,
        health: &Arc<Health>,
        answered: &Arc<Notify>,
    ) -> Self {
        Self {
            api: Api::all(client.clone()),
            fields,
            version: None,
            does_stream: true,
            rows: K::rows(tables),
            health: health.clone(),
            answered: answered.clone(),
            is_searching: false,
            reports: BTreeMap::new(),
        }
    }

    async fn run(mut self) {
        let mut delay = Backoff::new(DELAY_MIN, DELAY_MAX);
        let mut refusals = 0;
        let mut was_silent = false;
        let mut said = String::new();
        loop {
            let before = self.version.clone();
            let started = Instant::now();
            let ended = match self.session().await {
                Ok(()) if self.version == before && started.elapsed() < Duration::from_secs(1) => {
                    Err(Interruption::EndedAtOnce)
                }
                other => other,
            };
            if self.version.is_some() && self.version != before {
                delay.reset();
                refusals = 0;
                said.clear();
            }
            let Err(error) = ended else { continue };
            if matches!(error, Interruption::NoKind) {
                self.version = None;
                self.reset(Vec::new());
                sleep(jittered(NO_KIND_DELAY)).await;
                continue;
            }
            self.health.record_error(K::KIND);
            let delay_max =
                if matches!(error, Interruption::NoDefinition) { DEFINITION_DELAY_MAX } else { DELAY_MAX };
            match error {
                Interruption::NoStreaming(reason) => {
                    info!(kind = %K::KIND, reason, "this server does not stream lists; listing in pages");
                    self.does_stream = false;
                    continue;
                }
                // It is well: a list can come soon, if this was not the answer to one.
                Interruption::Expired if self.version.take().is_some() => delay.reset(),
                _ if error.is_refusal() => refusals += 1,
                _ => {}
            }
            if refusals >= REFUSALS_MAX {
                self.version = None;
            }
            let (is_absence, is_silent) = (error.is_absence(), error.is_silence());
            // One that has just come back may refuse until it has read its storage.
            if mem::replace(&mut was_silent, is_silent) && !is_silent {
                delay.reset();
            }
            // Once per outage; what the server last said stands.
            let text = crate::error::chain(&anyhow::Error::new(error));
            if said == text {
                debug!(kind = %K::KIND, error = text, "watching the API again");
            } else {
                warn!(kind = %K::KIND, error = text, "watching the API is interrupted");
                said = text;
            }
            self.pause(jittered(delay.wait_up_to(delay_max)), is_absence).await;
        }
    }

    /// Waits before the next attempt; no longer than until another watch finds the server that is away.
    async fn pause(&mut self, delay: Duration, is_absence: bool) {
        if !is_absence {
            return sleep(delay).await;
        }
        // Whoever was told tells nobody: each round of attempts is one wait of somebody's.
        self.is_searching = timeout(delay, self.answered.notified()).await.is_err();
    }

    /// One connection: a full list where there is no version to go on from, then changes
    /// until the server ends the watch.
    async fn session(&mut self) -> Result<(), Interruption> {
        if self.version.is_none() && !self.does_stream {
            self.list().await?;
        }
        let mut listed = self.version.is_none().then(Vec::new);
        let stream = match &self.version {
            Some(version) => self.api.watch(&self.parameters(), version).await,
            None => self.api.watch(&self.parameters().initial_events(), "").await,
        };
        let mut stream = Box::pin(stream.map_err(|error| refused(error, listed.is_some(), K::KIND))?);
        self.health.record(K::KIND, |health| health.is_connected = true);
        if mem::take(&mut self.is_searching) {
            self.answered.notify_waiters();
        }
        while let Some(event) = next(&mut stream, listed.is_some()).await? {
            match event.map_err(|error| refused(error, listed.is_some(), K::KIND))? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => match &mut listed {
                    Some(listed) => listed.push(object),
                    None => self.apply(object),
                },
                WatchEvent::Deleted(object) => match &mut listed {
                    Some(listed) => listed.retain(|other| other.id != object.id),
                    None => self.delete(object),
                },
                WatchEvent::Bookmark(bookmark) => self.bookmark(bookmark, &mut listed),
                WatchEvent::Error(status) => {
                    return Err(refused(kube::Error::Api(status), listed.is_some(), K::KIND));
                }
            }
        }
        Ok(())
    }

    fn parameters(&self) -> WatchParams {
        let parameters = WatchParams::default().timeout(WATCH_SECONDS - fastrand::u32(..60));
        match &self.fields {
            Some(fields) => parameters.fields(fields),
            None => parameters,
        }
    }

    /// A full list in pages, all of one version.
    async fn list(&mut self) -> Result<(), Interruption> {
        let mut parameters = ListParams::default().limit(PAGE);
        parameters.field_selector = self.fields.clone();
        let mut listed = Vec::new();
        loop {
            let page = match self.api.list(&parameters).await {
                Ok(page) => page,
                Err(error) => return Err(refused(error, false, K::KIND)),
            };
            listed.extend(page.items);
            parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if parameters.continue_token.is_none() {
                let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                self.version = Some(version.ok_or(Interruption::NoVersion)?);
                self.reset(listed);
                return Ok(());
            }
        }
    }

    fn bookmark(&mut self, bookmark: Bookmark, listed: &mut Option<Vec<Watched<K>>>) {
        let is_end = bookmark.metadata.annotations.contains_key("k8s.io/initial-events-end");
        match listed.take_if(|_| is_end) {
            Some(all) => self.reset(all),
            // Versions before the end of the list are not ones to go on from.
            None if listed.is_some() => return,
            None => {}
        }
        self.version = Some(bookmark.metadata.resource_version);
    }

    fn reset(&mut self, listed: Vec<Watched<K>>) {
        self.reports.clear();
        let mut all = Vec::with_capacity(listed.len());
        for object in listed {
            let Some((id, row)) = self.accept(object) else { continue };
            all.extend(row.map(|row| (id.key, row)));
        }
        debug!(kind = %K::KIND, count = all.len(), "listed");
        self.rows.reset(all);
        self.show_reports();
        self.health.record_event(K::KIND);
        self.health.record(K::KIND, |health| health.is_synced = true);
    }

    fn apply(&mut self, object: Watched<K>) {
        self.version = object.resource_version().or(self.version.take());
        let had_report = object.id.as_ref().is_ok_and(|id| self.reports.contains_key(id));
        if let Some((id, row)) = self.accept(object) {
            match row {
                Some(row) => self.rows.apply(&id.key, row),
                None => self.rows.delete(&id.key),
            }
            if had_report || self.reports.contains_key(&id) {
                self.show_reports();
            }
        }
        self.health.record_event(K::KIND);
    }

    fn delete(&mut self, object: Watched<K>) {
        self.version = object.resource_version().or(self.version.take());
        if let Ok(id) = object.id {
            self.rows.delete(&id.key);
            if self.reports.remove(&id).is_some() {
                self.show_reports();
            }
        }
        self.health.record_event(K::KIND);
    }

    /// The object's row, or the last good one where it is broken; `None` in the pair for
    /// an object that makes no row. Notes what is wrong with it.
    fn accept(&mut self, object: Watched<K>) -> Option<(ObjectId, Option<Arc<K::Row>>)> {
        let id = object
            .id
            .inspect_err(|error| warn!(kind = %K::KIND, %error, "an object has no valid name"))
            .ok()?;
        self.reports.remove(&id);
        let row = match object.outcome {
            Ok(Converted { row, warnings, doubts }) => {
                let said = warnings
                    .iter()
                    .map(FieldError::to_string)
                    .chain(doubts.iter().map(|doubt| closed(K::KIND, doubt)));
                let said: Vec<String> = said.collect();
                if !said.is_empty() {
                    self.reports.insert(id.clone(), said);
                }
                row
            }
            Err(error) => {
                self.reports.insert(id.clone(), vec![error.to_string()]);
                self.rows.get(&id.key)
            }
        };
        Some((id, row))
    }

    fn show_reports(&self) {
        let report = |id: &ObjectId, reason: &String| Report {
            source: "kubernetes".to_owned(),
            document: None,
            line: None,
            object: Some(id.to_string()),
            reason: reason.clone(),
        };
        let reports = self.reports.iter();
        let reports = reports.flat_map(|(id, reasons)| reasons.iter().map(move |reason| report(id, reason)));
        self.health.replace(&format!("kubernetes {}", K::KIND), reports.collect());
    }
}

/// The next event; `None` when the server ended the watch.
async fn next<S: Stream + Unpin>(stream: &mut S, is_listing: bool) -> Result<Option<S::Item>, Interruption> {
    let (limit, silent) = match is_listing {
        true => (LIST_SILENCE_MAX, Interruption::NoStreaming("silence".to_owned())),
        false => (SILENCE_MAX, Interruption::Silent),
    };
    timeout(limit, stream.next()).await.map_err(|_| silent)
}

#[cfg(test)]
mod tests;
