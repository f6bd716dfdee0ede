//! The agent's settings: `AgentArgs` is what was typed, `Config` is what the code uses.
//!
//! Converting validates everything: a setting that makes no sense is refused at
//! start with its name and what is allowed.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{ArgAction, Args, ValueEnum};
use ipnet::IpNet;
use thiserror::Error;

use crate::identity::LabelFilter;
use crate::operator::OperatorArgs;

/// Flags of `weir agent`; each can also be set by its environment variable.
#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    /// Name of this node, as in its Node object.
    #[arg(long, env = "WEIR_NODE_NAME", value_name = "NAME")]
    pub node_name: String,

    /// Take objects from the YAML files of this directory instead of the Kubernetes API.
    #[arg(long, env = "WEIR_MANIFESTS", value_name = "DIR", conflicts_with = "kubeconfig")]
    pub manifests: Option<PathBuf>,

    /// Reach the Kubernetes API with this file; without it, as a pod does.
    #[arg(long, env = "WEIR_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// API servers to begin with, as HOST:PORT; later those of the `kubernetes` Service's
    /// EndpointSlice, which are remembered in the state directory.
    #[arg(
        long,
        env = "WEIR_API_SERVERS",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        conflicts_with_all = ["manifests", "kubeconfig"]
    )]
    pub api_servers: Vec<String>,

    /// Where the BPF file system is, or is to be mounted.
    #[arg(long, env = "WEIR_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,

    /// Where the cgroup v2 hierarchy is, or a directory above its mount; found in
    /// /proc/self/mountinfo by default.
    #[arg(long, env = "WEIR_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,

    /// What must survive a restart of the agent.
    #[arg(long, env = "WEIR_STATE_DIR", value_name = "DIR", default_value = "/var/lib/weir")]
    pub state_dir: PathBuf,

    /// Where the node's kernel settings are; in a container /proc/sys can only be read.
    #[arg(long, env = "WEIR_PROC_SYS", value_name = "DIR", default_value = "/proc/sys")]
    pub proc_sys: PathBuf,

    /// Where the container runtime looks for CNI plugins: weir-cni is put there at start.
    #[arg(long, env = "WEIR_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,

    /// Where the container runtime looks for network configurations: ours is put there once
    /// pods can be connected, and stays.
    #[arg(long, env = "WEIR_CNI_CONFIG_DIR", value_name = "DIR")]
    pub cni_config_dir: Option<PathBuf>,

    /// Move other plugins' network configurations aside; `weir cni uninstall` moves them back.
    #[arg(long, env = "WEIR_CNI_EXCLUSIVE", action = ArgAction::Set, default_value_t = true)]
    pub cni_exclusive: bool,

    /// The socket that weir-cni and the command line use.
    #[arg(long, env = "WEIR_SOCKET", value_name = "PATH", default_value = "/run/weir/agent.sock")]
    pub socket: PathBuf,

    /// A device that leads to the other nodes; by default those that have the node's addresses.
    #[arg(long, env = "WEIR_DEVICES", value_name = "NAME", value_delimiter = ',')]
    pub device: Vec<String>,

    /// How pods of different nodes reach one another.
    #[arg(long, env = "WEIR_ROUTING", value_enum, default_value = "tunnel")]
    pub routing: Routing,

    /// UDP port of the VXLAN tunnels.
    #[arg(long, env = "WEIR_TUNNEL_PORT", value_name = "PORT", default_value_t = 8472)]
    pub tunnel_port: u16,

    /// Let the programs put on and take off the tunnel's headers, past the VXLAN device; where the node has
    /// IPsec policies they do not. False where rules of netfilter must see the tunnel's packets, too.
    #[arg(long, env = "WEIR_TUNNEL_DIRECT", action = ArgAction::Set, default_value_t = true)]
    pub tunnel_direct: bool,

    /// The bits of skb->mark that Weir uses: three or more adjacent ones that no rule of the node uses.
    /// The default keeps clear of kube-proxy, the portmap plugin, Calico, Cilium, Tailscale and AWS.
    #[arg(long, env = "WEIR_MARK_MASK", value_name = "MASK", default_value = "0x70")]
    pub mark_mask: MarkMask,

    /// MTU of the pods' devices in bytes; 0: the node's device's, less the tunnel's header.
    #[arg(long, env = "WEIR_MTU", value_name = "BYTES", default_value_t = 0)]
    pub mtu: u32,

    /// Give pods' traffic that leaves the cluster the node's address.
    #[arg(long, env = "WEIR_MASQUERADE", action = ArgAction::Set, default_value_t = true)]
    pub masquerade: bool,

    /// Lowest port that masquerading uses; of what ip_local_port_range has, too, it uses as little as it can.
    #[arg(long, env = "WEIR_NAT_PORT_MIN", value_name = "PORT", default_value_t = 12288)]
    pub nat_port_min: u16,

    /// Highest port that masquerading uses; keep clear of NodePorts and of ip_local_port_range.
    #[arg(long, env = "WEIR_NAT_PORT_MAX", value_name = "PORT", default_value_t = 28671)]
    pub nat_port_max: u16,

    /// What pods reach through the node's netfilter, whose rules everything else passes by: by default the
    /// metadata and wire servers of clouds, which nodes guard by such rules.
    #[arg(
        long,
        env = "WEIR_STACK_CIDRS",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = stack_cidr,
        default_value = "169.254.0.0/16,168.63.129.16/32,100.100.100.200/32,fd00:ec2::254/128,fd20:ce::254/128"
    )]
    pub stack_cidrs: Vec<IpNet>,

    /// Where metrics and health are served over HTTP.
    #[arg(long, env = "WEIR_METRICS_ADDRESS", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9962")]
    pub metrics_address: SocketAddr,

    /// Connections that the kernel remembers.
    #[arg(long, env = "WEIR_CONNECTIONS_MAX", value_name = "N", default_value_t = 262_144)]
    pub connections_max: u32,

    /// Masqueraded connections that the kernel remembers, two entries each.
    #[arg(long, env = "WEIR_NAT_MAX", value_name = "N", default_value_t = 131_072)]
    pub nat_max: u32,

    /// Sockets connected to services that the kernel remembers.
    #[arg(long, env = "WEIR_SOCKETS_MAX", value_name = "N", default_value_t = 65_536)]
    pub sockets_max: u32,

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

    /// Drops of one pod that are recorded in a second; the rest is only counted. 0: no limit.
    #[arg(long, env = "WEIR_ENDPOINT_DROP_RECORDS", value_name = "N", default_value_t = 1000)]
    pub endpoint_drop_records: u32,

    /// Rows that another map can hold, as `addresses=524288`; maps grow at the agent's next start.
    #[arg(long, env = "WEIR_MAP_SIZES", value_name = "MAP=N", value_delimiter = ',')]
    pub map_size: Vec<MapSize>,

    /// Rows that one compiled policy may have in map policy_rules: a pod whose policies need more is
    /// closed, and `weir status` names them.
    #[arg(long, env = "WEIR_POLICY_ROWS_MAX", value_name = "N", default_value_t = 16_384)]
    pub policy_rows_max: usize,

    /// How programs are attached to devices.
    #[arg(long, env = "WEIR_ATTACH", value_enum, default_value = "auto")]
    pub attach: Attach,

    /// Record flows.
    #[arg(long, env = "WEIR_FLOW_EVENTS", action = ArgAction::Set, default_value_t = true)]
    pub flow_events: bool,

    /// Flows kept in memory, 136 bytes each.
    #[arg(long, env = "WEIR_FLOW_BUFFER", value_name = "N", default_value_t = 16_384)]
    pub flow_buffer: usize,

    /// A running connection is reported this often, in seconds.
    #[arg(long, env = "WEIR_FLOW_REPORT_SECONDS", value_name = "SECONDS", default_value_t = 5)]
    pub flow_report_seconds: u32,

    /// Translate service addresses at the socket, before there are packets.
    #[arg(long, env = "WEIR_SOCKET_LB", action = ArgAction::Set, default_value_t = true)]
    pub socket_lb: bool,

    /// A node whose agent says nothing for so long counts as without one: the operator taints it.
    /// The agent says four times as often that it lives.
    #[arg(long, env = "WEIR_NODE_STALE_SECONDS", value_name = "SECONDS", default_value_t = 60)]
    pub node_stale_seconds: u32,

    /// With --manifests: an identity that no pod has had for so long is deleted. Otherwise the operator
    /// does that.
    #[arg(long, env = "WEIR_IDENTITY_GRACE_SECONDS", value_name = "SECONDS", default_value_t = 900)]
    pub identity_grace_seconds: u32,

    /// Which pod labels make identities, beside those that policies ask for: beginnings of label keys, with '!' those
    /// that do not, as "!statefulset.kubernetes.io/pod-name !workflow-". The same on every node.
    #[arg(
        long,
        env = "WEIR_IDENTITY_LABELS",
        value_name = "PATTERNS",
        default_value = "",
        hide_default_value = true
    )]
    pub identity_labels: LabelFilter,

    /// Believe another node's claim on an address that is in none of its pod CIDRs. Whoever has stolen one
    /// node's credentials can then take everybody's traffic to any address.
    #[arg(long, env = "WEIR_BELIEVE_ANY_ADDRESS", action = ArgAction::Set, default_value_t = false)]
    pub believe_any_address: bool,

    /// Form of the log.
    #[arg(long, env = "WEIR_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
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
        let sized = ["addresses", "backends", "policy_peers", "policy_rules", "prefixes", "services"];
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

