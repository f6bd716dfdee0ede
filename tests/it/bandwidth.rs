//! What a pod may send and receive.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Pod, Setup, Streams, output_of, round_trip, wait_for};
use crate::require::require_lab;

/// Bits a second.
const LIMIT: f64 = 20e6;
const MEASURED_FOR: Duration = Duration::from_secs(2);
/// Headers count, which are a twentieth; the rest is for a machine that is busy with other tests.
const SHARES: std::ops::RangeInclusive<f64> = 0.75..=1.15;

/// Bits a second of payload that arrive over so many connections, while all of them send.
fn measure(from: &Pod, to: &Pod, streams: usize, port: u16) -> Result<f64> {
    let rates = Streams::measure(vec![Streams::connect(from, to, streams, port)?], MEASURED_FOR)?;
    rates.first().copied().context("one rate")
}

fn limit(lab: &Lab, pod: &str, limit: Option<&str>) -> Result<()> {
    annotate(lab, pod, "kubernetes.io/egress-bandwidth", limit)
}

fn annotate(lab: &Lab, pod: &str, annotation: &str, value: Option<&str>) -> Result<()> {
    let (namespace, name) = pod.split_once('/').context("namespace/name")?;
    let annotations =
        value.map_or_else(String::new, |value| format!("  annotations: {{{annotation}: \"{value}\"}}\n"));
    lab.manifests().apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n{annotations}spec:\n  \
         nodeName: node1\n  containers: [{{name: main, image: none}}]\n"
    ))
}

#[test]
fn a_pod_sends_no_more_than_its_annotation_says() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let c = lab.pod(1, "shop/c").create()?;
    let queue = || a.space().ip("-details link show dev eth0");
    ensure!(!queue()?.contains("qdisc tbf"), "limited by nobody's word");
    limit(&lab, "shop/a", Some("20M"))?;
    wait_for("the limit", || Ok(queue()?.contains("qdisc tbf")))?;
    // To another node, and on this one; with one connection, with several, with many.
    let mut shares = Vec::new();
    for (port, (to, streams)) in (5000..).zip([(&b, 1), (&b, 4), (&b, 32), (&c, 1), (&c, 4)]) {
        shares.push(measure(&a, to, streams, port)? / LIMIT);
    }
    ensure!(shares.iter().all(|share| SHARES.contains(share)), "shares of the limit: {shares:?}");
    println!("shares of the limit: {shares:.3?}");
    ensure!(measure(&b, &a, 1, 6000)? > 2.0 * LIMIT, "what it receives is not limited");
    limit(&lab, "shop/a", None)?;
    wait_for("the end of the limit", || Ok(!queue()?.contains("qdisc tbf")))?;
    limit(&lab, "shop/a", Some("fast"))?;
    wait_for("the word on a limit that cannot be read", || {
        Ok(lab.node(1).status()?["broken"].to_string().contains("fast"))
    })
}

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";

/// From another node and from this one, with one connection and with many; who is beside the pod does not notice.
fn a_limited_pod_receives_its_share(routing: &str) -> Result<()> {
    let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let (c, d) = (lab.pod(1, "shop/c").create()?, lab.pod(1, "shop/d").create()?);
    annotate(&lab, "shop/a", INGRESS, Some("20M"))?;
    let classes = || lab.node(1).space().run(|| output_of(&mut classes_of("weir_limit"), ""));
    wait_for("the limit", || Ok(classes()?.contains("20Mbit")))?;
    let mut shares = Vec::new();
    for (port, (from, streams)) in (5000..).zip([(&b, 1), (&b, 4), (&b, 32), (&c, 1), (&c, 4), (&c, 32)]) {
        shares.push(measure(from, &a, streams, port)? / LIMIT);
    }
    println!("{routing}: shares of the limit: {shares:.3?}");
    ensure!(shares.iter().all(|share| SHARES.contains(share)), "shares of the limit: {shares:?}");
    let quiet = round_trip(&b, &d)?;
    let load = Streams::connect(&b, &a, 1, 7000)?;
    load.begin();
    let (beside, through) = (round_trip(&b, &d)?, round_trip(&b, &a)?);
    load.stop()?;
    println!(
        "{routing}: round trip of a pod beside it: {quiet:?}, {beside:?}; of the pod itself: {through:?}"
    );
    ensure!(beside < through / 4, "an unlimited pod waits with the limited one: {beside:?} of {through:?}");
    ensure!(measure(&a, &b, 1, 6000)? > 2.0 * LIMIT, "what it sends is not limited");
    annotate(&lab, "shop/a", INGRESS, Some("a lot"))?;
    wait_for("the word on a limit that cannot be read", || {
        Ok(lab.node(1).status()?["broken"].to_string().contains("a lot"))
    })?;
    wait_for("the end of the limit", || Ok(!classes()?.contains("20Mbit")))?;
    ensure!(measure(&b, &a, 1, 6001)? > 2.0 * LIMIT, "the limit is gone");
    Ok(())
}

