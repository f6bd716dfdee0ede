//! `weir policy diff`.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;
use serde::Serialize;

use super::running::Judged;
use super::{offline, running, validate};
use crate::agent::policy_diff;
use crate::api::Request;
use crate::cli::{Connection, Failure, Format, output, table};
use crate::policy::diff::{CHANGES_MAX, Change};

#[derive(Args)]
pub struct DiffArgs {
    #[command(flatten)]
    connection: Connection,
    /// Policies, as YAML or JSON; - is the standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Compare with the manifests of this directory, not with what an agent enforces.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Difference {
    /// Pairs that would be judged otherwise.
    changes: Vec<Change>,
    /// Of the flows that are kept those that would be; none of them are known offline.
    #[serde(skip_serializing_if = "Option::is_none")]
    flows: Option<BTreeSet<Judged>>,
}

pub fn run(args: &DiffArgs) -> Result<(), Failure> {
    let manifests = validate::read(&args.file)?;
    let changes: Vec<Change> = match &args.manifests {
        Some(directory) => {
            let tables = offline::tables(directory)?;
            policy_diff::of_pods(&tables, &manifests).map_err(|reason| Failure::Other(anyhow!(reason)))?
        }
        None => args.connection.ask(&Request::PolicyDiff { manifests })?,
    };
    // Flows are kept by an agent.
    let flows = match &args.manifests {
        None => Some(running::judged_otherwise(&args.connection, &changes)?),
        Some(_) => None,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    match args.output {
        Format::Json => output::write_json(&mut out, &Difference { changes, flows })?,
        Format::Table if changes.is_empty() => writeln!(out, "nothing changes")?,
        Format::Table => {
            let line = |change: &Change| {
                let becomes = if change.is_allowed { "allowed" } else { "denied" };
                let Change { pods, direction, peer, ports, .. } = change.clone();
                [becomes.to_owned(), pods, direction, peer, ports]
            };
            let lines: Vec<_> = changes.iter().map(line).collect();
            table::write(&mut out, ["BECOMES", "PODS", "DIRECTION", "PEER", "PORTS"], &lines)?;
            if changes.len() == CHANGES_MAX {
                writeln!(out, "and more: only the first {CHANGES_MAX} are listed")?;
            }
            if let Some(flows) = flows {
                let lines: Vec<_> = flows.iter().map(Judged::line).collect();
                writeln!(out, "\nof the flows that are kept {} would be judged otherwise", lines.len())?;
                table::write(&mut out, ["BECOMES", "FROM", "TO", "PORT"], &lines)?;
            }
        }
    }
    Ok(out.flush()?)
}
