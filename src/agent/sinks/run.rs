//! Runs the sinks, each by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::retry::Retry;
use super::{Problem, Round, Sink};
use crate::agent::compute::Desired;
use crate::model::{EndpointId, PolicyId};
use crate::netlink::News;
use crate::telemetry::Parts;

/// Each sink is compared with the kernel at least this often.
const COMPARE_EVERY: Duration = Duration::from_secs(60);

/// After news of the kernel: most changes are several, and many are our own.
const SETTLE: Duration = Duration::from_millis(200);
/// After news, where somebody keeps taking away what the sink puts back.
const FOUGHT_OVER: Duration = Duration::from_secs(1);

/// So many closed policies are named on a node, at most.
const CLOSED_MAX: usize = 16;

/// What one round did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Endpoints whose policy is in force and whose programs are attached.
    pub enforced: BTreeSet<EndpointId>,
    /// Why the other endpoints are not enforced.
    pub held_back: BTreeMap<EndpointId, String>,
    /// Backends that are no longer behind any service.
    pub removed_backends: Vec<SocketAddr>,
    /// No sink that pods need has failed as a whole.
    pub serves_pods: bool,
    /// Every sink holds all that was desired.
    pub is_complete: bool,
}

/// All sinks, in an order in which each comes after those that it needs.
pub struct Sinks {
    rows: Vec<Row>,
    in_force: BTreeSet<PolicyId>,
    enforced: BTreeSet<EndpointId>,
    parts: Parts,
}

/// A sink and how it is.
struct Row {
    sink: Box<dyn Sink>,
    retry: Retry,
    /// This round was a try, not a wait between two of them.
    is_try: bool,
    /// Why it failed as a whole, if it did.
    failure: Option<Failure>,
    problems: Vec<Problem>,
    /// When it is compared with the kernel next.
    compare_at: Instant,
}

/// Why a sink as a whole has not written.
enum Failure {
    /// A sink that it needs has not.
    Waits(&'static str),
    /// Its own error.
    Error(String),
}

impl Failure {
    fn text(&self) -> String {
        match self {
            Self::Waits(need) => format!("waiting for {need}"),
            Self::Error(error) => error.clone(),
        }
    }
}

impl Sinks {
    /// Orders the sinks by their needs. A need that is no sink, or a circle, is refused.
    pub fn new(sinks: Vec<Box<dyn Sink>>, in_force: BTreeSet<PolicyId>, parts: Parts) -> Result<Self> {
        let now = Instant::now();
        let count = u32::try_from(sinks.len()).context("counting the sinks")?.max(1);
        let ordered = ordered(sinks)?.into_iter().zip(1..);
        let rows = ordered.map(|(sink, number): (_, u32)| Row {
            sink,
            retry: Retry::default(),
            is_try: false,
            failure: None,
            problems: Vec::new(),
            // At start the sinks have just read the kernel. Each is compared at a time of its own.
            compare_at: now + COMPARE_EVERY * number / count,
        });
        let rows: Vec<Row> = rows.collect();
        rows.iter().for_each(|row| parts.add(row.sink.name()));
        Ok(Self { rows, in_force, enforced: BTreeSet::new(), parts })
    }

    /// There was this news of the kernel: the sinks that hear it are compared soon.
    pub fn heard(&mut self, news: &[News]) {
        let now = Instant::now();
        for row in &mut self.rows {
            if row.sink.hears().iter().any(|kind| news.contains(kind)) {
                let pause = if self.parts.is_fought_over(row.sink.name()) { FOUGHT_OVER } else { SETTLE };
                row.compare_at = row.compare_at.min(now + pause);
            }
        }
    }

    /// When the next round is due although nothing changes.
    pub fn due(&self) -> Option<Instant> {
        self.rows.iter().flat_map(|row| [row.retry.due(), Some(row.compare_at)]).flatten().min()
    }

    /// Lets each sink write what depends on the kernel alone. An error is tried again by the sink's `write`.
    pub fn write_early(&mut self) {
        for row in &mut self.rows {
            if let Err(error) = row.sink.write_early() {
                tracing::error!(sink = row.sink.name(), error = format!("{error:#}"), "writing early");
            }
        }
    }

    /// Writes the difference between `desired` and the kernel, then deletes what is not desired.
    pub fn apply(&mut self, desired: &Desired) -> Applied {
        let mut round = Round {
            desired,
            is_retry: false,
            in_force: &mut self.in_force,
            refused: BTreeMap::new(),
            held_back: BTreeMap::new(),
            removed_backends: Vec::new(),
        };
        let mut succeeded: BTreeSet<&'static str> = BTreeSet::new();
        for row in &mut self.rows {
            if row.write(&mut round, &succeeded, &self.parts) {
                succeeded.insert(row.sink.name());
            }
        }
        for row in self.rows.iter_mut().rev() {
            row.delete(&mut round, &mut succeeded);
        }
        for row in &mut self.rows {
            row.conclude(succeeded.contains(row.sink.name()), &self.parts);
        }
        let Round { held_back, removed_backends, .. } = round;
        self.applied(desired, held_back, removed_backends)
    }

