//! What survives: faults while requests run through everything and are counted.
//!
//! A row of the table is one fault: the requests made meanwhile, how many of them failed, and
//! how many may have. Only what the fault itself breaks may fail: the pods of a dead node.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use weir::kube::crd::SCHEMA_VERSION_ANNOTATION;

use crate::kubernetes::Node;
use crate::kubernetes::prober::Via;
use crate::lab::METRICS;
use crate::life::no_device_is_left;
use crate::world::{PATIENCE, PORT, Pod, Requests, Row, UDP_PORT, World, both, pause};

const AGENTS: &str = "app.kubernetes.io/name=weir-agent";

/// A fault, and what of it is worth telling.
struct Fault {
    name: &'static str,
    run: fn(&mut World) -> Result<String>,
    /// True if requests to pods of node 3 may fail meanwhile: those to Services, which have pods there.
    breaks_node: bool,
}

/// Requests of one way, and whether the fault may break them.
struct Running {
    requests: Requests,
    may_fail: bool,
}

const FAULTS: &[Fault] = &[
    Fault { name: "nothing", run: nothing, breaks_node: false },
    Fault { name: "agents_rolled", run: agents_rolled, breaks_node: false },
    Fault { name: "agent_killed_ten_times", run: agent_killed_ten_times, breaks_node: false },
    Fault { name: "policy_written_while_the_agent_is_down", run: policy_while_down, breaks_node: false },
    Fault { name: "hundred_pods_at_once", run: hundred_pods_at_once, breaks_node: false },
    Fault { name: "etcd_compacted_under_the_watch", run: etcd_compacted, breaks_node: false },
    Fault { name: "api_server_away", run: api_server_away, breaks_node: false },
    Fault { name: "operator_leader_killed", run: operator_leader_killed, breaks_node: false },
    Fault { name: "definitions_upgraded", run: definitions_upgraded, breaks_node: false },
    Fault { name: "node_killed_and_replaced", run: node_replaced, breaks_node: true },
];

/// Runs them and prints the table; true if nothing failed that should not. EXPECTED are failures of
/// requests to what the fault itself took away.
pub fn run(world: &mut World, is_wanted: impl Fn(&str) -> bool) -> Result<bool> {
    let mut is_right = true;
    println!("{:<40} {:>8} {:>7} {:>8} {:>9}  ", "FAULT", "REQUESTS", "FAILED", "EXPECTED", "GAP");
    for fault in FAULTS.iter().filter(|fault| is_wanted(fault.name)) {
        let running = start(world, fault.breaks_node)?;
        let told = (fault.run)(world);
        let (mut made, mut failed, mut expected, mut gap, mut by) = (0, 0, 0, Duration::ZERO, Vec::new());
        for Running { requests, may_fail } in running {
            let name = requests.name.clone();
            let count = requests.stop()?;
            made += count.made;
            if may_fail {
                expected += count.failed;
            } else {
                failed += count.failed;
                gap = gap.max(count.longest_gap);
            }
            if count.failed > 0 {
                by.push(format!("{name}: {} of {}", count.failed, count.made));
            }
        }
        let left = no_device_is_left(world);
        let is_as_expected = failed == 0 && told.is_ok() && left.is_ok();
        let told =
            told.and_then(|told| left.map(|()| told)).unwrap_or_else(|error| format!("FAILED: {error:#}"));
        println!(
            "{:<40} {made:>8} {failed:>7} {expected:>8} {:>6} ms  {told} {}",
            fault.name,
            gap.as_millis(),
            by.join(", ")
        );
        is_right &= is_as_expected;
    }
    Ok(is_right)
}

/// Requests along every way: same node and other, both families, UDP, Services.
fn start(world: &World, breaks_node: bool) -> Result<Vec<Running>> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    let (client, near, far) = (&clients[0], &servers[0], &servers[1]);
    let always = |requests| Running { requests, may_fail: false };
    let mut running = vec![
        always(world.request("same node", client, Via::Http, near.at(true, PORT))?),
        always(world.request("other node", client, Via::Http, far.at(true, PORT))?),
        always(world.request("other node IPv6", client, Via::Http, far.at(false, PORT))?),
        always(world.request("other node UDP", client, Via::Udp, far.at(true, UDP_PORT))?),
    ];
    for address in world.service("e2e", "server")? {
        let name = if address.is_ipv4() { "service" } else { "service IPv6" };
        let requests = world.request(name, client, Via::Http, SocketAddr::new(address, 80))?;
        running.push(Running { requests, may_fail: breaks_node });
    }
    Ok(running)
}

