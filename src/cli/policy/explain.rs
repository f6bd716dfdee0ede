//! `weir policy explain`.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;

use super::offline;
use crate::agent::Ends;
use crate::api::Request;
use crate::cli::{Connection, Failure, Format, output};
use crate::identity::LabelFilter;
use crate::model::IpProtocol;
use crate::policy::explain::{Explanation, Packet, Question, text};

#[derive(Args)]
pub struct ExplainArgs {
    #[command(flatten)]
    connection: Connection,
    /// Who begins: NAMESPACE/POD, NAMESPACE/KEY=VALUE,..., an address, world, host or remote-node.
    #[arg(long, value_name = "END")]
    from: String,
    /// Who is spoken to, likewise.
    #[arg(long, value_name = "END")]
    to: String,
    /// The port and its protocol, as 5432/TCP; of ICMP the type, as 8/ICMP.
    #[arg(long, value_name = "PORT/PROTOCOL", value_parser = packet)]
    port: Packet,
    /// Ask the manifests of this directory, not an agent.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

fn packet(text: &str) -> Result<Packet, String> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
    let protocol = IpProtocol::named(protocol).ok_or_else(|| format!("{protocol:?} is no protocol"))?;
    let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
    Ok(Packet { protocol: protocol.0, port })
}

pub fn run(args: &ExplainArgs) -> Result<(), Failure> {
    let explanation = match &args.manifests {
        Some(directory) => offline(args, directory)?,
        None => {
            let request =
                Request::PolicyExplain { from: args.from.clone(), to: args.to.clone(), packet: args.port };
            args.connection.ask::<Explanation>(&request)?
        }
    };
    let mut out = io::stdout().lock();
    match args.output {
        Format::Json => output::write_json(&mut out, &explanation)?,
        Format::Table => writeln!(out, "{} -> {} {}: {}", args.from, args.to, args.port, text(&explanation))?,
    }
    Ok(())
}

fn offline(args: &ExplainArgs, directory: &std::path::Path) -> Result<Explanation, Failure> {
    let tables = offline::tables(directory)?;
    let policies = offline::policies(&tables);
    let filter = LabelFilter::default();
    let asked: BTreeSet<String> = crate::policy::asked_labels(&policies, &filter);
    // Manifests do not say what DNS answers.
    let ends = Ends {
        tables: &tables,
        filter: &filter,
        asked: &asked,
        local: Vec::new(),
        named: Default::default(),
        node: "",
    };
    let find = |text: &str| ends.find(text).map_err(|reason| Failure::Other(anyhow!(reason)));
    let (from, to) = (find(&args.from)?, find(&args.to)?);
    let question = Question { policies: &policies, filter: &filter, from: &from, to: &to, packet: args.port };
    Ok(question.answer())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_typed_as_people_write_them() {
        assert_eq!(packet("5432/TCP"), Ok(Packet { protocol: 6, port: 5432 }));
        assert_eq!(packet("80"), Ok(Packet { protocol: 6, port: 80 }));
        assert_eq!(packet("8/icmp"), Ok(Packet { protocol: 1, port: 8 }));
        assert!(packet("http/TCP").is_err() && packet("1/XYZ").is_err());
    }
}
