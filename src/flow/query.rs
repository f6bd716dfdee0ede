//! What a reader asks for: the same struct is the command line's flags and the API's JSON.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use clap::{Args, CommandFactory, Parser};
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::model::IdentityId;

use super::names::reserved_name;
use super::{Direction, DropReason, EventType, L4Protocol, LabelPattern, Verdict};

/// Which flows, and whether to wait for more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Query {
    /// At most the newest N that match; none: 20, or none at all when following, or every one when
    /// a time is given.
    pub last: Option<u64>,
    /// Every flow that is kept.
    pub all: bool,
    /// Then go on with new ones until the reader goes away.
    pub follow: bool,
    /// Not older.
    pub since: Option<Timestamp>,
    /// Not newer.
    pub until: Option<Timestamp>,
    /// What must match.
    pub filter: Filter,
    /// What must not match; each on its own.
    pub not: Vec<Exclusion>,
}

/// Conditions on a flow: every field that is given must match, one of its values is enough.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[command(next_help_heading = "Filters (all must match; of one given several times, any)")]
pub struct Filter {
    /// From or to a pod whose name begins so.
    #[arg(long, value_name = "[NS/]PREFIX")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pod: Vec<NamePattern>,
    /// From a pod whose name begins so.
    #[arg(long, value_name = "[NS/]PREFIX")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_pod: Vec<NamePattern>,
    /// To a pod whose name begins so.
    #[arg(long, value_name = "[NS/]PREFIX")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_pod: Vec<NamePattern>,

    /// From or to a namespace.
    #[arg(long, short, value_name = "NAME")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespace: Vec<String>,
    /// From a namespace.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_namespace: Vec<String>,
    /// To a namespace.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_namespace: Vec<String>,

    /// From or to a party with these labels: key=value, key!=value, key, !key, key in (a,b).
    #[arg(long, short, value_name = "SELECTOR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub label: Vec<LabelPattern>,
    /// From a party with these labels.
    #[arg(long, value_name = "SELECTOR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_label: Vec<LabelPattern>,
    /// To a party with these labels.
    #[arg(long, value_name = "SELECTOR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_label: Vec<LabelPattern>,

    /// From or to an identity: a number, or a reserved name as world or host.
    #[arg(long, value_name = "IDENTITY")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub identity: Vec<IdentityPattern>,
    /// From an identity.
    #[arg(long, value_name = "IDENTITY")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_identity: Vec<IdentityPattern>,
    /// To an identity.
    #[arg(long, value_name = "IDENTITY")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_identity: Vec<IdentityPattern>,

    /// From or to an address or prefix; a service's address counts as a destination.
    #[arg(long, value_name = "IP[/N]", value_parser = network)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<IpNet>,
    /// From an address or prefix.
    #[arg(long, value_name = "IP[/N]", value_parser = network)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_ip: Vec<IpNet>,
    /// To an address or prefix.
    #[arg(long, value_name = "IP[/N]", value_parser = network)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_ip: Vec<IpNet>,

    /// From or to a port; a service's port counts as a destination.
    #[arg(long, value_name = "PORT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port: Vec<u16>,
    /// From a port.
    #[arg(long, value_name = "PORT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_port: Vec<u16>,
    /// To a port.
    #[arg(long, value_name = "PORT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_port: Vec<u16>,

    /// Through a service whose name begins so.
    #[arg(long, value_name = "[NS/]PREFIX")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service: Vec<NamePattern>,
    /// tcp, udp, sctp, icmpv4, icmpv6 or a number.
    #[arg(long, value_name = "PROTOCOL")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protocol: Vec<L4Protocol>,
    /// forwarded or dropped.
    #[arg(long, value_name = "VERDICT")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub verdict: Vec<Verdict>,
    /// Why it was dropped, as policy_denied.
    #[arg(long, alias = "drop-reason-desc", value_name = "REASON")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drop_reason: Vec<DropReason>,
    /// ingress or egress, seen from the pod whose policy judged.
    #[arg(long, alias = "traffic-direction", value_name = "DIRECTION")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub direction: Vec<Direction>,
    /// new, update, end or drop.
    #[arg(long = "type", value_name = "TYPE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub event_type: Vec<EventType>,
}

