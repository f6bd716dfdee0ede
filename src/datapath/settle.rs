//! A pod's programs come by clsact first and are moved to links later.
//!
//! Making a link waits for an RCU grace period with the kernel's network lock
//! held (`tcx_entry_sync`), 8 to 11 ms at 250 Hz, twice for a pod: more than all
//! the rest of an ADD. A filter of clsact is in force at once. Links are better
//! company: nobody else can take them off, and the programs of a device come in
//! an order. So a pod gets filters, and links when no other pod is coming. tcx
//! runs before clsact and our programs decide finally, so that between the two
//! steps no packet is unseen and none is seen twice.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Datapath;
use super::settings::AttachMode;
use crate::model::EndpointId;

/// The programs of a pod's device.
pub(super) const POD_PROGRAMS: [&str; 2] = ["from_pod", "to_pod"];

/// On a node where pods come all the time a device waits no longer than this.
const LONGEST: Duration = Duration::from_secs(60);

/// Devices of pods whose programs are filters still, and since when.
#[derive(Default)]
pub(super) struct Unsettled(Mutex<BTreeMap<u32, Instant>>);

impl Unsettled {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Datapath {
    /// Puts a pod's device under `from_pod` and `to_pod`.
    pub fn attach_pod(&self, id: EndpointId, ifindex: u32) -> Result<()> {
        let attaching = || format!("attaching to the device of endpoint {id}");
        if self.features().attach == AttachMode::Tcx
            && !self.has_links(ifindex, &POD_PROGRAMS).with_context(attaching)?
        {
            match self.attach_filters(ifindex, &POD_PROGRAMS) {
                Ok(()) => {
                    self.unsettled.lock().insert(ifindex, Instant::now());
                    return Ok(());
                }
                // A kernel without cls_bpf, or somebody else's filter in our place: links it is.
                Err(error) => {
                    tracing::debug!(ifindex, error = crate::error::chain(&error), "no filters for a pod")
                }
            }
        }
        self.attach_device(ifindex, &POD_PROGRAMS).with_context(attaching)
    }

    /// Takes a pod's device out again; nothing to do is no error.
    pub fn detach_pod(&self, id: EndpointId, ifindex: u32) -> Result<()> {
        let mut unsettled = self.unsettled.lock();
        unsettled.remove(&ifindex);
        self.detach_device(ifindex, &POD_PROGRAMS)
            .with_context(|| format!("detaching from the device of endpoint {id}"))
    }

    /// Verifies that a pod's device is under `from_pod` and `to_pod`; the error names what is not.
    pub fn verify_pod(&self, ifindex: u32) -> Result<()> {
        // While programs move from filters to links, a link comes before its filter goes.
        self.verify_device(ifindex, &POD_PROGRAMS)
    }

    /// Moves the programs of one pod's device from filters to links, if no pod has come for `quiet`; true if
    /// there may be another one. One at a time: an ADD meanwhile waits for the kernel's lock.
    pub fn settle_a_pod(&self, quiet: Duration) -> bool {
        // Held to the end: detach_pod must not overtake us.
        let mut unsettled = self.unsettled.lock();
        let is_quiet = unsettled.values().all(|since| since.elapsed() >= quiet);
        let longest =
            unsettled.iter().min_by_key(|(_, since)| **since).map(|(ifindex, since)| (*ifindex, *since));
        let Some((ifindex, since)) = longest else { return false };
        if !is_quiet && since.elapsed() < LONGEST {
            return false;
        }
        unsettled.remove(&ifindex);
        if let Err(error) = self.attach_device(ifindex, &POD_PROGRAMS) {
            // Its filters stay in force; or the device has gone, and its DEL is on the way.
            tracing::debug!(ifindex, error = crate::error::chain(&error), "making links of a pod's filters");
        }
        true
    }
}
