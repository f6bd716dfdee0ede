//! Golden files: YAML in, map dump out.
//!
//! `golden/NAME.yaml` has Kubernetes objects, and as its last document the rows that
//! the maps of node1 must then hold. Each is run in several orders: with the objects there
//! before the agent starts, arriving one by one in reverse while it runs, and arriving in a
//! random order in which a third of the objects come, go and come again. Then the objects
//! go, and the maps must be as they were. `make golden UPDATE=1` rewrites
//! the expected rows.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lab::{Lab, Manifests, Node, Pod, Setup, wait_for};
use crate::require::require_lab;

/// What is compared: everything that is computed.
const MAPS: [&str; 8] =
    ["endpoints", "addresses", "prefixes", "policy_peers", "policy_rules", "services", "slots", "backends"];

/// When and in which order objects come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    BeforeStart,
    Reverse,
    /// By this seed.
    Random(u64),
}

type Dump = BTreeMap<String, Vec<Value>>;

struct Golden {
    path: PathBuf,
    /// The file's text before the expected rows.
    input: String,
    objects: Vec<Value>,
    expected: Dump,
}

#[test]
fn golden() -> Result<()> {
    require_lab!();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden");
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&directory)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    let updates = std::env::var("UPDATE").is_ok_and(|update| !update.is_empty());
    let mut differences = Vec::new();
    for path in &paths {
        let golden = Golden::read(path)?;
        let dump = golden.run().with_context(|| path.display().to_string())?;
        if updates {
            golden.write(&dump)?;
        } else if dump != golden.expected {
            differences.push(format!("{}:\n{}", path.display(), difference(&golden.expected, &dump)));
        }
    }
    if !differences.is_empty() {
        bail!("make golden UPDATE=1 accepts these:\n{}", differences.join("\n"));
    }
    Ok(())
}

impl Golden {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        let (input, expected) = match text.split_once("---\nmaps:\n") {
            Some((input, rows)) => (input.to_owned(), read_rows(rows)?),
            None => (text, Dump::new()),
        };
        let objects = weir::yaml::read_all(&input).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), input, objects, expected })
    }

    /// The dump, the same in every order of arrival.
    fn run(&self) -> Result<Dump> {
        let before_start = self.run_in_order(Order::BeforeStart)?;
        for order in [Order::Reverse, Order::Random(fastrand::u64(..))] {
            let dump = self.run_in_order(order).with_context(|| format!("{order:?}"))?;
            if before_start != dump {
                bail!("the order of arrival matters, {order:?}:\n{}", difference(&before_start, &dump));
            }
        }
        Ok(before_start)
    }

    fn run_in_order(&self, order: Order) -> Result<Dump> {
        let is_before_start = order == Order::BeforeStart;
        let lab = Lab::start(Setup { nodes: 2, starts_agents: false, ..Setup::default() })?;
        let node = lab.node(1);
        // A namespace is there before its pods in any cluster; its labels are part of their identity.
        let is_namespace = |object: &&Value| object["kind"] == "Namespace";
        self.objects.iter().filter(is_namespace).try_for_each(|object| lab.manifests().write(object))?;
        let (pods, others): (Vec<&Value>, Vec<&Value>) = self
            .objects
            .iter()
            .partition(|object| object["kind"] == "Pod" && object["spec"]["nodeName"] == "node1");
        if is_before_start {
            others.iter().try_for_each(|object| lab.manifests().write(object))?;
        }
        node.start_agent()?;
        node.wait_ready()?;
        let empty = if is_before_start { None } else { Some(dump(node, None)?) };
        let made: Vec<Pod> = pods.iter().map(|object| lab.pod_of(object)?.create()).collect::<Result<_>>()?;
        match order {
            Order::BeforeStart => {}
            Order::Reverse => others.iter().rev().try_for_each(|object| lab.manifests().write(object))?,
            Order::Random(seed) => arrive_at_random(lab.manifests(), others, seed)?,
        }
        let settled = settle(node)?;
        if let Some(empty) = empty {
            made.iter().try_for_each(|pod| pod.delete(node))?;
            self.objects.iter().rev().try_for_each(|object| lab.manifests().remove(object))?;
            let mut last = Dump::new();
            let emptied = wait_for("the maps to be as before", || {
                last = dump(node, None)?;
                Ok(last == empty)
            });
            emptied.with_context(|| difference(&empty, &last))?;
        }
        Ok(settled)
    }

    fn write(&self, dump: &Dump) -> Result<()> {
        let mut text = format!("{}---\nmaps:\n", self.input);
        for (map, rows) in dump {
            text += &format!("  {map}:\n");
            for row in rows {
                text += &format!("  - {row}\n");
            }
        }
        fs::write(&self.path, text).with_context(|| format!("writing {}", self.path.display()))
    }
}

/// Writes objects in an order that the seed decides. A third of them go and come again in between, but no
/// namespace does: its pods would have another identity for a while, and an identity is kept for a while after its last pod.
fn arrive_at_random(manifests: &Manifests, mut objects: Vec<&Value>, seed: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let may_go = objects.iter().copied().filter(|object| object["kind"] != "Namespace");
    let again: Vec<&Value> = may_go.filter(|_| random.u8(..3) == 0).collect();
    random.shuffle(&mut objects);
    objects.iter().try_for_each(|object| manifests.write(object))?;
    for object in again {
        manifests.remove(object)?;
        // Some changes are seen one by one, others together.
        std::thread::sleep(Duration::from_millis(random.u64(..40)));
        manifests.write(object)?;
    }
    Ok(())
}

