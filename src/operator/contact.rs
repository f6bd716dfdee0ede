//! Readiness of a replica: it can read the Lease. One that cannot is no help when the leader ends.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::telemetry::{ReadyGuard, Telemetry};

/// When the API server last answered.
pub struct Contact<'a> {
    telemetry: &'a Telemetry,
    /// Silence for this long means not ready.
    limit: Duration,
    state: Mutex<State>,
}

struct State {
    answered: Instant,
    waiting: Option<ReadyGuard>,
}

impl<'a> Contact<'a> {
    /// Not ready before the first answer.
    pub fn new(telemetry: &'a Telemetry, limit: Duration) -> Self {
        let state = State { answered: Instant::now(), waiting: Some(telemetry.ready().register(AWAITED)) };
        Self { telemetry, limit, state: Mutex::new(state) }
    }

    /// After each attempt to read or write the Lease.
    pub fn tried(&self, is_answered: bool) {
        self.telemetry.main_loop_alive();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if is_answered {
            state.answered = Instant::now();
            state.waiting = None;
        } else if state.waiting.is_none() && state.answered.elapsed() >= self.limit {
            state.waiting = Some(self.telemetry.ready().register(AWAITED));
        }
    }
}

const AWAITED: &str = "the API server's answer about the Lease";
