//! `weir endpoint`, `identity`, `policy` and `service`: what the agent knows, as tables.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Connection, Failure, Format, output, table};
use crate::api::Request;
use crate::api::answers::{EndpointRow, IdentityRow, NameRow, NodeRow, PolicyRow, ServiceRow};
use crate::datapath::UsageKind;
use crate::kube::foreign::ForeignPolicy;
use crate::model::{
    EgressRow, EndpointId, FrontendKind, ObjectKey, PolicyRef, Protocol, Scope, ServiceQuestion,
    ServiceTrace, TracedBackend,
};

/// The agent answers from memory.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

#[derive(Subcommand)]
pub enum EndpointCommand {
    /// One line for each pod.
    List(ListArgs),
    /// Everything about one pod.
    Get(EndpointGetArgs),
}

#[derive(Subcommand)]
pub enum IdentityCommand {
    /// One line for each identity.
    List(ListArgs),
}

#[derive(Subcommand)]
pub enum ServiceCommand {
    /// One line for each address and port of a service.
    List(ListArgs),
    /// Everything about one service, as JSON.
    Get(GetArgs),
    /// Which backend a client would get of a service, and why not the others.
    Trace(TraceArgs),
}

#[derive(Subcommand)]
pub enum NamesCommand {
    /// One line for each name that a pod asked for.
    List(ListArgs),
}

#[derive(Subcommand)]
pub enum NodeCommand {
    /// One line for each node.
    List(ListArgs),
}

#[derive(Subcommand)]
pub enum EgressCommand {
    /// One line for each policy and pod: of this node, or with this node as the gateway.
    List(ListArgs),
}

#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    connection: Connection,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Args)]
pub struct EndpointGetArgs {
    #[command(flatten)]
    connection: Connection,
    /// Its number, its pod as NAMESPACE/NAME, or one of its addresses.
    #[arg(value_name = "ID|POD|IP")]
    wanted: String,
}

#[derive(Args)]
pub struct GetArgs {
    #[command(flatten)]
    connection: Connection,
    /// Namespace and name.
    #[arg(value_name = "NAMESPACE/NAME")]
    wanted: String,
}

#[derive(Args)]
pub struct TraceArgs {
    #[command(flatten)]
    connection: Connection,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
    /// The port's protocol, where one number has several.
    #[arg(long, value_name = "tcp|udp|sctp", value_parser = protocol)]
    protocol: Option<Protocol>,
    /// Who asks: a pod of this node as NAMESPACE/NAME, an address (with :PORT Maglev's choice is said), node or world.
    client: String,
    /// A Service as NAMESPACE/NAME, or an address; behind a colon the port, by number or name.
    #[arg(value_name = "SERVICE[:PORT]")]
    service: String,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let found = all.into_iter().find(|protocol| protocol.to_string().eq_ignore_ascii_case(text));
    found.ok_or_else(|| "must be tcp, udp or sctp".to_owned())
}

impl TraceArgs {
    /// An IPv6 address with a port is in brackets.
    fn question(&self) -> ServiceQuestion {
        let (service, port) = match self.service.parse::<SocketAddr>() {
            Ok(address) => (address.ip().to_string(), Some(address.port().to_string())),
            Err(_) if self.service.parse::<IpAddr>().is_ok() => (self.service.clone(), None),
            Err(_) => match self.service.split_once(':') {
                Some((service, port)) => (service.to_owned(), Some(port.to_owned())),
                None => (self.service.clone(), None),
            },
        };
        ServiceQuestion { client: self.client.clone(), service, port, protocol: self.protocol }
    }

