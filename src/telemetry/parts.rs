//! How each part of the agent is: the one place that status, readiness, the WeirNode's conditions, CNI
//! STATUS and metrics read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::model::PolicyRef;

/// A fault counts when it has lasted this long: most are gone with the first retry.
const GRACE: Duration = Duration::from_secs(2);
/// For how long it is remembered what was repaired.
const REMEMBERED: Duration = Duration::from_secs(600);
/// So many repairs of one thing within that time are said: somebody keeps taking it away.
const OFTEN: u64 = 3;
/// So many different things are remembered, at most, for each part.
const REMEMBERED_THINGS: usize = 256;

/// Every part. Clones share them.
#[derive(Clone, Default)]
pub struct Parts(Arc<Mutex<BTreeMap<&'static str, Part>>>);

#[derive(Default)]
struct Part {
    failing: Option<Failing>,
    errors_total: u64,
    repairs_total: u64,
    /// When each thing was repaired.
    repairs: BTreeMap<String, VecDeque<(Instant, u64)>>,
}

struct Failing {
    since: Instant,
    causes: Vec<String>,
    stops_pods: bool,
    closed: Vec<(PolicyRef, String)>,
}

/// How a part is, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PartRow {
    /// Which part.
    pub part: String,
    /// Since when it fails, in seconds; `None`: it works.
    pub failing_seconds: Option<u64>,
    /// Why it fails: one line for each object that it costs.
    pub causes: Vec<String>,
    /// No new pod can be connected meanwhile.
    pub stops_pods: bool,
    /// How often a try failed.
    pub errors_total: u64,
    /// How often something was put back that somebody else had changed.
    pub repairs_total: u64,
    /// What somebody keeps changing.
    pub notes: Vec<String>,
}

impl Parts {
    /// Names a part that works so far.
    pub fn add(&self, part: &'static str) {
        self.lock().entry(part).or_default();
    }

    /// The part works.
    pub fn works(&self, part: &'static str) {
        self.lock().entry(part).or_default().failing = None;
    }

    /// The part does not work, or not for all objects. True if that, or its cause, is news. A part that
    /// waits for its next try says so, too: `is_try` is false then.
    pub fn fails(&self, part: &'static str, causes: Vec<String>, stops_pods: bool, is_try: bool) -> bool {
        let mut parts = self.lock();
        let part = parts.entry(part).or_default();
        part.errors_total += u64::from(is_try);
        let is_news = part.failing.as_ref().is_none_or(|failing| failing.causes != causes);
        let since = part.failing.take().map_or_else(Instant::now, |failing| failing.since);
        part.failing = Some(Failing { since, causes, stops_pods, closed: Vec::new() });
        is_news
    }

    /// Policies that the part cannot put into force, and why; until the part works.
    pub fn closes(&self, part: &'static str, policies: Vec<(PolicyRef, String)>) {
        if let Some(failing) = self.lock().get_mut(part).and_then(|part| part.failing.as_mut()) {
            failing.closed = policies;
        }
    }

    /// The policies that parts have not put into force for longer than a retry takes, and why.
    pub fn closed(&self) -> Vec<(PolicyRef, String)> {
        let parts = self.lock();
        let failing = parts.values().filter_map(|part| part.failing.as_ref());
        failing
            .filter(|failing| failing.since.elapsed() >= GRACE)
            .flat_map(|failing| failing.closed.clone())
            .collect()
    }

    /// These things were not as the part had left them; it puts them back.
    pub fn repaired(&self, part: &'static str, things: impl IntoIterator<Item = (String, u64)>) {
        let now = Instant::now();
        let mut parts = self.lock();
        let part = parts.entry(part).or_default();
        for (thing, count) in things {
            part.repairs_total += count;
            part.repairs.entry(thing).or_default().push_back((now, count));
        }
        part.forget(now);
    }

    /// Somebody keeps changing what the part puts back.
    pub fn is_fought_over(&self, part: &str) -> bool {
        self.lock()
            .get(part)
            .is_some_and(|part| part.repairs.values().any(|times| times.len() as u64 >= OFTEN))
    }

