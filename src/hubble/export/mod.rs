//! Exporters: flows for those who keep them elsewhere, as lines of a file or as logs by OTLP.
//!
//! ```text
//! Recorder -> FlowStream (filters, mask) -> batch -> File | Otlp
//! ```
//!
//! An exporter is a follower as any other: its queue is the history, which has a bound. What it is too slow for is
//! counted as missed, what could not be written as failed.

mod file;
mod otlp;
mod settings;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout_at};

use super::proto::observer::get_flows_response::ResponseTypes;
use super::proto::observer::{GetFlowsRequest, GetFlowsResponse};
use super::stream::{FlowStream, Source};
use crate::telemetry::Parts;
use file::File;
use otlp::Otlp;
pub use settings::{Exporter, Target};

/// Flows that are written at once.
const BATCH: usize = 512;
/// A flow waits at most so long for others.
const LINGER: Duration = Duration::from_secs(1);
/// The settings are looked at so often.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The part of the agent that exports.
const PART: &str = "flow exporters";

/// What became of the flows of each exporter.
#[derive(Clone, Default)]
pub struct Counts(Family<Labels, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    exporter: String,
    outcome: &'static str,
}

impl Counts {
    /// Shows the counts.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Flows of exporters: written, failed (could not be written), or missed (the exporter was too \
                    slow; before its filters)";
        registry.register("flow_export_flows", help, self.0.clone());
    }

    fn add(&self, exporter: &str, outcome: &'static str, flows: u64) {
        if flows > 0 {
            let labels = Labels { exporter: exporter.to_owned(), outcome };
            self.0.get_or_create(&labels).inc_by(flows);
        }
    }

    /// How many flows of an exporter had this outcome.
    pub fn of(&self, exporter: &str, outcome: &'static str) -> u64 {
        self.0.get_or_create(&Labels { exporter: exporter.to_owned(), outcome }).get()
    }
}

/// Exports as the file at `path` says, and follows its changes. Settings that cannot be read leave the exporters
/// as they are.
pub async fn run(path: PathBuf, source: Source, counts: Counts, parts: Parts) {
    parts.add(PART);
    let mut running: BTreeMap<String, (Exporter, AbortOnDrop)> = BTreeMap::new();
    let mut current = None;
    loop {
        let text = tokio::fs::read_to_string(&path).await;
        let text = text.with_context(|| format!("reading {}", path.display()));
        if text.as_ref().ok() != current.as_ref() || text.is_err() {
            match text.and_then(|text| Ok((settings::read(&text)?, text))) {
                Ok((exporters, text)) => {
                    // Those that stay as they are miss nothing.
                    running.retain(|_, (there, _)| exporters.contains(there));
                    for exporter in exporters {
                        if !running.contains_key(&exporter.name) {
                            let exporting = export(exporter.clone(), source.clone(), counts.clone());
                            let exporting = AbortOnDrop(tokio::spawn(exporting));
                            running.insert(exporter.name.clone(), (exporter, exporting));
                        }
                    }
                    tracing::info!(exporters = running.len(), "exporting flows");
                    current = Some(text);
                    parts.works(PART);
                }
                Err(error) => {
                    let cause = crate::error::chain(&error);
                    if parts.fails(PART, vec![cause.clone()], false, true) {
                        tracing::warn!(
                            error = cause,
                            "the settings of flow exporters; they stay as they are"
                        );
                    }
                }
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// A task that ends with its handle.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where flows go.
enum Sink {
    File(File),
    Otlp(Box<Otlp>),
}

/// Exports for ever.
pub async fn export(exporter: Exporter, source: Source, counts: Counts) {
    let name = exporter.name.clone();
    let mut sink = match &exporter.target {
        Target::File(settings) => Sink::File(File::new(settings.clone())),
        Target::Otlp(settings) => Sink::Otlp(Box::new(Otlp::new(settings.clone(), &source.converter))),
    };
    let request = exporter.request();
    let mut stream = match FlowStream::new(source, request) {
        Ok(stream) => stream,
        Err(error) => return tracing::error!(exporter = name, %error, "an exporter's filters"),
    };
    let mut was_failing = false;
    loop {
        let Some(batch) = batch(&mut stream).await else { return };
        counts.add(&name, "missed", batch.missed);
        let flows = batch.flows.len() as u64;
        let outcome = match &mut sink {
            Sink::File(file) => file.write(batch.flows).await.map(|()| flows),
            Sink::Otlp(otlp) => otlp.send(batch.flows).await,
        };
        let written = match &outcome {
            Ok(written) => *written,
            Err(_) => 0,
        };
        counts.add(&name, "written", written);
        counts.add(&name, "failed", flows - written);
        match outcome {
            Ok(_) if std::mem::replace(&mut was_failing, false) => {
                tracing::info!(exporter = name, "exporting flows works again");
            }
            Err(error) if !std::mem::replace(&mut was_failing, true) => {
                tracing::warn!(exporter = name, error = crate::error::chain(&error), "exporting flows");
            }
            _ => {}
        }
    }
}

/// Flows that are written together, and how many were missed before them.
#[derive(Default)]
struct Batch {
    flows: Vec<GetFlowsResponse>,
    missed: u64,
}

/// The next batch; `None`: there will be none.
async fn batch(stream: &mut FlowStream) -> Option<Batch> {
    let mut batch = Batch::default();
    batch.add(stream.next().await?);
    let deadline = Instant::now() + LINGER;
    while batch.flows.len() < BATCH {
        match timeout_at(deadline.into(), stream.next()).await {
            Ok(Some(answers)) => batch.add(answers),
            Ok(None) | Err(_) => break,
        }
    }
    Some(batch)
}

impl Batch {
    fn add(&mut self, answers: Vec<GetFlowsResponse>) {
        for answer in answers {
            match &answer.response_types {
                Some(ResponseTypes::Flow(_)) => self.flows.push(answer),
                Some(ResponseTypes::LostEvents(lost)) => self.missed += lost.num_events_lost,
                Some(ResponseTypes::NodeStatus(_)) | None => {}
            }
        }
    }
}

impl Exporter {
    fn request(&self) -> GetFlowsRequest {
        let paths = self.fields.clone();
        GetFlowsRequest {
            follow: true,
            whitelist: self.allow.clone(),
            blacklist: self.deny.clone(),
            field_mask: (!paths.is_empty()).then_some(prost_types::FieldMask { paths }),
            ..GetFlowsRequest::default()
        }
    }
}

/// Says whose flows these are.
type Origin = Arc<super::convert::Converter>;

#[cfg(test)]
mod tests;
