//! `weir status`.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use clap::Args;
use jiff::SignedDuration;

use super::cluster::status::ClusterStatus;
use super::cluster::{self, ClusterArgs};
use super::{Connection, Failure, Format, output, table};
use crate::api::answers::{BrokenRow, StatusAnswer};
use crate::api::{self, Request};
use crate::flow::escape;
use crate::telemetry::PartRow;

/// Of what fails, so many lines a part.
const CAUSES: usize = 5;
/// Between two questions while waiting.
const POLL: Duration = Duration::from_millis(100);
const POLL_CLUSTER: Duration = Duration::from_secs(1);
/// An agent that is busy starting answers within this.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    connection: Connection,
    /// Wait until the agent is ready, at most so long.
    #[arg(
        long,
        value_name = "DURATION",
        num_args = 0..=1,
        default_missing_value = "60s",
        value_parser = duration,
    )]
    wait: Option<Duration>,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
    /// Every node of the cluster, through the API server.
    #[arg(long)]
    cluster: bool,
    #[command(flatten)]
    of: ClusterArgs,
}

pub fn run(args: &StatusArgs) -> Result<(), Failure> {
    let deadline = args.wait.map(|wait| Instant::now() + wait);
    if args.cluster {
        return run_cluster(args, deadline);
    }
    let status = loop {
        let answer = ask(&args.connection);
        let is_well = answer.as_ref().is_ok_and(|status| status.is_ready() && status.fault().is_none());
        if is_well || deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            break answer;
        }
        std::thread::sleep(POLL);
    };
    let status = status.map_err(|error| match error {
        Failure::Api(error @ api::Error::Unavailable { .. }) => Failure::NotReady(error.to_string()),
        error => error,
    })?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    match args.output {
        Format::Json => output::write_json(&mut out, &status)?,
        Format::Table => write(&mut out, &status)?,
    }
    out.flush()?;
    match (status.is_ready(), status.fault()) {
        (true, None) => Ok(()),
        (true, Some(fault)) => Err(Failure::NotReady(format!("degraded: {}", fault.text()))),
        (false, _) => Err(Failure::NotReady(format!("not ready: waiting for {}", status.pending.join(", ")))),
    }
}

fn run_cluster(args: &StatusArgs, deadline: Option<Instant>) -> Result<(), Failure> {
    let runtime = cluster::runtime()?;
    let status = loop {
        let answer = runtime.block_on(cluster::status::ask(&args.of));
        let is_ready = answer.as_ref().is_ok_and(ClusterStatus::is_ready);
        if is_ready || deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            break answer?;
        }
        std::thread::sleep(POLL_CLUSTER);
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    status.write(&mut out, args.output)?;
    out.flush()?;
    status.outcome()
}

fn ask(connection: &Connection) -> Result<StatusAnswer, Failure> {
    Ok(connection.connect()?.with_timeout(ANSWER_WITHIN)?.call(&Request::Status)?)
}

