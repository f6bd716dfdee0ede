//! Puts this agent's programs in the place of those of an agent with other tables, under traffic.
//!
//! The old programs run on until the new tables are complete. Then:
//!
//! 1. Rows of `connections` and `nat` are carried over, again and again until little comes meanwhile.
//! 2. Every link and filter gets its new program, one right after the other: what an old program has marked, and a
//!    new one reads, or the other way about, is lost if the two versions have other marks.
//! 3. What the old programs wrote between the two is carried over.
//!
//! A flow whose first packet passes an old program after the last pass of step 1, and whose answer
//! meets a new program before step 3 has reached its row, is not known: its next packet begins it
//! again. A map of the same layout is shared instead, and knows every flow at all times.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use libbpf_rs::{AsRawLibbpf, Link, ProgramMut, TcHook, libbpf_sys};

use super::Datapath;
use super::attach::{NETWORK_PROGRAMS, pinned_links};
use super::carry::Carrier;
use super::pins::{Pins, links, other_versions};
use super::settle::POD_PROGRAMS;

/// What is left of an agent whose tables were others.
#[derive(Default)]
pub(super) struct Succession {
    /// Programs may be attached that read tables which are not this process's.
    is_due: AtomicBool,
    /// The maps whose rows such programs write.
    carriers: Mutex<Vec<Carrier>>,
}

impl Succession {
    /// With the maps that are to be carried over; others are shared.
    pub(super) fn new(pins: &Pins, carriers: Vec<Carrier>) -> Result<Self> {
        let is_due = !carriers.is_empty() || !other_versions(pins.root())?.is_empty();
        Ok(Self { is_due: AtomicBool::new(is_due), carriers: Mutex::new(carriers) })
    }

    fn carriers(&self) -> MutexGuard<'_, Vec<Carrier>> {
        self.carriers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self) -> Result<()> {
        self.carriers().iter().try_for_each(Carrier::carry)
    }
}

impl Datapath {
    /// True until `succeed` has replaced the programs of an agent with other tables. Such an agent had
    /// another ABI version, or another layout of a map.
    pub fn is_succeeding(&self) -> bool {
        self.succession.is_due.load(Ordering::Acquire)
    }

    /// Replaces all programs of a former agent, with what their maps know: all links, and the filters on
    /// these devices. `attach` attaches whatever is not attached yet, and makes the links this version's
    /// own. May be done again after an error.
    pub fn succeed(&self, devices: &Devices, attach: impl FnOnce() -> Result<()>) -> Result<()> {
        self.succession.carry()?;
        self.replace_programs(devices).context("replacing the programs of a former agent")?;
        attach()?;
        self.succession.carry()?;
        self.succession.is_due.store(false, Ordering::Release);
        Ok(())
    }

    /// Carries over, for the last time, what a former agent's programs have written. Only when everything
    /// is attached.
    pub fn end_succession(&self) -> Result<()> {
        self.succession.carry()?;
        self.succession.carriers().clear();
        self.remove_other_versions()
    }

    /// Gives each link that is there the program of its name. Links of programs that there are no more
    /// keep theirs, and go with their version.
    fn replace_programs(&self, devices: &Devices) -> Result<()> {
        let mut places = self.links_to_replace()?;
        let of = |devices: &[u32], names: [&'static str; 2]| -> Vec<_> {
            devices.iter().flat_map(|ifindex| names.map(|name| (*ifindex, name))).collect()
        };
        for (ifindex, name) in
            of(&devices.pods, POD_PROGRAMS).into_iter().chain(of(&devices.network, NETWORK_PROGRAMS))
        {
            let filter = self.filter_to_replace(ifindex, name)?;
            places.extend(filter.map(|filter| (order_of(name), Place::Filter(filter))));
        }
        places.sort_by_key(|(order, _)| *order);
        let count = places.len();
        let began = Instant::now();
        places.into_iter().for_each(|(_, place)| place.replace());
        tracing::info!(count, took = ?began.elapsed(), "replaced the programs of a former agent");
        Ok(())
    }

    /// All are opened before the first is replaced, so that replacing takes a moment.
    fn links_to_replace(&self) -> Result<Vec<(u8, Place<'_>)>> {
        let mut places = Vec::new();
        let Some(pins) = &self.pins else { return Ok(places) };
        let versions = other_versions(pins.root())?.into_iter().map(|version| links(&version));
        for directory in versions.chain([pins.links()]) {
            for path in pinned_links(&directory)? {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let Some((_, name)) = name.split_once('-') else { continue };
                let Ok(program) = self.program(name) else { continue };
                let link =
                    Link::open(&path).with_context(|| format!("opening the link {}", path.display()))?;
                places.push((order_of(name), Place::Link(link, program)));
            }
        }
        Ok(places)
    }
}

/// Devices that may be under filters.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// Of pods.
    pub pods: Vec<u32>,
    /// That lead to the network.
    pub network: Vec<u32>,
}

/// Where a program of ours takes the place of another one.
enum Place<'a> {
    Link(Link, ProgramMut<'a>),
    Filter(TcHook),
}

impl Place<'_> {
    /// The device or the cgroup may have gone. Attaching finds every other error again.
    fn replace(self) {
        let result = match self {
            // SAFETY: link and program are open; both outlive the call.
            Self::Link(link, program) => unsafe {
                libbpf_sys::bpf_link__update_program(
                    link.as_libbpf_object().as_ptr(),
                    program.as_libbpf_object().as_ptr(),
                )
            },
            Self::Filter(mut filter) => filter.attach().map_or(-1, |_| 0),
        };
        if result != 0 {
            tracing::debug!(error = -result, "replacing a program");
        }
    }
}

/// Programs that mark packets and those that read the marks are neighbours.
fn order_of(program: &str) -> u8 {
    match program {
        "from_pod" => 1,
        "to_network" | "to_overlay" => 2,
        "to_pod" => 3,
        _ => 0,
    }
}
