//! Services for whom no kube-proxy is there: node ports, load balancers, affinity and traffic policies, as the
//! Kubernetes documentation promises them.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::kubernetes::prober::{Outcome, Via};
use crate::world::{PATIENCE, Pod, World};

const MANIFESTS: &str = include_str!("north_south.yaml");
/// The node ports of north_south.yaml, and where load balancers ask.
const ALL: u16 = 30980;
const LOCAL: u16 = 30981;
/// A pool that no node has an address of.
const POOL: &str = "198.51.100.";

/// From pods, hosts and outside, at every node's addresses of both families: any server answers; where the
/// policy is Local, outside gets that node's server alone, and pods and hosts get any.
pub fn node_ports_and_traffic_policies(world: &mut World) -> Result<()> {
    with_manifests(world, |world| {
        let servers = world.servers()?;
        let names: BTreeSet<String> = servers.iter().map(|server| server.name.clone()).collect();
        for node in 1..=3 {
            let name = world.cluster.node(node).name().to_owned();
            let own: BTreeSet<String> = servers
                .iter()
                .filter(|server| server.node == name)
                .map(|server| server.name.clone())
                .collect();
            for address in world.cluster.node(node).addresses().to_vec() {
                for from in world.clients()?.iter().chain(&world.hosts()?) {
                    for port in [ALL, LOCAL] {
                        gets(world, from, SocketAddr::new(address, port), &names)?;
                    }
                }
                outside_gets(world, SocketAddr::new(address, ALL), &names)?;
                outside_gets(world, SocketAddr::new(address, LOCAL), &own)?;
            }
        }
        let loopback = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), ALL);
        gets(world, &world.hosts()?[0], loopback, &names)
    })
}

/// By session affinity, from pods and hosts, at both families.
pub fn one_client_keeps_its_backend(world: &mut World) -> Result<()> {
    with_manifests(world, |world| {
        let address = world.service("e2e", "sticky")?;
        for from in world.clients()?.iter().chain(&world.hosts()?) {
            for address in &address {
                // The Service is new: its first answer says that this node has its backends.
                let first = [(Via::Http, SocketAddr::new(*address, 80))];
                world.cluster.wait(&format!("an answer at {address} to {}", from.name), PATIENCE, || {
                    Ok(matches!(world.probe(from, &first)?[..], [Outcome::Answered(_)]))
                })?;
                let probes = vec![(Via::Http, SocketAddr::new(*address, 80)); 20];
                let answers: BTreeSet<String> =
                    world.probe(from, &probes)?.into_iter().map(|outcome| format!("{outcome:?}")).collect();
                ensure!(answers.len() == 1, "{} at {address}: {answers:?}", from.name);
                ensure!(answers.iter().all(|answer| answer.starts_with("Answered")), "{answers:?}");
            }
        }
        Ok(())
    })
}

/// A load balancer gets an address of the pool, which pods, hosts and outside reach; who asks for one that another
/// has is told so; who shares gets the same; and all of it goes with the pool.
pub fn load_balancers_get_addresses(world: &mut World) -> Result<()> {
    with_manifests(world, |world| {
        let address_of = |world: &World, name: &str| -> Result<Option<IpAddr>> {
            let service = world.cluster.get(&["service", name, "--namespace", "e2e"])?;
            let ip = &service["status"]["loadBalancer"]["ingress"][0]["ip"];
            Ok(ip.as_str().and_then(|text| text.parse().ok()))
        };
        world.cluster.wait("an address of the pool", PATIENCE, || {
            Ok(address_of(world, "balanced")?.is_some_and(|address| address.to_string().starts_with(POOL)))
        })?;
        let address = address_of(world, "balanced")?.context("an address")?;
        world.cluster.wait("the same address by the sharing key", PATIENCE, || {
            Ok(address_of(world, "shares")? == Some(address))
        })?;
        world.cluster.wait("a word about an address that is another's", PATIENCE, || {
            let service = world.cluster.get(&["service", "greedy", "--namespace", "e2e"])?;
            let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let ours =
                conditions.into_iter().find(|condition| condition["type"] == "weir.dev/LoadBalancerAddress");
            Ok(ours.is_some_and(|ours| ours["status"] == "False" && ours["reason"] == "AddressInUse"))
        })?;
        let names: BTreeSet<String> = world.servers()?.into_iter().map(|server| server.name).collect();
        for from in world.clients()?.iter().chain(&world.hosts()?) {
            gets(world, from, SocketAddr::new(address, 80), &names)?;
        }
        let agent = &world.pods("weir-system", "app.kubernetes.io/name=weir-agent")?[0];
        let trace = world.weir(agent, &["service", "trace", "world", "e2e/balanced"])?;
        ensure!(trace.contains("To one of 3 backends"), "{trace}");
        world.cluster.kubectl(&["delete", "loadbalancerpool", "e2e"], "")?;
        world.cluster.wait("the address to go with its pool", PATIENCE, || {
            Ok(address_of(world, "balanced")?.is_none())
        })
    })
}