fn write(out: &mut impl Write, status: &StatusAnswer) -> io::Result<()> {
    let ready = match (status.is_ready(), status.fault()) {
        (true, None) => "ready".to_owned(),
        (true, Some(fault)) => degraded(fault),
        (false, _) => "NOT READY".to_owned(),
    };
    let up = SignedDuration::from_secs(i64::try_from(status.uptime_seconds).unwrap_or(i64::MAX));
    let objects = &status.objects;
    let flows = &status.flows;
    let mut lines = vec![(
        "agent",
        format!(
            "{ready}, version {}, up {up:#}, node {}, Linux {}",
            status.version, status.node, status.kernel
        ),
    )];
    lines.extend(status.pending.iter().map(|task| ("", format!("waiting for {task}"))));
    let faults = status.parts.iter().filter(|part| part.is_fault());
    lines.extend(faults.flat_map(|part| {
        part.causes.iter().take(CAUSES).map(|cause| ("", format!("{}: {cause}", part.part)))
    }));
    lines.extend(status.parts.iter().flat_map(|part| part.notes.iter().map(|note| ("", note.clone()))));
    lines.push(("endpoints", format!("{} of {} enforced", objects.endpoints_enforced, objects.endpoints)));
    lines.extend(status.waiting.iter().map(|row| ("", format!("{}: {}", row.endpoint, row.reason))));
    lines.push(("policies", format!("{}, {} compiled", objects.policies, objects.compiled_policies)));
    lines.push(("services", objects.services.to_string()));
    if !status.announced.is_empty() {
        let own = status.announced.iter().filter(|row| row.node == status.node).count();
        let none = status.announced.iter().filter(|row| row.node.is_empty()).count();
        let text = format!(
            "{} Services on the link, {own} led by this node, {none} by nobody",
            status.announced.len()
        );
        lines.push(("announced", text));
    }
    let identities =
        format!("{} of the cluster, {} of this node", objects.identities, objects.local_identities);
    lines.push(("identities", identities));
    lines.push(("nodes", objects.nodes.to_string()));
    lines.push((
        "flows",
        format!(
            "{} seen, {} of {} kept, {} lost in the kernel, {} suppressed, {} missed by observers",
            flows.seen,
            flows.held,
            flows.capacity,
            flows.lost_in_kernel,
            flows.suppressed,
            flows.missed_by_readers
        ),
    ));
    lines.push(("dropped", format!("{} packets", status.dropped_packets)));
    lines.extend(status.features.iter().map(|feature| (&*feature.name, feature.value.clone())));
    lines.push(("source", status.source.clone()));
    lines.extend(status.broken.iter().map(|broken| ("", broken_text(broken))));

    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + 1;
    for (name, value) in &lines {
        let name = if name.is_empty() { String::new() } else { format!("{}:", escape(name)) };
        writeln!(out, "{name:<width$}  {}", escape(value))?;
    }
    write_tables(out, status)
}

/// `DEGRADED since 4m: policies: map policy_rules is full`
fn degraded(fault: &PartRow) -> String {
    let seconds = i64::try_from(fault.failing_seconds.unwrap_or(0)).unwrap_or(i64::MAX);
    let since = SignedDuration::from_secs(if seconds < 120 { seconds } else { seconds / 60 * 60 });
    format!("DEGRADED since {since:#}: {}", fault.text())
}

fn broken_text(broken: &BrokenRow) -> String {
    let number = |name: &str, number: Option<usize>| {
        number.map(|number| format!(" {name} {number}")).unwrap_or_default()
    };
    format!(
        "{}{}{}{}: {}",
        broken.source,
        number("document", broken.document),
        number("line", broken.line),
        broken.object.as_deref().map(|object| format!(" ({object})")).unwrap_or_default(),
        broken.reason
    )
}

