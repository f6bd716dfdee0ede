//! The devices that lead out of the node: their rows, the programs on them, and the node's own addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Drift, Problem, Round, Sink};
use crate::agent::node;
use crate::datapath::{Datapath, DeviceWriter, XdpMode};
use crate::model::{AddressPair, NetworkDevice};
use crate::netlink::{self, News};
use crate::tables::Snapshot;

/// What the devices' drivers are to do.
#[derive(Clone, Debug, Default)]
pub struct Drivers {
    /// Whether they are to have a program.
    pub xdp: XdpMode,
    /// The devices that somebody named.
    pub named: Vec<String>,
}

/// Attaches each device by itself; one that cannot be attached is tried again.
pub struct Network {
    datapath: Arc<Datapath>,
    writer: DeviceWriter,
    /// The node forwards IPv6.
    has_ipv6: bool,
    drivers: Drivers,
    /// Names of the devices that are attached, by index.
    attached: BTreeMap<u32, String>,
    /// Those whose drivers have the program, too.
    wired: BTreeSet<u32>,
    failed: BTreeMap<u32, String>,
}

impl Network {
    /// What an agent before this one has attached is detached if it is not desired.
    pub fn new(
        datapath: Arc<Datapath>,
        writer: DeviceWriter,
        has_ipv6: bool,
        drivers: Drivers,
    ) -> Result<Self> {
        let attached = datapath.network_links().context("listing the links of devices")?;
        let attached = attached.into_iter().map(|ifindex| (ifindex, String::new())).collect();
        let (failed, wired) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { datapath, writer, has_ipv6, drivers, attached, wired, failed })
    }

    fn write_one(&mut self, ifindex: u32, device: &NetworkDevice) -> Result<()> {
        // Before the programs: without its row a device masquerades nothing.
        if self.writer.write(ifindex, &device.sources)? {
            let AddressPair { ipv4, ipv6 } = device.sources;
            tracing::info!(device = device.name, ifindex, ?ipv4, ?ipv6, "this device leads out");
        }
        if self.attached.get(&ifindex) != Some(&device.name) {
            if let Some((name, value)) = node::router_advertisements(&device.name)?.filter(|_| self.has_ipv6)
            {
                netlink::set_sysctl(&name, &value)?;
            }
            self.datapath.attach_network(ifindex)?;
            self.wire(ifindex, device)?;
            self.attached.insert(ifindex, device.name.clone());
        }
        Ok(())
    }

    /// A driver without the program costs time, and nothing else: that is no failure.
    fn wire(&mut self, ifindex: u32, device: &NetworkDevice) -> Result<()> {
        self.wired.remove(&ifindex);
        if self.drivers.xdp == XdpMode::Off {
            return self.datapath.detach_wire(ifindex);
        }
        let link = netlink::links()?.into_iter().find(|link| link.index == ifindex);
        let kind = link.map_or(String::new(), |link| link.kind);
        let is_named = self.drivers.named.contains(&device.name);
        let how = match self.datapath.attach_wire(ifindex, &kind, is_named) {
            Ok(()) => {
                self.wired.insert(ifindex);
                "native".to_owned()
            }
            Err(error) => {
                self.datapath.detach_wire(ifindex)?;
                format!("off: {error:#}")
            }
        };
        tracing::info!(device = device.name, xdp = how, "the driver of a device that leads out");
        self.datapath.note_wire(&device.name, Some(how));
        Ok(())
    }

    fn is_whole(&self, ifindex: u32) -> bool {
        self.datapath.verify_network(ifindex).is_ok()
            && (!self.wired.contains(&ifindex) || self.datapath.verify_wire(ifindex).is_ok())
    }
}

/// Writes and attaches what leads out at start, before there are rounds. Programs of an agent with other
/// tables stay until the first round.
pub fn bring_up(
    datapath: &Datapath,
    writer: &mut DeviceWriter,
    node: &AddressPair,
    devices: &Snapshot<u32, NetworkDevice>,
) -> Result<()> {
    writer.write_node(node)?;
    for (ifindex, device) in devices {
        writer.write(*ifindex, &device.sources)?;
        if !datapath.is_succeeding() {
            datapath.attach_network(*ifindex).with_context(|| format!("attaching to {}", device.name))?;
        }
    }
    Ok(())
}

impl Sink for Network {
    fn name(&self) -> &'static str {
        "network"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["devices", "succession"]
    }

    fn hears(&self) -> &'static [News] {
        &[News::Links, News::Filters]
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        let present: BTreeSet<u32> = netlink::links()?.iter().map(|link| link.index).collect();
        let is_lost = |ifindex: &u32| present.contains(ifindex) && !self.is_whole(*ifindex);
        let lost: Vec<u32> = self.attached.keys().copied().filter(is_lost).collect();
        let drift =
            |ifindex| self.attached.remove(&ifindex).map(|name| Drift::one(format!("programs on {name}")));
        Ok(lost.into_iter().filter_map(drift).collect())
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = round.desired;
        self.writer.write_node(&desired.node_addresses).context("writing the node's addresses")?;
        self.failed.retain(|ifindex, _| !round.is_retry && desired.devices.contains_key(ifindex));
        let mut problems = Vec::new();
        for (ifindex, device) in &desired.devices {
            if !self.failed.contains_key(ifindex)
                && let Err(error) = self.write_one(*ifindex, device)
            {
                self.failed.insert(*ifindex, format!("{error:#}"));
            }
            if let Some(error) = self.failed.get(ifindex) {
                problems.push(Problem::new(format!("device {}: {error}", device.name)));
            }
        }
        Ok(problems)
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        let desired = &round.desired.devices;
        let gone: Vec<u32> =
            self.attached.keys().filter(|ifindex| !desired.contains_key(*ifindex)).copied().collect();
        for ifindex in gone {
            self.datapath.detach_wire(ifindex).context("detaching from a device's driver")?;
            self.datapath.detach_network(ifindex).context("detaching from a device")?;
            self.wired.remove(&ifindex);
            let name = self.attached.remove(&ifindex);
            self.datapath.note_wire(name.as_deref().unwrap_or_default(), None);
            tracing::info!(device = name, ifindex, "this device does not lead out any more");
        }
        self.writer.keep(&desired.iter().map(|(ifindex, _)| (*ifindex, ())).collect::<BTreeMap<_, _>>())
    }
}
