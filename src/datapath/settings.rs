//! What the datapath is loaded with: where the pins are, how large maps are, and
//! the settings that the programs read.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use super::abi::{self, addr_of};
use super::quota::{Limits, Quotas};

/// How to load the datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// The pin directory, `<bpffs>/weir/v<ABI>`.
    pub pins: PathBuf,
    /// The cgroup v2 hierarchy; found in /proc/self/mountinfo when `None`.
    pub cgroup_root: Option<PathBuf>,
    /// How to attach to devices.
    pub attach: AttachMode,
    /// Rows that maps can hold.
    pub map_sizes: MapSizes,
    /// What the programs are told.
    pub settings: Settings,
}

/// How programs are attached to devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// tcx where the kernel has it, else clsact.
    #[default]
    Auto,
    /// tcx links (Linux 6.6 and later).
    Tcx,
    /// Filters of a clsact queueing discipline.
    Clsact,
}

impl AttachMode {
    /// Decides `Auto`; refuses what the kernel has not.
    pub(super) fn resolve(self, has_tcx: bool) -> Result<Self> {
        match self {
            Self::Auto if has_tcx => Ok(Self::Tcx),
            Self::Auto | Self::Clsact => Ok(Self::Clsact),
            Self::Tcx if has_tcx => Ok(Self::Tcx),
            Self::Tcx => bail!("the kernel has no tcx (Linux 6.6 and later have it): use --attach auto"),
        }
    }
}

/// Rows that maps can hold, by name; what is not given is as in `maps.h`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapSizes(pub BTreeMap<String, u32>);

impl MapSizes {
    /// Sets the size of one map.
    pub fn with(mut self, map: &str, entries: u32) -> Self {
        self.0.insert(map.to_owned(), entries);
        self
    }
}

/// The settings of a node, which are fixed while the programs run (`bpf/config.h`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Stands for a pod that reaches itself through a service.
    pub loopback_ipv4: Ipv4Addr,
    /// Stands for a pod that reaches itself through a service.
    pub loopback_ipv6: Ipv6Addr,
    /// Of this node: for hashes that pods must not be able to compute.
    pub secret: [u64; 2],
    /// The cookie of the node's network namespace: only its sockets have its loopback addresses.
    /// `None`: the kernel has none (before 5.14).
    pub netns_cookie: Option<u64>,
    /// The VXLAN device; `None`: native routing.
    pub tunnel_ifindex: Option<u32>,
    /// With native routing: the VXLAN device that leads to egress gateways; `None`: nothing leads there.
    pub gateway_ifindex: Option<u32>,
    /// UDP port of the tunnels.
    pub tunnel_port: u16,
    /// A running flow is reported this often.
    pub flow_report: Duration,
    /// Established TCP connections are forgotten after this much silence.
    pub tcp_timeout: Duration,
    /// TCP connections without an answer.
    pub tcp_opening: Duration,
    /// TCP connections that both sides ended.
    pub tcp_closing: Duration,
    /// Everything else.
    pub other_timeout: Duration,
    /// Ports for masquerading.
    pub nat_ports: RangeInclusive<u16>,
    /// Ports that running flows have been given already, perhaps of another range.
    pub nat_known: Option<RangeInclusive<u16>>,
    /// Masquerade IPv4.
    pub masquerade_ipv4: bool,
    /// Masquerade IPv6.
    pub masquerade_ipv6: bool,
    /// Report flows.
    pub flow_events: bool,
    /// Translate services at the socket.
    pub socket_lb: bool,
    /// Put on and take off the tunnel's headers, past its device.
    pub tunnel_direct: bool,
    /// The device that encrypts what is sent to it; without it nothing is encrypted.
    pub encrypt_ifindex: Option<u32>,
    /// The device that encrypts with the other key, by which keys change without loss.
    pub encrypt_second: Option<u32>,
    /// Drop what comes in plain and has to be encrypted.
    pub encrypt_strict: bool,
    /// The response code of a question that no rule allows.
    pub dns_denied: u8,
    /// What fits the way to other nodes' pods, in bytes: TCP offers no more; 0: what the pods offer.
    pub path_mtu: u32,
    /// Where fragments wait for the first one of their packet; without it they are dropped.
    pub wait_ifindex: Option<u32>,
    /// The queue of pods that have a limit on what they receive; without it nothing is limited.
    pub limit_ifindex: Option<u32>,
    /// The bits of `skb->mark` that are Weir's: adjacent, at least three.
    pub mark_mask: u32,
    /// What one pod may have of what all share.
    pub quotas: Quotas,
    /// Places in a table of Maglev: a prime number, the same on every node.
    pub maglev_size: u32,
}

