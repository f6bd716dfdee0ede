//! `weir observe`.

mod filters;
mod stream;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use jiff::Timestamp;

use super::cluster::ClusterArgs;
use super::{Connection, Failure};
use crate::hubble::page::moment;
pub use filters::FilterArgs;
pub use stream::{channel, flows_of};

/// Whose flows: this node's, those of a server, or of every node.
#[derive(Args, Clone)]
pub struct From {
    #[command(flatten)]
    pub(super) connection: Connection,

    /// Ask this observer or relay by Hubble's API: HOST:PORT, or unix:PATH.
    #[arg(long, env = "HUBBLE_SERVER", value_name = "TARGET", conflicts_with = "cluster")]
    pub(super) server: Option<String>,
    /// Reach --server with TLS: a directory with ca.crt, tls.crt and tls.key.
    #[arg(long, value_name = "DIR", requires = "server")]
    pub(super) tls_dir: Option<PathBuf>,
    /// The name that the certificate of --server must have.
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
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
