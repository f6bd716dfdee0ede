//! `make bench`: every suite, or the one that SUITE names; tables here, JSON in `target/bench`.

mod cluster;
mod collect;
#[path = "../it/control_plane.rs"]
#[allow(dead_code)]
mod control_plane;
mod datapath;
mod encryption;
#[path = "../e2e/world.rs"]
#[allow(dead_code)]
mod end_to_end;
mod flow;
mod flow_kernel;
mod flow_page;
#[path = "../it/packets/frame.rs"]
#[allow(dead_code)]
mod frame;
mod from_pod;
#[path = "../kubernetes/mod.rs"]
mod kubernetes;
mod l7;
mod l7_dns;
#[path = "../lab/mod.rs"]
mod lab;
mod load;
mod policy;
mod reference;
mod row;
mod service;
#[path = "../it/packets/world.rs"]
#[allow(dead_code)]
mod world;

use anyhow::{Result, bail};

use row::Row;

type Measure = fn() -> Result<Vec<Row>>;

/// What is measured together, and the row that says why if it could not be.
type Section = (&'static str, &'static str, Measure);

/// Every suite, by name.
const SUITES: [(&str, Measure); 7] = [
    ("datapath", datapath::rows),
    ("policy", policy::rows),
    ("flow", flow::rows),
    ("service", service::rows),
    ("l7", layer7),
    ("encryption", encryption::rows),
    ("cluster", cluster::rows),
];

/// Requests through the proxy, and names that the programs judge.
fn layer7() -> Result<Vec<Row>> {
    let mut rows = l7::rows()?;
    rows.extend(l7_dns::rows()?);
    Ok(rows)
}

fn main() -> Result<()> {
    load::run_if_asked()?;
    if let Some(lack) = lab::machine_lacks() {
        bail!("the benchmarks: {lack}");
    }
    let wanted = std::env::var("SUITE").unwrap_or_default();
    let names: Vec<&str> = SUITES.iter().map(|(name, _)| *name).collect();
    if !wanted.is_empty() && !names.contains(&&*wanted) {
        bail!("no suite {wanted}: there are {}", names.join(", "));
    }
    for (name, rows) in SUITES.iter().filter(|(name, _)| wanted.is_empty() || *name == wanted) {
        println!("suite {name}");
        row::report(name, &rows()?)?;
    }
    Ok(())
}

/// The rows of every section of a suite, or of the one that ONLY names.
fn measure_sections(suite: &str, sections: &[Section]) -> Result<Vec<Row>> {
    let only = std::env::var("ONLY").unwrap_or_default();
    let names: Vec<&str> = sections.iter().map(|(name, ..)| *name).collect();
    if !only.is_empty() && !names.contains(&&*only) {
        bail!("the suite {suite} has no section {only}: there are {}", names.join(", "));
    }
    let wanted = sections.iter().filter(|(name, ..)| only.is_empty() || *name == only);
    let measure = |(_, row, measure): &Section| {
        measure().unwrap_or_else(|error| vec![Row::skipped(*row, "", format!("{error:#}"))])
    };
    Ok(wanted.flat_map(measure).collect())
}
