//! What the proxy tells: requests and answers as records, names of DNS.

use std::sync::Arc;

use super::answers::Known;
use super::proxy::Hears;
use crate::model::l7::{Names, Record};

/// Takes what the proxy tells.
pub struct Told {
    /// What the agent knows.
    pub known: Arc<Known>,
}

impl Hears for Told {
    fn records(&self, records: Vec<Record>, lost: u64) {
        self.known.recorder.append_requests(records);
        self.known.recorder.requests_lost(lost);
    }

    fn names(&self, _names: &Names) {}
}
