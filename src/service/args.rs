//! The agent's settings about Services.

use std::net::SocketAddr;
use std::str::FromStr;

use clap::{ArgAction, Args};
use ipnet::IpNet;

use super::Defaults;
use crate::model::{Algorithm, Forwarding};
use crate::settings::SettingError;

/// Flags of `weir agent` about Services; each can also be set by its environment variable.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Services")]
pub struct ServiceArgs {
    /// How a new connection to a Service gets its backend: random, or maglev, by which one connection gets
    /// one backend on whatever node it arrives. A Service says otherwise by the annotation weir.dev/algorithm.
    #[arg(long, env = "WEIR_SERVICE_ALGORITHM", value_name = "random|maglev", default_value = "random")]
    pub service_algorithm: Algorithm,

    /// How packets from the network reach backends of other nodes: snat, or dsr, by which the backend's node
    /// answers the client itself. A Service says otherwise by the annotation weir.dev/forwarding.
    #[arg(long, env = "WEIR_SERVICE_FORWARDING", value_name = "snat|dsr", default_value = "snat")]
    pub service_forwarding: Forwarding,

    /// Slots of a Maglev table: a prime, at least a hundred times as many as a Service has backends.
    #[arg(long, env = "WEIR_MAGLEV_TABLE_SIZE", value_name = "PRIME", default_value_t = 16_381)]
    pub maglev_table_size: u32,

    /// Ports that Services may have at the nodes' addresses, as --service-node-port-range of the API server.
    #[arg(long, env = "WEIR_NODE_PORT_RANGE", value_name = "FIRST-LAST", default_value = "30000-32767")]
    pub node_port_range: PortRange,

    /// Node ports are at the node's addresses within these; by default at all of them.
    #[arg(long, env = "WEIR_NODE_PORT_ADDRESSES", value_name = "CIDR", value_delimiter = ',')]
    pub node_port_addresses: Vec<IpNet>,

    /// Addresses within these may be redirected by a CiliumLocalRedirectPolicy (addressMatcher), whatever
    /// namespace it is of: for pods of all namespaces. By default none may.
    #[arg(long, env = "WEIR_REDIRECT_ADDRESSES", value_name = "CIDR", value_delimiter = ',')]
    pub redirect_addresses: Vec<IpNet>,

    /// Where load balancers ask whether this node serves, as of kube-proxy: /healthz, /livez; none: nowhere.
    #[arg(long, env = "WEIR_HEALTHZ_ADDRESS", value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_address: HealthzAddress,

    /// The same for the node alone, where upstream's tests ask for kube-proxy's mode: /proxyMode; none: nowhere.
    #[arg(
        long,
        env = "WEIR_PROXY_METRICS_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:10249"
    )]
    pub proxy_metrics_address: HealthzAddress,

    /// This node may answer ARP and neighbour discovery for addresses of Services, where a LoadBalancerPool
    /// (`announce`) or a CiliumL2AnnouncementPolicy asks for it.
    #[arg(long, env = "WEIR_ANNOUNCE", action = ArgAction::Set, default_value_t = true)]
    pub announce: bool,

    /// An agent that is asked to stop gives the addresses that it answers for to another node at once. If false,
    /// its node goes on for two thirds of the time below: a new agent comes in place, and no connection moves.
    #[arg(long, env = "WEIR_ANNOUNCE_HAND_OVER", action = ArgAction::Set, default_value_t = false)]
    pub announce_hand_over: bool,

    /// A node that is silent for so long loses the addresses that it answers for to another node.
    #[arg(long, env = "WEIR_ANNOUNCE_LEASE_SECONDS", value_name = "SECONDS", default_value_t = 10)]
    pub announce_lease_seconds: u32,
}

impl ServiceArgs {
    /// What counts where a Service says nothing itself.
    pub fn defaults(&self) -> Defaults {
        Defaults {
            algorithm: self.service_algorithm,
            forwarding: self.service_forwarding,
            node_port_cidrs: self.node_port_addresses.as_slice().into(),
            redirect_cidrs: self.redirect_addresses.as_slice().into(),
        }
    }

    /// Refuses tables that Maglev cannot fill, and times that no renewal can keep.
    pub fn check(&self) -> Result<(), SettingError> {
        crate::settings::within("announce-lease-seconds", self.announce_lease_seconds, 2..=300)?;
        let size = self.maglev_table_size;
        let is_prime = || (2..).take_while(|n| n * n <= size).all(|n| !size.is_multiple_of(n));
        if (251..=131_071).contains(&size) && is_prime() {
            return Ok(());
        }
        Err(SettingError::new("maglev-table-size", size, "must be a prime from 251 to 131071"))
    }
}

/// A range of ports, both ends in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = text
            .split_once('-')
            .and_then(|(first, last)| Some(Self { first: first.parse().ok()?, last: last.parse().ok()? }));
        range
            .filter(|range| range.first > 0 && range.first <= range.last)
            .ok_or_else(|| "must be FIRST-LAST, as 30000-32767".to_owned())
    }
}

/// An address to serve at, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthzAddress(pub Option<SocketAddr>);

impl FromStr for HealthzAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            text => text
                .parse()
                .map(|address| Self(Some(address)))
                .map_err(|_| "must be ADDRESS:PORT, as 0.0.0.0:10256, or none".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: ServiceArgs,
    }

    #[test]
    fn nonsense_is_refused() {
        let args = |flags: &[&str]| {
            Command::try_parse_from(["weir"].iter().chain(flags)).map(|command| command.args).ok()
        };
        assert_eq!(args(&[]).expect("the defaults").check(), Ok(()));
        for size in ["16383", "7", "131072"] {
            assert!(args(&["--maglev-table-size", size]).expect("a number").check().is_err(), "{size}");
        }
        for nonsense in ["30000", "2-1", "0-5", "a-b", "1-65536"] {
            assert!(args(&["--node-port-range", nonsense]).is_none(), "{nonsense}");
        }
        assert!(args(&["--service-algorithm", "round-robin"]).is_none());
        assert!(args(&["--healthz-address", "10256"]).is_none());
        assert_eq!(args(&["--healthz-address", "none"]).expect("none").healthz_address, HealthzAddress(None));
    }
}
