//! What limited pods get of their limits, sent and received, and what a pod beside them notices.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::{Lab, Pod, Streams, round_trip, wait_for};
use crate::load::median;
use crate::row::Row;

/// Bits a second.
const LIMIT: f64 = 100e6;
const TIME: Duration = Duration::from_millis(1500);
const COUNTS: [usize; 3] = [1, 4, 32];
/// Of Ethernet, IP and TCP with timestamps: what a segment has beside its payload.
const ETHERNET: f64 = 14.0;
const HEADERS: f64 = 52.0;

pub fn rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (routing, mtu) in [("tunnel", 1450.0), ("native", 1500.0)] {
        rows.extend(case(routing, mtu)?);
    }
    let worst = |count: usize| {
        let prefix = format!("bandwidth/{count}/");
        let of = rows.iter().filter(|row| row.row.starts_with(&prefix));
        of.filter_map(|row| row.value).min_by(f64::total_cmp).context("a share")
    };
    let summary = COUNTS.map(|count| Ok::<_, anyhow::Error>((count, worst(count)?)));
    let summary: Vec<(usize, f64)> = summary.into_iter().collect::<Result<_>>()?;
    rows.extend(
        summary
            .into_iter()
            .map(|(count, share)| Row::new(format!("bandwidth/{count}"), "", share).at_least(0.95)),
    );
    Ok(rows)
}

fn case(routing: &str, mtu: f64) -> Result<Vec<Row>> {
    let lab = Lab::start(super::setup(routing, &[]))?;
    let limited = lab.pod(1, "bench/limited").create()?;
    let (beside, near, far) = (
        lab.pod(1, "bench/beside").create()?,
        lab.pod(1, "bench/near").create()?,
        lab.pod(2, "bench/far").create()?,
    );
    let quiet = || round_trip(&far, &beside);
    let mut before = vec![quiet()?];
    limit(&lab, &limited)?;
    // Headers count: a share is of what passes the wire.
    let of_wire = (mtu + ETHERNET) / (mtu - HEADERS);
    let (mut rows, mut port) = (Vec::new(), 5000);
    let cases: [(&str, &str, &Pod); 4] = [
        ("sent", "two_nodes", &far),
        ("sent", "one_node", &near),
        ("received", "two_nodes", &far),
        ("received", "one_node", &near),
    ];
    for count in COUNTS {
        for (direction, place, other) in cases {
            let (from, to) = if direction == "sent" { (&limited, other) } else { (other, &limited) };
            port += 1;
            // What was lost is behind many holes, and comes at once when they are filled: many take longer to settle.
            let time = if count > 4 { 2 * TIME } else { TIME };
            let rate = Streams::measure(vec![Streams::connect(from, to, count, port)?], time)?;
            let share = rate.first().context("a rate")? * of_wire / LIMIT;
            let row = Row::new(format!("bandwidth/{count}/{direction}/{place}/{routing}"), "", share);
            rows.push(Row { met: Some((0.95..=1.02).contains(&share)), aim: Some(0.95), ..row });
        }
    }
    let mut loaded = Vec::new();
    for _ in 0..5 {
        port += 1;
        let load = Streams::connect(&far, &limited, 4, port)?;
        load.begin();
        loaded.push(quiet()?);
        load.stop()?;
        before.push(quiet()?);
    }
    let micros = |times: Vec<Duration>| median(times.iter().map(|time| time.as_secs_f64() * 1e6).collect());
    let row = Row::new(format!("bandwidth/ping_beside/{routing}/vs_quiet"), "us", micros(loaded));
    rows.push(row.against(micros(before), None).at_most(1.2));
    Ok(rows)
}

/// Both directions at once: what is sent meanwhile of the other one are acknowledgements.
fn limit(lab: &Lab, pod: &Pod) -> Result<()> {
    lab.manifests().apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: limited\n  namespace: bench\n  annotations: \
         {{kubernetes.io/egress-bandwidth: 100M, kubernetes.io/ingress-bandwidth: 100M}}\nspec:\n  nodeName: {}\n  \
         containers: [{{name: main, image: none}}]\n",
        pod.node()
    ))?;
    wait_for("the limits", || {
        let rows = lab.node(1).map("endpoints")?;
        let is_limited = rows.iter().any(|row| row["flags"].to_string().contains("limited"));
        Ok(is_limited && pod.space().ip("-details link show dev eth0")?.contains("qdisc tbf"))
    })
}