/// What the requests are worth by themselves.
fn nothing(_world: &mut World) -> Result<String> {
    pause(Duration::from_secs(10));
    Ok(String::new())
}

fn agents_rolled(world: &mut World) -> Result<String> {
    let began = Instant::now();
    world
        .cluster
        .kubectl(&["--namespace", "weir-system", "rollout", "restart", "daemonset/weir-agent"], "")?;
    world.rollout("weir-system", "daemonset/weir-agent")?;
    Ok(format!("took {:.1} s", began.elapsed().as_secs_f32()))
}

fn agent_of(world: &World, number: usize) -> Result<Pod> {
    let node = world.cluster.node(number).name();
    let agents = world.pods("weir-system", AGENTS)?;
    agents
        .into_iter()
        .find(|agent| agent.node == node)
        .with_context(|| format!("no agent is ready on {node}"))
}

fn is_ready(node: &Node) -> bool {
    let address = METRICS.parse().expect("METRICS is an address");
    matches!(node.space().http_get(address, "/readyz"), Ok((200, _)))
}

fn agent_killed_ten_times(world: &mut World) -> Result<String> {
    let mut longest = Duration::ZERO;
    for _ in 0..10 {
        let agent = agent_of(world, 1)?;
        kill(agent.process()?, Signal::SIGKILL)?;
        let began = Instant::now();
        world.cluster.wait("the agent to be ready again", PATIENCE, || {
            let is_another = agent_of(world, 1).is_ok_and(|now| now.process().ok() != agent.process().ok());
            Ok(is_another && is_ready(world.cluster.node(1)))
        })?;
        longest = longest.max(began.elapsed());
    }
    Ok(format!("ready again after at most {:.1} s", longest.as_secs_f32()))
}

const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-host, namespace: e2e}
spec:
  podSelector: {matchLabels: {app: client}}
  ingress: [{from: [{podSelector: {matchLabels: {app: nobody}}}]}]
";

/// kubelet is held, so that the agent stays down while the policy is written.
fn policy_while_down(world: &mut World) -> Result<String> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    let node = world.cluster.node(1);
    let kubelet = process_of(node, "kubelet")?;
    let agent = agent_of(world, 1)?;
    let denied = (Via::Http, clients[0].at(true, PORT));
    ensure!(world.probe(&servers[1], &[denied])?[0].is_answered(), "denied before there is a policy");
    kill(kubelet, Signal::SIGSTOP)?;
    let killed = kill(agent.process()?, Signal::SIGKILL);
    let applied = killed.map_err(Into::into).and_then(|()| world.cluster.apply(DENY));
    let still = world.probe(&servers[1], &[denied]);
    kill(kubelet, Signal::SIGCONT)?;
    applied?;
    ensure!(still?[0].is_answered(), "enforced by no agent");
    world.cluster.wait("the agent to be ready", PATIENCE, || Ok(is_ready(node)))?;
    let outcome = world.probe(&servers[1], &[denied])?.remove(0);
    world.cluster.kubectl(&["delete", "--filename", "-"], DENY)?;
    ensure!(!outcome.is_answered(), "ready, and the policy is not enforced");
    world.cluster.wait("the pod to be open again", PATIENCE, || {
        Ok(world.probe(&servers[1], &[denied])?[0].is_answered())
    })?;
    Ok("enforced when ready".to_owned())
}

fn process_of(node: &Node, name: &str) -> Result<Pid> {
    let is_it =
        |pid: &Pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    node.daemon().processes().into_iter().find(is_it).with_context(|| format!("no {name} on {}", node.name()))
}

const HUNDRED: &str = include_str!("hundred.yaml");

fn hundred_pods_at_once(world: &mut World) -> Result<String> {
    let writes = |world: &World| -> Result<i64> {
        let objects = world.cluster.get(&["nodeendpoints.weir.dev"])?;
        let of_node =
            objects["items"].as_array().into_iter().flatten().filter(|row| row["spec"]["node"] == "node2");
        Ok(of_node.filter_map(|object| object["metadata"]["generation"].as_i64()).sum())
    };
    let before = writes(world)?;
    let began = Instant::now();
    world.cluster.apply(HUNDRED)?;
    world.rollout("hundred", "deployment/hundred")?;
    let (took, written) = (began.elapsed(), writes(world)? - before);
    world.cluster.kubectl(&["delete", "namespace", "hundred"], "")?;
    Ok(format!("ready after {:.1} s, {written} writes of the agent", took.as_secs_f32()))
}