/// Waits until a change of the manifests has gone through: the dump is the same for a while.
fn settle(node: &Node) -> Result<Dump> {
    let mut last = dump(node, Some(()))?;
    let mut same = 0;
    wait_for("the maps to settle", || {
        let now = dump(node, Some(()))?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
        Ok(same >= 10)
    })?;
    Ok(last)
}

/// The rows of all maps. What differs from run to run is left out where rows are compared
/// between runs: devices, hardware addresses, epochs, and how often a number was given anew.
fn dump(node: &Node, between_runs: Option<()>) -> Result<Dump> {
    let mut dump = Dump::new();
    for map in MAPS {
        dump.insert(map.to_owned(), node.map(map)?);
    }
    if between_runs.is_some() {
        normalise(&mut dump);
    }
    Ok(dump)
}

fn normalise(dump: &mut Dump) {
    let mut policies = Numbers::default();
    let mut services = Numbers::default();
    for row in dump.get_mut("endpoints").into_iter().flatten() {
        for field in ["epoch", "ifindex", "mac"] {
            row.as_object_mut().map(|row| row.remove(field));
        }
        policies.replace(&mut row["policy"]);
    }
    for row in dump.get_mut("services").into_iter().flatten() {
        services.replace(&mut row["service"]);
        row.as_object_mut().map(|row| row.remove("generation"));
    }
    let backends = dump.get_mut("backends").into_iter().flatten();
    let backends: BTreeMap<String, Value> = backends
        .filter_map(|row| Some((row.as_object_mut()?.remove("id")?.to_string(), row.clone())))
        .collect();
    for row in dump.get_mut("slots").into_iter().flatten() {
        services.replace(&mut row["service"]);
        row.as_object_mut().map(|row| row.remove("generation"));
        let backend = &backends[&row["backend"].to_string()];
        row["backend"] = format!("{} {}", backend["address"], backend["port"]).replace('"', "").into();
    }
    for map in ["policy_peers", "policy_rules"] {
        for row in dump.get_mut(map).into_iter().flatten() {
            policies.replace(&mut row["policy"]);
            row.as_object_mut().map(|row| row.remove("rule"));
        }
    }
    renumber_classes(dump);
    for rows in dump.values_mut() {
        rows.sort_by_key(Value::to_string);
    }
}

/// Classes are numbered as they appear: here by what their rules say.
fn renumber_classes(dump: &mut Dump) {
    let owner =
        |row: &Value| (row["policy"].to_string(), row["direction"].to_string(), row["class"].to_string());
    let mut rules: BTreeMap<(String, String, String), Vec<String>> = BTreeMap::new();
    for row in &dump["policy_rules"] {
        let mut rule = row.clone();
        rule["class"] = Value::Null;
        rules.entry(owner(row)).or_default().push(rule.to_string());
    }
    let mut contents: Vec<(Vec<String>, (String, String, String))> =
        rules.into_iter().filter(|(key, _)| key.2 != "0").map(|(key, rules)| (rules, key)).collect();
    contents.sort();
    let mut numbers: BTreeMap<(String, String), u32> = BTreeMap::new();
    let mut renumbered = BTreeMap::new();
    for (_, key) in contents {
        let next = numbers.entry((key.0.clone(), key.1.clone())).or_default();
        *next += 1;
        renumbered.insert(key, *next);
    }
    for map in ["policy_rules", "policy_peers"] {
        for row in dump.get_mut(map).into_iter().flatten() {
            if let Some(number) = renumbered.get(&owner(row)) {
                row["class"] = Value::from(*number);
            }
        }
    }
}

/// Numbers in the order in which they are met.
#[derive(Default)]
struct Numbers(BTreeMap<String, usize>);

impl Numbers {
    fn replace(&mut self, number: &mut Value) {
        if number.is_null() || *number == 0 {
            return;
        }
        let next = self.0.len() + 1;
        *number = Value::from(*self.0.entry(number.to_string()).or_insert(next));
    }
}

fn read_rows(text: &str) -> Result<Dump> {
    let mut dump = Dump::new();
    let mut map = String::new();
    for line in text.lines() {
        match line.strip_prefix("  - ") {
            Some(row) => dump.entry(map.clone()).or_default().push(serde_json::from_str(row)?),
            None => {
                map = line.trim().trim_end_matches(':').to_owned();
                dump.insert(map.clone(), Vec::new());
            }
        }
    }
    Ok(dump)
}

fn difference(expected: &Dump, dump: &Dump) -> String {
    let lines = |dump: &Dump| -> Vec<String> {
        dump.iter().flat_map(|(map, rows)| rows.iter().map(move |row| format!("{map} {row}"))).collect()
    };
    let (expected, dump) = (lines(expected), lines(dump));
    let missing = expected.iter().filter(|line| !dump.contains(line)).map(|line| format!("- {line}"));
    let extra = dump.iter().filter(|line| !expected.contains(line)).map(|line| format!("+ {line}"));
    missing.chain(extra).collect::<Vec<_>>().join("\n")
}