/// Weir's bits of `skb->mark` by default; docs/decisions/002-packet-mark.md has those of others.
pub const MARK_MASK: u32 = 0x70;

impl Default for Settings {
    fn default() -> Self {
        Self {
            loopback_ipv4: Ipv4Addr::new(169, 254, 42, 1),
            loopback_ipv6: Ipv6Addr::new(0xfd57, 0x6569, 0x7200, 0, 0, 0, 0x2a, 1),
            secret: [0; 2],
            netns_cookie: None,
            tunnel_ifindex: None,
            gateway_ifindex: None,
            tunnel_port: 8472,
            flow_report: Duration::from_secs(5),
            tcp_timeout: Duration::from_secs(7440),
            tcp_opening: Duration::from_secs(60),
            tcp_closing: Duration::from_secs(10),
            other_timeout: Duration::from_secs(60),
            nat_ports: 12288..=28671,
            nat_known: None,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
            flow_events: true,
            socket_lb: true,
            tunnel_direct: true,
            wait_ifindex: None,
            limit_ifindex: None,
            encrypt_ifindex: None,
            encrypt_second: None,
            encrypt_strict: true,
            dns_denied: crate::model::l7::dns_message::REFUSED,
            path_mtu: 0,
            mark_mask: MARK_MASK,
            quotas: Quotas::default(),
            maglev_size: super::maglev::TABLE_SIZE,
        }
    }
}

impl Settings {
    /// As the programs read it, with these limits.
    pub(super) fn encode(&self, jiffies_per_second: u32, limits: &Limits) -> abi::Settings {
        let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        let known = self.nat_known.as_ref().unwrap_or(&self.nat_ports);
        abi::Settings {
            loopback_ipv4: addr_of(self.loopback_ipv4.into()),
            loopback_ipv6: addr_of(self.loopback_ipv6.into()),
            secret: self.secret,
            netns_cookie: self.netns_cookie.unwrap_or(0),
            jiffies_per_second,
            tunnel_ifindex: self.tunnel_ifindex.unwrap_or(0),
            overlay_ifindex: self.tunnel_ifindex.or(self.gateway_ifindex).unwrap_or(0),
            flow_report_seconds: seconds(self.flow_report),
            tcp_timeout_seconds: seconds(self.tcp_timeout),
            tcp_opening_seconds: seconds(self.tcp_opening),
            tcp_closing_seconds: seconds(self.tcp_closing),
            other_timeout_seconds: seconds(self.other_timeout),
            mark_mask: self.mark_mask,
            encrypt_ifindex: self.encrypt_ifindex.unwrap_or(0),
            encrypt_second: self.encrypt_second.unwrap_or(0),
            path_mtu: self.path_mtu,
            wait_ifindex: self.wait_ifindex.unwrap_or(0),
            limit_ifindex: self.limit_ifindex.unwrap_or(0),
            quota_limit: limits.of_one,
            quota_capacity: limits.of_all,
            drop_record_cost: self.quotas.drop_record_cost(jiffies_per_second),
            maglev_size: self.maglev_size,
            event_buffer_half: limits.event_buffer_bytes / 2,
            nat_port_min: *self.nat_ports.start(),
            nat_port_max: *self.nat_ports.end(),
            nat_known_min: *known.start().min(self.nat_ports.start()),
            nat_known_max: *known.end().max(self.nat_ports.end()),
            tunnel_port: self.tunnel_port,
            masquerade_ipv4: self.masquerade_ipv4.into(),
            masquerade_ipv6: self.masquerade_ipv6.into(),
            flow_events: self.flow_events.into(),
            socket_lb: self.socket_lb.into(),
            tunnel_direct: self.tunnel_direct.into(),
            encrypt_strict: self.encrypt_strict.into(),
            dns_denied: self.dns_denied,
            pad: [0; 3],
        }
    }
}