    /// Every part, by name.
    pub fn rows(&self) -> Vec<PartRow> {
        let now = Instant::now();
        let mut parts = self.lock();
        parts.values_mut().for_each(|part| part.forget(now));
        parts.iter().map(|(name, part)| part.row(name, now)).collect()
    }

    /// The parts that have failed for longer than a retry takes.
    pub fn faults(&self) -> Vec<PartRow> {
        self.rows().into_iter().filter(PartRow::is_fault).collect()
    }

    /// Why no new pod can be connected, if that is so.
    pub fn stops_pods(&self) -> Option<String> {
        let fault = self.faults().into_iter().find(|row| row.stops_pods)?;
        Some(fault.text())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Part>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartRow {
    /// It has failed for longer than a retry takes.
    pub fn is_fault(&self) -> bool {
        self.failing_seconds.is_some_and(|seconds| seconds >= GRACE.as_secs())
    }

    /// `policies: the first cause (and 3 more)`.
    pub fn text(&self) -> String {
        let first = self.causes.first().map_or("", String::as_str);
        match self.causes.len() {
            0 | 1 => format!("{}: {first}", self.part),
            count => format!("{}: {first} (and {} more)", self.part, count - 1),
        }
    }
}

impl Part {
    fn forget(&mut self, now: Instant) {
        for times in self.repairs.values_mut() {
            while times.front().is_some_and(|(at, _)| now.duration_since(*at) > REMEMBERED) {
                times.pop_front();
            }
        }
        self.repairs.retain(|_, times| !times.is_empty());
        while self.repairs.len() > REMEMBERED_THINGS {
            self.repairs.pop_last();
        }
    }

    fn row(&self, name: &str, now: Instant) -> PartRow {
        let failing = self.failing.as_ref();
        let often = self.repairs.iter().filter_map(|(thing, times)| {
            let count = times.iter().map(|(_, count)| count).sum::<u64>();
            let minutes = REMEMBERED.as_secs() / 60;
            (times.len() as u64 >= OFTEN)
                .then(|| format!("{thing} was removed {count} times in the last {minutes} minutes"))
        });
        PartRow {
            part: name.to_owned(),
            failing_seconds: failing.map(|failing| now.duration_since(failing.since).as_secs()),
            causes: failing.map(|failing| failing.causes.clone()).unwrap_or_default(),
            stops_pods: failing.is_some_and(|failing| failing.stops_pods),
            errors_total: self.errors_total,
            repairs_total: self.repairs_total,
            notes: often.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_fails_is_a_fault_when_it_lasts_and_none_when_it_works_again() {
        let parts = Parts::default();
        parts.add("routes");
        assert!(parts.fails("policies", vec!["full".to_owned()], true, true));
        assert!(!parts.fails("policies", vec!["full".to_owned()], true, true), "the same is no news");
        assert!(parts.faults().is_empty(), "it has only begun");
        let began = Instant::now().checked_sub(GRACE).expect("the machine is up for longer");
        parts.lock().get_mut("policies").and_then(|part| part.failing.as_mut()).expect("it fails").since =
            began;
        assert_eq!(parts.stops_pods().as_deref(), Some("policies: full"));
        let rows = parts.rows();
        assert_eq!(rows.iter().map(|row| row.part.as_str()).collect::<Vec<_>>(), ["policies", "routes"]);
        assert_eq!((rows[0].errors_total, rows[1].failing_seconds), (2, None));
        parts.works("policies");
        assert_eq!((parts.faults().len(), parts.stops_pods()), (0, None));
    }

    #[test]
    fn what_is_taken_away_again_and_again_is_said() {
        let parts = Parts::default();
        for _ in 0..5 {
            parts.repaired("routes", [("route 10.1.2.0/24".to_owned(), 1)]);
        }
        parts.repaired("routes", [("route 10.1.3.0/24".to_owned(), 1)]);
        let row = parts.rows().remove(0);
        assert_eq!(row.repairs_total, 6);
        assert_eq!(row.notes, ["route 10.1.2.0/24 was removed 5 times in the last 10 minutes"]);
    }
}
