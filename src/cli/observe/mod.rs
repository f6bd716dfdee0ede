//! `weir observe`.

mod filters;
mod stream;

use std::path::PathBuf;

use anyhow::anyhow;
use clap::{ArgAction, Args, ValueEnum};
use jiff::Timestamp;

use super::cluster::ClusterArgs;
use super::{Connection, Failure};
use crate::hubble::page::moment;
use crate::hubble::text::TimeFormat;
use crate::hubble::tls::Identity;
pub use filters::FilterArgs;
pub use stream::{channel, flows_of};

/// Whose flows: this node's, those of a server, or of every node.
#[derive(Args, Clone)]
pub struct From {
    #[command(flatten)]
    pub(super) connection: Connection,

    /// Ask this observer or relay by Hubble's API: HOST:PORT, tls://HOST:PORT, or unix:PATH.
    #[arg(long, env = "HUBBLE_SERVER", value_name = "TARGET", conflicts_with = "cluster")]
    pub(super) server: Option<String>,
    /// Reach --server with TLS: a directory with ca.crt, tls.crt and tls.key.
    #[arg(long, value_name = "DIR", requires = "server")]
    pub(super) tls_dir: Option<PathBuf>,
    /// Reach --server with TLS, as with tls:// before its name.
    #[arg(long, requires = "server")]
    pub(super) tls: bool,
    /// The authority whose certificates --server may have.
    #[arg(long, value_name = "FILE", requires = "server", conflicts_with = "tls_dir")]
    pub(super) tls_ca_cert_files: Option<PathBuf>,
    /// The certificate to show to --server.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca_cert_files", "tls_client_key_file"])]
    pub(super) tls_client_cert_file: Option<PathBuf>,
    /// Its key.
    #[arg(long, value_name = "FILE", requires = "tls_client_cert_file")]
    pub(super) tls_client_key_file: Option<PathBuf>,
    /// The name that the certificate of --server must have.
    #[arg(long, value_name = "NAME", requires = "server")]
    pub(super) tls_server_name: Option<String>,

    /// The flows of every node of the cluster, through the API server.
    #[arg(long)]
    pub(super) cluster: bool,
    #[command(flatten)]
    pub(super) of: ClusterArgs,
}

#[derive(Args)]
pub struct ObserveArgs {
    #[command(flatten)]
    from: From,
    /// Read flows from a file, one JSON object a line, as -o json writes them; - is standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["server", "cluster", "follow"])]
    input_file: Option<PathBuf>,

    /// Show the newest N that match; by default 20, or none when following.
    #[arg(long, value_name = "N", conflicts_with_all = ["all", "first"], allow_negative_numbers = true)]
    last: Option<u64>,
    /// Show the oldest N that match.
    #[arg(long, value_name = "N", conflicts_with_all = ["all", "follow"])]
    first: Option<u64>,
    /// Show everything that is kept.
    #[arg(long)]
    all: bool,
    /// Go on with new flows as they come.
    #[arg(long, short)]
    follow: bool,
    /// Not older: a time, or how long ago, as 5m.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,
    /// Not newer: a time, or how long ago, as 5m.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "compact")]
    output: FlowFormat,
    /// Print the node that saw a flow.
    #[arg(long)]
    print_node_name: bool,
    /// Print the policies that decided.
    #[arg(long)]
    print_policy_names: bool,
    /// Print addresses, not names.
    #[arg(long)]
    numeric: bool,
    /// Print names of addresses; false: as --numeric.
    #[arg(long, action = ArgAction::Set, default_value_t = true, num_args = 0..=1, default_missing_value = "true")]
    ip_translation: bool,
    /// How times are printed, but in JSON.
    #[arg(long, value_enum, default_value = "StampMilli", hide_possible_values = false)]
    time_format: TimeFormat,
    /// Colours for verdicts: auto (on a terminal), always or never.
    #[arg(long, value_enum, default_value = "auto")]
    color: Colour,
    /// Print the filters as JSON and ask nobody.
    #[arg(long)]
    print_raw_filters: bool,
    /// Only these fields of a flow, as source.pod_name; for -o json.
    #[arg(long, value_name = "FIELDS", value_delimiter = ',')]
    field_mask: Vec<String>,

    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FlowFormat {
    /// A line for people.
    Compact,
    /// A line for each field.
    Dict,
    /// Columns.
    Table,
    /// One JSON object a line: GetFlowsResponse, as the stock command line prints it.
    #[value(alias = "jsonpb")]
    Json,
}

/// When there are colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Colour {
    Auto,
    Always,
    Never,
}

impl From {
    /// Who this side is and whom it believes; `None`: in plain text.
    fn identity(&self) -> Result<Option<Identity>, Failure> {
        if let Some(directory) = &self.tls_dir {
            return Ok(Some(Identity::new(directory)));
        }
        let is_tls = self.tls || self.server.as_deref().is_some_and(|server| server.starts_with("tls://"));
        let Some(authority) = &self.tls_ca_cert_files else {
            return match is_tls {
                true => Err(anyhow!("TLS needs --tls-ca-cert-files, or --tls-dir").into()),
                false => Ok(None),
            };
        };
        let leaf = self.tls_client_cert_file.clone().zip(self.tls_client_key_file.clone());
        Ok(Some(Identity::of_client(authority.clone(), leaf.map(|(certificate, key)| [certificate, key]))))
    }
}

pub fn run(args: ObserveArgs) -> Result<(), Failure> {
    if args.print_raw_filters {
        return stream::print_filters(&args);
    }
    stream::run(&args)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::moment;

    #[test]
    fn moments() {
        assert_eq!(moment("2026-01-31T12:00:00Z").expect("a time").as_second(), 1_769_860_800);
        for (text, seconds) in [("90s", 90), ("5m", 300), ("1h30m", 5400), ("1h 30m", 5400)] {
            let ago = Timestamp::now().duration_since(moment(text).expect(text)).as_secs();
            assert!((seconds - 1..seconds + 5).contains(&ago), "{text}: {ago}");
        }
        assert!(moment("yesterday").is_err());
    }
}
