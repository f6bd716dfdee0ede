//! Services, with nothing but Weir to serve them, and cluster DNS.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use crate::kubernetes::prober::{Outcome, Via};
use crate::world::{PATIENCE, Pod, Row, World};

const WEB: &str = include_str!("web.yaml");

/// Every backend answers at the Service's addresses, for pods and for pods on the host's network.
pub fn services_of_both_families(world: &mut World) -> Result<()> {
    let addresses = world.service("e2e", "server")?;
    ensure!(addresses.len() == 2, "the Service has {addresses:?}");
    let servers: BTreeSet<String> = world.servers()?.into_iter().map(|server| server.name).collect();
    for from in world.clients()?.iter().chain(&world.hosts()?) {
        for address in &addresses {
            let who = answers(world, from, Via::Http, SocketAddr::new(*address, 80), 40)?;
            let of_pods: BTreeSet<String> =
                who.iter().filter(|name| servers.contains(*name)).cloned().collect();
            ensure!(of_pods == servers, "{}: of {servers:?} only {who:?} answered at {address}", from.name);
            let who = answers(world, from, Via::Udp, SocketAddr::new(*address, 81), 5)?;
            ensure!(who.is_subset(&servers), "{}: {who:?} answered at {address}", from.name);
        }
    }
    Ok(())
}

/// A Service without pods refuses, and serves again with the first one.
pub fn services_follow_their_pods(world: &mut World) -> Result<()> {
    world.cluster.apply(WEB)?;
    let addresses = world.service("e2e", "web")?;
    let client = world.clients()?.remove(0);
    for replicas in [2, 1, 0, 3] {
        let argument = format!("--replicas={replicas}");
        world.cluster.kubectl(&["--namespace", "e2e", "scale", "deployment/web", &argument], "")?;
        world.rollout("e2e", "deployment/web")?;
        if replicas == 0 {
            // While pods end and none is ready, those that end serve: one is dead, another still answers.
            world.cluster.wait("the pods to be gone", PATIENCE, || {
                let pods = world.cluster.get(&["pods", "--namespace", "e2e", "--selector", "app=web"])?;
                Ok(pods["items"].as_array().is_some_and(Vec::is_empty))
            })?;
            let row = |address| Row {
                from: client.clone(),
                via: Via::Http,
                to: SocketAddr::new(address, 80),
                is_allowed: false,
            };
            world.expect(&addresses.iter().copied().map(row).collect::<Vec<_>>())?;
            continue;
        }
        let of_pods = || -> Result<BTreeSet<String>> {
            Ok(world.pods("e2e", "app=web")?.into_iter().map(|pod| pod.name).collect())
        };
        for address in &addresses {
            world.cluster.wait(&format!("{replicas} backends at {address}"), PATIENCE, || {
                Ok(answers(world, &client, Via::Http, SocketAddr::new(*address, 80), 30)? == of_pods()?)
            })?;
        }
    }
    world.cluster.kubectl(&["delete", "--filename", "-"], WEB).map(drop)
}

/// Names of Services, asked of CoreDNS by a pod's own resolver.
pub fn names_by_cluster_dns(world: &mut World) -> Result<()> {
    for client in world.clients()? {
        for name in
            ["server:80", "server.e2e:80", "server.e2e.svc.cluster.local:80", "kubernetes.default:443"]
        {
            let exec = ["--namespace", "e2e", "exec", &client.name, "--", "/agnhost", "connect", name];
            world
                .cluster
                .kubectl(&[&exec[..], &["--timeout=3s"]].concat(), "")
                .with_context(|| format!("{name} from {}", client.node))?;
        }
    }
    Ok(())
}

/// Who answers to a number of probes; one that is not answered is an error.
fn answers(world: &World, from: &Pod, via: Via, to: SocketAddr, count: usize) -> Result<BTreeSet<String>> {
    let outcomes = world.probe(from, &vec![(via, to); count])?;
    let name = |outcome| match outcome {
        Outcome::Answered(name) => Ok(name),
        outcome => Err(anyhow::anyhow!("{} to {to}: {outcome:?}", from.name)),
    };
    outcomes.into_iter().map(name).collect()
}
