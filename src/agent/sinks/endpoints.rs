//! The pods of this node and the policy that each has: `endpoints`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anyhow::Result;

use super::{Drift, Problem, Refusal, Round, Sink};
use crate::datapath::EndpointWriter;
use crate::model::{EndpointEntry, EndpointId, PolicyId};

type Entries = BTreeMap<EndpointId, EndpointEntry>;

/// Flips endpoints to their policies, after all that a policy is made of has been written. An endpoint
/// whose policy is not completely in the maps is closed, or keeps what it had until the next try.
pub struct Endpoints {
    writer: EndpointWriter,
}

impl Endpoints {
    /// Of the writer.
    pub fn new(writer: EndpointWriter) -> Self {
        Self { writer }
    }
}

impl Sink for Endpoints {
    fn name(&self) -> &'static str {
        "endpoints"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["policies", "addresses", "egress"]
    }

    fn is_for_pods(&self) -> bool {
        true
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        Ok(Drift::rows(&self.writer.compare()?))
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let entries = with_closed(&round.desired.endpoints, &round.refused, &mut round.held_back);
        let written = self.writer.write(&entries);
        // Also after an error: some rows may have been written.
        *round.in_force = self.writer.policies_in_force();
        written?;
        Ok(Vec::new())
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        let pruned = self.writer.prune(&round.desired.endpoints);
        *round.in_force = self.writer.policies_in_force();
        pruned
    }
}

/// The entries to write: those of refused policies closed or left out.
fn with_closed<'a>(
    desired: &'a Entries,
    refused: &BTreeMap<PolicyId, Refusal>,
    held_back: &mut BTreeMap<EndpointId, String>,
) -> Cow<'a, Entries> {
    if refused.is_empty() {
        return Cow::Borrowed(desired);
    }
    let mut entries = desired.clone();
    entries.retain(|id, entry| {
        let Some(refusal) = refused.get(&entry.policy) else { return true };
        // A closed node could not be mended: its own policy stays as it was.
        if *id == EndpointId::HOST {
            held_back.insert(*id, format!("the host's policy is not in force: {}", refusal.cause));
            return false;
        }
        if refusal.closes {
            held_back.insert(*id, format!("closed, because its policy is not in force: {}", refusal.cause));
            (entry.policy, entry.enforces_ingress, entry.enforces_egress) = (PolicyId::CLOSED, true, true);
        } else {
            held_back.insert(*id, format!("its policy is not in force yet: {}", refusal.cause));
        }
        refusal.closes
    });
    Cow::Owned(entries)
}
