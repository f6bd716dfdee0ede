//! When a sink that failed tries again.

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

/// The first wait; each further one is twice as long.
const FIRST: Duration = Duration::from_millis(50);
/// No wait is longer.
const LAST: Duration = Duration::from_secs(5);

/// The back-off of one sink.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retry {
    /// How long the waits are, and when this one ends; `None`: the last try succeeded.
    waiting: Option<(Backoff, Instant)>,
}

impl Retry {
    /// Whether the last try failed.
    pub fn is_failing(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether a try may be made at `now`.
    pub fn is_due(&self, now: Instant) -> bool {
        self.waiting.is_none_or(|(_, until)| until <= now)
    }

    /// When the next try is due; `None`: nothing is to be tried again.
    pub fn due(&self) -> Option<Instant> {
        self.waiting.map(|(_, until)| until)
    }

    /// A try succeeded.
    pub fn succeeded(&mut self) {
        self.waiting = None;
    }

    /// A try failed at `now`.
    pub fn failed(&mut self, now: Instant) {
        let mut backoff = self.waiting.map_or(Backoff::new(FIRST, LAST), |(backoff, _)| backoff);
        let wait = backoff.wait();
        self.waiting = Some((backoff, now + wait));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_last_and_begin_anew_after_a_success() {
        let now = Instant::now();
        let mut retry = Retry::default();
        assert!(retry.is_due(now) && retry.due().is_none());
        let mut waits = Vec::new();
        for _ in 0..9 {
            retry.failed(now);
            waits.push(retry.due().expect("it failed") - now);
        }
        assert_eq!(waits[..3], [50, 100, 200].map(Duration::from_millis));
        assert_eq!(waits[7..], [LAST, LAST]);
        assert!(!retry.is_due(now) && retry.is_due(now + LAST));
        retry.succeeded();
        retry.failed(now);
        assert_eq!(retry.due(), Some(now + FIRST));
    }
}
