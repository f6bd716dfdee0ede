//! The settings of exporters: a YAML file with a list.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::hubble::filter::Filters;
use crate::hubble::json;
use crate::hubble::mask::Mask;
use crate::hubble::proto::flow::FlowFilter;

/// More exporters than that are refused.
const EXPORTERS_MAX: usize = 16;
/// Bytes in a megabyte.
const MEGABYTE: u64 = 1_000_000;

/// One exporter.
#[derive(Clone, Debug, PartialEq)]
pub struct Exporter {
    /// Its name in metrics.
    pub name: String,
    /// Only what one of these matches; none: everything.
    pub allow: Vec<FlowFilter>,
    /// Nothing that one of these matches.
    pub deny: Vec<FlowFilter>,
    /// Only these fields; none: every field.
    pub fields: Vec<String>,
    /// Where to.
    pub target: Target,
}

/// Where an exporter's flows go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Lines of a file.
    File(FileSettings),
    /// Logs by OTLP.
    Otlp(OtlpSettings),
}

/// A file that is turned over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSettings {
    /// The file that is written; full ones get `.1`, `.2`.
    pub path: PathBuf,
    /// A file is full at this size.
    pub bytes_max: u64,
    /// Files that are kept beside the one that is written.
    pub files_max: u32,
}

/// A collector.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OtlpSettings {
    /// HOST:PORT of its gRPC receiver.
    pub endpoint: String,
    /// A directory with ca.crt, tls.crt and tls.key; none: plain text.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
    /// The name that its certificate must have.
    #[serde(default)]
    pub server_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    exporters: Vec<Written>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    name: String,
    #[serde(default)]
    allow: Vec<Value>,
    #[serde(default)]
    deny: Vec<Value>,
    #[serde(default)]
    fields: Vec<String>,
    file: Option<WrittenFile>,
    otlp: Option<OtlpSettings>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenFile {
    path: PathBuf,
    #[serde(default = "ten", rename = "maxSizeMB")]
    max_size_mb: u64,
    #[serde(default = "five")]
    max_files: u32,
}

fn ten() -> u64 {
    10
}

fn five() -> u32 {
    5
}

/// Reads the settings; every fault is one, since a filter that is left out would export what must not be.
pub fn read(text: &str) -> Result<Vec<Exporter>> {
    let documents = crate::yaml::read_all(text).context("reading YAML")?;
    let mut exporters = Vec::new();
    for document in documents {
        let document: Document = serde_json::from_value(document).context("understanding the exporters")?;
        for written in document.exporters {
            let name = written.name.clone();
            exporters.push(exporter(written).with_context(|| format!("exporter {name:?}"))?);
        }
    }
    ensure!(exporters.len() <= EXPORTERS_MAX, "more than {EXPORTERS_MAX} exporters");
    let names: BTreeSet<_> = exporters.iter().map(|exporter| &exporter.name).collect();
    ensure!(names.len() == exporters.len(), "two exporters have one name");
    let path = |exporter: &Exporter| match &exporter.target {
        Target::File(file) => Some(file.path.clone()),
        Target::Otlp(_) => None,
    };
    let paths: Vec<_> = exporters.iter().filter_map(path).collect();
    ensure!(paths.iter().collect::<BTreeSet<_>>().len() == paths.len(), "two exporters have one file");
    Ok(exporters)
}

fn exporter(written: Written) -> Result<Exporter> {
    let is_right = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    ensure!(
        !written.name.is_empty() && written.name.len() <= 63 && written.name.bytes().all(is_right),
        "a name is at most 63 lower case letters, digits and dashes"
    );
    let target = match (written.file, written.otlp) {
        (Some(file), None) => {
            ensure!(file.path.is_absolute(), "the path must be absolute");
            ensure!((1..=10_000).contains(&file.max_size_mb), "maxSizeMB must be 1 to 10000");
            ensure!(file.max_files <= 100, "maxFiles must be at most 100");
            let bytes_max = file.max_size_mb * MEGABYTE;
            Target::File(FileSettings { path: file.path, bytes_max, files_max: file.max_files })
        }
        (None, Some(otlp)) => {
            let port = otlp.endpoint.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            ensure!(port.is_some(), "endpoint must be HOST:PORT");
            Target::Otlp(otlp)
        }
        _ => bail!("needs one of file and otlp"),
    };
    let (allow, deny) = (filters(written.allow).context("allow")?, filters(written.deny).context("deny")?);
    Filters::new(&allow, &deny)?;
    Mask::new(&written.fields)?;
    Ok(Exporter { name: written.name, allow, deny, fields: written.fields, target })
}

/// Filters as `weir observe --print-raw-filters` prints them, as text or as YAML.
fn filters(written: Vec<Value>) -> Result<Vec<FlowFilter>> {
    let text = |value: Value| match value {
        Value::String(text) => text,
        value => value.to_string(),
    };
    written.into_iter().map(|value| Ok(json::from_str_strict(&text(value))?)).collect()
}
