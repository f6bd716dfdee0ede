//! What was tried and what became of it, for people and for programs.

use std::io::{self, Write};

use serde::Serialize;

use crate::cli::{Format, output, table};

/// What became of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Passed,
    Failed,
    Skipped,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub verdict: Verdict,
    pub test: String,
    pub family: String,
    pub protocol: String,
    pub from: String,
    pub to: String,
    /// Where whoever answers is.
    pub node: String,
    pub address: String,
    pub milliseconds: Option<u64>,
    pub reason: String,
}

impl Row {
    /// Nothing but its verdict.
    pub fn new(verdict: Verdict) -> Self {
        Self {
            verdict,
            test: String::new(),
            family: String::new(),
            protocol: String::new(),
            from: String::new(),
            to: String::new(),
            node: String::new(),
            address: String::new(),
            milliseconds: None,
            reason: String::new(),
        }
    }

    fn cells(&self) -> [String; 8] {
        let verdict = match self.verdict {
            Verdict::Passed => "ok",
            Verdict::Failed => "FAILED",
            Verdict::Skipped => "skipped",
        };
        let to = match self.node.as_str() {
            "" => self.to.clone(),
            node => format!("{} ({node})", self.to),
        };
        [
            verdict.to_owned(),
            self.test.clone(),
            self.family.clone(),
            self.protocol.clone(),
            self.from.clone(),
            to,
            self.milliseconds.map(|milliseconds| milliseconds.to_string()).unwrap_or_default(),
            self.reason.clone(),
        ]
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub server: String,
    pub kubernetes: String,
    pub image: String,
    pub nodes: Vec<String>,
    pub checks: Vec<Row>,
}

impl Report {
    pub fn failed(&self) -> usize {
        self.count(Verdict::Failed)
    }

    pub fn tried(&self) -> usize {
        self.checks.len() - self.count(Verdict::Skipped)
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.checks.iter().filter(|row| row.verdict == verdict).count()
    }

    pub fn write(&self, out: &mut impl Write, format: Format) -> io::Result<()> {
        if format == Format::Json {
            return output::write_json(out, self);
        }
        writeln!(out, "Kubernetes {} at {}, image {}", self.kubernetes, self.server, self.image)?;
        writeln!(out, "pods on {} ask\n", self.nodes.first().map_or("", String::as_str))?;
        let rows: Vec<_> = self.checks.iter().map(Row::cells).collect();
        table::write(out, ["RESULT", "TEST", "FAMILY", "PROTOCOL", "FROM", "TO", "MS", "REASON"], &rows)?;
        let (failed, skipped) = (self.failed(), self.count(Verdict::Skipped));
        writeln!(out, "\n{} passed, {failed} failed, {skipped} skipped", self.tried() - failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_and_the_numbers() {
        let row = |verdict, reason: &str| Row {
            test: "pod to pod".to_owned(),
            to: "server-2".to_owned(),
            node: "b".to_owned(),
            reason: reason.to_owned(),
            ..Row::new(verdict)
        };
        let report = Report {
            server: "https://a".to_owned(),
            kubernetes: "v1.34.4".to_owned(),
            image: "weir:1".to_owned(),
            nodes: vec!["a".to_owned(), "b".to_owned()],
            checks: vec![row(Verdict::Passed, ""), row(Verdict::Failed, "why"), row(Verdict::Skipped, "so")],
        };
        assert_eq!((report.tried(), report.failed()), (2, 1));
        let mut out = Vec::new();
        report.write(&mut out, Format::Table).expect("memory");
        let text = String::from_utf8(out).expect("text");
        assert!(
            text.contains("FAILED   pod to pod  -       -         -     server-2 (b)  -   why\n"),
            "{text}"
        );
        assert!(text.ends_with("\n1 passed, 1 failed, 1 skipped\n"), "{text}");
    }
}
