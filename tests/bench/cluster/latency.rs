//! From the API server's answer to what the kernel does: two agents, pods by the real plugin.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::quantile;
use super::world::{PinnedMap, World, Writes, agent, memory};
use crate::lab::Pod;
use crate::load::median;
use crate::row::Row;

/// How often each change is made.
const ROUNDS: usize = 25;
/// Pods that start at once.
const BURST: usize = 100;
/// Between two changes: as long as changes of people and controllers are apart, or longer.
const APART: Duration = Duration::from_millis(150);
/// Between two datagrams of the probe, and so the precision of what they show.
const PERIOD: Duration = Duration::from_micros(300);
/// So many periods without a datagram mean that none comes any more.
const SILENCE: Duration = Duration::from_millis(60);
const PATIENCE: Duration = Duration::from_secs(5);
const NAMESPACE: &str = "latency";
/// Of the probe.
const PORT: u16 = 7777;

/// Measures policies, pods of other nodes and backends of Services.
pub fn rows() -> Result<Vec<Row>> {
    let world = World::start("the section latency", 2)?;
    let mut ready = Vec::new();
    for number in [1, 2] {
        let began = Instant::now();
        world.start_agent(number)?;
        world.lab.node(number).wait_ready()?;
        ready.push(began.elapsed().as_secs_f64());
    }
    world.namespace(NAMESPACE)?;
    let client = world.pod(1, NAMESPACE, "client", &json!({"app": "client"}))?;
    let server = world.pod(2, NAMESPACE, "server", &json!({"app": "server"}))?;
    let mut rows = policies(&world, &client, &server)?;
    rows.extend(remote_pods(&world)?);
    rows.extend(slices(&world)?);
    rows.push(burst(&world)?);
    rows.push(Row::new("agent/start_to_ready_seconds", "s", median(ready)).at_most(1.0));
    rows.push(Row::new("agent/rss_mib", "MiB", memory(agent(world.lab.node(2))?, "VmRSS:")?));
    Ok(rows)
}

fn rows_of(name: &str, samples: &[Duration], p50: f64, p99: Option<f64>) -> Vec<Row> {
    let milliseconds = |share| quantile(samples, share).as_secs_f64() * 1e3;
    let row = |quantile: &str, value| Row::new(format!("latency/{name}/{quantile}_ms"), "ms", value);
    let last = row("p99", milliseconds(0.99));
    vec![
        row("p50", milliseconds(0.5)).at_most(p50),
        match p99 {
            Some(aim) => last.at_most(aim),
            None => last,
        },
    ]
}

/// Datagrams from one pod to another, and when the last of them came.
pub struct Probe {
    began: Instant,
    last: Arc<AtomicU64>,
    stopped: Arc<AtomicBool>,
}