    fn print(&self) -> Result<(), Failure> {
        let trace: ServiceTrace = self.connection.ask(&Request::ServiceTrace(self.question()))?;
        if let Format::Json = self.output {
            return Ok(output::write_json(&mut io::stdout().lock(), &trace)?);
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{} of Service {}, {}", trace.frontend, trace.service, trace.kind)?;
        writeln!(out, "{}", trace.verdict)?;
        for fact in &trace.facts {
            writeln!(out, "  {fact}")?;
        }
        if !trace.backends.is_empty() {
            let line = |row: &TracedBackend| {
                let text = |name: &Option<String>| name.clone().unwrap_or_default();
                let chosen = if row.is_chosen { "yes" } else { "no" };
                [
                    row.address.to_string(),
                    text(&row.node),
                    text(&row.zone),
                    chosen.to_owned(),
                    row.why.clone(),
                ]
            };
            let rows: Vec<_> = trace.backends.iter().map(line).collect();
            table::write(&mut out, ["BACKEND", "NODE", "ZONE", "CHOSEN", "WHY"], &rows)?;
        }
        Ok(())
    }
}

pub fn names(command: NamesCommand) -> Result<(), Failure> {
    let NamesCommand::List(args) = command;
    args.list(&Request::Names, ["NAME", "POD", "ADDRESSES", "SECONDS LEFT", "POLICIES"], |row: &NameRow| {
        let addresses: Vec<IpAddr> = row.addresses.iter().map(|it| it.address).collect();
        let left = row.addresses.iter().map(|it| it.seconds_left);
        let left = left.clone().min().zip(left.max());
        [
            row.name.clone(),
            row.pod.as_ref().map_or_else(|| row.endpoint.to_string(), ToString::to_string),
            shorten(&addresses),
            left.map_or_else(String::new, |(least, most)| match least == most {
                true => least.to_string(),
                false => format!("{least}-{most}"),
            }),
            join(&row.policies),
        ]
    })
}

pub fn endpoint(command: EndpointCommand) -> Result<(), Failure> {
    match command {
        EndpointCommand::List(args) => args.list(
            &Request::Endpoints,
            ["ID", "POD", "IPV4", "IPV6", "IDENTITY", "INGRESS", "EGRESS", "CONNECTIONS", "REFUSED", "STATE"],
            endpoint_line,
        ),
        EndpointCommand::Get(args) => args.get(),
    }
}

pub fn identity(command: IdentityCommand) -> Result<(), Failure> {
    let IdentityCommand::List(args) = command;
    args.list(&Request::Identities, ["ID", "NAMESPACE", "LABELS", "ADDRESSES"], |row: &IdentityRow| {
        let (namespace, labels) = short_labels(&row.labels);
        [row.id.to_string(), namespace, labels, shorten(&row.addresses)]
    })
}

/// Namespace and labels as people write them: without the sources, and without what the namespace
/// and its service account add to every pod. JSON has all of them.
fn short_labels(labels: &[String]) -> (String, String) {
    const NAMESPACE: &str = "k8s:io.kubernetes.pod.namespace=";
    let namespace = labels.iter().find_map(|label| label.strip_prefix(NAMESPACE)).unwrap_or_default();
    let is_own =
        |label: &&String| !label.starts_with("k8s:io.kubernetes.") && !label.starts_with("k8s:io.cilium.");
    let own = labels.iter().filter(is_own).map(|label| label.strip_prefix("k8s:").unwrap_or(label));
    (namespace.to_owned(), own.collect::<Vec<_>>().join(","))
}

/// The first few of many; JSON has all of them.
fn shorten<T: ToString>(values: &[T]) -> String {
    const SHOWN: usize = 3;
    match values.len() {
        count if count > SHOWN + 1 => format!("{},+{}", join(&values[..SHOWN]), count - SHOWN),
        _ => join(values),
    }
}

/// `NAMESPACE/NAME`, or the name of one that is the cluster's.
fn key_of(policy: &PolicyRef) -> String {
    let name = &policy.name;
    policy.namespace.as_ref().map_or_else(|| name.to_string(), |namespace| format!("{namespace}/{name}"))
}

/// Everything about one policy.
pub fn policy(args: &GetArgs) -> Result<(), Failure> {
    args.get(&Request::Policies, "policy", |row: &PolicyRow| key_of(&row.policy))
}

/// A line for each policy, and what others' policies are not enforced.
pub fn policies(args: &ListArgs) -> Result<(), Failure> {
    let endpoints: Vec<EndpointRow> = args.connection.ask(&Request::Endpoints)?;
    let header = ["KIND", "POLICY", "TIER", "INGRESS", "EGRESS", "LAYER 7", "PODS", "NOT ENFORCED"];
    args.list(&Request::Policies, header, |row: &PolicyRow| {
        let rules = |count: Option<usize>| match count {
            None => String::new(),
            Some(0) => "deny all".to_owned(),
            Some(1) => "1 rule".to_owned(),
            Some(count) => format!("{count} rules"),
        };
        [
            row.policy.kind.name().to_owned(),
            key_of(&row.policy),
            row.tier.clone(),
            rules(row.ingress_rules),
            rules(row.egress_rules),
            join(&row.layer7),
            shorten(&pods(row, &endpoints)),
            row.doubts.join("; "),
        ]
    })?;
    let foreign: Vec<ForeignPolicy> = args.connection.ask(&Request::ForeignPolicies)?;
    if args.output == Format::Table && !foreign.is_empty() {
        let line = |policy: &ForeignPolicy| {
            let ForeignPolicy { kind, namespace, name } = policy.clone();
            let name = if namespace.is_empty() { name } else { format!("{namespace}/{name}") };
            [kind, name]
        };
        let mut out = io::BufWriter::new(io::stdout().lock());
        writeln!(out)?;
        let lines: Vec<_> = foreign.iter().map(line).collect();
        table::write(&mut out, ["NOT ENFORCED BY WEIR", "POLICY"], &lines)?;
        out.flush()?;
    }
    Ok(())
}

/// The pods of this node that a policy selects.
fn pods(policy: &PolicyRow, endpoints: &[EndpointRow]) -> Vec<String> {
    let name = |id: &EndpointId| match endpoints.iter().find(|row| row.id == *id) {
        Some(row) => row.pod.to_string(),
        None => format!("endpoint {id}"),
    };
    policy.endpoints.iter().map(name).collect()
}

pub fn service(command: ServiceCommand) -> Result<(), Failure> {
    let args = match command {
        ServiceCommand::List(args) => args,
        ServiceCommand::Get(args) => {
            return args.get(&Request::Services, "service", |row: &ServiceRow| row.service.to_string());
        }
        ServiceCommand::Trace(args) => return args.print(),
    };
    let header = ["SERVICE", "KIND", "FRONTEND", "PROTOCOL", "FOR", "BACKENDS"];
    args.list(&Request::Services, header, |row: &ServiceRow| {
        let frontend = SocketAddr::new(row.address, row.port);
        let name = match row.kind {
            FrontendKind::HostPort => format!("pod {}", row.service),
            FrontendKind::LocalRedirect => format!("policy {}", row.service),
            _ => row.service.to_string(),
        };
        let scope = match row.scope {
            Scope::Internal => "cluster",
            Scope::External => "network",
        };
        let backends = match row.backends.as_slice() {
            [] if row.has_others => "(of other nodes)".to_owned(),
            backends => shorten(backends),
        };
        let protocol = row.protocol.clone();
        [name, row.kind.to_string(), frontend.to_string(), protocol, scope.to_owned(), backends]
    })
}

/// One line for each node of the cluster.
pub fn node(command: NodeCommand) -> Result<(), Failure> {
    let NodeCommand::List(args) = command;
    args.list(&Request::Nodes, ["NODE", "ADDRESSES", "POD CIDRS", "PODS", "BY"], |row: &NodeRow| {
        [row.node.clone(), join(&row.addresses), join(&row.pod_cidrs), row.pods.to_string(), row.way.clone()]
    })
}

pub fn egress(command: EgressCommand) -> Result<(), Failure> {
    let EgressCommand::List(args) = command;
    let header = ["POLICY", "POD", "NODE", "GATEWAY", "ADDRESS", "DESTINATIONS", "EXCLUDED"];
    args.list(&Request::Egress, header, |row: &EgressRow| {
        let or = |text: &Option<String>, none: &str| text.clone().unwrap_or_else(|| none.to_owned());
        [
            row.policy.clone(),
            row.pod.to_string(),
            row.node.clone(),
            or(&row.gateway, "none is ready: dropped"),
            or(&row.address, if row.gateway.is_some() { "not there: dropped" } else { "" }),
            join(&row.destinations),
            join(&row.excluded),
        ]
    })
}

impl Connection {
    pub fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, Failure> {
        Ok(self.connect()?.with_timeout(ANSWER_WITHIN)?.call(request)?)
    }
}

impl GetArgs {
    /// Prints the rows of this name; there is one for each frontend of a service.
    fn get<T: Serialize + DeserializeOwned>(
        &self,
        request: &Request,
        kind: &str,
        name: impl Fn(&T) -> String,
    ) -> Result<(), Failure> {
        let mut rows: Vec<T> = self.connection.ask(request)?;
        rows.retain(|row| name(row) == self.wanted || name(row).ends_with(&format!(" {}", self.wanted)));
        if rows.is_empty() {
            return Err(anyhow::anyhow!("no {kind} {} is known on this node", self.wanted).into());
        }
        Ok(output::write_json(&mut io::stdout().lock(), &rows)?)
    }
}

impl ListArgs {
    fn list<T: Serialize + DeserializeOwned, const N: usize>(
        &self,
        request: &Request,
        header: [&str; N],
        line: impl Fn(&T) -> [String; N],
    ) -> Result<(), Failure> {
        let rows: Vec<T> = self.connection.ask(request)?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        match self.output {
            Format::Json => output::write_json(&mut out, &rows)?,
            Format::Table => table::write(&mut out, header, &rows.iter().map(line).collect::<Vec<_>>())?,
        }
        Ok(out.flush()?)
    }
}

impl EndpointGetArgs {
    fn get(&self) -> Result<(), Failure> {
        let rows: Vec<EndpointRow> = self.connection.ask(&Request::Endpoints)?;
        let row = rows
            .iter()
            .find(|row| is_wanted(row, &self.wanted))
            .ok_or_else(|| anyhow::anyhow!("no endpoint {} on this node", self.wanted))?;
        Ok(output::write_json(&mut io::stdout().lock(), row)?)
    }
}

fn is_wanted(row: &EndpointRow, wanted: &str) -> bool {
    let is_pod =
        wanted.split_once('/').is_some_and(|(namespace, name)| row.pod == ObjectKey::new(namespace, name));
    let is_id = wanted.parse().is_ok_and(|id| row.id == EndpointId(id));
    let is_address = wanted.parse().is_ok_and(|address| match address {
        std::net::IpAddr::V4(address) => row.ipv4 == Some(address),
        std::net::IpAddr::V6(address) => row.ipv6 == Some(address),
    });
    is_pod || is_id || is_address
}

fn endpoint_line(row: &EndpointRow) -> [String; 10] {
    let enforced = |enforces| if enforces { "enforced" } else { "" }.to_owned();
    let state = match (&row.waiting_for, row.is_enforced) {
        (Some(reason), _) => format!("waiting: {reason}"),
        (None, true) => "ready".to_owned(),
        (None, false) => "not ready".to_owned(),
    };
    [
        row.id.to_string(),
        row.pod.to_string(),
        row.ipv4.map(|address| address.to_string()).unwrap_or_default(),
        row.ipv6.map(|address| address.to_string()).unwrap_or_default(),
        row.identity.map(|identity| identity.to_string()).unwrap_or_default(),
        enforced(row.enforces_ingress),
        enforced(row.enforces_egress),
        format!("{}/{}", row.usage.connections, row.usage.limits[UsageKind::Connections as usize]),
        row.usage.refused_total().to_string(),
        state,
    ]
}

fn join<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_named_as_people_name_it() {
        let labels = [
            "k8s:app=database",
            "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=data",
            "k8s:io.cilium.k8s.policy.serviceaccount=default",
            "k8s:io.kubernetes.pod.namespace=data",
        ];
        let short = short_labels(&labels.map(str::to_owned));
        assert_eq!(short, ("data".to_owned(), "app=database".to_owned()));
        assert_eq!(short_labels(&["reserved:world".to_owned()]).1, "reserved:world");
    }

    #[test]
    fn many_values_are_counted() {
        assert_eq!(shorten(&[1, 2, 3, 4]), "1,2,3,4");
        assert_eq!(shorten(&[1, 2, 3, 4, 5]), "1,2,3,+2");
    }
}
