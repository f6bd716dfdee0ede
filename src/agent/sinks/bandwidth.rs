//! What pods may send (`kubernetes.io/egress-bandwidth`): a limit on each pod's own device.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{Problem, Round, Sink};
use crate::model::EndpointId;
use crate::netlink;

/// Limits each pod by itself.
#[derive(Default)]
pub struct Bandwidth {
    /// What each pod's device was told last, by the pod's container.
    told: BTreeMap<EndpointId, (String, Option<u64>)>,
    failed: BTreeMap<EndpointId, String>,
}

impl Sink for Bandwidth {
    fn name(&self) -> &'static str {
        "bandwidth"
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = &round.desired;
        self.told.retain(|id, _| desired.endpoints.contains_key(id));
        let is_retry = round.is_retry;
        self.failed.retain(|id, _| !is_retry && desired.endpoints.contains_key(id));
        let mut problems = Vec::new();
        for (id, entry) in desired.endpoints.iter().filter(|(id, _)| **id != EndpointId::HOST) {
            let endpoint = &entry.endpoint;
            let wanted = (endpoint.container_id.clone(), desired.bandwidth.get(id).copied());
            if self.told.get(id) != Some(&wanted) && !self.failed.contains_key(id) {
                match netlink::limit_pod(&endpoint.netns, &endpoint.interface, wanted.1) {
                    Ok(is_news) => {
                        if is_news {
                            let rate = wanted.1;
                            tracing::info!(pod = %endpoint.pod, bytes_per_second = rate, "limited what it may send");
                        }
                        self.told.insert(*id, wanted);
                    }
                    Err(error) => drop(self.failed.insert(*id, error.to_string())),
                }
            }
            if let Some(error) = self.failed.get(id) {
                problems.push(Problem::new(format!("pod {} is not limited: {error}", endpoint.pod)));
            }
        }
        Ok(problems)
    }
}
