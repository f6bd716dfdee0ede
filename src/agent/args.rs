//! The agent's settings: `AgentArgs` is what was typed, `Config` is what the code uses.
//!
//! A setting is in the group of the module that reads it. Converting validates everything: a
//! setting that makes no sense is refused at start with its name and what is allowed.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use ipnet::IpNet;

use super::names::NameArgs;
use super::proxy::JudgeArgs;
use crate::cni::CniArgs;
use crate::datapath::{KernelArgs, MapArgs, QuotaArgs, XdpMode, pin_directory};
use crate::encryption::EncryptionArgs;
use crate::flow::FlowArgs;
use crate::hubble::args::HubbleArgs;
use crate::identity::LabelFilter;
use crate::kube::args::{ApiArgs, TimingArgs};
use crate::model::names::is_object_name;
use crate::service::ServiceArgs;
use crate::settings::{LogArgs, SettingError, within};

/// Flags of `weir agent`; each can also be set by its environment variable.
#[derive(Args, Clone, Debug)]
pub struct AgentArgs {
    /// Name of this node, as in its Node object.
    #[arg(long, env = "WEIR_NODE_NAME", value_name = "NAME")]
    pub node_name: String,

    /// What must survive a restart of the agent.
    #[arg(long, env = "WEIR_STATE_DIR", value_name = "DIR", default_value = "/var/lib/weir")]
    pub state_dir: PathBuf,

    /// The socket that weir-cni and the command line use.
    #[arg(long, env = "WEIR_SOCKET", value_name = "PATH", default_value = crate::api::DEFAULT_SOCKET)]
    pub socket: PathBuf,

    /// Where metrics and health are served over HTTP.
    #[arg(long, env = "WEIR_METRICS_ADDRESS", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9962")]
    pub metrics_address: SocketAddr,

    /// Where the node's kernel settings are; in a container /proc/sys can only be read.
    #[arg(long, env = "WEIR_PROC_SYS", value_name = "DIR", default_value = "/proc/sys")]
    pub proc_sys: PathBuf,

    /// Take objects from the YAML files of this directory instead of the Kubernetes API.
    #[arg(
        long,
        env = "WEIR_MANIFESTS",
        value_name = "DIR",
        conflicts_with_all = ["kubeconfig", "api_servers"]
    )]
    pub manifests: Option<PathBuf>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub api: ApiArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub timing: TimingArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub cni: CniArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub network: NetworkArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub encryption: EncryptionArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub nat: NatArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub rules: RuleArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub names: NameArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub judge: JudgeArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub services: ServiceArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub kernel: KernelArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub maps: MapArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub quotas: QuotaArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub flows: FlowArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub hubble: HubbleArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

/// The way between nodes, which `agent::node` prepares.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// A device that leads out of the node; by default those that have an address of the Node object, a
    /// route by a router, or neighbours. Devices that come later are followed.
    #[arg(long, env = "WEIR_DEVICES", value_name = "NAME", value_delimiter = ',')]
    pub device: Vec<String>,

    /// How pods of different nodes reach one another.
    #[arg(long, env = "WEIR_ROUTING", value_enum, default_value = "tunnel")]
    pub routing: Routing,

    /// Whether the drivers of devices that lead out send on what clients outside and backends of other nodes
    /// send one another, where they can (XDP, Linux 6.3 and later): off, or native. With a tunnel they do not.
    #[arg(long, env = "WEIR_XDP", value_enum, default_value = "off")]
    pub xdp: XdpMode,

    /// UDP port of the VXLAN tunnels.
    #[arg(long, env = "WEIR_TUNNEL_PORT", value_name = "PORT", default_value_t = 8472)]
    pub tunnel_port: u16,

    /// Let the programs put on and take off the tunnel's headers, past the VXLAN device; where the node has
    /// IPsec policies they do not. False where rules of netfilter must see the tunnel's packets, too.
    #[arg(long, env = "WEIR_TUNNEL_DIRECT", action = ArgAction::Set, default_value_t = true)]
    pub tunnel_direct: bool,

    /// With native routing, let pods' packets go to egress gateways of other nodes: by tunnels, for which pods' MTU
    /// gets smaller. With tunnels between pods they always can.
    #[arg(long, env = "WEIR_EGRESS_GATEWAY", action = ArgAction::Set, default_value_t = false)]
    pub egress_gateway: bool,

    /// MTU of the pods' devices in bytes; 0: the node's device's, less the tunnel's header.
    #[arg(long, env = "WEIR_MTU", value_name = "BYTES", default_value_t = 0)]
    pub mtu: u32,

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
}

impl NetworkArgs {
    fn check(&self) -> Result<(), SettingError> {
        if self.mtu != 0 && !(1280..=65_535).contains(&self.mtu) {
            return Err(SettingError::new("mtu", self.mtu, "must be 0, or 1280 (IPv6's least) to 65535"));
        }
        within("tunnel-port", self.tunnel_port, 1..=u16::MAX)
    }
}

/// Masquerading: `agent::ports` chooses among its ports.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Masquerading")]
pub struct NatArgs {
    /// Give pods' traffic that leaves the cluster the node's address.
    #[arg(long, env = "WEIR_MASQUERADE", action = ArgAction::Set, default_value_t = true)]
    pub masquerade: bool,