impl Filter {
    /// Adds the conditions of `more`: of one field, any may match.
    pub fn extend(&mut self, more: Self) {
        self.pod.extend(more.pod);
        self.from_pod.extend(more.from_pod);
        self.to_pod.extend(more.to_pod);
        self.namespace.extend(more.namespace);
        self.from_namespace.extend(more.from_namespace);
        self.to_namespace.extend(more.to_namespace);
        self.label.extend(more.label);
        self.from_label.extend(more.from_label);
        self.to_label.extend(more.to_label);
        self.identity.extend(more.identity);
        self.from_identity.extend(more.from_identity);
        self.to_identity.extend(more.to_identity);
        self.ip.extend(more.ip);
        self.from_ip.extend(more.from_ip);
        self.to_ip.extend(more.to_ip);
        self.port.extend(more.port);
        self.from_port.extend(more.from_port);
        self.to_port.extend(more.to_port);
        self.service.extend(more.service);
        self.protocol.extend(more.protocol);
        self.verdict.extend(more.verdict);
        self.drop_reason.extend(more.drop_reason);
        self.direction.extend(more.direction);
        self.event_type.extend(more.event_type);
    }
}

/// `[namespace/]prefix` of a name; `ns/` is all of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NamePattern {
    namespace: Option<String>,
    prefix: String,
}

impl NamePattern {
    /// True for `namespace/name`.
    pub fn matches(&self, namespace: &str, name: &str) -> bool {
        !name.is_empty()
            && name.starts_with(&self.prefix)
            && self.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.prefix),
            None => f.write_str(&self.prefix),
        }
    }
}

impl FromStr for NamePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, prefix) = match text.split_once('/') {
            Some(("", prefix)) => (None, prefix),
            Some((namespace, prefix)) => (Some(namespace.to_owned()), prefix),
            None => (None, text),
        };
        if prefix.contains('/') {
            return Err("write [namespace/]name-prefix".to_owned());
        }
        Ok(Self { namespace, prefix: prefix.to_owned() })
    }
}

impl From<NamePattern> for String {
    fn from(pattern: NamePattern) -> Self {
        pattern.to_string()
    }
}

impl TryFrom<String> for NamePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// An identity by number, or by its reserved name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdentityPattern(pub IdentityId);

impl FromStr for IdentityPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("reserved:").unwrap_or(text);
        let reserved = (0..IdentityId::FIRST_CLUSTER.0).map(IdentityId);
        if let Some(identity) = reserved.into_iter().find(|identity| reserved_name(*identity) == Some(name)) {
            return Ok(Self(identity));
        }
        let number = text.parse().map_err(|_| "not a number or reserved name as world, host".to_owned())?;
        Ok(Self(IdentityId(number)))
    }
}

/// One `--not FILTER=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Exclusion(pub Filter);

#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct ExclusionParser {
    #[command(flatten)]
    filter: Filter,
}

impl FromStr for Exclusion {
    type Err = String;

    /// A filter's flag without its dashes, as `pod=shop/web` or `verdict=forwarded`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (flag, value) = text.split_once('=').ok_or("write FILTER=VALUE, as pod=shop/web")?;
        let typed = format!("--{}={value}", flag.trim_start_matches('-'));
        ExclusionParser::try_parse_from([typed]).map(|parsed| Self(parsed.filter)).map_err(|error| {
            if error.kind() == clap::error::ErrorKind::UnknownArgument {
                let filters = ExclusionParser::command();
                let names = filters.get_arguments().filter_map(clap::Arg::get_long);
                return format!("no filter {flag}; there are {}", names.collect::<Vec<_>>().join(", "));
            }
            error.to_string().lines().next().unwrap_or_default().replace("error: ", "")
        })
    }
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpAddr>()
        .map(IpNet::from)
        .or_else(|_| text.parse())
        .map_err(|_| "not an address or prefix".to_owned())
}
