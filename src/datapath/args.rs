//! Settings of the datapath: where the kernel's file systems are, how programs are attached, sizes of maps,
//! shares of pods.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args};

use super::{AttachMode, MapSizes, Quotas};
use crate::settings::{SettingError, within};

/// How the programs are put into the kernel.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Datapath")]
pub struct KernelArgs {
    /// Where the BPF file system is, or is to be mounted.
    #[arg(long, env = "WEIR_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,

    /// Where the cgroup v2 hierarchy is, or a directory above its mount; found in
    /// /proc/self/mountinfo by default.
    #[arg(long, env = "WEIR_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,

    /// The bits of skb->mark that Weir uses: three or more adjacent ones that no rule of the node uses.
    /// The default keeps clear of kube-proxy, the portmap plugin, Calico, Cilium, Tailscale and AWS.
    #[arg(long, env = "WEIR_MARK_MASK", value_name = "MASK", default_value = "0x70")]
    pub mark_mask: MarkMask,

    /// How programs are attached to devices.
    #[arg(long, env = "WEIR_ATTACH", value_enum, default_value = "auto")]
    pub attach: AttachMode,

    /// Translate service addresses at the socket, before there are packets.
    #[arg(long, env = "WEIR_SOCKET_LB", action = ArgAction::Set, default_value_t = true)]
    pub socket_lb: bool,
}

/// How much the kernel remembers.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sizes of maps")]
pub struct MapArgs {
    /// Connections that the kernel remembers.
    #[arg(long, env = "WEIR_CONNECTIONS_MAX", value_name = "N", default_value_t = 262_144)]
    pub connections_max: u32,

    /// Masqueraded connections that the kernel remembers, two entries each.
    #[arg(long, env = "WEIR_NAT_MAX", value_name = "N", default_value_t = 131_072)]
    pub nat_max: u32,

    /// Rows that another map can hold, as `addresses=524288`; maps grow at the agent's next start.
    #[arg(long, env = "WEIR_MAP_SIZES", value_name = "MAP=N", value_delimiter = ',')]
    pub map_size: Vec<MapSize>,
}

impl MapArgs {
    /// Refuses sizes that no kernel could make, or that no node could live with.
    pub fn check(&self) -> Result<(), SettingError> {
        for (setting, rows) in [("connections-max", self.connections_max), ("nat-max", self.nat_max)] {
            within(setting, rows, 1024..=16_777_216)?;
        }
        Ok(())
    }

    /// The sizes by the maps' names.
    pub fn sizes(&self) -> MapSizes {
        let sizes = MapSizes::default().with("connections", self.connections_max).with("nat", self.nat_max);
        self.map_size.iter().fold(sizes, |sizes, MapSize { map, rows }| sizes.with(map, *rows))
    }
}

/// What one pod may have.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Shares of pods")]
pub struct QuotaArgs {
    /// Connections that one pod may have; by default half of --connections-max. However many pods take
    /// theirs, none gets more than is left for the others.
    #[arg(long, env = "WEIR_ENDPOINT_CONNECTIONS_MAX", value_name = "N")]
    pub endpoint_connections_max: Option<u32>,

    /// Unanswered connections that one pod may have before its oldest one is forgotten for a new one; by
    /// default a sixteenth of --connections-max, at least 1024.
    #[arg(long, env = "WEIR_ENDPOINT_OPENING_MAX", value_name = "N")]
    pub endpoint_opening_max: Option<u32>,

    /// Ports for masquerading that one pod may have; by default half of them.
    #[arg(long, env = "WEIR_ENDPOINT_NAT_PORTS_MAX", value_name = "N")]
    pub endpoint_nat_ports_max: Option<u32>,

    /// Drops of one pod that are recorded in a second, and as many of its messages of DNS that the kernel judges; the
    /// rest is only counted. 0: no limit.
    #[arg(long, env = "WEIR_ENDPOINT_DROP_RECORDS", value_name = "N", default_value_t = 1000)]
    pub endpoint_drop_records: u32,
}

impl QuotaArgs {
    /// Refuses shares that no pod could work with.
    pub fn check(&self) -> Result<(), SettingError> {
        for (setting, share) in [
            ("endpoint-connections-max", self.endpoint_connections_max),
            ("endpoint-opening-max", self.endpoint_opening_max),
            ("endpoint-nat-ports-max", self.endpoint_nat_ports_max),
        ] {
            share.map_or(Ok(()), |share| within(setting, share, 16..=16_777_216))?;
        }
        Ok(())
    }

    /// The shares as the programs take them.
    pub fn quotas(&self) -> Quotas {
        Quotas {
            connections: self.endpoint_connections_max,
            opening: self.endpoint_opening_max,
            nat_ports: self.endpoint_nat_ports_max,
            drop_records_per_second: self.endpoint_drop_records,
        }
    }
}

/// Rows that a map can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSize {
    /// The map's name in maps.h.
    pub map: String,
    /// 1 to 2^24.
    pub rows: u32,
}

impl FromStr for MapSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sized = super::reuse::GROWING;
        let (map, rows) = text.split_once('=').ok_or("must be MAP=N")?;
        if !sized.contains(&map) {
            return Err(format!("must name one of {}", sized.join(", ")));
        }
        match rows.parse() {
            Ok(rows @ 1..=16_777_216) => Ok(Self { map: map.to_owned(), rows }),
            _ => Err("must give 1 to 16777216 rows".to_owned()),
        }
    }
}

/// The bits of `skb->mark` that are Weir's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkMask(pub u32);

impl FromStr for MarkMask {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        let number = match digits {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        let mask = number.map_err(|_| "must be a number of 32 bits, as 0x70".to_owned())?;
        let is_adjacent = mask.count_ones() + mask.leading_zeros() + mask.trailing_zeros() == u32::BITS;
        if mask == 0 || !is_adjacent || mask.count_ones() < 3 {
            return Err("must have at least three bits, all adjacent, as 0x70".to_owned());
        }
        Ok(Self(mask))
    }
}
