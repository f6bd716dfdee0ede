//! The page: how large it is, and when it is first painted in a browser.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::row::Row;

/// The rows of the section.
pub fn rows() -> Result<Vec<Row>> {
    let mut bytes = 0;
    for file in files(&ui().join("dist"))? {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&fs::read(&file)?)?;
        bytes += encoder.finish()?.len();
    }
    let mut rows = vec![Row::new("flow/page/compressed", "kB", bytes as f64 / 1000.0).at_most(500.0)];
    rows.push(match first_paint() {
        Ok(seconds) => Row::new("flow/page/first_paint", "s", seconds).at_most(1.0),
        Err(error) => Row::skipped("flow/page/first_paint", "s", format!("{error:#}")),
    });
    Ok(rows)
}

fn ui() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ui")
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

/// What the page's own test prints (ui/tests/browser/use.test.ts).
fn first_paint() -> Result<f64> {
    ensure!(ui().join("node_modules/.bin/vitest").exists(), "needs ui/node_modules: make ui");
    let output = Command::new("npx")
        .args(["vitest", "run", "--project", "browser", "-t", "what it shows first"])
        .current_dir(ui())
        .output()
        .context("running npx vitest")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let written = text.split("first contentful paint after ").nth(1).and_then(|rest| rest.split(' ').next());
    let milliseconds: f64 = written.with_context(|| format!("no figure in\n{text}"))?.parse()?;
    Ok(milliseconds / 1000.0)
}
