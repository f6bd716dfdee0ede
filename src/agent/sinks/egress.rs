//! By which gateways pods' packets leave: `egress_pods` and `egress_rules`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;

use super::policies::few;
use super::{Drift, Problem, Round, Sink};
use crate::datapath::EgressWriter;
use crate::egress;
use crate::model::EndpointId;

/// Writes before the endpoints: a pod that is connected never leaves with another address. Pods whose rules do not
/// fit are closed to the world: their rows of `endpoints` say that they have rules, and there are none.
pub struct Egress {
    writer: EgressWriter,
    /// What was written last, and the addresses whose rules did not fit.
    last: Option<(Arc<egress::Output>, BTreeMap<IpAddr, String>)>,
}

impl Egress {
    /// Of the writer.
    pub fn new(writer: EgressWriter) -> Self {
        Self { writer, last: None }
    }

    /// The addresses whose rules do not fit; the same until something changes or it is time to try again.
    fn unfit(&mut self, round: &Round<'_>) -> Result<BTreeMap<IpAddr, String>> {
        let desired = &round.desired.egress;
        if let Some((last, unfit)) = &self.last
            && Arc::ptr_eq(last, desired)
            && (unfit.is_empty() || !round.is_retry)
        {
            return Ok(unfit.clone());
        }
        self.last = None;
        let unfit = self.writer.write(&desired.tables)?;
        self.last = Some((desired.clone(), unfit.clone()));
        Ok(unfit)
    }
}

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
        self.last = None;
        Ok(Drift::rows(&self.writer.compare()?))
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let mut unfit = self.unfit(round)?;
        let mut problems = Vec::new();
        for (id, entry) in round.desired.endpoints.iter().filter(|(id, _)| **id != EndpointId::HOST) {
            let causes = entry.endpoint.addresses().filter_map(|address| unfit.remove(&address));
            let Some(cause) = causes.collect::<Vec<_>>().pop() else { continue };
            let text =
                format!("nothing leaves the cluster, because its egress rules are not in force: {cause}");
            problems.push(Problem::new(format!("pod {}: {text}", entry.endpoint.pod)));
            round.held_back.insert(*id, text);
        }
        if let Some(cause) = unfit.values().next() {
            let pods: Vec<String> = unfit.keys().map(ToString::to_string).collect();
            problems.push(Problem::new(format!("this node is no gateway of {}: {cause}", few(&pods))));
        }
        Ok(problems)
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        self.writer.prune(&round.desired.egress.tables)
    }
}
