//! The sinks: each makes one target in the kernel hold what is desired.
//!
//! A sink fails by itself. It has its own retry, its own back-off, its own row in
//! `weir status`. Which sink waits for which is data (`needs`), so a sink that
//! fails stops only the sinks that need it. A sink also compares its target with
//! the kernel as it is: when the kernel says that something changed, and once a
//! minute.
//!
//! ```text
//! desired ─> [ policies ─> addresses ─> endpoints ─> succession ─> links ]   write, in the order of `needs`
//!            [ services ]   [ devices ─> network ─> routes ]   [ ... ]
//!            then each deletes what is not desired, in the opposite order
//! ```
//!
//! A new target is one file that implements `Sink`, and one line in `all`.

mod addresses;
mod bandwidth;
mod devices;
mod egress;
mod encryption;
mod endpoints;
mod links;
mod network;
mod policies;
mod retry;
mod routes;
mod run;
mod services;
mod stack;
mod succession;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;

use super::compute::Desired;
use super::ipsec;
use super::proxy::Proxy;
use crate::datapath::{Datapath, Writers};
use crate::model::{EndpointId, PolicyId, PolicyRef};
use crate::netlink::News;
use crate::telemetry::Parts;

pub use devices::DeviceSink;
pub use encryption::{Encryption, Shared as SharedEncryption};
pub use network::{Drivers, bring_up};
pub use policies::few;
pub use retry::Retry;
pub use run::{Applied, Sinks};

/// One target in the kernel.
pub trait Sink: Send {
    /// The target's name in `weir status`, in metrics and in the log.
    fn name(&self) -> &'static str;

    /// The sinks that must have succeeded in this round before this sink writes.
    fn needs(&self) -> &'static [&'static str] {
        &[]
    }

    /// The sinks that must have succeeded in this round before this sink deletes.
    fn needs_to_delete(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether no new pod can be connected while this sink fails as a whole.
    fn is_for_pods(&self) -> bool {
        false
    }

    /// The news of the kernel after which this sink is compared at once, and not only once a minute.
    fn hears(&self) -> &'static [News] {
        &[]
    }

    /// Compares the target with the kernel as it is, and returns what somebody else changed. This
    /// sink's next `write` and `delete` mend it.
    fn compare(&mut self) -> Result<Vec<Drift>> {
        Ok(Vec::new())
    }

    /// Writes what depends on the kernel alone. It does not wait for the sources, nor for what is compiled.
    fn write_early(&mut self) -> Result<()> {
        Ok(())
    }

    /// Writes what is missing or different, and deletes nothing. A problem costs the object that it
    /// names; an error stops this sink until its next try.
    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>>;

    /// Deletes what is not desired.
    fn delete(&mut self, _round: &mut Round<'_>) -> Result<()> {
        Ok(())
    }
}

/// Something in the kernel that is not as its sink left it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Drift {
    /// What, as `route 10.1.2.0/24`.
    pub what: String,
    /// How many rows of a map it is; 1 for anything else.
    pub count: u64,
}

impl Drift {
    /// One thing.
    pub fn one(what: impl Into<String>) -> Self {
        Self { what: what.into(), count: 1 }
    }

    /// Rows of maps, where there are any.
    fn rows(changed: &[(&str, u64)]) -> Vec<Self> {
        let changed = changed.iter().filter(|(_, count)| *count > 0);
        changed.map(|(map, count)| Self { what: (*map).to_owned(), count: *count }).collect()
    }
}

/// An object that a sink could not put into the kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Which object, and why not.
    pub cause: String,
    /// The policies that it closes, for events on them.
    pub closes: Vec<(PolicyRef, String)>,
}

impl Problem {
    /// What people read.
    pub fn new(cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), closes: Vec::new() }
    }
}

/// One pass over all sinks: what is desired, and what the sinks tell one another.
pub struct Round<'a> {
    /// What the kernel should hold.
    pub desired: &'a Desired,
    /// It is time to try again what this sink could not write before.
    pub is_retry: bool,
    /// The policies that rows of `endpoints` point at.
    pub in_force: &'a mut BTreeSet<PolicyId>,
    /// Policies that are not completely in the maps.
    pub refused: BTreeMap<PolicyId, Refusal>,
    /// Endpoints that are not enforced, and why.
    pub held_back: BTreeMap<EndpointId, String>,
    /// Backends that no service leads to any more.
    pub removed_backends: Vec<SocketAddr>,
}

/// Why a policy is not completely in the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What people read.
    pub cause: String,
    /// Its endpoints are closed. Else they keep what they had, because the next try may succeed.
    pub closes: bool,
}

/// Every sink of the agent, over what it has loaded.
pub fn all(
    datapath: &Arc<Datapath>,
    writers: Writers,
    devices: DeviceSink,
    encryption: Option<Encryption>,
    (limits, proxy): (Limits, Proxy),
    (ipsec, attach_node, drivers): (ipsec::News, AttachNode, Drivers),
    parts: Parts,
) -> Result<Sinks> {
    let plan = devices.devices().clone();
    let in_force = writers.endpoints.policies_in_force();
    let encrypted = encryption.as_ref().map(Encryption::shared);
    let encryption = encryption.map(|sink| Box::new(sink) as Box<dyn Sink>);
    let mut sinks: Vec<Box<dyn Sink>> = encryption.into_iter().collect();
    let others: Vec<Box<dyn Sink>> = vec![
        Box::new(stack::Stack::new(writers.stack, ipsec, plan.encryption.clone())),
        Box::new(policies::Policies::new(writers.policies, writers.dns, limits, proxy)),
        Box::new(addresses::Addresses::new(writers.addresses, encrypted)),
        Box::new(egress::Egress::new(writers.egress)),
        Box::new(bandwidth::Bandwidth::new(plan.limit.map(|[given, _]| given))),
        Box::new(endpoints::Endpoints::new(writers.endpoints)),
        Box::new(services::Services::new(writers.services)),
        Box::new(succession::Succession::new(datapath.clone(), attach_node)),
        Box::new(devices),
        Box::new(network::Network::new(datapath.clone(), writers.devices, plan.has_ipv6(), drivers)?),
        Box::new(routes::Routes::new(plan)),
        Box::new(links::Links::new(datapath.clone())),
    ];
    // Peers come before the rows that send to them.
    sinks.extend(others);
    Sinks::new(sinks, in_force, parts)
}

/// Attaches the programs of the node's own devices and of sockets.
pub type AttachNode = Box<dyn Fn() -> Result<()> + Send>;

/// How much one object may take of what all share.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows that one compiled policy may have in `policy_rules`.
    pub policy_rows: usize,
}

#[cfg(test)]
mod tests;
