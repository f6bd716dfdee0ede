//! Tables of probes: who reaches whom, and who does not.
//!
//! All probes of a table run at once, again and again until every one has its
//! expected outcome in the same round: what was written to the manifests takes
//! effect within moments, and nothing says when.

use std::fmt;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Result, anyhow};

use crate::lab::{Outcome, Pod, Running, Space, Via, noting_failure, probe};

/// What a probe must end as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Somebody answers.
    Answered,
    /// Nothing comes back.
    Denied,
    /// Refused at once.
    Refused,
}

/// One probe and what must come of it.
pub struct Row<'a> {
    space: &'a Space,
    name: String,
    via: Via,
    target: SocketAddr,
    expected: Expected,
}

impl<'a> Row<'a> {
    /// From a pod.
    pub fn new(from: &'a Pod, via: Via, target: SocketAddr, expected: Expected) -> Self {
        Self::from_space(
            from.space(),
            &format!("{}/{}", from.namespace(), from.name()),
            via,
            target,
            expected,
        )
    }

    /// From any namespace.
    pub fn from_space(
        space: &'a Space,
        name: &str,
        via: Via,
        target: SocketAddr,
        expected: Expected,
    ) -> Self {
        Self { space, name: name.to_owned(), via, target, expected }
    }

    /// Says what the row is about, in messages.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    fn start(&self) -> Running<Outcome> {
        let (via, target) = (self.via, self.target);
        self.space.start(move || probe(via, target))
    }

    fn holds(&self, outcome: &Outcome) -> bool {
        match self.expected {
            Expected::Answered => outcome.is_answered(),
            Expected::Denied => *outcome == Outcome::TimedOut,
            Expected::Refused => outcome.is_refused(),
        }
    }
}

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} by {:?}: expected {:?}", self.name, self.target, self.via, self.expected)
    }
}

/// Probes until every row holds in one round; an error names those that never did.
pub fn expect_all(rows: &[Row<'_>]) -> Result<()> {
    let deadline = Instant::now() + crate::lab::patience();
    loop {
        let failed = wrong_rows(rows);
        if failed.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let message =
                anyhow!("{} of {} verdicts are wrong:\n{}", failed.len(), rows.len(), failed.join("\n"));
            return noting_failure(Err(message));
        }
    }
}

/// Every pod to every other, by TCP, UDP and ping, in both families: all must be answered.
pub fn expect_full_mesh(pods: &[&Pod]) -> Result<()> {
    let mut rows = Vec::new();
    for from in pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            for via in [Via::Tcp, Via::Udp, Via::Ping] {
                for address in to.addresses() {
                    rows.push(Row::new(from, via, SocketAddr::new(*address, 80), Expected::Answered));
                }
            }
        }
    }
    expect_all(&rows)
}

fn wrong_rows(rows: &[Row<'_>]) -> Vec<String> {
    // So many at once that a machine of two cores answers in time.
    rows.chunks(48)
        .flat_map(|chunk| {
            let running: Vec<_> = chunk.iter().map(Row::start).collect();
            let outcomes = running.into_iter().map(Running::wait);
            chunk.iter().zip(outcomes).filter(|(row, outcome)| !row.holds(outcome)).collect::<Vec<_>>()
        })
        .map(|(row, outcome)| format!("  {row}, but it {outcome}"))
        .collect()
}
