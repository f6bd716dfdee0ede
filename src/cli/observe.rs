//! `weir observe`.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use jiff::{SignedDuration, Timestamp};

use super::cluster::observe::Wanted;
use super::cluster::{self, ClusterArgs};
use super::{Connection, Failure, output};
use crate::api::Request;
use crate::flow::{Colours, Exclusion, Filter, Item, Query, compact};

#[derive(Args)]
pub struct ObserveArgs {
    #[command(flatten)]
    connection: Connection,

    /// Show the newest N that match; by default 20, or none when following.
    #[arg(long, value_name = "N", conflicts_with = "all", allow_negative_numbers = true)]
    last: Option<u64>,
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

    /// The flows of every node of the cluster, through the API server.
    #[arg(long)]
    cluster: bool,
    #[command(flatten)]
    of: ClusterArgs,

    #[command(flatten)]
    filter: Filter,
    /// Leave out what matches a filter below, as --not verdict=forwarded; each on its own.
    #[arg(long, value_name = "FILTER=VALUE")]
    not: Vec<Exclusion>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FlowFormat {
    /// A line for people.
    Compact,
    /// One JSON object a line.
    #[value(alias = "jsonpb")]
    Json,
}

pub fn run(args: ObserveArgs) -> Result<(), Failure> {
    if args.cluster {
        return run_cluster(&args);
    }
    let query = Query {
        last: args.last,
        all: args.all,
        follow: args.follow,
        since: args.since,
        until: args.until,
        filter: args.filter,
        not: args.not,
    };
    let colours = output::colours();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut items = args.connection.connect()?.stream::<Item>(&Request::Observe(query))?;
    while let Some(item) = items.next() {
        write_item(&mut out, &item?, args.output, colours)?;
        // Whoever follows wants to see each at once; many at once need only one write.
        if args.follow && !items.has_next_now() {
            out.flush()?;
        }
    }
    Ok(out.flush()?)
}

fn run_cluster(args: &ObserveArgs) -> Result<(), Failure> {
    let wanted = Wanted::typed(std::env::args(), args.follow, args.last, args.all);
    let colours = output::colours();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let runtime = cluster::runtime()?;
    let outcome = runtime.block_on(cluster::observe::run(&args.of, wanted, |item| {
        write_item(&mut out, item, args.output, colours)?;
        if args.follow { out.flush() } else { Ok(()) }
    }));
    runtime.shutdown_background();
    out.flush()?;
    outcome
}

fn write_item(out: &mut impl Write, item: &Item, format: FlowFormat, colours: Colours) -> io::Result<()> {
    match format {
        FlowFormat::Compact => writeln!(out, "{}", compact(item, colours)),
        FlowFormat::Json => output::write_json_line(out, item),
    }
}

fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let ago: SignedDuration =
        text.parse().map_err(|_| "not a time as 2026-01-31T12:00:00Z, nor a duration as 90s, 5m, 1h30m")?;
    Timestamp::now().checked_sub(ago).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

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