    fn applied(
        &mut self,
        desired: &Desired,
        mut held_back: BTreeMap<EndpointId, String>,
        removed_backends: Vec<SocketAddr>,
    ) -> Applied {
        let mut rows = self.rows.iter().filter(|row| row.sink.is_for_pods());
        let failing =
            rows.find_map(|row| Some(format!("{}: {}", row.sink.name(), row.failure.as_ref()?.text())));
        if let Some(cause) = &failing {
            // What this round would have changed is not known to be in force.
            let new = desired.endpoints.keys().filter(|id| !self.enforced.contains(id));
            for id in new {
                held_back.entry(*id).or_insert_with(|| cause.clone());
            }
        }
        let enforced = desired.endpoints.keys().filter(|id| !held_back.contains_key(id)).copied();
        self.enforced = enforced.collect();
        let is_complete = self.rows.iter().all(|row| !row.retry.is_failing());
        Applied {
            enforced: self.enforced.clone(),
            held_back,
            removed_backends,
            serves_pods: failing.is_none(),
            is_complete,
        }
    }
}

impl Row {
    /// True if the sink now holds everything that is desired, but for what its problems name.
    fn write(&mut self, round: &mut Round<'_>, succeeded: &BTreeSet<&str>, parts: &Parts) -> bool {
        let now = Instant::now();
        self.is_try = self.retry.is_due(now);
        if let Some(missing) = self.sink.needs().iter().find(|need| !succeeded.contains(*need)) {
            self.failure = Some(Failure::Waits(missing));
            self.compare_at = self.compare_at.max(now + FOUGHT_OVER);
            return false;
        }
        if matches!(self.failure, Some(Failure::Error(_))) && !self.is_try {
            self.compare_at = self.compare_at.max(now + FOUGHT_OVER);
            return false;
        }
        let compared = if self.compare_at <= now { self.compare(now, parts) } else { Ok(()) };
        round.is_retry = self.is_try;
        match compared.and_then(|()| self.sink.write(round)) {
            Ok(problems) => {
                log_new(self.sink.name(), &self.problems, &problems);
                self.problems = problems;
                self.failure = None;
                true
            }
            Err(error) => {
                self.failure = Some(Failure::Error(crate::error::chain(&error)));
                false
            }
        }
    }

    fn compare(&mut self, now: Instant, parts: &Parts) -> Result<()> {
        self.compare_at = now + COMPARE_EVERY;
        let drifts = self.sink.compare().context("comparing with the kernel")?;
        for drift in &drifts {
            tracing::warn!(
                sink = self.sink.name(),
                drift.what,
                drift.count,
                "somebody changed it: putting it back"
            );
        }
        parts.repaired(self.sink.name(), drifts.iter().map(|drift| (drift.what.clone(), drift.count)));
        Ok(())
    }

    fn delete(&mut self, round: &mut Round<'_>, succeeded: &mut BTreeSet<&'static str>) {
        let name = self.sink.name();
        let may = succeeded.contains(name)
            && self.sink.needs_to_delete().iter().all(|need| succeeded.contains(need));
        if may && let Err(error) = self.sink.delete(round) {
            self.failure = Some(Failure::Error(crate::error::chain(&error)));
            succeeded.remove(name);
        }
    }

    /// Notes how the sink is, and when it tries again.
    fn conclude(&mut self, succeeded: bool, parts: &Parts) {
        let name = self.sink.name();
        if succeeded && self.problems.is_empty() {
            self.retry.succeeded();
            parts.works(name);
            return;
        }
        if self.is_try {
            self.retry.failed(Instant::now());
        }
        let failure = self.failure.as_ref().map(Failure::text);
        let problems = self.problems.iter().map(|problem| problem.cause.clone());
        let causes = failure.iter().cloned().chain(problems).collect();
        let stops_pods = self.sink.is_for_pods() && failure.is_some();
        let is_news = parts.fails(name, causes, stops_pods, self.is_try);
        let closed = self.problems.iter().flat_map(|problem| problem.closes.iter().cloned());
        parts.closes(name, closed.take(CLOSED_MAX).collect());
        if let (true, Some(error)) = (is_news, failure) {
            tracing::error!(sink = name, error, "programming the kernel");
        }
    }
}

/// Each problem is logged once, when it appears.
fn log_new(sink: &str, before: &[Problem], now: &[Problem]) {
    for problem in now.iter().filter(|problem| !before.contains(problem)) {
        tracing::warn!(sink, error = problem.cause, "leaving out of the kernel");
    }
}

/// Puts each sink behind those that it needs, and keeps the given order otherwise.
fn ordered(mut rest: Vec<Box<dyn Sink>>) -> Result<Vec<Box<dyn Sink>>> {
    let mut ordered: Vec<Box<dyn Sink>> = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let is_there = |need: &&str| ordered.iter().any(|before| before.name() == *need);
        let Some(next) = rest.iter().position(|sink| sink.needs().iter().all(&is_there)) else {
            let names: Vec<&str> = rest.iter().map(|sink| sink.name()).collect();
            bail!("the sinks {} need one another, or a sink that is not there", names.join(", "));
        };
        ordered.push(rest.remove(next));
    }
    Ok(ordered)
}
