//! The tunnel's device, the programs on it and on sockets, and the kernel settings that pods' packets need.

use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::{Drift, Problem, Round, Sink};
use crate::agent::node::{Devices, OVERLAY_DEVICE};
use crate::agent::restart::Restart;
use crate::datapath::Datapath;
use crate::netlink::{self, News};

/// What is made before the programs are loaded, and kept as it was made.
pub struct DeviceSink {
    datapath: Arc<Datapath>,
    devices: Devices,
    tunnel_port: u16,
    has_socket_programs: bool,
    restart: Restart,
    /// What the last comparison found wrong.
    wrong: Vec<Wrong>,
}

/// One thing that is not as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wrong {
    Setting { name: String, value: String },
    Overlay,
    OverlayAddress(IpNet),
    OverlayPrograms(u32),
    SocketPrograms,
}

impl Wrong {
    fn what(&self) -> String {
        match self {
            Self::Setting { name, value } => format!("setting {name}={value}"),
            Self::Overlay => format!("device {OVERLAY_DEVICE}"),
            Self::OverlayAddress(address) => format!("address {} of {OVERLAY_DEVICE}", address.addr()),
            Self::OverlayPrograms(_) => format!("programs on {OVERLAY_DEVICE}"),
            Self::SocketPrograms => "programs of sockets".to_owned(),
        }
    }
}

impl DeviceSink {
    /// Over devices that were just made and attached to.
    pub fn new(
        datapath: Arc<Datapath>,
        devices: Devices,
        tunnel_port: u16,
        has_socket_programs: bool,
        restart: Restart,
    ) -> Self {
        Self { datapath, devices, tunnel_port, has_socket_programs, restart, wrong: Vec::new() }
    }

    /// The devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    fn look(&self) -> Result<Vec<Wrong>> {
        // The programs of a former agent are replaced all at once, by the sink `succession`.
        let is_succeeding = self.datapath.is_succeeding();
        let mut wrong = Vec::new();
        for (name, value) in &self.devices.settings {
            if netlink::get_sysctl(name)?.is_some_and(|found| found != *value) {
                wrong.push(Wrong::Setting { name: name.clone(), value: value.clone() });
            }
        }
        let links = netlink::links()?;
        if let Some(index) = self.devices.vxlan {
            match links.iter().find(|link| link.name == OVERLAY_DEVICE && link.index == index) {
                Some(link) if link.is_up && link.mtu == self.devices.mtu => {
                    wrong.extend(self.look_at_overlay(index)?)
                }
                _ => wrong.push(Wrong::Overlay),
            }
        }
        if !is_succeeding && self.has_socket_programs && self.datapath.verify_sockets().is_err() {
            wrong.push(Wrong::SocketPrograms);
        }
        Ok(wrong)
    }

    fn look_at_overlay(&self, index: u32) -> Result<Vec<Wrong>> {
        let there = netlink::addresses_of(index)?;
        let wanted = self.devices.addresses_of_tunnel().iter().map(|address| IpNet::from(*address));
        let missing = wanted.filter(|address| !there.contains(address)).map(Wrong::OverlayAddress);
        let is_wrong = !self.datapath.is_succeeding() && self.datapath.verify_overlay(index).is_err();
        let programs = is_wrong.then_some(Wrong::OverlayPrograms(index));
        Ok(missing.chain(programs).collect())
    }

    fn mend(&self, wrong: &Wrong) -> Result<()> {
        match wrong {
            Wrong::Setting { name, value } => netlink::set_sysctl(name, value)?,
            Wrong::Overlay => self.mend_overlay()?,
            Wrong::OverlayAddress(address) => {
                let index = self.devices.vxlan.context("there is a tunnel device")?;
                netlink::add_address(index, *address)?;
            }
            Wrong::OverlayPrograms(index) => self.datapath.attach_overlay(*index)?,
            Wrong::SocketPrograms => self.datapath.attach_sockets()?,
        }
        Ok(())
    }

    /// Under the same index, by which the programs know it.
    fn mend_overlay(&self) -> Result<()> {
        let wanted = self.devices.vxlan;
        let index = netlink::ensure_vxlan(OVERLAY_DEVICE, self.tunnel_port, self.devices.mtu, wanted)?;
        if Some(index) != wanted {
            self.restart.request(&format!(
                "device {OVERLAY_DEVICE} was made anew, and the programs know the old one"
            ));
            return Ok(());
        }
        for address in self.devices.addresses_of_tunnel() {
            netlink::add_address(index, IpNet::from(*address))?;
        }
        self.datapath.attach_overlay(index)
    }
}

impl Sink for DeviceSink {
    fn name(&self) -> &'static str {
        "devices"
    }

    fn hears(&self) -> &'static [News] {
        &[News::Links, News::Filters, News::Settings, News::Routes]
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        self.wrong = self.look()?;
        Ok(self.wrong.iter().map(|wrong| Drift::one(wrong.what())).collect())
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        if round.is_retry && !self.wrong.is_empty() {
            self.wrong = self.look()?;
        }
        let mut problems = Vec::new();
        self.wrong = std::mem::take(&mut self.wrong)
            .into_iter()
            .filter(|wrong| match self.mend(wrong) {
                Ok(()) => false,
                Err(error) => {
                    problems.push(Problem::new(format!("{}: {error:#}", wrong.what())));
                    true
                }
            })
            .collect();
        Ok(problems)
    }
}
