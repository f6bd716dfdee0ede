//! From ten Services to 30,000: a connection to one of them, a change of one, and the agent that serves them.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use super::kube_proxy::KubeProxy;
use super::population::{self, NAMESPACE};
use crate::cluster::latency::{address_key, changed_after};
use crate::cluster::quantile;
use crate::cluster::world::{World, agent, memory};
use crate::lab::{Lab, Node, Pod, ServicePort, Setup, Space, wait_for};
use crate::load::{
    ECHO_PORT, Load, LoadServer, Path, ServiceSample, measure, median, ready_client, sample_services,
    service_address,
};
use crate::row::Row;

/// Numbers of Services, unless the variable SERVICES has others: `SERVICES=10,100`.
const SIZES: [usize; 4] = [10, 1000, 10_000, 30_000];
/// Services of the node that stays small.
const FEW: usize = 10;
/// The number of the Service with one backend.
const ALONE: usize = 50_000;
/// Backends of each Service.
const BACKENDS: usize = 4;
/// Samples of each node for each number of Services.
const ROUNDS: usize = 45;
/// How long kube-proxy may need until all Services are served; then it is measured no more.
const PATIENCE: Duration = Duration::from_secs(180);
/// Changes of an EndpointSlice, and the time between two.
const CHANGES: usize = 25;
const APART: Duration = Duration::from_millis(150);
/// kube-proxy's modes, and the names of their rows.
const MODES: [&str; 2] = ["nftables", "iptables"];

/// The samples of one number of Services: by node, in rounds.
type Rounds = BTreeMap<&'static str, Vec<ServiceSample>>;

