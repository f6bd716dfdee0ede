//! Policies of the host are confirmed: under a new one the node must reach the API server by a new
//! connection. One under which it does not is suspended, said, and tried again when it has changed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::host::api_servers;
use crate::kube::Tables;
use crate::telemetry::Parts;

/// The part of the agent that says so.
const PART: &str = "host policy";
/// What the kernel is told takes effect within this time.
const IN_FORCE_WITHIN: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_secs(1);
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// What became of the last definition; kept over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Confirmed(u64),
    Suspended(u64),
}

/// What is asked for, and what became of it.
#[derive(Debug, Default)]
struct State {
    /// What the policies say now, and since when that is in force; `None`: it is not yet.
    asked: Option<(u64, Option<Instant>)>,
    /// Their names.
    names: String,
    verdict: Option<Verdict>,
}

impl State {
    /// True if `definition` is to be in force.
    fn ask(&mut self, definition: Option<u64>) -> bool {
        match definition {
            Some(definition) if self.asked.is_none_or(|(asked, _)| asked != definition) => {
                self.asked = Some((definition, None));
            }
            Some(_) => {}
            None => self.asked = None,
        }
        definition.is_some_and(|definition| self.verdict != Some(Verdict::Suspended(definition)))
    }

    fn in_force(&mut self, now: Instant) {
        if let Some((_, since)) = &mut self.asked {
            since.get_or_insert(now);
        }
    }

    /// What is awaited since when; `None`: nothing.
    fn unconfirmed(&self) -> Option<(u64, Instant)> {
        let (asked, Some(since)) = self.asked? else { return None };
        let is_decided =
            [Verdict::Confirmed(asked), Verdict::Suspended(asked)].map(Some).contains(&self.verdict);
        (!is_decided).then_some((asked, since))
    }

    /// A try that began at `began` has reached the API server or not; the verdict where this decides.
    fn tried(&mut self, began: Instant, is_reached: bool, patience: Duration) -> Option<Verdict> {
        let (asked, since) = self.unconfirmed()?;
        let verdict = match is_reached {
            true if began >= since + IN_FORCE_WITHIN => Verdict::Confirmed(asked),
            false if began >= since + patience => Verdict::Suspended(asked),
            _ => return None,
        };
        self.verdict = Some(verdict);
        Some(verdict)
    }
}

/// Whether the policies of the host are to be in force.
pub struct Confirming {
    state: Mutex<State>,
    /// Raised by every verdict: there is to be a round.
    decided: watch::Sender<u64>,
    path: PathBuf,
    patience: Duration,
}

impl Confirming {
    /// With what the agent before has found out.
    pub fn open(state_dir: &Path, patience: Duration) -> Self {
        let path = state_dir.join("host-policy");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let verdict = match text.trim().split_once(' ') {
            Some(("confirmed", number)) => number.parse().ok().map(Verdict::Confirmed),
            Some(("suspended", number)) => number.parse().ok().map(Verdict::Suspended),
            _ => None,
        };
        let state = Mutex::new(State { verdict, ..State::default() });
        Self { state, decided: watch::Sender::new(0), path, patience }
    }

    /// Says what the policies of the host say; true if they are to be in force.
    pub fn ask(&self, definition: Option<u64>, names: impl FnOnce() -> String) -> bool {
        let mut state = self.lock();
        if state.asked.map(|(asked, _)| asked) != definition {
            state.names = names();
        }
        state.ask(definition)
    }

    /// What was asked for last is in the kernel.
    pub fn in_force(&self) {
        self.lock().in_force(Instant::now());
    }

    /// Changes with every verdict.
    pub fn decided(&self) -> watch::Receiver<u64> {
        self.decided.subscribe()
    }

    /// Tries to reach the API server while something is to be confirmed. Never returns.
    pub async fn run(self: Arc<Self>, tables: Arc<Tables>, parts: Parts) {
        loop {
            self.say(&parts);
            tokio::time::sleep(LOOK).await;
            if self.lock().unconfirmed().is_none() {
                continue;
            }
            let servers = api_servers(&tables.slices.snapshot());
            let began = Instant::now();
            // Where no API server is known there is none to lose.
            let is_reached = servers.is_empty() || any_answers(servers.into_iter().collect()).await;
            let verdict = self.lock().tried(began, is_reached, self.patience);
            if let Some(verdict) = verdict {
                self.keep(verdict);
            }
        }
    }

    fn keep(&self, verdict: Verdict) {
        let text = match verdict {
            Verdict::Confirmed(definition) => format!("confirmed {definition}\n"),
            Verdict::Suspended(definition) => {
                tracing::error!(
                    policies = self.lock().names,
                    "suspended the host's policies: {}",
                    self.reason()
                );
                format!("suspended {definition}\n")
            }
        };
        if let Err(error) = std::fs::write(&self.path, text) {
            tracing::warn!(%error, path = %self.path.display(), "the next agent will confirm the host's policies again");
        }
        self.decided.send_modify(|count| *count += 1);
    }

    fn reason(&self) -> String {
        format!(
            "the node did not reach the API server for {} s under them; change them, and they are tried again",
            self.patience.as_secs()
        )
    }

    fn say(&self, parts: &Parts) {
        let state = self.lock();
        let is_suspended =
            state.asked.is_some_and(|(asked, _)| state.verdict == Some(Verdict::Suspended(asked)));
        let names = state.names.clone();
        drop(state);
        if is_suspended {
            parts.fails(PART, vec![format!("{names} suspended: {}", self.reason())], false, false);
        } else {
            parts.works(PART);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn any_answers(servers: Vec<SocketAddr>) -> bool {
    let connects = servers.into_iter().map(async |server| {
        matches!(tokio::time::timeout(ANSWERS_WITHIN, TcpStream::connect(server)).await, Ok(Ok(_)))
    });
    join_all(connects).await.contains(&true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn what_takes_the_api_server_away_is_suspended_until_it_changes() {
        let mut state = State::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!state.ask(None));
        assert!(state.ask(Some(1)), "it is tried");
        assert_eq!(state.tried(at(0), true, PATIENCE), None, "what is not in force is not confirmed");
        state.in_force(at(0));
        assert_eq!(state.tried(at(59), false, PATIENCE), None);
        assert_eq!(state.tried(at(60), false, PATIENCE), Some(Verdict::Suspended(1)));
        assert!(!state.ask(Some(1)), "it is not tried again");
        assert_eq!(state.tried(at(80), true, PATIENCE), None);
        assert!(!state.ask(None));
        assert!(!state.ask(Some(1)), "nor when it comes back unchanged");
        assert!(state.ask(Some(2)), "it has changed");
        state.in_force(at(100));
        assert_eq!(state.tried(at(101), true, PATIENCE), None, "it may not be in force yet");
        assert_eq!(state.tried(at(103), true, PATIENCE), Some(Verdict::Confirmed(2)));
        assert_eq!(state.tried(at(500), false, PATIENCE), None, "an outage opens nothing");
        assert!(state.ask(Some(2)));
    }

    #[test]
    fn a_verdict_outlives_the_agent() {
        let directory = tempfile::tempdir().expect("a directory");
        let confirming = Confirming::open(directory.path(), PATIENCE);
        assert!(confirming.ask(Some(7), String::new));
        confirming.keep(Verdict::Suspended(7));
        let next = Confirming::open(directory.path(), PATIENCE);
        assert!(!next.ask(Some(7), String::new));
        assert!(next.ask(Some(8), String::new));
    }
}