/// What an agent says when the API server answers 410.
const EXPIRED: &str = "the server has forgotten the version to go on from";

/// How often the agent was told so.
fn expired(world: &World, agent: &Pod) -> Result<usize> {
    let log = world.cluster.kubectl(&["--namespace", "weir-system", "logs", &agent.name], "")?;
    Ok(log.matches(EXPIRED).count())
}

/// The agent sleeps while the history that its watches would go on from is thrown away.
fn etcd_compacted(world: &mut World) -> Result<String> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    let denied = (Via::Http, clients[0].at(true, PORT));
    let pod = agent_of(world, 1)?;
    let agent = pod.process()?;
    let before = expired(world, &pod)?;
    kill(agent, Signal::SIGSTOP)?;
    let changed = compact(world);
    kill(agent, Signal::SIGCONT)?;
    changed?;
    world.cluster.wait("a policy of the time that was compacted away", PATIENCE, || {
        Ok(!world.probe(&servers[1], &[denied])?[0].is_answered())
    })?;
    world.cluster.kubectl(&["delete", "--filename", "-"], DENY)?;
    world.cluster.wait("the pod to be open again", PATIENCE, || {
        Ok(world.probe(&servers[1], &[denied])?[0].is_answered())
    })?;
    let times = expired(world, &pod)? - before;
    ensure!(times > 0, "no watch was told that its version is gone: nothing was tried");
    Ok(format!("{times} watches began anew"))
}

fn compact(world: &World) -> Result<()> {
    world.cluster.apply(DENY)?;
    let control = world.cluster.control_plane();
    // A new API server has no history of its own.
    control.kill_api_server()?;
    let answer = etcd(world, "/v3/kv/range", &json!({"key": "AA=="}))?;
    let revision = answer["header"]["revision"].as_str().context("etcd tells no revision")?.to_owned();
    etcd(world, "/v3/kv/compaction", &json!({"revision": revision, "physical": true}))?;
    control.start_api_server()?;
    world.cluster.wait_api_server()
}

fn etcd(world: &World, path: &str, request: &Value) -> Result<Value> {
    let body = request.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    world.cluster.control_plane().space().run(move || {
        let mut stream = TcpStream::connect("127.0.0.1:2379").context("connecting to etcd")?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
        if !head.starts_with("HTTP/1.1 200") {
            bail!("etcd: {answer}");
        }
        Ok(serde_json::from_str(body)?)
    })
}

const WEB: &str = include_str!("web.yaml");

/// AWAY=seconds, by default two minutes. Agents follow within seconds of its return, and then pods restart.
///
/// That takes Kubernetes up to two minutes more: after a long outage the watches of its controllers and
/// kubelets pause 30 to 60 s, find that their version is forgotten, and pause as long again before they
/// list (client-go, reflector.go). With --vmodule=reflector=4 kube-controller-manager says so of a server
/// that was ready at 06:46:37:
///
///     06:46:19 "Watch failed - backing off" type="*v1.ReplicaSet" err="... connection refused"
///     06:47:11 "Watch closed" type="*v1.ReplicaSet" err="too old resource version: 1529 (1552)"
///     06:47:55 "Listing and watching" type="*v1.ReplicaSet"
fn api_server_away(world: &mut World) -> Result<String> {
    let away = std::env::var("AWAY").ok().and_then(|away| away.parse().ok()).unwrap_or(120);
    world.cluster.apply(WEB)?;
    world.rollout("e2e", "deployment/web")?;
    let control = world.cluster.control_plane();
    control.kill_api_server()?;
    pause(Duration::from_secs(away));
    control.start_api_server()?;
    world.cluster.wait_api_server()?;
    let began = Instant::now();
    let (clients, servers) = (world.clients()?, world.servers()?);
    let denied = (Via::Http, clients[0].at(true, PORT));
    world.cluster.apply(DENY)?;
    world.cluster.wait("a policy of the time after its return", PATIENCE, || {
        Ok(!world.probe(&servers[1], &[denied])?[0].is_answered())
    })?;
    let followed = began.elapsed();
    world.cluster.kubectl(&["delete", "--filename", "-"], DENY)?;
    world.cluster.kubectl(&["--namespace", "e2e", "rollout", "restart", "deployment/web"], "")?;
    world.rollout("e2e", "deployment/web")?;
    let restarted = began.elapsed();
    let client = &clients[0];
    let row = |address| Row {
        from: client.clone(),
        via: Via::Http,
        to: SocketAddr::new(address, 80),
        is_allowed: true,
    };
    world.expect(&world.service("e2e", "web")?.into_iter().map(row).collect::<Vec<_>>())?;
    world.cluster.kubectl(&["delete", "--filename", "-"], WEB)?;
    Ok(format!(
        "away {away} s; after its return a policy was enforced within {:.1} s, pods restarted within {:.1} s",
        followed.as_secs_f32(),
        restarted.as_secs_f32()
    ))
}

