//! The suite `l7`: what judging requests costs, beside an Envoy that does the same in the same place.
//!
//! Two nodes, each with a client and a server that a rule on method and path is for: one judges with `weir proxy`, the
//! other with an Envoy (`scripts/envoy`). Load is wrk's and h2load's. What counts is the processor time of the proxy's
//! process, which is exact whatever else the machine does. The rows of DNS are in `l7_dns.rs`.

mod memory;
mod requests;
pub mod server;
mod world;

use anyhow::Result;

use crate::row::Row;

const SECTIONS: [crate::Section; 4] = [
    ("requests", "http1/keep_alive/vs_envoy", requests::rows),
    ("latency", "http1/latency_p50_us", requests::latency),
    ("memory", "proxy/rss_idle_mib", memory::rows),
    ("without_rule", "tcp_crr/without_rule/vs_before", memory::without_rule),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::measure_sections("l7", &SECTIONS)
}
