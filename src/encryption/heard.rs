//! Which keys of other nodes work: when each became a peer, and when there was a handshake by it.
//!
//! By a clock that nobody sets. What the kernel says of handshakes is by the clock of the day.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::model::{PeerState, PublicKey};

/// A peer has a keepalive, and sessions are made anew every two minutes: one without a handshake for so long is not
/// reached.
pub const HANDSHAKE_WITHIN: Duration = Duration::from_secs(200);

/// How it is with one key of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// There was a handshake.
    Reached,
    /// It is not known yet.
    Unknown,
    /// It has been a peer for long, and there is no handshake.
    Away,
}

#[derive(Debug)]
struct One {
    told: Instant,
    handshake: Option<Instant>,
}

/// What is known of all keys that are peers.
#[derive(Debug, Default)]
pub struct Heard(BTreeMap<PublicKey, One>);

impl Heard {
    /// These are the peers from now on.
    pub fn told(&mut self, keys: impl Iterator<Item = PublicKey>, now: Instant) {
        let mut before = std::mem::take(&mut self.0);
        for key in keys {
            let one = before.remove(&key).unwrap_or(One { told: now, handshake: None });
            self.0.insert(key, one);
        }
    }

    /// This is said of them. A handshake that was noted is not forgotten because somebody sets the clock.
    pub fn saw(&mut self, states: &[PeerState], now: Instant) {
        for state in states {
            let Some(one) = self.0.get_mut(&state.public_key) else { continue };
            let since = state.last_handshake_seconds.map(Duration::from_secs);
            let at = since.and_then(|since| now.checked_sub(since));
            one.handshake = one.handshake.max(at);
        }
    }

    /// How it is with a key.
    pub fn reach(&self, key: &PublicKey, now: Instant) -> Reach {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < HANDSHAKE_WITHIN;
        match self.0.get(key) {
            Some(one) if one.handshake.is_some_and(is_recent) => Reach::Reached,
            Some(one) if !is_recent(one.told) => Reach::Away,
            _ => Reach::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(key: PublicKey, seconds: Option<u64>) -> PeerState {
        PeerState {
            public_key: key,
            endpoint: None,
            last_handshake_seconds: seconds,
            received_bytes: 0,
            sent_bytes: 0,
            errors: 0,
        }
    }

    #[test]
    fn a_node_is_away_when_it_has_been_a_peer_for_long_without_a_handshake() {
        let [a, b] = [1, 2].map(|byte| PublicKey([byte; 32]));
        let start = Instant::now() + Duration::from_secs(100_000);
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut heard = Heard::default();
        assert_eq!(heard.reach(&a, at(0)), Reach::Unknown);
        // This node has just started: nothing is said of the other one.
        heard.told([a].into_iter(), at(0));
        heard.saw(&[state(a, None)], at(199));
        assert_eq!(heard.reach(&a, at(199)), Reach::Unknown);
        assert_eq!(heard.reach(&a, at(200)), Reach::Away);
        // One that becomes a peer later has its own time, and that of the first one goes on.
        heard.told([a, b].into_iter(), at(150));
        assert_eq!((heard.reach(&a, at(200)), heard.reach(&b, at(200))), (Reach::Away, Reach::Unknown));
        heard.saw(&[state(a, Some(0)), state(b, None)], at(300));
        assert_eq!((heard.reach(&a, at(301)), heard.reach(&b, at(350))), (Reach::Reached, Reach::Away));
        // Somebody sets the clock of the day forward by an hour.
        heard.saw(&[state(a, Some(3610))], at(310));
        assert_eq!(heard.reach(&a, at(499)), Reach::Reached);
        assert_eq!(heard.reach(&a, at(500)), Reach::Away);
        // A peer that was taken away begins anew.
        heard.told([b].into_iter(), at(500));
        heard.told([a, b].into_iter(), at(510));
        assert_eq!((heard.reach(&a, at(520)), heard.reach(&b, at(520))), (Reach::Unknown, Reach::Away));
    }
}