/// How pods of different nodes reach one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Routing {
    /// VXLAN between the nodes; the network between them need not know pods.
    Tunnel,
    /// Routes to the other nodes' pod CIDRs.
    Native,
}

/// How programs are attached to devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// tcx where the kernel has it, else clsact.
    Auto,
    /// tcx links (Linux 6.6 and later).
    Tcx,
    /// Filters of a clsact queueing discipline.
    Clsact,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Validated settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// As typed, with every rule below checked.
    pub args: AgentArgs,
    /// Pins of this ABI version: `<bpffs>/weir/v<ABI>`.
    pub pins: PathBuf,
}

/// Why a setting was refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("--{setting} {given}: {allowed}")]
pub struct ConfigError {
    setting: &'static str,
    given: String,
    allowed: &'static str,
}

/// The directory of this ABI version's pins below a BPF file system.
pub fn pin_directory(bpffs: &Path) -> PathBuf {
    let version = crate::datapath::skeleton::types::abi_version::ABI_VERSION.0;
    bpffs.join("weir").join(format!("v{version}"))
}

impl ConfigError {
    /// `setting` was `given`, and `allowed` says what it may be.
    pub(crate) fn new(setting: &'static str, given: String, allowed: &'static str) -> Self {
        Self { setting, given, allowed }
    }
}

