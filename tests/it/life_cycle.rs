//! Pods come and go, three hundred in a row; nothing of them stays.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use crate::lab::{Lab, Node, PodSpec, Setup, wait_for};
use crate::require::require_lab;

/// In batches, so that several are made at once, as kubelet does.
const BATCHES: usize = 30;
const BATCH: usize = 10;

/// Maps whose rows belong to pods, services and policies; the others hold traffic.
const MAPS: [&str; 7] =
    ["endpoints", "addresses", "prefixes", "policy_peers", "policy_rules", "services", "backends"];

/// Everything that a pod could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    devices: Vec<String>,
    addresses: Vec<String>,
    routes: Vec<String>,
    neighbours: Vec<String>,
    pins: Vec<PathBuf>,
    state: Vec<PathBuf>,
    rows: BTreeMap<&'static str, usize>,
}

impl Traces {
    fn of(node: &Node) -> Result<Self> {
        let lines = |arguments: &str| -> Result<Vec<String>> {
            // The first word or two name it; counters and ages change by themselves.
            let mut lines: Vec<String> = node
                .space()
                .ip(arguments)?
                .lines()
                .map(|line| line.split_whitespace().take(4).collect::<Vec<_>>().join(" "))
                .collect();
            lines.sort();
            Ok(lines)
        };
        Ok(Self {
            devices: lines("-o -brief link show")?,
            addresses: lines("-o -brief addr show")?,
            routes: [lines("-4 route show table all")?, lines("-6 route show table all")?].concat(),
            neighbours: lines("neigh show nud permanent")?,
            pins: node.pins(),
            state: node.state_files(),
            rows: MAPS.into_iter().map(|map| Ok((map, node.map(map)?.len()))).collect::<Result<_>>()?,
        })
    }
}

#[test]
fn three_hundred_pods_leave_nothing_behind() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    lab.manifests().apply(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: own, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}
",
    )?;
    // One pod first and last: what an agent makes once, with its first pod, is no trace of a pod.
    make_and_delete(&lab, 0..1)?;
    let before = Traces::of(node)?;
    for batch in 0..BATCHES {
        make_and_delete(&lab, batch * BATCH..(batch + 1) * BATCH)?;
    }
    let mut after = Traces::of(node)?;
    // Link pins and peers of identities that nobody has any more go a moment later.
    let gone = wait_for("every trace to go", || {
        after = Traces::of(node)?;
        Ok(after == before)
    });
    if gone.is_err() {
        assert_eq!(before, after);
    }
    Ok(())
}

fn make_and_delete(lab: &Lab, numbers: std::ops::Range<usize>) -> Result<()> {
    let node = lab.node(1);
    let specs: Vec<PodSpec<'_>> = numbers
        .map(|number| lab.pod(1, &format!("shop/pod{number}")).label("number", &number.to_string()))
        .collect();
    let pods = std::thread::scope(|scope| {
        let threads: Vec<_> = specs.into_iter().map(|spec| scope.spawn(|| spec.create())).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("creating a pod does not panic"))
            .collect::<Result<Vec<_>>>()
    })?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = pods.iter().map(|pod| scope.spawn(|| pod.delete(node))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("deleting a pod does not panic"))
    })?;
    for pod in &pods {
        lab.manifests().remove_file(&format!("pod-{}-{}.yaml", pod.namespace(), pod.name()))?;
    }
    Ok(())
}
