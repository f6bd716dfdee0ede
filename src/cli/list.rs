//! `weir endpoint`, `identity`, `policy` and `service`: what the agent knows, as tables.

use std::io::{self, Write};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Connection, Failure, Format, output, table};
use crate::api::Request;
use crate::api::answers::{EndpointRow, IdentityRow, PolicyRow, ServiceRow};
use crate::model::{EndpointId, ObjectKey};

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
pub enum PolicyCommand {
    /// One line for each policy.
    List(ListArgs),
}

#[derive(Subcommand)]
pub enum ServiceCommand {
    /// One line for each address and port of a service.
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

pub fn endpoint(command: EndpointCommand) -> Result<(), Failure> {
    match command {
        EndpointCommand::List(args) => args.list(
            &Request::Endpoints,
            ["ID", "POD", "IPV4", "IPV6", "IDENTITY", "INGRESS", "EGRESS", "STATE"],
            endpoint_line,
        ),
        EndpointCommand::Get(args) => args.get(),
    }
}

pub fn identity(command: IdentityCommand) -> Result<(), Failure> {
    let IdentityCommand::List(args) = command;
    args.list(&Request::Identities, ["ID", "LABELS", "ADDRESSES"], |row: &IdentityRow| {
        [row.id.to_string(), row.labels.join(","), join(&row.addresses)]
    })
}

pub fn policy(command: PolicyCommand) -> Result<(), Failure> {
    let PolicyCommand::List(args) = command;
    args.list(&Request::Policies, ["POLICY", "INGRESS", "EGRESS", "ENDPOINTS"], |row: &PolicyRow| {
        let rules = |count: Option<usize>| match count {
            None => String::new(),
            Some(0) => "deny all".to_owned(),
            Some(1) => "1 rule".to_owned(),
            Some(count) => format!("{count} rules"),
        };
        [row.policy.to_string(), rules(row.ingress_rules), rules(row.egress_rules), join(&row.endpoints)]
    })
}

pub fn service(command: ServiceCommand) -> Result<(), Failure> {
    let ServiceCommand::List(args) = command;
    args.list(&Request::Services, ["SERVICE", "FRONTEND", "PROTOCOL", "BACKENDS"], |row: &ServiceRow| {
        let frontend = std::net::SocketAddr::new(row.address, row.port);
        let name = if row.is_host_port { format!("pod {}", row.service) } else { row.service.to_string() };
        [name, frontend.to_string(), row.protocol.clone(), join(&row.backends)]
    })
}

impl ListArgs {
    fn list<T: Serialize + DeserializeOwned, const N: usize>(
        &self,
        request: &Request,
        header: [&str; N],
        line: impl Fn(&T) -> [String; N],
    ) -> Result<(), Failure> {
        let rows: Vec<T> = self.connection.connect()?.with_timeout(ANSWER_WITHIN)?.call(request)?;
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
        let client = self.connection.connect()?.with_timeout(ANSWER_WITHIN)?;
        let rows: Vec<EndpointRow> = client.call(&Request::Endpoints)?;
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

fn endpoint_line(row: &EndpointRow) -> [String; 8] {
    let judged = |enforces| if enforces { "judged" } else { "open" }.to_owned();
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
        judged(row.enforces_ingress),
        judged(row.enforces_egress),
        state,
    ]
}

fn join<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
