//! The command line for people: asks the agent over its socket, or reads the pins.

mod agent;
mod cluster;
mod cni;
mod confined;
mod connectivity;
mod encryption;
mod facts;
mod list;
mod map;
mod node;
mod observe;
mod operator;
mod output;
mod policy;
mod proxy;
mod relay;
mod settings;
mod status;
mod sysdump;
mod table;
mod top;
mod wireguard;

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::agent::AgentArgs;
use crate::api;
use crate::operator::OperatorArgs;
use crate::proxy::ProxyArgs;
use crate::relay::RelayArgs;

/// Networking, security and observability for Kubernetes on eBPF.
#[derive(Parser)]
#[command(name = "weir", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of this node.
    Agent(Box<AgentArgs>),
    /// Run the operator: what a cluster needs once, not on every node.
    Operator(Box<OperatorArgs>),
    /// Run the relay: the flows of all nodes in one stream, and the flows page.
    Relay(Box<RelayArgs>),
    /// Encrypt for this node where the kernel has no WireGuard; the agent starts it.
    Wireguard(wireguard::WireguardArgs),
    /// Run the proxy of layer 7, which the agent starts: HTTP, gRPC, DNS, Kafka, TLS names.
    Proxy(Box<ProxyArgs>),
    /// Become another program with no more privileges than the proxy; the agent starts an Envoy so.
    #[command(hide = true)]
    Confined(confined::ConfinedArgs),
    /// Show flows: who talked to whom, what became of it, and why.
    Observe(Box<observe::ObserveArgs>),
    /// Show the live talkers, pairs and drops; --once prints them for scripts.
    Top(Box<top::TopArgs>),
    /// Show how the agent is, or with --cluster all of them; exits with 3 when one is not ready.
    Status(status::StatusArgs),
    /// Try a cluster's network: pods, services, nodes, DNS, policies.
    #[command(subcommand)]
    Connectivity(connectivity::ConnectivityCommand),
    /// Collect everything that a bug report needs in one archive; no Secrets.
    Sysdump(sysdump::SysdumpArgs),
    /// Show the pods of this node.
    #[command(subcommand)]
    Endpoint(list::EndpointCommand),
    /// Show identities: the sets of labels that policy knows.
    #[command(subcommand)]
    Identity(list::IdentityCommand),
    /// Show network policies and whom they select.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Show the names of DNS that pods asked for, and the policies that mean them.
    #[command(subcommand)]
    Names(list::NamesCommand),
    /// Show services and their backends.
    #[command(subcommand)]
    Service(list::ServiceCommand),
    /// Show who encrypts what goes between nodes, and how the peers are.
    #[command(subcommand)]
    Encryption(encryption::EncryptionCommand),
    /// Show which pods' packets leave the cluster by which gateway, and with which address.
    #[command(subcommand)]
    Egress(list::EgressCommand),
    /// Show the nodes of the cluster, and how this node reaches their pods.
    #[command(subcommand)]
    Node(list::NodeCommand),
    /// Read BPF maps, with or without an agent.
    #[command(subcommand)]
    Map(map::MapCommand),
    /// Load every program with everything on, and show what the verifier needed.
    Verify(map::VerifyArgs),
    /// Print the custom resource definitions as YAML.
    Crds,
    /// Put the CNI plugin on this node, or take it away.
    #[command(subcommand)]
    Cni(cni::CniCommand),
    /// Print the agent's metrics, as Prometheus reads them.
    Metrics(facts::MetricsArgs),
    /// Print what this node's kernel says about its network.
    Facts(facts::FactsArgs),
    /// Mount what the agent needs and this node lacks.
    Prepare(node::PrepareArgs),
    /// Take Weir and all its traces off this node.
    Uninstall(node::UninstallArgs),
}

/// How to reach the agent.
#[derive(Args, Clone, Debug)]
struct Connection {
    /// The agent's socket.
    #[arg(long, env = "WEIR_SOCKET", value_name = "PATH", default_value = api::DEFAULT_SOCKET)]
    socket: PathBuf,
}

impl Connection {
    fn connect(&self) -> Result<api::Client, Failure> {
        Ok(api::Client::connect(&self.socket)?)
    }
}

/// Form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns.
    Table,
    /// JSON.
    Json,
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Asked for readiness, and there is none.
    #[error("{0}")]
    NotReady(String),
    /// The agent could not be asked, or said no.
    #[error("{0}")]
    Api(#[from] api::Error),
    /// Writing the answer; a reader that went away is not worth a word.
    #[error("writing: {0}")]
    Output(#[from] io::Error),
    /// What was to be tried could not be.
    #[error("{}", crate::error::chain(.0))]
    NotTried(anyhow::Error),
    /// Anything else.
    #[error("{}", crate::error::chain(.0))]
    Other(#[from] anyhow::Error),
}

impl Failure {
    /// True when whoever read the output has seen enough.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn crds() -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for definition in crate::kube::crd::crds() {
        let yaml = crate::yaml::write(&definition).context("writing a definition as YAML")?;
        writeln!(out, "---\n{}", yaml.trim_end())?;
    }
    Ok(out.flush()?)
}

/// Does what was typed.
pub fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Agent(args) => agent::run(*args),
        Command::Operator(args) => operator::run(*args),
        Command::Relay(args) => relay::run(*args),
        Command::Wireguard(args) => wireguard::run(&args),
        Command::Proxy(args) => proxy::run(*args),
        Command::Confined(args) => confined::run(&args),
        Command::Observe(args) => observe::run(*args),
        Command::Top(args) => top::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Connectivity(command) => connectivity::run(command),
        Command::Sysdump(args) => sysdump::run(&args),
        Command::Endpoint(command) => list::endpoint(command),
        Command::Identity(command) => list::identity(command),
        Command::Policy(command) => policy::run(command),
        Command::Names(command) => list::names(command),
        Command::Service(command) => list::service(command),
        Command::Encryption(command) => encryption::run(&command),
        Command::Egress(command) => list::egress(command),
        Command::Node(command) => list::node(command),
        Command::Map(command) => map::run(command),
        Command::Verify(args) => map::verify(&args),
        Command::Crds => crds(),
        Command::Cni(command) => cni::run(command),
        Command::Metrics(args) => facts::metrics(&args),
        Command::Facts(args) => facts::facts(&args),
        Command::Prepare(args) => node::prepare(&args),
        Command::Uninstall(args) => node::uninstall(&args),
    }
}
