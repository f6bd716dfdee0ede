//! The harness: sinks that fail in turn, in every way that the kernel has, among others that do not.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Result, anyhow};

use super::{Drift, Problem, Round, Sink, Sinks};
use crate::agent::compute::Desired;
use crate::netlink::News;
use crate::telemetry::Parts;

/// What a sink does and is to do.
#[derive(Default)]
struct Script {
    fails: Option<i32>,
    fails_to_delete: bool,
    problems: Vec<Problem>,
    drifts: Vec<Drift>,
    written: u32,
    deleted: u32,
    compared: u32,
    retries: u32,
}

type Scripts = Arc<Mutex<BTreeMap<&'static str, Script>>>;

struct Scripted {
    name: &'static str,
    needs: &'static [&'static str],
    scripts: Scripts,
}

impl Scripted {
    fn script<T>(&self, act: impl FnOnce(&mut Script) -> T) -> T {
        script(&self.scripts, self.name, act)
    }
}

fn script<T>(scripts: &Scripts, name: &'static str, act: impl FnOnce(&mut Script) -> T) -> T {
    act(scripts.lock().expect("no test panics with the lock").entry(name).or_default())
}

impl Sink for Scripted {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> &'static [&'static str] {
        self.needs
    }

    fn is_for_pods(&self) -> bool {
        self.name != "routes"
    }

    fn hears(&self) -> &'static [News] {
        if self.name == "routes" { &[News::Routes] } else { &[] }
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        self.script(|script| {
            script.compared += 1;
            Ok(std::mem::take(&mut script.drifts))
        })
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        self.script(|script| {
            script.retries += u32::from(round.is_retry);
            if let Some(number) = script.fails {
                return Err(anyhow!(io::Error::from_raw_os_error(number)));
            }
            script.written += 1;
            Ok(script.problems.clone())
        })
    }

    fn delete(&mut self, _round: &mut Round<'_>) -> Result<()> {
        self.script(|script| {
            if script.fails_to_delete {
                return Err(anyhow!("it does not go"));
            }
            script.deleted += 1;
            Ok(())
        })
    }
}

const SINKS: [(&str, &[&str]); 6] = [
    ("links", &["endpoints"]),
    ("endpoints", &["policies", "addresses"]),
    ("services", &[]),
    ("addresses", &["policies"]),
    ("policies", &[]),
    ("routes", &[]),
];

fn sinks() -> (Sinks, Scripts, Parts) {
    let (scripts, parts) = (Scripts::default(), Parts::default());
    let sink = |(name, needs): (&'static str, &'static [&'static str])| -> Box<dyn Sink> {
        Box::new(Scripted { name, needs, scripts: scripts.clone() })
    };
    let all = SINKS.into_iter().map(sink).collect();
    (Sinks::new(all, BTreeSet::new(), parts.clone()).expect("they can be ordered"), scripts, parts)
}

/// The sinks that need `name`, by way of others, too.
fn in_need_of(name: &str) -> BTreeSet<&'static str> {
    let mut found: BTreeSet<&str> = BTreeSet::new();
    loop {
        let is_new = |(sink, needs): &(&'static str, &[&str])| {
            !found.contains(sink) && needs.iter().any(|need| *need == name || found.contains(need))
        };
        let Some((next, _)) = SINKS.into_iter().find(is_new) else { return found };
        found.insert(next);
    }
}

fn failing(parts: &Parts) -> BTreeSet<String> {
    let rows = parts.rows().into_iter();
    rows.filter(|row| row.failing_seconds.is_some()).map(|row| row.part).collect()
}