impl TryFrom<AgentArgs> for Config {
    type Error = ConfigError;

    fn try_from(args: AgentArgs) -> Result<Self, ConfigError> {
        let refuse = |setting, given: String, allowed| Err(ConfigError { setting, given, allowed });
        if !is_node_name(&args.node_name) {
            return refuse(
                "node-name",
                args.node_name,
                "must be a DNS subdomain: lower case letters, digits, '-' and '.', at most 253",
            );
        }
        if args.mtu != 0 && !(1280..=65_535).contains(&args.mtu) {
            return refuse("mtu", args.mtu.to_string(), "must be 0, or 1280 (IPv6's least) to 65535");
        }
        if args.tunnel_port == 0 {
            return refuse("tunnel-port", "0".to_owned(), "must be 1 to 65535");
        }
        if args.nat_port_min < 1024 || args.nat_port_min >= args.nat_port_max {
            let given = format!("{} --nat-port-max {}", args.nat_port_min, args.nat_port_max);
            return refuse("nat-port-min", given, "must be at least 1024 and below --nat-port-max");
        }
        for (setting, value) in [
            ("connections-max", args.connections_max),
            ("nat-max", args.nat_max),
            ("sockets-max", args.sockets_max),
        ] {
            if !(1024..=16_777_216).contains(&value) {
                return refuse(setting, value.to_string(), "must be 1024 to 16777216");
            }
        }
        for (setting, value) in [
            ("endpoint-connections-max", args.endpoint_connections_max),
            ("endpoint-opening-max", args.endpoint_opening_max),
            ("endpoint-nat-ports-max", args.endpoint_nat_ports_max),
        ] {
            if value.is_some_and(|value| !(16..=16_777_216).contains(&value)) {
                return refuse(setting, value.unwrap_or_default().to_string(), "must be 16 to 16777216");
            }
        }
        if !(128..=4_194_304).contains(&args.flow_buffer) {
            return refuse("flow-buffer", args.flow_buffer.to_string(), "must be 128 to 4194304");
        }
        if !(1..=3600).contains(&args.flow_report_seconds) {
            return refuse("flow-report-seconds", args.flow_report_seconds.to_string(), "must be 1 to 3600");
        }
        if !(4..=3600).contains(&args.node_stale_seconds) {
            return refuse("node-stale-seconds", args.node_stale_seconds.to_string(), "must be 4 to 3600");
        }
        if !(1..=604_800).contains(&args.identity_grace_seconds) {
            let given = args.identity_grace_seconds.to_string();
            return refuse("identity-grace-seconds", given, "must be 1 to 604800");
        }
        for (setting, path) in [("cni-bin-dir", &args.cni_bin_dir), ("cni-config-dir", &args.cni_config_dir)]
        {
            if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
                return refuse(setting, path.display().to_string(), "must be an absolute path");
            }
        }
        if let Some(server) = args.api_servers.iter().find(|server| !is_server(server)) {
            return refuse("api-servers", server.clone(), "must be HOST:PORT, an IPv6 address in brackets");
        }
        let pins = pin_directory(&args.bpffs);
        Ok(Self { args, pins })
    }
}

