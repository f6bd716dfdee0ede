//! Where the addresses of services lead: `services` and `backends`.

use anyhow::Result;

use super::policies::few;
use super::{Drift, Problem, Round, Sink};
use crate::datapath::ServiceWriter;

/// Needs no other sink. A frontend that does not fit keeps the backends that it had.
pub struct Services {
    writer: ServiceWriter,
}

impl Services {
    /// Of the writer.
    pub fn new(writer: ServiceWriter) -> Self {
        Self { writer }
    }

    fn problems(&self) -> Vec<Problem> {
        let frontends: Vec<String> = self.writer.refused().map(|(key, _)| key.to_string()).collect();
        let cause = self.writer.refused().next().map(|(_, cause)| cause);
        cause
            .map(|cause| Problem::new(format!("not as they should be: {}: {cause}", few(&frontends))))
            .into_iter()
            .collect()
    }
}

impl Sink for Services {
    fn name(&self) -> &'static str {
        "services"
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        Ok(Drift::rows(&self.writer.compare()?))
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        if round.is_retry {
            self.writer.retry_refused();
        }
        round.removed_backends.extend(self.writer.write(&round.desired.frontends)?);
        Ok(self.problems())
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        round.removed_backends.extend(self.writer.prune(&round.desired.frontends)?);
        Ok(())
    }
}