#[test]
fn a1_a4_one_sink_that_fails_stops_only_those_that_need_it_and_all_go_on_when_the_cause_goes() {
    let causes = [libc::E2BIG, libc::EEXIST, libc::ENETUNREACH, libc::EPERM, libc::ENODEV];
    for (name, _) in SINKS {
        for cause in causes {
            let (mut sinks, scripts, parts) = sinks();
            let desired = Desired::default();
            script(&scripts, name, |script| script.fails = Some(cause));
            let applied = sinks.apply(&desired);
            assert!(!applied.is_complete);
            assert_eq!(applied.serves_pods, name == "routes", "{name}");
            let stopped: BTreeSet<&str> = in_need_of(name).into_iter().chain([name]).collect();
            for (other, _) in SINKS {
                let written = script(&scripts, other, |script| script.written);
                assert_eq!(written == 0, stopped.contains(other), "{name} fails with {cause}: {other}");
            }
            assert_eq!(failing(&parts), stopped.iter().map(|name| (*name).to_owned()).collect());
            script(&scripts, name, |script| script.fails = None);
            let due = sinks.due().expect("a retry is due");
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let applied = sinks.apply(&desired);
            assert!(applied.is_complete && applied.serves_pods, "{name} after {cause}");
            assert_eq!(failing(&parts), BTreeSet::new());
            assert!(SINKS.iter().all(|(other, _)| script(&scripts, other, |script| script.deleted) > 0));
        }
    }
}

#[test]
fn a10_a_sink_is_tried_again_by_its_own_clock_and_the_others_write_every_round() {
    let (mut sinks, scripts, parts) = sinks();
    script(&scripts, "services", |script| script.fails = Some(libc::EPERM));
    script(&scripts, "routes", |script| script.problems = vec![Problem::new("one node is away")]);
    for _ in 0..100 {
        sinks.apply(&Desired::default());
    }
    let count = |name, of: fn(&Script) -> u32| script(&scripts, name, |script| of(script));
    assert_eq!(count("policies", |script| script.written), 100);
    assert!(count("services", |script| script.retries) < 5, "its back-off holds");
    // A problem costs its own object: the rest of the sink is written, and deleted, every round.
    assert_eq!(count("routes", |script| script.written), 100);
    assert_eq!(count("routes", |script| script.deleted), 100);
    assert!(count("routes", |script| script.retries) < 5);
    let rows = parts.rows();
    let row = |name: &str| rows.iter().find(|row| row.part == name).expect("every sink has a row").clone();
    assert_eq!(row("routes").causes, ["one node is away"]);
    assert!(row("services").causes[0].contains("Operation not permitted"), "{:?}", row("services"));
    assert_eq!(row("services").errors_total, u64::from(count("services", |script| script.retries)));
}

#[test]
fn what_cannot_be_deleted_is_tried_again() {
    let (mut sinks, scripts, parts) = sinks();
    script(&scripts, "addresses", |script| script.fails_to_delete = true);
    assert!(!sinks.apply(&Desired::default()).is_complete);
    assert_eq!(failing(&parts), BTreeSet::from(["addresses".to_owned()]));
    script(&scripts, "addresses", |script| script.fails_to_delete = false);
    std::thread::sleep(sinks.due().expect("a retry").saturating_duration_since(Instant::now()));
    assert!(sinks.apply(&Desired::default()).is_complete);
}

#[test]
fn a7_a_sink_is_compared_when_the_kernel_says_that_something_changed() {
    let (mut sinks, scripts, parts) = sinks();
    sinks.apply(&Desired::default());
    let compared = |name| script(&scripts, name, |script| script.compared);
    assert_eq!(compared("routes"), 0, "at start it has just read the kernel");
    script(&scripts, "routes", |script| script.drifts = vec![Drift::one("route 10.1.2.0/24")]);
    sinks.heard(&[News::Routes]);
    std::thread::sleep(sinks.due().expect("it is to be compared").saturating_duration_since(Instant::now()));
    sinks.apply(&Desired::default());
    assert_eq!((compared("routes"), compared("links")), (1, 0));
    let rows = parts.rows();
    let routes = rows.iter().find(|row| row.part == "routes").expect("its row");
    assert_eq!(routes.repairs_total, 1);
}

#[test]
fn sinks_that_need_one_another_are_refused() {
    let scripts = Scripts::default();
    let sink =
        |name, needs| -> Box<dyn Sink> { Box::new(Scripted { name, needs, scripts: scripts.clone() }) };
    for sinks in [vec![sink("a", &["b"][..]), sink("b", &["a"])], vec![sink("a", &["nobody"])]] {
        assert!(Sinks::new(sinks, BTreeSet::new(), Parts::default()).is_err());
    }
}
