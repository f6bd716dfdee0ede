//! What the proxy tells: requests and answers as records, names of DNS.

use std::sync::Arc;
use std::time::Duration;

use super::answers::Known;
use super::names::Learned;
use super::proxy::{Heard, Hears};
use crate::model::l7::{Names, ProxyState, Record};

/// Takes what the proxy tells.
pub struct Told {
    /// What the agent knows.
    pub known: Arc<Known>,
    /// What pods were told.
    pub learned: Arc<Learned>,
}

impl Hears for Told {
    fn records(&self, records: Vec<Record>, lost: u64) {
        self.known.proxy.seen(&records, lost);
        self.known.recorder.append_requests(records);
        self.known.recorder.requests_lost(lost);
    }

    fn state(&self, state: &ProxyState) {
        self.known.proxy.state(state);
    }

    fn names(&self, names: Names) -> Heard {
        let learned = self.learned.clone();
        Box::pin(async move { learned.take(names).await })
    }

    fn names_passed(&self, names: Vec<(Names, Duration)>, left_out: u64) {
        self.learned.passed(names, left_out);
    }
}
