//! The suite `cluster`: what a large cluster costs an agent, and how soon a change of it counts.
//!
//! A real API server, real agents on the lab's nodes, real pods; the rest of a large cluster is
//! written into the API server as its agents and controllers would have written it. What kubelet and
//! the container runtime have a part in is measured on the cluster of the end-to-end tests.

mod large;
pub mod latency;
mod population;
mod real;
pub mod world;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::row::Row;

const SECTIONS: [crate::Section; 4] = [
    ("large", "large/start_to_programmed_seconds", large::rows),
    ("latency", "latency/policy/change/p50_ms", latency::rows),
    // Deploying it builds the image, which the last section looks at.
    ("real", "pod/start_p50/vs_ptp", real::rows),
    ("image", "image/compressed_mib", image),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::measure_sections("cluster", &SECTIONS)
}

/// What a node is sent: the programs as they are in the image, and the image.
fn image() -> Result<Vec<Row>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/image");
    let archive = directory.join("weir.tar");
    ensure!(archive.exists(), "no {}: make image writes it", archive.display());
    let mib = |bytes: usize| bytes as f64 / 1_048_576.0;
    let program = |name| -> Result<f64> { Ok(mib(fs::read(directory.join("context").join(name))?.len())) };
    let compressed = Command::new("gzip").arg("--stdout").arg(&archive).output()?.stdout;
    Ok(vec![
        Row::new("binary/weir_mib", "MiB", program("weir")?),
        Row::new("binary/weir_cni_mib", "MiB", program("weir-cni")?),
        Row::new("image/compressed_mib", "MiB", mib(compressed.len())).at_most(20.0),
    ])
}

/// The value below which `share` of the samples are.
pub fn quantile(samples: &[Duration], share: f64) -> Duration {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or_default()
}
