//! The programs on pods' devices.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Drift, Problem, Round, Sink};
use crate::datapath::Datapath;
use crate::model::EndpointId;
use crate::netlink::{self, News};

/// Attaches each endpoint by itself. One whose device has gone is held back: its DEL is on the way.
pub struct Links {
    datapath: Arc<Datapath>,
    attached: BTreeMap<EndpointId, u32>,
    /// Endpoints that could not be attached at the last try, and why.
    failed: BTreeMap<EndpointId, (u32, String)>,
}

impl Links {
    /// Nothing is attached by this process yet.
    pub fn new(datapath: Arc<Datapath>) -> Self {
        Self { datapath, attached: BTreeMap::new(), failed: BTreeMap::new() }
    }
}

impl Sink for Links {
    fn name(&self) -> &'static str {
        "links"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["endpoints", "succession"]
    }

    fn is_for_pods(&self) -> bool {
        true
    }

    fn hears(&self) -> &'static [News] {
        &[News::Filters]
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        let devices: BTreeMap<u32, String> =
            netlink::links()?.into_iter().map(|link| (link.index, link.name)).collect();
        let mut drifts = Vec::new();
        self.attached.retain(|_, ifindex| {
            // A device that has gone takes its programs along: its DEL is on the way.
            let Some(name) = devices.get(ifindex) else { return true };
            let is_attached = self.datapath.verify_pod(*ifindex).is_ok();
            if !is_attached {
                drifts.push(Drift::one(format!("programs on {name}")));
            }
            is_attached
        });
        Ok(drifts)
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = &round.desired.endpoints;
        let ifindex_of = |id: &EndpointId| desired.get(id).map(|entry| entry.endpoint.host_ifindex);
        self.failed.retain(|id, (ifindex, _)| !round.is_retry && ifindex_of(id) == Some(*ifindex));
        let mut problems = Vec::new();
        for (id, entry) in desired.iter().filter(|(id, _)| **id != EndpointId::HOST) {
            let ifindex = entry.endpoint.host_ifindex;
            if self.attached.get(id) != Some(&ifindex) && !self.failed.contains_key(id) {
                match self.datapath.attach_pod(*id, ifindex) {
                    Ok(()) => drop(self.attached.insert(*id, ifindex)),
                    Err(error) => drop(self.failed.insert(*id, (ifindex, crate::error::chain(&error)))),
                }
            }
            if let Some((_, error)) = self.failed.get(id) {
                round.held_back.entry(*id).or_insert_with(|| error.clone());
                problems.push(Problem::new(format!("pod {}: {error}", entry.endpoint.pod)));
            }
        }
        Ok(problems)
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        let desired = &round.desired.endpoints;
        let gone: Vec<EndpointId> =
            self.attached.keys().filter(|id| !desired.contains_key(id)).copied().collect();
        for id in gone {
            if let Some(ifindex) = self.attached.get(&id) {
                self.datapath.detach_pod(id, *ifindex).context("detaching an endpoint's programs")?;
                self.attached.remove(&id);
            }
        }
        Ok(())
    }
}
