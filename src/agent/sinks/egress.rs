//! By which gateways pods' packets leave: `egress_rules`.

use anyhow::Result;

use super::{Drift, Problem, Round, Sink};
use crate::datapath::EgressWriter;

/// Writes before the endpoints: a pod that is connected never leaves with another address.
pub struct Egress(pub EgressWriter);

impl Sink for Egress {
    fn name(&self) -> &'static str {
        "egress"
    }

    /// A pod that no policy selects any more must know first.
    fn needs_to_delete(&self) -> &'static [&'static str] {
        &["endpoints"]
    }

    fn is_for_pods(&self) -> bool {
        true
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        Ok(Drift::rows(&self.0.compare()?))
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        self.0.write(&round.desired.egress.rules)?;
        Ok(Vec::new())
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        self.0.prune(&round.desired.egress.rules)
    }
}
