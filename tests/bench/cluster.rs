//! The suite `cluster`: what a large cluster costs an agent, and how soon a change of it counts.
//!
//! A real API server, real agents on the lab's nodes, real pods; the rest of a large cluster is
//! written into the API server as its agents and controllers would have written it.

mod large;
mod latency;
mod population;
mod world;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::lab::binary;
use crate::row::Row;

const SECTIONS: [crate::Section; 3] = [
    ("large", "large/start_to_programmed_seconds", large::rows),
    ("latency", "latency/policy/change/p50_ms", latency::rows),
    ("image", "binary/weir_mib", image),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::measure_sections("cluster", &SECTIONS)
}

/// The programs as they are built here; the image where `make image` has left one.
fn image() -> Result<Vec<Row>> {
    let mib = |path: &Path| -> Result<f64> { Ok(std::fs::metadata(path)?.len() as f64 / 1_048_576.0) };
    let mut rows = vec![
        Row::new("binary/weir_mib", "MiB", mib(&binary("weir")?)?),
        Row::new("binary/weir_cni_mib", "MiB", mib(&binary("weir-cni")?)?),
    ];
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/image/weir.tar");
    rows.push(if archive.exists() {
        let compressed = Command::new("gzip").arg("--stdout").arg(&archive).output()?.stdout;
        Row::new("image/compressed_mib", "MiB", compressed.len() as f64 / 1_048_576.0).at_most(20.0)
    } else {
        let why = format!("no {}: make image writes it", archive.display());
        Row::skipped("image/compressed_mib", "MiB", why)
    });
    Ok(rows)
}

/// The value below which `share` of the samples are.
fn quantile(samples: &[Duration], share: f64) -> Duration {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or_default()
}
