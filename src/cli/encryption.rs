//! `weir encryption`: who encrypts on this node, and how its peers are.

use std::io::{self, Write};

use clap::{Args, Subcommand};

use super::cluster::{self, ClusterArgs};
use super::{Connection, Failure, Format, output, table};
use crate::api::Request;
use crate::api::answers::{EncryptionAnswer, EncryptionPeerRow};

#[derive(Subcommand)]
pub enum EncryptionCommand {
    /// Who encrypts, with which key, and how each other node is.
    Status(StatusArgs),
    /// Change the keys without loss: this node begins, and every other node follows.
    Rotate(RotateArgs),
}

#[derive(Args)]
pub struct RotateArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    connection: Connection,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
    /// Every node of the cluster, through the API server; exits with 3 where something does not fit together.
    #[arg(long)]
    cluster: bool,
    #[command(flatten)]
    of: ClusterArgs,
}

pub fn run(command: &EncryptionCommand) -> Result<(), Failure> {
    let args = match command {
        EncryptionCommand::Status(args) => args,
        EncryptionCommand::Rotate(args) => {
            let said: String = args.connection.ask(&Request::EncryptionRotate)?;
            return Ok(writeln!(io::stdout(), "{said}")?);
        }
    };
    if args.cluster {
        let answer = cluster::runtime()?.block_on(cluster::encryption::ask(&args.of))?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        answer.write(&mut out, args.output)?;
        out.flush()?;
        return answer.outcome();
    }
    let answer: EncryptionAnswer = args.connection.ask(&Request::Encryption)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    match args.output {
        Format::Json => output::write_json(&mut out, &answer)?,
        Format::Table => write(&mut out, &answer)?,
    }
    Ok(out.flush()?)
}

fn write(out: &mut impl Write, answer: &EncryptionAnswer) -> io::Result<()> {
    let Some(device) = &answer.device else {
        return writeln!(out, "off: WEIR_ENCRYPTION says so");
    };
    let mode =
        if answer.is_strict { "strict" } else { "not strict: nodes without a key are spoken to in plain" };
    writeln!(out, "by {}, device {} with MTU {}, {mode}", device.kind, device.name, device.mtu)?;
    let (key, port, generation) = (device.public_key, device.port, device.generation);
    let port = if port > 0 { format!(", UDP port {port}") } else { String::new() };
    writeln!(out, "key {key} of generation {generation}{port}")?;
    if let Some(change) = &device.change {
        writeln!(out, "keys change: {change}")?;
    }
    if let Some(error) = &answer.error {
        writeln!(out, "the peers' states are not known: {error}")?;
    }
    writeln!(out)?;
    let has_handshakes = device.port > 0;
    let rows: Vec<_> = answer.peers.iter().map(|peer| row(peer, has_handshakes)).collect();
    table::write(out, ["NODE", "ENDPOINT", "LAST HANDSHAKE", "RECEIVED", "SENT", "ERRORS", "KEY"], &rows)
}

fn row(peer: &EncryptionPeerRow, has_handshakes: bool) -> [String; 7] {
    let state = peer.state.as_ref();
    let number = |value: fn(&crate::model::PeerState) -> u64| {
        state.map(|state| value(state).to_string()).unwrap_or_default()
    };
    let since = state.and_then(|state| state.last_handshake_seconds);
    [
        peer.node.clone(),
        state.and_then(|state| state.endpoint).map(|endpoint| endpoint.to_string()).unwrap_or_default(),
        match since {
            Some(seconds) => format!("{seconds} s ago"),
            None if has_handshakes => "never".to_owned(),
            None => String::new(),
        },
        number(|state| state.received_bytes),
        number(|state| state.sent_bytes),
        number(|state| state.errors),
        peer.public_key.map_or_else(|| "none published".to_owned(), |key| key.to_string()),
    ]
}
