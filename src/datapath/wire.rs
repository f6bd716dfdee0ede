//! Attaches `from_wire` to the drivers of network devices (XDP): a short cut for what passes the node, before
//! which and behind which `from_network` does the same.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{Link, libbpf_sys};
use serde::Serialize;

use super::Datapath;
use super::attach::remove_pin;
use super::messages::with_messages;

const PROGRAM: &str = "from_wire";

/// What a driver can, by the kernel's netdev.yaml (Linux 6.3 and later say so).
const CAN_RUN_PROGRAMS: u64 = 1 << 0;
const CAN_TAKE_FRAMES: u64 = 1 << 2;

/// Whether drivers send on what passes the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// The kernel makes a packet of everything.
    #[default]
    Off,
    /// Where the driver runs programs itself.
    Native,
}

/// How it is with each device, by its name, in words.
#[derive(Default)]
pub(super) struct Wires(Mutex<BTreeMap<String, String>>);

impl Datapath {
    /// Puts the driver of a device under `from_wire`; the error says why it cannot be. `is_named`: somebody
    /// answers for the device, also for a veth.
    pub fn attach_wire(&self, ifindex: u32, kind: &str, is_named: bool) -> Result<()> {
        check_driver(ifindex, kind, is_named)?;
        let program = self.program(PROGRAM)?;
        let is_ours =
            |info: &LinkTypeInfo| matches!(info, LinkTypeInfo::Xdp(found) if found.ifindex == ifindex);
        let index = i32::try_from(ifindex)?;
        let create = || program.attach_xdp(index).map_err(with_messages);
        let pin = self.link_pin(&format!("{ifindex}-{PROGRAM}"));
        self.attach_link(pin, &program, is_ours, create).with_context(|| format!("attaching {PROGRAM}"))?;
        Ok(())
    }

    /// Takes the program off the driver of a device, if it is there.
    pub fn detach_wire(&self, ifindex: u32) -> Result<()> {
        remove_pin(&self.link_pin(&format!("{ifindex}-{PROGRAM}"))?)
    }

    /// Verifies that the driver of a device is under `from_wire`.
    pub fn verify_wire(&self, ifindex: u32) -> Result<()> {
        let path = self.link_pin(&format!("{ifindex}-{PROGRAM}"))?;
        let link = Link::open(&path).with_context(|| format!("opening the link {}", path.display()))?;
        let info = link.info().context("reading a link")?.info;
        ensure!(
            matches!(info, LinkTypeInfo::Xdp(found) if found.ifindex == ifindex),
            "{PROGRAM} is not attached to device {ifindex}"
        );
        Ok(())
    }

    /// Says how it is with a device; `None`: there is no such device any more.
    pub fn note_wire(&self, device: &str, how: Option<String>) {
        let mut wires = self.wires.0.lock().unwrap_or_else(PoisonError::into_inner);
        match how {
            Some(how) => drop(wires.insert(device.to_owned(), how)),
            None => drop(wires.remove(device)),
        }
    }

    /// How it is with the devices, for people: `eth0: native`.
    pub fn wires(&self) -> Vec<String> {
        let wires = self.wires.0.lock().unwrap_or_else(PoisonError::into_inner);
        wires.iter().map(|(device, how)| format!("{device}: {how}")).collect()
    }
}

/// The kernel would put a program that the driver cannot run behind the making of packets: that is slower than
/// without, and refused. A veth gives frames whose checksums their sender has left to a network card that never
/// comes.
fn check_driver(ifindex: u32, kind: &str, is_named: bool) -> Result<()> {
    if kind == "veth" && !is_named {
        bail!("a veth, whose frames may have unfinished checksums: only if WEIR_DEVICES names it");
    }
    let can = driver_features(ifindex).context("asking what the driver can")?;
    ensure!(
        can & CAN_RUN_PROGRAMS != 0,
        "the driver has no XDP, or the kernel does not say so (Linux 6.3 and later do)"
    );
    ensure!(
        kind != "veth" || can & CAN_TAKE_FRAMES != 0,
        "the other end of this veth has no XDP program, and takes nothing that a driver sends"
    );
    Ok(())
}

fn driver_features(ifindex: u32) -> Result<u64> {
    let mut options = libbpf_sys::bpf_xdp_query_opts {
        sz: size_of::<libbpf_sys::bpf_xdp_query_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    // SAFETY: options are as long as they say, and outlive the call.
    let result = unsafe { libbpf_sys::bpf_xdp_query(i32::try_from(ifindex)?, 0, &mut options) };
    match result {
        0 => Ok(options.feature_flags),
        error => Err(io::Error::from_raw_os_error(-error).into()),
    }
}