/// Refuses environment variables that look like settings and are none: a misspelled one would
/// silently do nothing.
pub fn check_variables(variables: impl IntoIterator<Item = String>) -> Result<(), UnknownVariable> {
    // Agent and operator share a ConfigMap: each knows the other's settings.
    let programs = [
        AgentArgs::augment_args(clap::Command::new("agent")),
        OperatorArgs::augment_args(clap::Command::new("operator")),
    ];
    let arguments = programs.iter().flat_map(clap::Command::get_arguments);
    let mut known: Vec<&str> = Vec::new();
    for name in arguments.filter_map(|argument| argument.get_env()?.to_str()) {
        if !known.contains(&name) {
            known.push(name);
        }
    }
    // What is logged is read before settings are.
    known.push("WEIR_LOG");
    let is_setting = |name: &str| name.starts_with("WEIR_") && !name.starts_with("WEIR_TEST_");
    let unknown = |name: &String| is_setting(name) && !known.contains(&name.as_str());
    match variables.into_iter().find(unknown) {
        None => Ok(()),
        Some(name) => Err(UnknownVariable { nearest: nearest(&name, &known), name }),
    }
}

/// The setting that was probably meant; `weir agent --help` where none is near.
fn nearest(name: &str, known: &[&str]) -> String {
    let own = |name: &str| name.trim_start_matches("WEIR_").to_owned();
    let likeness = |setting: &&str| (strsim::jaro_winkler(&own(name), &own(setting)) * 1000.0) as u32;
    let best = known.iter().copied().max_by_key(likeness).filter(|setting| likeness(setting) > 850);
    best.map_or_else(|| "`weir agent --help` lists them".to_owned(), |best| format!("did you mean {best}?"))
}

/// A variable of the environment that is no setting.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name} is no setting: {nearest}")]
pub struct UnknownVariable {
    name: String,
    nearest: String,
}

/// A CIDR of one family alone: `prefixes` keeps IPv4 inside IPv6.
fn stack_cidr(text: &str) -> Result<IpNet, String> {
    let cidr = text.parse::<IpNet>().map_err(|_| "must be a CIDR, as 169.254.0.0/16".to_owned())?.trunc();
    let mapped = Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0);
    match cidr {
        IpNet::V6(ipv6) if ipv6.contains(&mapped) || ipv6.network().to_ipv4_mapped().is_some() => {
            Err("must not cover IPv4: write that as IPv4".to_owned())
        }
        cidr => Ok(cidr),
    }
}

/// HOST:PORT, where HOST is a name, an IPv4 address or a bracketed IPv6 address.
pub(crate) fn is_server(text: &str) -> bool {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return address.port() != 0;
    }
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        !host.is_empty() && host.bytes().all(is_host) && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