/// Where a load balancer asks, each node says how many backends it has itself; and /healthz is as of kube-proxy.
pub fn load_balancers_ask_nodes(world: &mut World) -> Result<()> {
    with_manifests(world, |world| {
        let mut port = None;
        world.cluster.wait("a health check node port", PATIENCE, || {
            let service = world.cluster.get(&["service", "balanced-local", "--namespace", "e2e"])?;
            port = service["spec"]["healthCheckNodePort"].as_u64().filter(|port| *port > 0);
            Ok(port.is_some())
        })?;
        let port = port.context("a port")? as u16;
        for node in 1..=3 {
            for address in world.cluster.node(node).addresses().to_vec() {
                world.cluster.wait(&format!("{address} to have one backend"), PATIENCE, || {
                    Ok(outside(world, SocketAddr::new(address, port), "/")
                        .is_ok_and(|text| text.contains(" 200 OK") && text.contains("\"localEndpoints\":1")))
                })?;
                if address.is_ipv4() {
                    let text = outside(world, SocketAddr::new(address, 10256), "/healthz")?;
                    ensure!(text.contains(" 200 OK") && text.contains("\"nodeEligible\":true"), "{text}");
                }
            }
        }
        Ok(())
    })
}

/// Applies the manifests, does the work, and takes them away whatever came of it.
fn with_manifests(world: &mut World, work: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    world.cluster.apply(MANIFESTS)?;
    let outcome = work(world);
    let gone = world.cluster.kubectl(&["delete", "--ignore-not-found", "--filename", "-"], MANIFESTS);
    outcome.and(gone.map(drop))
}

/// Waits until exactly these have answered to a client; nobody else may.
fn gets(world: &World, from: &Pod, to: SocketAddr, expected: &BTreeSet<String>) -> Result<()> {
    let mut seen = BTreeSet::new();
    world.cluster.wait(&format!("{expected:?} at {to} from {} on {}", from.name, from.node), PATIENCE, || {
        for outcome in world.probe(from, &vec![(Via::Http, to); 20])? {
            if let Outcome::Answered(name) = outcome {
                seen.insert(name);
            }
        }
        ensure!(seen.is_subset(expected), "{seen:?} answered at {to}, not only {expected:?}");
        Ok(seen == *expected)
    })
}

/// The same from the host outside.
fn outside_gets(world: &World, to: SocketAddr, expected: &BTreeSet<String>) -> Result<()> {
    let mut seen = BTreeSet::new();
    world.cluster.wait(&format!("{expected:?} at {to} from outside"), PATIENCE, || {
        for _ in 0..10 {
            if let Ok(text) = outside(world, to, "/hostname") {
                seen.insert(text.rsplit("\r\n").next().unwrap_or_default().trim().to_owned());
            }
        }
        ensure!(seen.is_subset(expected), "{seen:?} answered at {to}, not only {expected:?}");
        Ok(seen == *expected)
    })
}

/// What is answered to `GET path` from the host outside.
fn outside(world: &World, server: SocketAddr, path: &'static str) -> Result<String> {
    world.cluster.wire().outside().run(move || {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}