/// Measures all of it.
pub fn rows() -> Result<Vec<Row>> {
    let world = World::start("the suite service", 2)?;
    world.start_agent(1)?;
    world.lab.node(1).wait_ready()?;
    world.namespace(NAMESPACE)?;
    let large = Large::start(&world)?;
    let small = Small::start()?;
    let addresses = large.addresses();
    let backends = &addresses[1..];
    let mut proxies: Vec<(&'static str, Result<KubeProxy>)> = Vec::new();
    for mode in MODES {
        proxies.push((mode, KubeProxy::start(&world, mode, world.lab.node(1).name(), &addresses)));
    }
    let (mut rows, mut written) = (Vec::new(), 0);
    let sizes = sizes()?;
    for size in &sizes {
        let began = Instant::now();
        let node = world.lab.node(1).name();
        world.runtime.block_on(population::write(&world.client, written..*size, backends, node))?;
        written = *size;
        let seconds = began.elapsed().as_secs_f64();
        println!("{size} Services are written after {seconds:.1} s");
        wait_served(large.client.space(), *size).context("Weir")?;
        for (mode, proxy) in &mut proxies {
            let served = proxy.as_ref().ok().map(|proxy| wait_served(&proxy.client, *size));
            if let Some(Err(error)) = served {
                *proxy = Err(error.context(format!("kube-proxy in {mode} mode with {size} Services")));
            }
            println!("  {mode}: {:.1} s", began.elapsed().as_secs_f64());
        }
        let mut clients = vec![("weir", large.client.space(), *size), ("small", small.client.space(), FEW)];
        clients.extend(
            proxies.iter().filter_map(|(mode, proxy)| Some((*mode, &proxy.as_ref().ok()?.client, *size))),
        );
        rows.extend(compare(*size, &sample(&clients)?, &proxies));
    }
    // What follows is Weir's alone.
    drop(proxies);
    rows.extend(or_skipped("tcp_rr/cluster_ip/vs_pod", cluster_ip_and_pod(&world, &large)));
    rows.extend(or_skipped("endpoint_change/p50_ms", changes(&world, &addresses)));
    rows.extend(or_skipped(&format!("agent/rss_{written}_mib"), fresh_agent(&world, written)));
    Ok(rows)
}

fn or_skipped(row: &str, rows: Result<Vec<Row>>) -> Vec<Row> {
    rows.unwrap_or_else(|error| vec![Row::skipped(row, "", format!("{error:#}"))])
}

fn sizes() -> Result<Vec<usize>> {
    match std::env::var("SERVICES") {
        Ok(sizes) => sizes.split(',').map(|size| size.parse().context("SERVICES=10,100")).collect(),
        Err(_) => Ok(SIZES.to_vec()),
    }
}

/// A client and servers on the node that has all Services.
struct Large {
    client: Pod,
    servers: Vec<(LoadServer, Pod)>,
}

impl Large {
    fn start(world: &World) -> Result<Self> {
        let client = world.pod(1, NAMESPACE, "client", &json!({"app": "client"}))?;
        ready_client(client.space())?;
        let mut servers = Vec::new();
        for number in 0..BACKENDS {
            let pod = world.pod(1, NAMESPACE, &format!("server-{number}"), &json!({"app": "server"}))?;
            servers.push((LoadServer::start_in(pod.space())?, pod));
        }
        Ok(Self { client, servers })
    }

    /// The client's, then the servers'.
    fn addresses(&self) -> Vec<IpAddr> {
        let servers = self.servers.iter().map(|(_, pod)| pod.address(true));
        std::iter::once(self.client.address(true)).chain(servers).collect()
    }
}

/// A node with few Services, to compare with in the same rounds.
struct Small {
    client: Pod,
    _servers: Vec<(LoadServer, Pod)>,
    _lab: Lab,
}

impl Small {
    fn start() -> Result<Self> {
        let lab = Lab::start(Setup::default())?;
        let client = lab.pod(1, "services/client").create()?;
        ready_client(client.space())?;
        let mut servers = Vec::new();
        for number in 0..BACKENDS {
            let pod = lab.pod(1, &format!("services/server-{number}")).create()?;
            servers.push((LoadServer::start_in(pod.space())?, pod));
        }
        let pods: Vec<&Pod> = servers.iter().map(|(_, pod)| pod).collect();
        for number in 0..FEW {
            let address = service_address(number);
            let port = ServicePort::from(("echo", "TCP", address.port(), ECHO_PORT));
            let (key, ip) = (format!("services/service-{number}"), address.ip().to_string());
            lab.service(&key, &[ip.as_str()], &[port], &pods)?;
        }
        wait_served(client.space(), FEW)?;
        Ok(Self { client, _servers: servers, _lab: lab })
    }
}

/// Waits until a client in `space` reaches the last Services, and some before.
fn wait_served(space: &Space, count: usize) -> Result<()> {
    let step = (count / 64).max(1);
    let numbers: Vec<usize> = (0..count).rev().take(64).chain((0..count).step_by(step)).collect();
    let deadline = Instant::now() + PATIENCE;
    space.run(move || {
        for number in numbers {
            while let Err(error) =
                TcpStream::connect_timeout(&service_address(number), Duration::from_secs(1))
            {
                if Instant::now() > deadline {
                    bail!("Service {number} is not served after {PATIENCE:?}: {error}");
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    })
}

/// Rounds of samples, in which nobody always follows the same neighbour.
fn sample(clients: &[(&'static str, &Space, usize)]) -> Result<Rounds> {
    let mut rounds = Rounds::new();
    for round in 0..=ROUNDS {
        for turn in 0..clients.len() {
            let (name, space, count) = clients[(turn + round) % clients.len()];
            let sample = sample_services(space, count, round).with_context(|| format!("on {name}"))?;
            // The first round warms up.
            if round > 0 {
                rounds.entry(name).or_default().push(sample);
            }
        }
    }
    Ok(rounds)
}

/// The medians of `one` and `other`, and of the ratios within rounds.
fn ratio(rounds: &Rounds, one: &str, other: &str, of: fn(&ServiceSample) -> f64) -> Option<(f64, f64, f64)> {
    let (one, other) = (rounds.get(one)?, rounds.get(other)?);
    let ratios = one.iter().zip(other).map(|(one, other)| of(one) / of(other)).collect();
    let middle = |samples: &[ServiceSample]| median(samples.iter().map(of).collect());
    Some((middle(one), middle(other), median(ratios)))
}

fn compare(size: usize, rounds: &Rounds, proxies: &[(&'static str, Result<KubeProxy>)]) -> Vec<Row> {
    let connect = |sample: &ServiceSample| sample.connect;
    let rate = |sample: &ServiceSample| sample.rate;
    let mut rows = Vec::new();
    if let Some((value, against, ratio)) = ratio(rounds, "weir", "small", connect) {
        let row = Row::new(format!("connect_p50/{size}_vs_{FEW}"), "us", value).against(against, Some(ratio));
        rows.push(row.at_most(1.1));
    }
    for (mode, proxy) in proxies {
        let names = [format!("connect_p50/{size}/vs_{mode}"), format!("tcp_crr/{size}/vs_{mode}")];
        if let Err(error) = proxy {
            let skip = |name| Row::skipped(name, "", format!("{error:#}"));
            rows.extend(names.map(skip));
            continue;
        }
        let [connect_name, rate_name] = names;
        if let Some((value, against, ratio)) = ratio(rounds, "weir", mode, connect) {
            rows.push(Row::new(connect_name, "us", value).against(against, Some(ratio)).at_most(1.0));
        }
        if let Some((value, against, ratio)) = ratio(rounds, "weir", mode, rate) {
            let row = Row::new(rate_name, "connections/s", value).against(against, Some(ratio));
            rows.push(row.at_least(1.0));
        }
    }
    rows
}

/// Through a cluster IP against the pod's own address. The Service has that pod alone: servers that take turns
/// find less in the processor's caches.
fn cluster_ip_and_pod(world: &World, large: &Large) -> Result<Vec<Row>> {
    let client = large.client.space();
    let (_, pod) = &large.servers[0];
    let server = pod.space();
    let service = service_address(ALONE);
    let (backend, node) = ([pod.address(true)], world.lab.node(1).name());
    world.runtime.block_on(population::write(&world.client, ALONE..ALONE + 1, &backend, node))?;
    wait_for("the Service with one backend", || {
        Ok(client.run(move || TcpStream::connect_timeout(&service, Duration::from_secs(1)).is_ok()))
    })?;
    let paths = [
        Path { name: "pod", client, server, target: pod.address(true), port: ECHO_PORT },
        Path { name: "again", client, server, target: pod.address(true), port: ECHO_PORT },
        Path { name: "cluster_ip", client, server, target: service.ip(), port: service.port() },
    ];
    let mut rows = Vec::new();
    for (load, aim) in [(Load::Transactions, 0.98), (Load::Connections, 0.95)] {
        let samples = measure(load, &paths)?;
        let row =
            Row::new(format!("{}/cluster_ip/vs_pod", load.name()), load.unit(), samples.median("cluster_ip"));
        rows.push(
            row.against(samples.median("pod"), Some(samples.ratio("cluster_ip", &["pod", "again"])))
                .noise((samples.ratio("again", &["pod"]) - 1.0).abs())
                .at_least(aim),
        );
    }
    Ok(rows)
}

/// From the API server's answer to a changed EndpointSlice to the Service's row in the kernel.
fn changes(world: &World, addresses: &[IpAddr]) -> Result<Vec<Row>> {
    let api: Api<EndpointSlice> = Api::namespaced(world.client.clone(), NAMESPACE);
    let address = service_address(0);
    let key = [&address_key(address.ip())[..], &address.port().to_be_bytes(), &[6, 0]].concat();
    let map = world.map(1, "services")?;
    let node = world.lab.node(1).name();
    let mut samples = Vec::new();
    for change in 0..CHANGES {
        // All backends but one, then all.
        let left = &addresses[2 - change % 2..];
        let slice = population::slice(0, left, node);
        let before = map.get(&key)?;
        ensure!(before.is_some(), "the Service {address} has no row");
        let parameters = PatchParams::default();
        let patch = Patch::Merge(json!({"endpoints": slice["endpoints"]}));
        world.runtime.block_on(api.patch("service-0-1", &parameters, &patch))?;
        samples.push(changed_after(&map, &key, &before, Instant::now())?);
        thread::sleep(APART);
    }
    let milliseconds = |share| quantile(&samples, share).as_secs_f64() * 1e3;
    Ok(vec![
        Row::new("endpoint_change/p50_ms", "ms", milliseconds(0.5)).at_most(5.0),
        Row::new("endpoint_change/p90_ms", "ms", milliseconds(0.9)),
    ])
}

/// The other node's agent, which has never been there before: until everything is in the kernel.
fn fresh_agent(world: &World, services: usize) -> Result<Vec<Row>> {
    let node = world.lab.node(2);
    let began = Instant::now();
    world.start_agent(2)?;
    node.wait_ready()?;
    let seconds = began.elapsed().as_secs_f64();
    let (frontends, slots) = (node.map("services")?.len(), node.map("slots")?.len());
    ensure!(frontends >= services, "{frontends} rows of {services} Services");
    println!("{frontends} frontends, {slots} slots");
    let name = |what: &str| format!("agent/{what}_{services}");
    Ok(vec![
        Row::new(name("seconds_to_programmed"), "s", seconds).at_most(3.0),
        Row::new(format!("{}_mib", name("rss")), "MiB", memory(agent(node)?, "VmRSS:")?).at_most(150.0),
        Row::new(format!("{}_mib", name("rss_peak")), "MiB", memory(agent(node)?, "VmHWM:")?),
        Row::new(format!("{}_mib", name("maps")), "MiB", map_memory(node)?),
    ])
}

/// What the kernel has for the maps that the agent holds, in MiB: each map once.
fn map_memory(node: &Node) -> Result<f64> {
    let mut maps: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", agent(node)?))? {
        // A descriptor may be closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let number = |field: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(field))?;
            line.trim().parse().ok()
        };
        if let (Some(id), Some(bytes)) = (number("map_id:"), number("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    ensure!(!maps.is_empty(), "the agent holds no map");
    Ok(maps.values().sum::<u64>() as f64 / 1_048_576.0)
}