fn is_node_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: AgentArgs,
    }

    fn config(flags: &[&str]) -> Result<Config, String> {
        let typed = ["weir-agent", "--node-name", "a"].iter().chain(flags);
        let command = Command::try_parse_from(typed).map_err(|error| error.to_string())?;
        Config::try_from(command.args).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_valid() {
        let config = config(&[]).expect("the defaults");
        assert_eq!(config.pins, Path::new("/sys/fs/bpf/weir/v2"));
        assert_eq!(config.args.routing, Routing::Tunnel);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (flags, message) in [
            (["--mtu", "100"], "--mtu 100: must be 0, or 1280 (IPv6's least) to 65535"),
            (["--connections-max", "1"], "--connections-max 1: must be 1024 to 16777216"),
            (["--identity-grace-seconds", "0"], "--identity-grace-seconds 0: must be 1 to 604800"),
            (
                ["--nat-port-min", "80"],
                "--nat-port-min 80 --nat-port-max 28671: must be at least 1024 and below --nat-port-max",
            ),
        ] {
            assert_eq!(config(&flags).err().as_deref(), Some(message));
        }
        assert!(config(&["--cni-bin-dir", "opt/cni/bin"]).is_err());
        assert!(config(&["--node-name", "../etc"]).is_err());
        assert!(config(&["--routing", "magic"]).is_err());
        assert!(config(&["--map-size", "addresses=0"]).is_err());
        assert!(config(&["--map-size", "weird=5"]).is_err_and(|error| error.contains("must name one of")));
        assert!(config(&["--map-size", "addresses=5"]).is_ok());
        assert!(config(&["--stack-cidrs", "192.0.2.0/24,fd00::1/128"]).is_ok());
        for nonsense in ["::/0", "::ffff:10.0.0.0/104", "10.0.0.1", "all"] {
            assert!(config(&["--stack-cidrs", nonsense]).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn api_servers_are_hosts_and_ports() {
        let config = config(&["--api-servers", "10.0.0.1:6443,[fd00::1]:6443,api.example.org:443"]);
        assert_eq!(config.map(|config| config.args.api_servers.len()), Ok(3));
        for nonsense in ["10.0.0.1", "https://10.0.0.1:6443", "fd00::1", ":6443", "host:0", "host:70000"] {
            assert!(!is_server(nonsense), "{nonsense}");
        }
    }

    #[test]
    fn a_misspelled_variable_is_refused_by_name() {
        let check = |names: &[&str]| check_variables(names.iter().map(|name| (*name).to_owned()));
        assert_eq!(check(&["PATH", "WEIR_MTU", "WEIR_NODE_NAME", "HOME"]), Ok(()));
        let message = check(&["WEIR_MTUU"]).expect_err("no such setting").to_string();
        assert_eq!(message, "WEIR_MTUU is no setting: did you mean WEIR_MTU?");
        let message = check(&["WEIR_COLOUR_OF_THE_SKY"]).expect_err("no such setting").to_string();
        assert!(message.ends_with("`weir agent --help` lists them"), "{message}");
    }

    #[test]
    fn the_manifests_have_every_setting_with_its_default() {
        let settings = include_str!("../deploy/base/settings.env");
        let agent = include_str!("../deploy/base/agent.yaml");
        let operator = include_str!("../deploy/base/operator.yaml");
        let programs = [
            (AgentArgs::augment_args(clap::Command::new("agent")), agent),
            (OperatorArgs::augment_args(clap::Command::new("operator")), operator),
        ];
        let arguments = programs.iter().flat_map(|(command, manifest)| {
            command.get_arguments().map(move |argument| (argument, *manifest))
        });
        // Not for pods.
        let elsewhere = ["WEIR_MANIFESTS", "WEIR_KUBECONFIG"];
        for (argument, manifest) in arguments {
            let Some(name) = argument.get_env().and_then(|name| name.to_str()) else { continue };
            let default = argument.get_default_values().first().and_then(|value| value.to_str());
            let line = match default {
                Some(default) => format!("\n{name}={default}\n"),
                None => format!("\n#{name}="),
            };
            let is_there = settings.contains(&line) || manifest.contains(&format!("name: {name}"));
            assert!(is_there || elsewhere.contains(&name), "deploy/base has no {}", line.trim());
        }
        let names = settings.lines().filter_map(|line| line.trim_start_matches('#').split_once('='));
        let names = names.map(|(name, _)| name.to_owned()).filter(|name| name.starts_with("WEIR_"));
        assert_eq!(check_variables(names), Ok(()));
    }
}
