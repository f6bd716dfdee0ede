//! Settings of what DNS tells pods.

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use serde::Serialize;

use super::Bounds;
use crate::model::l7::dns_message::{NXDOMAIN, REFUSED};

/// How long what DNS told pods counts, and how much of it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Names of DNS")]
pub struct NameArgs {
    /// Addresses of names (toFQDNs) count for at least so long, however short their TTL is: programs keep addresses
    /// longer than they should. What connections run to counts as long as they do.
    #[arg(long, env = "WEIR_NAMES_MIN_TTL_SECONDS", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..=604_800))]
    pub names_min_ttl_seconds: u32,

    /// Addresses of all names of one pod that count at most; of one name half of that. What the pod was told longest
    /// ago goes first.
    #[arg(long, env = "WEIR_NAMES_PER_ENDPOINT_MAX", value_name = "N", default_value_t = 2000,
        value_parser = clap::value_parser!(u32).range(2..=8192))]
    pub names_per_endpoint_max: u32,

    /// What a pod gets that asks DNS for a name that its rules deny: REFUSED, or that there is no such name. Resolvers
    /// ask the next server after REFUSED, and go on with their search list after NXDOMAIN.
    #[arg(long, env = "WEIR_DNS_DENIED", value_name = "CODE", value_enum, default_value_t)]
    pub dns_denied: DnsDenied,

    /// What answers may name although the node guards it (--stack-cidrs) or it is of the link alone.
    #[arg(long, env = "WEIR_NAMES_BELIEVE", value_name = "CIDR", value_delimiter = ',')]
    pub names_believe: Vec<IpNet>,
}

/// The response code of a question that no rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DnsDenied {
    /// REFUSED (5).
    #[default]
    Refused,
    /// NXDOMAIN (3), in other words: nameError.
    #[value(alias = "nameError")]
    Nxdomain,
}

impl DnsDenied {
    /// As messages have it.
    pub fn code(self) -> u8 {
        match self {
            Self::Refused => REFUSED,
            Self::Nxdomain => NXDOMAIN,
        }
    }
}

/// Addresses of names of all pods: fewer than half of the rows that map prefixes has.
const OF_ALL: usize = 8192;

/// New addresses of one pod in a minute. With four times as many of all pods the numbers of identities last for 139
/// minutes before one has another meaning; an idle connection is forgotten after 124.
const NEW_OF_MINUTE: usize = 30_000;

impl NameArgs {
    /// What is kept at most.
    pub fn bounds(&self) -> Bounds {
        let of_endpoint = self.names_per_endpoint_max as usize;
        Bounds {
            of_name: of_endpoint / 2,
            of_endpoint,
            of_all: OF_ALL,
            ttl_min_s: self.names_min_ttl_seconds.into(),
            of_minute: NEW_OF_MINUTE,
            of_minute_all: 4 * NEW_OF_MINUTE,
        }
    }
}