fn write_tables(out: &mut impl Write, status: &StatusAnswer) -> io::Result<()> {
    let rows: Vec<_> = status
        .kinds
        .iter()
        .map(|kind| {
            let health = match (kind.is_synced, kind.is_connected) {
                (_, false) => "away",
                (false, true) => "first list awaited",
                (true, true) => "ok",
            };
            let silent = kind.silent_seconds.map(|seconds| format!("{seconds} s ago")).unwrap_or_default();
            [
                kind.kind.clone(),
                kind.objects.to_string(),
                health.to_owned(),
                silent,
                kind.errors_total.to_string(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        writeln!(out)?;
        table::write(out, ["KIND", "OBJECTS", "SOURCE", "LAST NEWS", "ERRORS"], &rows)?;
    }
    let parts: Vec<_> = status.parts.iter().map(part_row).collect();
    if !parts.is_empty() {
        writeln!(out)?;
        table::write(out, ["PART", "STATE", "ERRORS", "REPAIRS"], &parts)?;
    }
    let maps = status.maps.iter().map(|map| {
        let percent = map.used as f64 * 100.0 / map.capacity.max(1) as f64;
        [map.map.clone(), map.used.to_string(), map.capacity.to_string(), format!("{percent:.1} %")]
    });
    let maps: Vec<_> = maps.collect();
    if !maps.is_empty() {
        writeln!(out)?;
        table::write(out, ["MAP", "ROWS", "MAX", "FULL"], &maps)?;
    }
    Ok(())
}

fn part_row(part: &PartRow) -> [String; 4] {
    let state = match part.failing_seconds {
        None => "ok".to_owned(),
        Some(seconds) => format!("failing for {seconds} s"),
    };
    [part.part.clone(), state, part.errors_total.to_string(), part.repairs_total.to_string()]
}

fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let duration: SignedDuration =
        text.parse().map_err(|_| "not a number of seconds, nor a duration as 500ms, 90s, 5m".to_owned())?;
    duration.try_into().map_err(|_| "a duration cannot be negative".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::answers::{FeatureRow, KindRow, WaitingRow};
    use crate::datapath::MapFill;
    use crate::flow::RecorderCounts;
    use crate::model::EndpointId;
    use crate::telemetry::ObjectCounts;

    #[test]
    fn a_status_for_people() {
        let status = StatusAnswer {
            announced: Vec::new(),
            version: "0.1.0".into(),
            node: "a".into(),
            kernel: "6.18.0".into(),
            uptime_seconds: 3725,
            pending: vec!["the first round".into()],
            parts: vec![PartRow {
                part: "policies".into(),
                failing_seconds: Some(250),
                causes: vec!["NetworkPolicy shop/a: 17000 rows".into()],
                errors_total: 3,
                notes: vec!["route 10.1.2.0/24 was removed 5 times in the last 10 minutes".into()],
                ..PartRow::default()
            }],
            source: "/etc/manifests".into(),
            kinds: vec![KindRow {
                kind: "Pod".into(),
                objects: 2,
                is_synced: true,
                is_connected: true,
                silent_seconds: Some(3),
                errors_total: 0,
            }],
            broken: vec![BrokenRow {
                source: "shop.yaml".into(),
                document: Some(2),
                line: None,
                object: Some("NetworkPolicy shop/web".into()),
                reason: "spec.ingress[0].ports[0].port: 70000 is no port".into(),
            }],
            features: vec![FeatureRow { name: "attach".into(), value: "tcx".into() }],
            objects: ObjectCounts {
                endpoints: 2,
                endpoints_enforced: 1,
                policies: 3,
                ..ObjectCounts::default()
            },
            waiting: vec![WaitingRow { endpoint: EndpointId(3), reason: "no Pod object yet".into() }],
            maps: vec![MapFill { map: "nat".into(), used: 1024, capacity: 131_072 }],
            flows: RecorderCounts { seen: 5, held: 5, capacity: 16_384, ..RecorderCounts::default() },
            dropped_packets: 9,
        };
        let mut out = Vec::new();
        write(&mut out, &status).expect("memory");
        let expected = "\
agent:       NOT READY, version 0.1.0, up 1h 2m 5s, node a, Linux 6.18.0
             waiting for the first round
             policies: NetworkPolicy shop/a: 17000 rows
             route 10.1.2.0/24 was removed 5 times in the last 10 minutes
endpoints:   1 of 2 enforced
             3: no Pod object yet
policies:    3, 0 compiled
services:    0
identities:  0 of the cluster, 0 of this node
nodes:       0
flows:       5 seen, 5 of 16384 kept, 0 lost in the kernel, 0 suppressed, 0 missed by observers
dropped:     9 packets
attach:      tcx
source:      /etc/manifests
             shop.yaml document 2 (NetworkPolicy shop/web): spec.ingress[0].ports[0].port: 70000 is no port

KIND  OBJECTS  SOURCE  LAST NEWS  ERRORS
Pod   2        ok      3 s ago    0

PART      STATE              ERRORS  REPAIRS
policies  failing for 250 s  3       0

MAP  ROWS  MAX     FULL
nat  1024  131072  0.8 %
";
        assert_eq!(String::from_utf8(out).expect("text"), expected);
        let degraded = StatusAnswer { pending: Vec::new(), ..status };
        let mut out = Vec::new();
        write(&mut out, &degraded).expect("memory");
        let first = String::from_utf8(out).expect("text").lines().next().unwrap_or_default().to_owned();
        assert!(
            first.starts_with("agent:       DEGRADED since 4m: policies: NetworkPolicy shop/a: 17000 rows,"),
            "{first}"
        );
    }
}
