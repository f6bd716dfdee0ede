//! One real agent in a large cluster.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use weir::kube::crd::NodeEndpoints;
use weir::kube::{Publisher, Source, Tables};
use weir::model::{IdentityId, IdentityLabels};

use super::population::{
    self, NODES, PODS_PER_NODE, SERVICES, namespace, node_endpoints, node_name, pod_labels,
};
use super::world::{World, Writes, agent, memory};
use crate::lab::{Node, Pod};
use crate::load::median;
use crate::row::Row;

/// Changes of pods in a second: one starts on this node, one ends, the others are other nodes'.
const CHANGES: usize = 20;
/// For so many seconds.
const CHANGING: usize = 20;
/// Pods of the node itself.
const OWN_PODS: usize = 30;

/// Measures an agent that joins a large cluster, starts again in it, and follows its changes.
pub fn rows() -> Result<Vec<Row>> {
    let world = World::start("the section large", 1)?;
    let began = Instant::now();
    let identities = world.runtime.block_on(population::write(&world.client))?;
    println!("the cluster is written after {:.0} s", began.elapsed().as_secs_f64());
    let node = world.lab.node(1);
    let began = Instant::now();
    world.start_agent(1)?;
    node.wait_ready()?;
    let first = began.elapsed().as_secs_f64();
    everything_is_programmed(node)?;
    let (pods, writes) = own_pods(&world)?;
    let mut again = Vec::new();
    for _ in 0..3 {
        node.kill_agent()?;
        let began = Instant::now();
        world.start_agent(1)?;
        node.wait_ready()?;
        again.push(began.elapsed().as_secs_f64());
    }
    everything_is_programmed(node)?;
    let idle = cores(node, || std::thread::sleep(Duration::from_secs(5)))?;
    let changing = cores(node, || {
        std::thread::scope(|scope| {
            let others = scope.spawn(|| world.runtime.block_on(change_others(&world, &identities)));
            change_own(&world)?;
            others.join().expect("a panic is the bench's end")
        })
    })?;
    changing.1?;
    let (resident, peak) = (memory(agent(node)?, "VmRSS:")?, memory(agent(node)?, "VmHWM:")?);
    drop(pods);
    Ok(vec![
        Row::new("large/start_to_programmed_seconds/first", "s", first).at_most(5.0),
        Row::new("large/start_to_programmed_seconds", "s", median(again)).at_most(5.0),
        Row::new("large/rss_mib", "MiB", resident).at_most(150.0),
        Row::new("large/rss_peak_mib", "MiB", peak),
        Row::new("large/cpu_cores_idle", "cores", idle.0),
        Row::new(format!("large/cpu_cores_at_{CHANGES}_changes_per_second"), "cores", changing.0)
            .at_most(0.1),
        Row::new("large/writes_per_pod_event", "writes", writes).at_most(1.0),
        Row::new("large/identity_claims_agree", "share", world.runtime.block_on(claims_agree(&world))?)
            .at_least(1.0),
    ])
}

/// Addresses, and frontends: two ports and the refused rest in both families.
fn everything_is_programmed(node: &Node) -> Result<()> {
    for (map, least) in [("addresses", 2 * (NODES - 1) * (PODS_PER_NODE + 2)), ("services", 6 * SERVICES)] {
        let rows = node.map(map)?.len();
        ensure!(rows >= least, "{map} holds {rows} rows, not {least}");
    }
    Ok(())
}

/// Starts pods one after the other; how often the node's objects are written for one.
fn own_pods(world: &World) -> Result<(Vec<Pod>, f64)> {
    let writes = Writes::count(world, world.lab.node(1).name())?;
    let mut pods = Vec::new();
    for number in 0..OWN_PODS {
        pods.push(world.pod(1, &namespace(number), &format!("own-{number}"), &json!(pod_labels(number)))?);
        std::thread::sleep(Duration::from_millis(200));
    }
    std::thread::sleep(Duration::from_secs(1));
    Ok((pods, writes.so_far() as f64 / OWN_PODS as f64))
}

/// Starts and ends a pod of the node in every second.
fn change_own(world: &World) -> Result<()> {
    for number in 0..CHANGING {
        let second = Instant::now();
        let pod = world.pod(1, &namespace(number), &format!("brief-{number}"), &json!(pod_labels(number)))?;
        std::thread::sleep(Duration::from_millis(500));
        world.end_pod(1, pod)?;
        std::thread::sleep(Duration::from_secs(1).saturating_sub(second.elapsed()));
    }
    Ok(())
}

/// Replaces pods of other nodes, evenly in time.
async fn change_others(world: &World, identities: &[IdentityId]) -> Result<()> {
    let api: Api<NodeEndpoints> = Api::all(world.client.clone());
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / (CHANGES as u32 - 2));
    for change in 1..=(CHANGES - 2) * CHANGING {
        ticks.tick().await;
        let number = 2 + change * 37 % (NODES - 1);
        let name = format!("{}-0", node_name(number));
        let object = NodeEndpoints::new(&name, node_endpoints(number, identities, change));
        api.patch(&name, &PatchParams::apply("weir-agent").force(), &Patch::Apply(&object)).await?;
    }
    Ok(())
}

/// Two agents that claim numbers for the same labels at the same time, some of them taken: the share on which they agree.
async fn claims_agree(world: &World) -> Result<f64> {
    const SETS: usize = 50;
    let publisher = |node: &str| {
        let source = Source::Kubernetes(world.client.clone(), node.to_owned());
        Publisher::new(&source, node, Arc::new(Tables::new()))
    };
    let (one, other) = (publisher("a")?, publisher("b")?);
    let mut agreed = 0;
    for number in 0..SETS {
        let labels = IdentityLabels {
            namespace: "claims".to_owned(),
            service_account: "default".to_owned(),
            pod_labels: [("app".to_owned(), number.to_string())].into(),
            ..IdentityLabels::default()
        };
        let (one, other) =
            future::try_join(one.claim_identity(&labels), other.claim_identity(&labels)).await?;
        agreed += usize::from(one == other);
    }
    Ok(agreed as f64 / SETS as f64)
}

/// The processor time of the node's agent during `work`, in cores, and what came of the work.
fn cores<T>(node: &Node, work: impl FnOnce() -> T) -> Result<(f64, T)> {
    let ticks = || -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", agent(node)?))?;
        // After the name, which may hold spaces, user and system time are the 12th and 13th.
        let rest = stat.rsplit(") ").next().context("a name in parentheses")?;
        rest.split(' ').skip(11).take(2).map(|ticks| Ok(ticks.parse::<u64>()?)).sum()
    };
    let (before, began) = (ticks()?, Instant::now());
    let done = work();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("clock ticks")?;
    let used = (ticks()? - before) as f64 / per_second as f64;
    Ok((used / began.elapsed().as_secs_f64(), done))
}