impl Probe {
    /// From now on.
    pub fn start(from: &Pod, to: &Pod) -> Result<Self> {
        let probe = Self { began: Instant::now(), last: Arc::default(), stopped: Arc::default() };
        let receiver = to.space().run(|| UdpSocket::bind(("0.0.0.0", PORT)))?;
        receiver.set_read_timeout(Some(SILENCE))?;
        let (began, last, stopped) = (probe.began, probe.last.clone(), probe.stopped.clone());
        thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if receiver.recv(&mut [0; 16]).is_ok() {
                    last.store(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
                }
            }
        });
        let target = (to.address(true), PORT);
        let sender = from.space().run(|| UdpSocket::bind(("0.0.0.0", 0)))?;
        let stopped = probe.stopped.clone();
        thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // What policy refuses is no matter.
                let _ = sender.send_to(b"weir", target);
                thread::sleep(PERIOD);
            }
        });
        Ok(probe)
    }

    fn last(&self) -> Duration {
        Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }

    /// How long after `since` the last datagram came, when none comes any more.
    pub fn silent_after(&self, since: Instant) -> Result<Duration> {
        let since = since - self.began;
        while self.began.elapsed().saturating_sub(self.last()) < SILENCE {
            if self.began.elapsed() > since + PATIENCE {
                bail!("packets are still let through {PATIENCE:?} after the answer");
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(self.last().saturating_sub(since))
    }

    /// How long after `since` a datagram came; none came before it for a while.
    pub fn heard_after(&self, since: Instant) -> Result<Duration> {
        let since = since - self.began;
        let before = self.last();
        loop {
            let last = self.last();
            if last != before || last > since {
                return Ok(last.saturating_sub(since));
            }
            if self.began.elapsed() > since + PATIENCE {
                bail!("no packet is let through {PATIENCE:?} after the answer");
            }
            thread::sleep(Duration::from_micros(100));
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

fn policies(world: &World, from: &Pod, to: &Pod) -> Result<Vec<Row>> {
    let api: Api<NetworkPolicy> = Api::namespaced(world.client.clone(), NAMESPACE);
    let apply = |who: &str| -> Result<Instant> {
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "server"},
            "spec": {"podSelector": {"matchLabels": {"app": "server"}},
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": who}}}]}]},
        });
        let parameters = PatchParams::apply("bench").force();
        world.runtime.block_on(api.patch("server", &parameters, &Patch::Apply(&policy)))?;
        Ok(Instant::now())
    };
    let probe = Probe::start(from, to)?;
    let (mut first, mut change, mut removal) = (Vec::new(), Vec::new(), Vec::new());
    thread::sleep(APART);
    for _ in 0..ROUNDS {
        first.push(probe.silent_after(apply("nobody")?)?);
        thread::sleep(APART);
        change.push(probe.heard_after(apply("client")?)?);
        thread::sleep(APART);
        change.push(probe.silent_after(apply("nobody")?)?);
        thread::sleep(APART);
        world.runtime.block_on(api.delete("server", &DeleteParams::default()))?;
        removal.push(probe.heard_after(Instant::now())?);
        thread::sleep(APART);
    }
    let cases = [("policy/first", first), ("policy/change", change), ("policy/removal", removal)];
    Ok(cases.iter().flat_map(|(name, samples)| rows_of(name, samples, 20.0, Some(100.0))).collect())
}

/// Waits until a row of a map is another than `before`; how long after `since`.
pub fn changed_after(
    map: &PinnedMap,
    key: &[u8],
    before: &Option<Vec<u8>>,
    since: Instant,
) -> Result<Duration> {
    while map.get(key)? == *before {
        if since.elapsed() > PATIENCE {
            bail!("the map is as it was {PATIENCE:?} later");
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(since.elapsed())
}

/// An address as the maps' keys have it.
pub fn address_key(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// From the end of a pod's ADD to its address in the other node's map.
fn remote_pods(world: &World) -> Result<Vec<Row>> {
    let map = world.map(1, "addresses")?;
    let (mut samples, mut pods) = (Vec::new(), Vec::new());
    for number in 0..ROUNDS {
        let pod = world.pod(2, NAMESPACE, &format!("remote-{number}"), &json!({"app": "remote"}))?;
        samples.push(changed_after(&map, &address_key(pod.address(true)), &None, Instant::now())?);
        pods.push(pod);
        thread::sleep(APART);
    }
    Ok(rows_of("remote_pod", &samples, 100.0, None))
}

/// How often a node writes its endpoints while a hundred pods start on it.
fn burst(world: &World) -> Result<Row> {
    let writes = Writes::count(world, world.lab.node(2).name())?;
    let before = world.lab.node(2).map("endpoints")?.len();
    let pods: Vec<Result<Pod>> = thread::scope(|scope| {
        let start = |number| {
            let name = format!("burst-{number}");
            scope.spawn(move || world.pod(2, NAMESPACE, &name, &json!({"app": "burst"})))
        };
        let starting: Vec<_> = (0..BURST).map(start).collect();
        starting.into_iter().map(|pod| pod.join().expect("a panic is the bench's end")).collect()
    });
    let pods = pods.into_iter().collect::<Result<Vec<Pod>>>()?;
    let there = world.map(1, "addresses")?;
    for pod in &pods {
        changed_after(&there, &address_key(pod.address(true)), &None, Instant::now())?;
    }
    ensure!(world.lab.node(2).map("endpoints")?.len() >= before + BURST, "fewer endpoints than pods");
    Ok(Row::new(format!("burst/writes_for_{BURST}_pods"), "writes", writes.so_far() as f64).at_most(10.0))
}

/// From the answer to a changed EndpointSlice to the Service's row in the kernel.
fn slices(world: &World) -> Result<Vec<Row>> {
    let address: IpAddr = "10.96.7.7".parse()?;
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": "web"},
        "spec": {"clusterIP": address, "ports": [{"name": "http", "port": 80}]},
    }))?;
    let services: Api<Service> = Api::namespaced(world.client.clone(), NAMESPACE);
    world.runtime.block_on(services.create(&Default::default(), &service))?;
    let api: Api<EndpointSlice> = Api::namespaced(world.client.clone(), NAMESPACE);
    let slice = |number: usize| -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": [format!("10.1.2.{}", 100 + number)], "conditions": {"ready": true}}],
        })
    };
    let map = world.map(1, "services")?;
    let key = [&address_key(address)[..], &80_u16.to_be_bytes(), &[6, 0]].concat();
    let mut samples = Vec::new();
    changed_after(&map, &key, &None, Instant::now())?;
    for number in 0..ROUNDS {
        let before = map.get(&key)?;
        let parameters = PatchParams::apply("bench").force();
        world.runtime.block_on(api.patch("web-1", &parameters, &Patch::Apply(&slice(number))))?;
        samples.push(changed_after(&map, &key, &before, Instant::now())?);
        thread::sleep(APART);
    }
    Ok(rows_of("endpoint_slice", &samples, 20.0, None))
}
