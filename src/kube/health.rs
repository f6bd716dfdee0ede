//! How the sources are doing: per kind for metrics, per broken object for `weir status`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::SystemTime;

use serde::Serialize;
use tracing::{info, warn};

use super::convert::FieldError;
use super::kind::Kind;

/// How the source of one kind is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KindHealth {
    /// The first full list was delivered.
    pub is_synced: bool,
    /// The source answers now; what it last said stands when it does not.
    pub is_connected: bool,
    /// When the source last said anything, a full list or a change.
    pub last_event: Option<SystemTime>,
    /// How often the watch or the directory could not be read.
    pub errors_total: u64,
}

/// A document or object that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Report {
    /// The file's name, or `kubernetes`.
    pub source: String,
    /// The document's number in the file, from 1.
    pub document: Option<usize>,
    /// The line where the document begins.
    pub line: Option<usize>,
    /// The object, where the document could be read so far.
    pub object: Option<String>,
    /// What is wrong, and what was done about it.
    pub reason: String,
}

/// What is said of a doubt about an object, and what becomes of that.
pub(super) fn closed(kind: Kind, doubt: &FieldError) -> String {
    format!("{doubt}; closed: {}", kind.meta().doubt)
}

/// The health of all sources, shared between them and whoever shows it.
#[derive(Default)]
pub struct Health {
    kinds: Mutex<BTreeMap<Kind, KindHealth>>,
    reports: Mutex<BTreeMap<String, Vec<Report>>>,
}

impl Health {
    /// Every kind with its health.
    pub fn kinds(&self) -> Vec<(Kind, KindHealth)> {
        let kinds = self.kinds.lock().expect("nobody panics while holding the lock");
        Kind::ALL.iter().map(|kind| (*kind, kinds.get(kind).copied().unwrap_or_default())).collect()
    }

    /// Every standing report, by source.
    pub fn reports(&self) -> Vec<Report> {
        let reports = self.reports.lock().expect("nobody panics while holding the lock");
        reports.values().flatten().cloned().collect()
    }

    pub(super) fn record(&self, kind: Kind, change: impl FnOnce(&mut KindHealth)) {
        change(self.kinds.lock().expect("nobody panics while holding the lock").entry(kind).or_default());
    }

    pub(super) fn record_event(&self, kind: Kind) {
        self.record(kind, |health| {
            health.is_connected = true;
            health.last_event = Some(SystemTime::now());
        });
    }

    pub(super) fn record_error(&self, kind: Kind) {
        self.record(kind, |health| {
            health.is_connected = false;
            health.errors_total += 1;
        });
    }

    /// Makes `reports` all that stands under `topic`; logs those that are new.
    pub(super) fn replace(&self, topic: &str, reports: Vec<Report>) {
        let mut all = self.reports.lock().expect("nobody panics while holding the lock");
        let known = all.get(topic).map_or(&[][..], Vec::as_slice);
        for report in reports.iter().filter(|report| !known.contains(report)) {
            let Report { source, document, line, object, reason } = report;
            warn!(source, document, line, object, reason, "an object is not as it should be");
        }
        if !known.is_empty() && reports.is_empty() {
            info!(topic, "everything reported about it is put right");
        }
        match reports.is_empty() {
            true => all.remove(topic),
            false => all.insert(topic.to_owned(), reports),
        };
    }
}
