//! The devices that lead out of the node: their rows, the programs on them, and the node's own addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Drift, Problem, Round, Sink};
use crate::agent::node;
use crate::datapath::{Datapath, DeviceWriter, XdpMode};
use crate::model::{AddressPair, NetworkDevice};
use crate::netlink::{self, Link, News};
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
    /// What keeps drivers from it, as it was when they would have got it.
    hindered: BTreeMap<u32, String>,
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
        let (failed, wired, hindered) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        Ok(Self { datapath, writer, has_ipv6, drivers, attached, wired, hindered, failed })
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
        self.hindered.remove(&ifindex);
        if self.drivers.xdp == XdpMode::Off {
            return self.datapath.detach_wire(ifindex);
        }
        let links = netlink::links()?;
        let link = links.iter().find(|link| link.index == ifindex);
        let kind = link.map_or("", |link| &link.kind);
        let is_named = self.drivers.named.contains(&device.name);
        let attached = match link.and_then(|link| hindrance(&links, link)) {
            Some(why) => {
                self.hindered.insert(ifindex, why.clone());
                Err(anyhow::anyhow!(why))
            }
            None => self.datapath.attach_wire(ifindex, kind, is_named),
        };
        let how = match attached {
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

    fn is_whole(&self, links: &[Link], link: &Link) -> bool {
        let is_wired = self.wired.contains(&link.index);
        let is_as_it_was = self.drivers.xdp == XdpMode::Off
            || hindrance(links, link).as_ref() == self.hindered.get(&link.index);
        is_as_it_was
            && self.datapath.verify_network(link.index).is_ok()
            && (!is_wired || self.datapath.verify_wire(link.index).is_ok())
    }
}

/// Why a driver must not send on what it receives: it may have taken a VLAN's tag off a frame, and the program
/// would take the frame for one of the device's own network. A veth keeps a tag beside the frame where its other
/// end does (`ethtool --offload DEV txvlan off`): whoever has named the veth answers for that.
fn hindrance(links: &[Link], link: &Link) -> Option<String> {
    let vlan = links.iter().find(|upper| upper.kind == "vlan" && upper.lower == link.index);
    if let Some(vlan) = vlan {
        return Some(format!(
            "the VLAN {} is on it, and the driver may give its frames without their tags",
            vlan.name
        ));
    }
    if link.kind == "veth" {
        return None;
    }
    match netlink::active_features(&link.name) {
        Ok(features) => takes_tags(&features).then(|| {
            format!("the driver takes the tags off VLANs' frames: `ethtool -K {} rxvlan off`", link.name)
        }),
        Err(error) => Some(format!("what the driver does with VLANs is not known: {error}")),
    }
}

/// True if a driver with these features takes tags off. That it filters VLANs is no answer: it lets in those that
/// another namespace or a bridge has asked for, and all of them while something sets the device promiscuous.
fn takes_tags(features: &BTreeSet<String>) -> bool {
    features.contains("rx-vlan-hw-parse") || features.contains("rx-vlan-stag-hw-parse")
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
        let links = netlink::links()?;
        let present = links.iter().filter(|link| self.attached.contains_key(&link.index));
        let lost: Vec<u32> =
            present.filter(|link| !self.is_whole(&links, link)).map(|link| link.index).collect();
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
            self.hindered.remove(&ifindex);
            let name = self.attached.remove(&ifindex);
            self.datapath.note_wire(name.as_deref().unwrap_or_default(), None);
            tracing::info!(device = name, ifindex, "this device does not lead out any more");
        }
        self.writer.keep(&desired.iter().map(|(ifindex, _)| (*ifindex, ())).collect::<BTreeMap<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MacAddress;

    fn link(name: &str, index: u32, kind: &str, lower: u32) -> Link {
        Link {
            name: name.to_owned(),
            index,
            mac: MacAddress::default(),
            mtu: 1500,
            is_up: true,
            is_operational: true,
            kind: kind.to_owned(),
            lower,
        }
    }

    #[test]
    fn a_driver_that_may_hide_a_vlan_has_no_program() {
        let (eth0, veth) = (link("lo", 1, "", 0), link("eth1", 2, "veth", 9));
        let vlan = |lower| link("eth.7", 3, "vlan", lower);
        for (other, is_hindered) in [(vlan(1), true), (vlan(2), false), (link("br", 3, "bridge", 1), false)] {
            let found = hindrance(&[eth0.clone(), veth.clone(), other.clone()], &eth0);
            assert_eq!(found.is_some(), is_hindered, "{other:?}: {found:?}");
        }
        assert!(hindrance(&[veth.clone(), vlan(2)], &veth).is_some());
        assert_eq!(hindrance(&[veth.clone(), vlan(1)], &veth), None);
        let gone = link("no-such-device", 5, "", 0);
        assert!(hindrance(std::slice::from_ref(&gone), &gone).is_some());
        let features = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert!(!takes_tags(&features(&["rx-checksum", "rx-vlan-filter"])));
        assert!(takes_tags(&features(&["rx-vlan-hw-parse", "rx-vlan-filter"])));
        assert!(takes_tags(&features(&["rx-vlan-stag-hw-parse"])));
    }
}