    /// Lowest port that masquerading uses; of what ip_local_port_range has, too, it uses as little as it can.
    #[arg(long, env = "WEIR_NAT_PORT_MIN", value_name = "PORT", default_value_t = 12288)]
    pub nat_port_min: u16,

    /// Highest port that masquerading uses; keep clear of NodePorts and of ip_local_port_range.
    #[arg(long, env = "WEIR_NAT_PORT_MAX", value_name = "PORT", default_value_t = 28671)]
    pub nat_port_max: u16,
}

impl NatArgs {
    fn check(&self) -> Result<(), SettingError> {
        if self.nat_port_min < 1024 || self.nat_port_min >= self.nat_port_max {
            let given = format!("{} --nat-port-max {}", self.nat_port_min, self.nat_port_max);
            let allowed = "must be at least 1024 and below --nat-port-max";
            return Err(SettingError::new("nat-port-min", given, allowed));
        }
        Ok(())
    }
}

/// Rules of the compilers (`agent::compute`) and of the sink of policies.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Identities and policies")]
pub struct RuleArgs {
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

    /// What a pod gets that sends what its policies deny: nothing, or at once a reset of TCP and "administratively
    /// prohibited" for the rest. The annotation weir.dev/deny-response of a policy or a namespace counts before this.
    #[arg(long, env = "WEIR_DENY_RESPONSE", value_enum, default_value = "drop")]
    pub deny_response: DenyResponse,

    /// A policy of the host is suspended if the node has not reached the API server for so long under it; it is tried
    /// again when it has changed.
    #[arg(long, env = "WEIR_HOST_POLICY_CONFIRM_SECONDS", value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(3..))]
    pub host_policy_confirm_seconds: u32,

    /// Rows that one compiled policy may have in map policy_rules: a pod whose policies need more is
    /// closed, and `weir status` names them.
    #[arg(long, env = "WEIR_POLICY_ROWS_MAX", value_name = "N", default_value_t = 16_384)]
    pub policy_rows_max: usize,
}

/// What a pod gets that sends what it may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DenyResponse {
    /// Nothing.
    Drop,
    /// An answer that says so.
    Reject,
}

/// How pods of different nodes reach one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Routing {
    /// VXLAN between the nodes; the network between them need not know pods.
    Tunnel,
    /// Routes to the other nodes' pod CIDRs.
    Native,
}

/// Validated settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// As typed, with every rule of every group checked.
    pub args: AgentArgs,
    /// Pins of this ABI version: `<bpffs>/weir/v<ABI>`.
    pub pins: PathBuf,
}

impl TryFrom<AgentArgs> for Config {
    type Error = SettingError;

    fn try_from(args: AgentArgs) -> Result<Self, SettingError> {
        if !is_object_name(&args.node_name) {
            let allowed = "must be a DNS subdomain: lower case letters, digits, '-' and '.', at most 253";
            return Err(SettingError::new("node-name", args.node_name, allowed));
        }
        args.api.check()?;
        args.timing.check()?;
        args.cni.check()?;
        args.network.check()?;
        args.encryption.check()?;
        if args.encryption.wireguard_port == args.network.tunnel_port {
            let allowed = "must be another one than --tunnel-port";
            return Err(SettingError::new("wireguard-port", args.encryption.wireguard_port, allowed));
        }
        args.nat.check()?;
        args.services.check()?;
        let node_ports = args.services.node_port_range;
        if args.nat.nat_port_min <= node_ports.last && node_ports.first <= args.nat.nat_port_max {
            let given = format!("{}-{}", args.nat.nat_port_min, args.nat.nat_port_max);
            return Err(SettingError::new("nat-port-max", given, "must be apart from --node-port-range"));
        }
        args.maps.check()?;
        args.quotas.check()?;
        args.flows.check()?;
        args.hubble.check()?;
        let pins = pin_directory(&args.kernel.bpffs);
        Ok(Self { args, pins })
    }
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;

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
        assert_eq!(config.args.network.routing, Routing::Tunnel);
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
        assert!(
            config(&["--nat-port-max", "30000"])
                .is_err_and(|error| error.contains("apart from --node-port-range"))
        );
        assert!(config(&["--map-size", "addresses=0"]).is_err());
        assert!(config(&["--map-size", "weird=5"]).is_err_and(|error| error.contains("must name one of")));
        assert!(config(&["--map-size", "addresses=5"]).is_ok());
        assert!(config(&["--stack-cidrs", "192.0.2.0/24,fd00::1/128"]).is_ok());
        for nonsense in ["::/0", "::ffff:10.0.0.0/104", "10.0.0.1", "all"] {
            assert!(config(&["--stack-cidrs", nonsense]).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn objects_have_one_source() {
        assert!(config(&["--manifests", "/a", "--kubeconfig", "/b"]).is_err());
        assert!(config(&["--manifests", "/a", "--api-servers", "10.0.0.1:6443"]).is_err());
        assert!(config(&["--kubeconfig", "/b", "--api-servers", "10.0.0.1:6443"]).is_err());
        assert!(config(&["--api-servers", "10.0.0.1:6443,[fd00::1]:6443"]).is_ok());
        assert!(config(&["--api-servers", "10.0.0.1"]).is_err());
    }
}
