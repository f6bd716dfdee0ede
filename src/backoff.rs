//! How long to wait before the next try.

use std::time::Duration;

/// Waits that double from the first to the last, and begin anew after a success.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// The first wait, and the one that none exceeds.
    pub const fn new(first: Duration, last: Duration) -> Self {
        Self { first, last, next: first }
    }

    /// A try failed: how long to wait now.
    pub fn wait(&mut self) -> Duration {
        self.wait_up_to(self.last)
    }

    /// As `wait`, with another longest wait from here on.
    pub fn wait_up_to(&mut self, last: Duration) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(last);
        wait
    }

    /// A try succeeded.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Half to all of `delay`: many that failed at once do not try again at once.
pub fn jittered(delay: Duration) -> Duration {
    delay / 2 + (delay / 2).mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_last_and_begin_anew_after_a_success() {
        let seconds = |number| Duration::from_secs(number);
        let mut backoff = Backoff::new(seconds(1), seconds(5));
        let waits: Vec<_> = (0..5).map(|_| backoff.wait().as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 5, 5]);
        backoff.reset();
        assert_eq!(backoff.wait_up_to(seconds(60)), seconds(1));
    }

    #[test]
    fn jitter_is_at_most_half() {
        let delay = Duration::from_secs(8);
        let waits: Vec<_> = (0..100).map(|_| jittered(delay)).collect();
        assert!(waits.iter().all(|wait| (delay / 2..=delay).contains(wait)), "{waits:?}");
        assert!(waits.iter().any(|wait| *wait != waits[0]), "they are spread");
    }
}