fn classes_of(device: &str) -> Command {
    let mut command = Command::new("tc");
    command.args(["class", "show", "dev", device]);
    command
}

#[test]
fn a_pod_receives_no_more_than_its_annotation_says_by_tunnel() -> Result<()> {
    require_lab!();
    a_limited_pod_receives_its_share("tunnel")
}

#[test]
fn a_pod_receives_no_more_than_its_annotation_says_by_route() -> Result<()> {
    require_lab!();
    a_limited_pod_receives_its_share("native")
}

fn the_guaranteed_go_first(routing: &str) -> Result<()> {
    let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(1, "shop/b").create()?);
    let c = lab.pod(2, "shop/c").create()?;
    let priority = |pod: &str, value| annotate(&lab, pod, "bandwidth.cilium.io/priority", Some(value));
    for line in [
        "qdisc add dev eth0 root handle 1: htb default 1",
        "class add dev eth0 parent 1: classid 1:1 htb rate 20mbit quantum 60000",
        "qdisc add dev eth0 parent 1:1 pfifo_fast",
    ] {
        let mut command = Command::new("tc");
        command.args(line.split_whitespace());
        lab.node(1).space().command(command, "")?;
    }
    let said = || -> Result<String> { Ok(lab.node(1).status()?["features"].to_string()) };
    wait_for(
        "the word on bands",
        || Ok(said()?.contains("count on eth0, whose queue is htb of pfifo_fast")),
    )?;
    for (port, first, second) in [(5000, "guaranteed", "bestEffort"), (5100, "bestEffort", "guaranteed")] {
        priority("shop/a", first)?;
        priority("shop/b", second)?;
        wait_for("both priorities", || {
            let rows = lab.node(1).map("endpoints")?;
            let told = |pod: &Pod| {
                let is_its = |row: &&serde_json::Value| row["ipv4"] == pod.address(true).to_string();
                rows.iter().find(is_its).and_then(|row| row["priority"].as_u64())
            };
            let wanted = if first == "guaranteed" { (6, 5) } else { (5, 6) };
            Ok(told(&a).zip(told(&b)) == Some(wanted))
        })?;
        // A queue of the node's device is full, which both pass.
        let both = vec![Streams::connect(&a, &c, 4, port)?, Streams::connect(&b, &c, 4, port + 1)?];
        let shares: Vec<f64> =
            Streams::measure(both, MEASURED_FOR)?.iter().map(|rate| rate / LIMIT).collect();
        println!("{routing}: {first} {:.3}, {second} {:.3}", shares[0], shares[1]);
        let (most, least) =
            if first == "guaranteed" { (shares[0], shares[1]) } else { (shares[1], shares[0]) };
        ensure!(most > 3.0 * least, "{first} and {second} have {shares:?}");
    }
    priority("shop/a", "royal")?;
    wait_for("the word on a priority that is none", || {
        Ok(lab.node(1).status()?["broken"].to_string().contains("royal"))
    })
}

#[test]
fn pods_of_high_priority_go_first_by_tunnel() -> Result<()> {
    require_lab!();
    the_guaranteed_go_first("tunnel")
}

#[test]
fn pods_of_high_priority_go_first_by_route() -> Result<()> {
    require_lab!();
    the_guaranteed_go_first("native")
}