fn operator_leader_killed(world: &mut World) -> Result<String> {
    let Ok(operators) = world.pods("weir-system", "app.kubernetes.io/name=weir-operator") else {
        return Ok("SKIPPED: no operator is deployed".to_owned());
    };
    let lease = || -> Result<String> {
        let lease = world.cluster.get(&["lease", "--namespace", "weir-system", "weir-operator"])?;
        Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
    };
    let leader = lease()?;
    let operator = operators.iter().find(|operator| leader.contains(&operator.name)).context("no leader")?;
    let began = Instant::now();
    kill(operator.process()?, Signal::SIGKILL)?;
    world.cluster.kubectl(&["--namespace", "weir-system", "delete", "pod", &operator.name, "--force"], "")?;
    world.cluster.wait("another leader", PATIENCE, || {
        let now = lease()?;
        Ok(!now.is_empty() && now != leader)
    })?;
    Ok(format!("another led after {:.1} s", began.elapsed().as_secs_f32()))
}

/// The leader finds definitions of an older operator, and brings them up to date.
fn definitions_upgraded(world: &mut World) -> Result<String> {
    let kind = "customresourcedefinitions.apiextensions.k8s.io";
    let names = ["identities.weir.dev", "nodeendpoints.weir.dev", "weirnodes.weir.dev"];
    let versions = |world: &World| -> Result<Vec<String>> {
        let version = |name: &&str| {
            let definition = world.cluster.get(&[kind, name])?;
            let version = &definition["metadata"]["annotations"][SCHEMA_VERSION_ANNOTATION];
            Ok(version.as_str().unwrap_or_default().to_owned())
        };
        names.iter().map(version).collect()
    };
    let before = versions(world)?;
    for name in names {
        let older = json!({
            "metadata": {"annotations": {SCHEMA_VERSION_ANNOTATION: "0"}},
            "spec": {"names": {"shortNames": ["older"]}},
        });
        world
            .cluster
            .kubectl(&["patch", kind, name, "--type", "merge", "--patch", &older.to_string()], "")?;
    }
    let began = Instant::now();
    let operators = "deployment/weir-operator";
    world.cluster.kubectl(&["--namespace", "weir-system", "rollout", "restart", operators], "")?;
    world.rollout("weir-system", operators)?;
    world.cluster.wait("definitions of this version", PATIENCE, || Ok(versions(world)? == before))?;
    Ok(format!("up to date after {:.1} s", began.elapsed().as_secs_f32()))
}

/// Node 3 loses its power, leaves the cluster, and comes back empty under its old name.
fn node_replaced(world: &mut World) -> Result<String> {
    world.cluster.kubectl(&["delete", "node", "node3", "--wait=false"], "")?;
    let began = Instant::now();
    world.cluster.replace_node(3)?;
    crate::world::load_weir(world)?;
    // The controller of DaemonSets takes its time to see the node: a rollout may be complete without it.
    for app in ["app=server", "app=client", "app=host"] {
        world.cluster.wait(&format!("a pod with {app} on node3"), Duration::from_secs(120), || {
            Ok(world.pods("e2e", app)?.iter().any(|pod| pod.node == "node3"))
        })?;
    }
    let took = began.elapsed();
    let (clients, servers) = (world.clients()?, world.servers()?);
    let mut rows = Vec::new();
    for client in &clients {
        for server in &servers {
            rows.extend(both(client, Via::Http, server, PORT, true));
        }
    }
    world.expect(&rows)?;
    Ok(format!("its pods ran again after {:.1} s", took.as_secs_f32()))
}
