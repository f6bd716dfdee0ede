//! The one form of every benchmark file: rows, a table for people, JSON for programs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// One measurement, named by slashes from the thing to the case.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// `tcp_rr/same_node/vs_direct`
    pub row: String,
    /// Unit of `value` and `against`.
    pub unit: String,
    /// What was measured.
    pub value: Option<f64>,
    /// The same of what it is compared with.
    pub against: Option<f64>,
    /// `value` to `against`; the median over rounds where there are rounds.
    pub ratio: Option<f64>,
    /// By how much the ratio of two equal things differs from 1.
    pub noise: Option<f64>,
    /// What `ratio`, or `value` where there is no ratio, must reach.
    pub aim: Option<f64>,
    /// Whether it does.
    pub met: Option<bool>,
    /// Why it could not be measured.
    pub skipped: Option<String>,
}

/// The file of a suite.
#[derive(Debug, Serialize)]
struct Report<'a> {
    suite: &'a str,
    commit: String,
    kernel: String,
    cpus: usize,
    rows: &'a [Row],
}

impl Row {
    /// A measured value.
    pub fn new(row: impl Into<String>, unit: &str, value: f64) -> Self {
        Self { row: row.into(), unit: unit.to_owned(), value: Some(value), ..Self::default() }
    }

    /// A row that could not be measured.
    pub fn skipped(row: impl Into<String>, unit: &str, why: impl Into<String>) -> Self {
        Self { row: row.into(), unit: unit.to_owned(), skipped: Some(why.into()), ..Self::default() }
    }

    /// Compared with `against`; the ratio is that of the two unless `ratio` is given.
    pub fn against(mut self, against: f64, ratio: Option<f64>) -> Self {
        self.against = Some(against);
        self.ratio = ratio.or_else(|| self.value.map(|value| value / against));
        self
    }

    /// With the noise of its rounds.
    pub fn noise(mut self, noise: f64) -> Self {
        self.noise = Some(noise);
        self
    }

    /// More is better: met from `aim` on.
    pub fn at_least(self, aim: f64) -> Self {
        let met = self.judged().map(|judged| judged >= aim);
        Self { aim: Some(aim), met, ..self }
    }

    /// Less is better: met up to `aim`.
    pub fn at_most(self, aim: f64) -> Self {
        let met = self.judged().map(|judged| judged <= aim);
        Self { aim: Some(aim), met, ..self }
    }

    fn judged(&self) -> Option<f64> {
        self.ratio.or(self.value)
    }
}

/// Prints the table of a suite and writes `target/bench/SUITE.json`.
pub fn report(suite: &str, rows: &[Row]) -> Result<()> {
    print_table(rows);
    let report = Report {
        suite,
        commit: written_by("git", &["rev-parse", "--short=12", "HEAD"]),
        kernel: written_by("uname", &["-r"]),
        // Not those that this process may use: it has pinned itself to one.
        cpus: fs::read_to_string("/proc/cpuinfo")?
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count(),
        rows,
    };
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    fs::create_dir_all(&directory)?;
    let file = directory.join(format!("{suite}.json"));
    fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| format!("writing {}", file.display()))?;
    println!("\nwritten to {}", file.display());
    Ok(())
}

fn print_table(rows: &[Row]) {
    let width = rows.iter().map(|row| row.row.len()).max().unwrap_or(0);
    println!(
        "\n{:width$}  {:>12} {:<12} {:>12} {:>7} {:>6} {:>9}  met",
        "row", "value", "unit", "against", "ratio", "noise", "aim"
    );
    for row in rows {
        if let Some(why) = &row.skipped {
            println!("{:width$}  skipped: {why}", row.row);
            continue;
        }
        let met = row.met.map_or("", |met| if met { "yes" } else { "NO" });
        println!(
            "{:width$}  {:>12} {:<12} {:>12} {:>7} {:>6} {:>9}  {met}",
            row.row,
            number(row.value),
            row.unit,
            number(row.against),
            row.ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")),
            row.noise.map_or(String::new(), |noise| format!("{noise:.3}")),
            number(row.aim),
        );
    }
}

fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value.abs() >= 1000.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.3}"),
    }
}

fn written_by(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
