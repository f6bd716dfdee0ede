//! Pods come and go, three hundred in a row; nothing of them stays, and in the end not even their identities.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Result, ensure};

use crate::lab::{Lab, Node, Pod, PodSpec, Setup, Traffic, wait_for};
use crate::require::require_lab;
use crate::verdicts::expect_full_mesh;

/// In batches, so that several are made at once, as kubelet does.
const BATCHES: usize = 30;
const BATCH: usize = 10;

/// Maps whose rows belong to pods, services and policies; the others hold traffic.
const MAPS: [&str; 8] =
    ["endpoints", "addresses", "prefixes", "policy_peers", "policy_rules", "services", "slots", "backends"];

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

/// An identity that a person wrote into a file of another name, and that no pod has.
const BY_HAND: &str = "
apiVersion: weir.dev/v1alpha1
kind: Identity
metadata: {name: '300'}
spec: {namespace: shop, serviceAccount: default}
";

#[test]
fn identities_go_when_no_pod_has_them_and_the_others_stay() -> Result<()> {
    require_lab!();
    let grace = ["--identity-grace-seconds", "1"].map(str::to_owned).into();
    let lab = Lab::start(Setup { nodes: 2, agent_arguments: grace, ..Setup::default() })?;
    lab.manifests().write_file("by-hand.yaml", BY_HAND)?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").label("app", "b").create()?);
    expect_full_mesh(&[&a, &b])?;
    let stay = identities(&lab)?;
    ensure!(stay.len() == 2, "two pods with other labels have {stay:?}");
    let streams: Vec<Traffic> =
        b.addresses().iter().map(|to| Traffic::tcp(a.space(), SocketAddr::new(*to, 80))).collect();
    let mut of_short = BTreeSet::new();
    // The second time on the other node, and with the number that was free again.
    for number in [1, 2] {
        let short = lab.pod(number, "shop/short").label("app", "short").create()?;
        expect_full_mesh(&[&a, &b, &short])?;
        let there = identities(&lab)?;
        let new: Vec<_> = there.keys().filter(|name| !stay.contains_key(*name)).cloned().collect();
        ensure!(new.len() == 1 && there.len() == 3, "{there:?} after {stay:?}");
        of_short.extend(new);
        outlives_the_grace_time(&lab, &[&a, &b, &short], &there)?;
        short.delete(lab.node(number))?;
        lab.manifests().remove_file("pod-shop-short.yaml")?;
        wait_for("the identity to go", || Ok(identities(&lab)? == stay))?;
    }
    ensure!(of_short.len() == 1, "the same labels had {of_short:?}");
    outlives_the_grace_time(&lab, &[&a, &b], &stay)?;
    let by_hand = fs::read_to_string(lab.manifests().directory().join("by-hand.yaml"))?;
    ensure!(by_hand == BY_HAND, "by-hand.yaml is now {by_hand}");
    for stream in streams {
        stream.wait_for_answers(100)?;
        stream.stop()?.check_nothing_lost()?;
    }
    Ok(())
}

/// The files of identities, and when they were written: marks that come and go would show.
type Identities = BTreeMap<String, SystemTime>;

fn identities(lab: &Lab) -> Result<Identities> {
    let mut identities = BTreeMap::new();
    for entry in fs::read_dir(lab.manifests().directory())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("identity-") {
            match entry.metadata() {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                metadata => drop(identities.insert(name, metadata?.modified()?)),
            }
        }
    }
    Ok(identities)
}

/// A pod comes and goes, and its identity with it: by then, those of `pods` would have gone as well, had
/// they been taken for unused.
fn outlives_the_grace_time(lab: &Lab, pods: &[&Pod], stay: &Identities) -> Result<()> {
    let witness = lab.pod(1, "shop/witness").label("app", "witness").create()?;
    ensure!(identities(lab)?.len() == stay.len() + 1, "the witness has no identity of its own");
    witness.delete(lab.node(1))?;
    lab.manifests().remove_file("pod-shop-witness.yaml")?;
    wait_for("the witness's identity to go", || Ok(identities(lab)?.len() <= stay.len()))?;
    wait_for("the others to be as they were", || Ok(identities(lab)? == *stay))?;
    expect_full_mesh(pods)
}
