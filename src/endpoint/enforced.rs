//! Which endpoints' policy is in force: said by the agent's loop, awaited by ADD.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::watch;

use crate::model::EndpointId;

/// What the last round of the agent's loop achieved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// There was a round.
    pub is_started: bool,
    /// Policy written, programs attached.
    pub enforced: BTreeSet<EndpointId>,
    /// What the others wait for.
    pub waiting: BTreeMap<EndpointId, String>,
}

/// The agent's end: it publishes after every round.
#[derive(Debug)]
pub struct Enforced(watch::Sender<Progress>);

impl Default for Enforced {
    fn default() -> Self {
        Self::new()
    }
}

impl Enforced {
    /// Nothing is enforced yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(Progress::default()))
    }

    /// These endpoints are enforced, those wait; any other is unknown to the agent's loop.
    pub fn publish(&self, enforced: BTreeSet<EndpointId>, waiting: BTreeMap<EndpointId, String>) {
        let news = Progress { is_started: true, enforced, waiting };
        self.0.send_if_modified(|progress| {
            let changed = *progress != news;
            *progress = news;
            changed
        });
    }

    /// To read or to await.
    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.0.subscribe()
    }
}
