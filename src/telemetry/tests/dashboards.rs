//! Dashboards and alerts of deploy/components name metrics and labels that exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use prometheus_client::registry::Registry;
use serde_json::Value;

use super::{http, telemetry};
use crate::operator::metrics::{KindLabel, Metrics, PoolLabel, StateLabel};

/// Labels that the scrape adds.
const OF_THE_SCRAPE: [&str; 2] = ["instance", "job"];

/// Samples by name, with the labels that they have, as far as the test's have rows.
fn samples() -> BTreeMap<String, BTreeSet<String>> {
    let mut registry = Registry::default();
    let metrics = Metrics::default();
    // A family without rows is not written.
    let pool = PoolLabel::from(&"10.1.0.0/16=24".parse().expect("a pool"));
    drop(metrics.pool_capacity.get_or_create(&pool));
    drop(metrics.pool_used.get_or_create(&pool));
    drop(metrics.nodes.get_or_create(&StateLabel { state: "ready" }));
    drop(metrics.objects_reported.get_or_create(&KindLabel { kind: "NetworkPolicy" }));
    metrics.register(registry.sub_registry_with_prefix("weir"));
    let mut operator = String::new();
    prometheus_client::encoding::text::encode(&mut operator, &registry).expect("text");
    let text = http::classic(&telemetry().open_metrics().expect("text"))
        + &http::classic(&operator)
        + &http::classic(&of_flows());
    let mut samples = BTreeMap::<String, BTreeSet<String>>::new();
    for line in text.lines() {
        let names: Vec<String> = match line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            Some((name, "histogram")) => {
                ["_bucket", "_sum", "_count"].iter().map(|suffix| format!("{name}{suffix}")).collect()
            }
            Some((name, _)) => vec![name.to_owned()],
            None if line.starts_with('#') => Vec::new(),
            None => {
                let (name, rest) = line.split_once(['{', ' ']).expect("a sample has a value");
                let labels = samples.entry(name.to_owned()).or_default();
                labels.extend(
                    identifiers(rest)
                        .filter(|(_, next)| next.starts_with('='))
                        .map(|(word, _)| word.to_owned()),
                );
                Vec::new()
            }
        };
        for name in names {
            samples.entry(name).or_default();
        }
    }
    samples
}

/// The metrics of flows, exporters and the relay.
fn of_flows() -> String {
    let mut registry = Registry::default();
    let flows = crate::hubble::metrics::FlowMetrics::new(crate::hubble::metrics::Context::None);
    let names = crate::flow::tests::names();
    for event in [crate::flow::tests::forwarded(), crate::flow::tests::dropped()] {
        flows.count(&event, &names);
    }
    registry.sub_registry_with_prefix("hubble").register_collector(Box::new(flows));
    let exporters = crate::hubble::export::Counts::default();
    exporters.of("a", "written");
    exporters.register(registry.sub_registry_with_prefix("weir"));
    let nodes = crate::relay::Nodes::new(None);
    crate::relay::metrics::Counts::default().register(nodes, registry.sub_registry_with_prefix("weir"));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
    text
}

/// Every identifier outside of quotes, with what follows it.
fn identifiers(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let first = rest.chars().next()?;
            if first == '"' {
                let after = rest[1..].find('"').map_or("", |end| &rest[end + 2..]);
                rest = after;
                continue;
            }
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
            if !is_part(first) {
                rest = &rest[first.len_utf8()..];
                continue;
            }
            let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
            let word = &rest[..end];
            rest = &rest[end..];
            return Some((word, rest));
        }
    })
}

/// What is wrong with an expression.
fn faults(expression: &str, samples: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut faults = Vec::new();
    for (word, next) in identifiers(expression) {
        if !["weir_", "process_", "hubble_"].iter().any(|prefix| word.starts_with(prefix)) {
            continue;
        }
        let Some(labels) = samples.get(word) else {
            faults.push(format!("there is no metric {word}"));
            continue;
        };
        let selector =
            next.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(inner, _)| inner);
        for (label, _) in identifiers(selector) {
            // A family without rows in the test tells nothing of its labels.
            if !labels.is_empty() && !labels.contains(label) && !OF_THE_SCRAPE.contains(&label) {
                faults.push(format!("{word} has no label {label}"));
            }
        }
    }
    faults
}

fn components() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/components")
}

/// Every string under the key `expr`, and the query of every variable, by the file that has it.
fn expressions() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(components().join("dashboards")).expect("dashboards") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let text = fs::read_to_string(&path).expect("readable");
            collect(&serde_json::from_str(&text).expect("JSON"), &path.display().to_string(), &mut found);
        }
    }
    collect(&rules(), "rules.yaml", &mut found);
    found
}

/// The rules of the alerts, as Prometheus reads them.
fn rules() -> Value {
    let text = fs::read_to_string(components().join("alerts/rules.yaml")).expect("readable");
    let document: Value = crate::yaml::read(&text).expect("YAML");
    document["spec"].clone()
}

fn collect(value: &Value, file: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            if let Some(expression) = fields.get("expr").and_then(Value::as_str) {
                found.push((file.to_owned(), expression.to_owned()));
            }
            fields.values().for_each(|value| collect(value, file, found));
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, file, found)),
        _ => {}
    }
}

#[test]
fn panels_and_alerts_name_metrics_that_exist() {
    let samples = samples();
    let expressions = expressions();
    assert!(expressions.len() > 50, "{}", expressions.len());
    let wrong: Vec<_> = expressions
        .iter()
        .flat_map(|(file, expression)| {
            faults(expression, &samples)
                .into_iter()
                .map(move |fault| format!("{file}: {fault}: {expression}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(faults("rate(weir_nothing_total[5m])", &samples), ["there is no metric weir_nothing_total"]);
    assert_eq!(
        faults("weir_map_entries{instance=~\"a\",mop=\"weir_x{\"}", &samples),
        ["weir_map_entries has no label mop"]
    );
}

/// Every metric of the agent and of the operator is in a dashboard or an alert: who adds one says what it is for.
#[test]
fn every_metric_is_shown() {
    let all: String = expressions().into_iter().map(|(_, expression)| expression + "\n").collect();
    let shown: BTreeSet<&str> = identifiers(&all).map(|(word, _)| word).collect();
    let unseen: Vec<_> = samples()
        .into_keys()
        .filter(|name| !name.ends_with("_sum") && !name.ends_with("_count"))
        .filter(|name| !UNSEEN.contains(&name.as_str()) && !shown.contains(name.as_str()))
        .collect();
    assert!(unseen.is_empty(), "neither in deploy/components/dashboards nor in alerts: {unseen:?}");
}

/// Metrics that are for looking up, not for looking at.
const UNSEEN: [&str; 0] = [];

/// Prometheus itself can parse them all, where its tool is installed.
#[test]
fn promtool_takes_every_expression() {
    let panels = expressions().into_iter().enumerate().map(|(i, (_, expression))| {
        let expression = expression.replace("$__rate_interval", "5m").replace("$instance", ".*");
        serde_json::json!({"record": format!("panel:{i}"), "expr": expression})
    });
    let mut file = rules();
    let groups = file["groups"].as_array_mut().expect("groups");
    groups.push(serde_json::json!({"name": "panels", "rules": panels.collect::<Vec<_>>()}));
    let mut written = tempfile::NamedTempFile::new().expect("a file");
    written.write_all(file.to_string().as_bytes()).expect("written");
    let Ok(output) = Command::new("promtool").args(["check", "rules"]).arg(written.path()).output() else {
        eprintln!("SKIPPED promtool_takes_every_expression: promtool is not installed");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
