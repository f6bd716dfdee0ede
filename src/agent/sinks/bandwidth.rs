//! What pods may send and receive (`kubernetes.io/egress-bandwidth` and `ingress-bandwidth`): a limit on each pod's
//! own device for the one, a class of the node's queue for the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Drift, Problem, Round, Sink};
use crate::model::EndpointId;
use crate::netlink;

/// What the kernel was told of a pod, for a container of its.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    container: String,
    netns: PathBuf,
    interface: String,
    sends: Option<u64>,
    receives: Option<u64>,
}

/// Limits each pod by itself.
pub struct Bandwidth {
    /// The queue of what pods receive.
    queue: Option<u32>,
    told: BTreeMap<EndpointId, Told>,
    failed: BTreeMap<EndpointId, String>,
}

impl Bandwidth {
    /// With the device of the queue for limited pods, if the kernel has one.
    pub fn new(queue: Option<u32>) -> Self {
        Self { queue, told: BTreeMap::new(), failed: BTreeMap::new() }
    }

    /// The class comes before the row of `endpoints` that sends packets to it, or they pass at once.
    fn tell(&self, id: EndpointId, wanted: &Told) -> netlink::Result<bool> {
        let former = self.told.get(&id).and_then(|told| told.receives);
        let mut is_news = false;
        match (self.queue, wanted.receives) {
            (Some(queue), Some(rate)) if former != Some(rate) => {
                netlink::limit_class(queue, id.0, rate)?;
                is_news = true;
            }
            (None, Some(_)) => {
                let reason = "the kernel has no htb queue, so that what it receives has no limit";
                return Err(netlink::Error::Different(reason.to_owned()));
            }
            _ => {}
        }
        Ok(netlink::limit_pod(&wanted.netns, &wanted.interface, wanted.sends)? || is_news)
    }

    /// Somebody else took the limit away.
    fn is_gone(&self, id: EndpointId, told: &Told, classes: &BTreeSet<u16>) -> bool {
        let is_limited = || netlink::is_pod_limited(&told.netns, &told.interface);
        // A pod that has gone has nothing to compare.
        let may_send = told.sends.is_some() && is_limited().is_ok_and(|is_limited| !is_limited);
        let may_receive = self.queue.is_some() && told.receives.is_some() && !classes.contains(&id.0);
        may_send || may_receive
    }
}

impl Sink for Bandwidth {
    fn name(&self) -> &'static str {
        "bandwidth"
    }

    fn needs_to_delete(&self) -> &'static [&'static str] {
        &["endpoints"]
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        let classes = self.queue.map(netlink::classes).transpose()?.unwrap_or_default();
        let gone = self.told.iter().filter(|(id, told)| self.is_gone(**id, told, &classes));
        let gone: Vec<EndpointId> = gone.map(|(id, _)| *id).collect();
        for id in &gone {
            self.told.remove(id);
        }
        Ok(gone.iter().map(|id| Drift::one(format!("the limit of endpoint {}", id.0))).collect())
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = &round.desired;
        self.told.retain(|id, _| desired.endpoints.contains_key(id));
        let is_retry = round.is_retry;
        self.failed.retain(|id, _| !is_retry && desired.endpoints.contains_key(id));
        let mut problems = Vec::new();
        for (id, entry) in desired.endpoints.iter().filter(|(id, _)| **id != EndpointId::HOST) {
            let endpoint = &entry.endpoint;
            let wanted = Told {
                container: endpoint.container_id.clone(),
                netns: endpoint.netns.clone(),
                interface: endpoint.interface.clone(),
                sends: desired.bandwidth.get(id).copied(),
                receives: desired.receives.get(id).copied(),
            };
            if self.told.get(id) != Some(&wanted) && !self.failed.contains_key(id) {
                match self.tell(*id, &wanted) {
                    Ok(is_news) => {
                        if is_news {
                            let (sends, receives) = (wanted.sends, wanted.receives);
                            tracing::info!(pod = %endpoint.pod, sends, receives, "limited, in bytes a second");
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

    /// After the rows of `endpoints`: packets of which the class has gone would pass at once.
    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        let Some(queue) = self.queue else { return Ok(()) };
        let is_stale = |class: &u16| !round.desired.receives.contains_key(&EndpointId(*class));
        for class in netlink::classes(queue)?.into_iter().filter(is_stale) {
            netlink::delete_class(queue, class).context("taking away the class of a pod")?;
        }
        Ok(())
    }
}
