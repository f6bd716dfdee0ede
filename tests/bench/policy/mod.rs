//! The suite `policy`: what policies cost to compile, to write, to keep and to ask, and how soon they count.

mod compile;
mod file;
mod maps;
mod packet;
mod start;

use std::time::Duration;

use anyhow::Result;

use crate::row::Row;

const SECTIONS: [crate::Section; 5] = [
    ("compile", "policy/full/labels", compile::rows),
    ("maps", "policy/maps/entries", maps::rows),
    ("packet", "policy/packet/new/ipv4", packet::rows),
    ("start", "policy/start/enforced_seconds", start::rows),
    ("file", "policy/file/change/p50_ms", file::rows),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::measure_sections("policy", &SECTIONS)
}

/// Median and 99th percentile of some samples, in milliseconds.
fn quantiles(name: &str, samples: &[Duration], p50: f64, p99: f64) -> [Row; 2] {
    let row = |suffix: &str, share, aim| {
        let value = crate::cluster::quantile(samples, share).as_secs_f64() * 1e3;
        Row::new(format!("policy/{name}/{suffix}_ms"), "ms", value).at_most(aim)
    };
    [row("p50", 0.5, p50), row("p99", 0.99, p99)]
}
