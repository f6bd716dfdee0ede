//! Bounds on everything that a peer chooses.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::model::EndpointId;
use crate::model::l7::Judges;

/// The times and numbers that bound a connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A head that has begun must be whole after this time.
    pub head: Duration,
    /// A connection on which nothing is asked ends after this time.
    pub idle: Duration,
    /// A connection on which an answer is awaited, or that is a tunnel, ends after this time of silence.
    pub silence: Duration,
    /// A server must accept within this time.
    pub connect: Duration,
    /// The connections of one endpoint.
    pub connections_per_endpoint: usize,
    /// The connections of all.
    pub connections: usize,
    /// The streams at once of one HTTP/2 connection.
    pub streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            idle: Duration::from_secs(300),
            silence: Duration::from_secs(3600),
            connect: Duration::from_secs(5),
            connections_per_endpoint: 8192,
            connections: 65_536,
            streams: 1000,
        }
    }
}

/// At whose expense a connection is: the client's endpoint, or else the server's, or else the client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Payer {
    /// A pod of this node.
    Endpoint(EndpointId),
    /// Somebody else.
    Address(IpAddr),
}

impl Payer {
    /// Who pays for a flow.
    pub fn of(judges: &Judges, client: IpAddr) -> Self {
        let endpoint = judges.source_endpoint.or(judges.destination_endpoint);
        endpoint.map_or(Self::Address(client), Self::Endpoint)
    }
}

/// Counts connections by payer.
#[derive(Debug, Default)]
pub struct Shares {
    counts: Mutex<Counts>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    each: HashMap<Payer, usize>,
}

/// A connection that is counted as long as this value lives.
#[derive(Debug)]
pub struct Share {
    shares: Arc<Shares>,
    payer: Payer,
}

impl Shares {
    /// Counts a connection more, unless a limit is reached.
    pub fn take(self: &Arc<Self>, payer: Payer, limits: &Limits) -> Option<Share> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let has = counts.each.get(&payer).copied().unwrap_or(0);
        if counts.all >= limits.connections || has >= limits.connections_per_endpoint {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        counts.all += 1;
        counts.each.insert(payer, has + 1);
        Some(Share { shares: self.clone(), payer })
    }

    /// How many were refused since the last call.
    pub fn take_refused(&self) -> u64 {
        self.refused.swap(0, Ordering::Relaxed)
    }

    /// How many connections there are.
    pub fn count(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).all
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.shares.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.all -= 1;
        match counts.each.get_mut(&self.payer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.each.remove(&self.payer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_payer_cannot_take_all() {
        let shares = Arc::new(Shares::default());
        let limits = Limits { connections_per_endpoint: 2, connections: 3, ..Limits::default() };
        let (first, second) = (Payer::Endpoint(EndpointId(1)), Payer::Endpoint(EndpointId(2)));
        let held: Vec<_> = (0..4).map(|_| shares.take(first, &limits)).collect();
        assert_eq!(held.iter().filter(|share| share.is_some()).count(), 2);
        let other = shares.take(second, &limits);
        assert!(other.is_some() && shares.take(second, &limits).is_none(), "3 is the limit of all");
        drop(held);
        assert_eq!(shares.count(), 1);
        assert!(shares.take(first, &limits).is_some());
    }
}
