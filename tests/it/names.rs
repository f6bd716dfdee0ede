//! Names of DNS on real nodes: who may ask for which, and who may speak to what an answer says.

pub mod zone;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::{Lab, OUTSIDE, Pod, Server, ServicePort, Setup, Space, Traffic, Via, wait_for};
use crate::require::require_lab;
use zone::{By, NXDOMAIN, REFUSED, Zone, ask, look_up};

const BOTH: [By; 2] = [By::Datagram, By::Connection];

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Lets pods with the label `app: client` ask everybody for some names, and speak to nobody else.
pub fn allow_names(lab: &Lab, rules: &str, more: &str) -> Result<()> {
    lab.manifests().apply(&format!(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: names, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: client}}}}
  egress:
  - toEntities: [all]
    toPorts: [{{ports: [{{port: '53', protocol: ANY}}], rules: {{dns: {rules}}}}}]
{more}"
    ))
}

fn only_allowed_names_are_answered(routing: &str) -> Result<()> {
    let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    let (near, far) = (lab.pod(1, "kube-system/near").create()?, lab.pod(2, "kube-system/far").create()?);
    let zones = [near.space(), far.space(), lab.outside()]
        .into_iter()
        .map(Zone::start)
        .collect::<Result<Vec<_>>>()?;
    let addresses = ["198.51.100.1", "2001:db8::1"].map(address);
    for zone in &zones {
        for name in ["allowed.test", "a.sub.test", "denied.test"] {
            zone.set(name, &addresses, 60);
        }
    }
    let port = |name: &str, protocol| ServicePort { name: name.to_owned(), protocol, port: 53, target: 53 };
    let cluster_ips = ["10.96.0.10", "fd00:96::10"];
    lab.service("kube-system/dns", &cluster_ips, &[port("dns", "UDP"), port("dns-tcp", "TCP")], &[&far])?;
    allow_names(&lab, "[{matchName: Allowed.test}, {matchPattern: '*.sub.test'}]", "")?;
    let of_pods = [&near, &far].into_iter().flat_map(|pod| pod.addresses().to_vec());
    let of_world = OUTSIDE[..2].iter().chain(&cluster_ips).map(|text| address(text));
    for server in of_pods.chain(of_world) {
        for by in BOTH {
            let what = format!("{routing}: {server} by {by:?}");
            wait_for(&what, || Ok(ask(client.space(), server, by, "denied.test")? == Some((REFUSED, 0))))?;
            for name in ["allowed.test", "a.sub.test"] {
                let found = look_up(&lab, client.space(), server, by, name).context(what.clone())?;
                ensure!(found == addresses, "{what}: {name} has {found:?}");
            }
            for name in ["denied.test", "sub.test", "a.b.sub.test"] {
                let found = look_up(&lab, client.space(), server, by, name).context(what.clone())?;
                ensure!(found.is_empty(), "{what}: {name} has {found:?}");
            }
        }
    }
    let metric = |verdict: &str| {
        let labels = ["protocol=\"dns\"", &format!("verdict=\"{verdict}\"")];
        lab.node(1).metric("weir_proxy_requests_total", &labels)
    };
    wait_for("requests to be counted", || Ok(metric("forwarded")? > 16.0 && metric("denied")? > 24.0))?;
    wait_for("the proxy to say how it is", || {
        Ok(lab.node(1).metric("weir_proxy_resident_bytes", &[])? > 1e6)
    })?;
    for zone in &zones {
        let asked = zone.asked();
        ensure!(asked.iter().any(|name| name == "a.sub.test"), "{routing}: {asked:?}");
        let is_allowed = |name: &String| ["allowed.test", "a.sub.test"].contains(&name.as_str());
        let stray: Vec<_> = asked.iter().filter(|name| !is_allowed(name)).collect();
        // Before the policy was in force somebody may have been asked.
        ensure!(stray.iter().all(|name| *name == "denied.test"), "{routing}: {stray:?}");
    }
    Ok(())
}

#[test]
fn only_allowed_names_are_answered_by_the_tunnel() -> Result<()> {
    require_lab!();
    only_allowed_names_are_answered("tunnel")
}

#[test]
fn only_allowed_names_are_answered_by_native_routing() -> Result<()> {
    require_lab!();
    only_allowed_names_are_answered("native")
}

/// Where names lead: a server outside of the cluster with all addresses of two prefixes.
struct World {
    lab: Lab,
    client: Pod,
    resolver: IpAddr,
    zone: Zone,
    _dns: Pod,
    _server: Server,
}

const WEB: u16 = 7070;
const DNS_RULES: &str = "[{matchPattern: '**.test'}]";
const BY_NAME: &str = "  - toFQDNs: [{matchName: Open.Test}, {matchPattern: '*.open.test'}]
    toPorts: [{ports: [{port: '7070', protocol: TCP}]}]
";

/// Address `number` of the server's prefixes.
fn of_server(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [IpAddr::from([198, 18, high, low]), address(&format!("2001:db8:aaaa::{number:x}"))]
}

impl World {
    fn start(arguments: &[&str]) -> Result<Self> {
        let agent_arguments = arguments.iter().map(ToString::to_string).collect();
        let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
        lab.outside().configure(&[
            "route add local 198.18.0.0/16 dev lo",
            "route add local 2001:db8:aaaa::/64 dev lo",
        ])?;
        let server = Server::start(lab.outside(), "web", &[Ipv6Addr::UNSPECIFIED.into()], &[WEB, WEB + 1])?;
        let client = lab.pod(1, "shop/client").label("app", "client").create()?;
        let dns = lab.pod(1, "kube-system/dns").create()?;
        let zone = Zone::start(dns.space())?;
        let world = Self { client, resolver: dns.address(true), zone, _dns: dns, _server: server, lab };
        allow_names(&world.lab, DNS_RULES, BY_NAME)?;
        let is_refused = || {
            let answer = ask(world.client.space(), world.resolver, By::Datagram, "not.allowed")?;
            Ok(answer.is_some_and(|(code, _)| code == REFUSED))
        };
        wait_for("the policy to be in force", is_refused)?;
        Ok(world)
    }

    fn reaches(&self, target: IpAddr) -> bool {
        self.client.probe(Via::Tcp, (target, WEB).into()).is_answered()
    }

    /// How often a packet to an address, or to any, was denied.
    fn denied(&self, target: Option<IpAddr>) -> Result<usize> {
        let flows = self.lab.node(1).flows(&["--verdict", "dropped", "--port", "7070"])?;
        let is_it = |flow: &&Value| target.is_none_or(|it| flow["IP"]["destination"] == it.to_string());
        Ok(flows.iter().filter(is_it).count())
    }

    /// An address is reached, and no packet to it is denied on the way to that.
    fn expect_open(&self, target: IpAddr) -> Result<()> {
        let before = self.denied(Some(target))?;
        wait_for(&format!("{target} to answer"), || Ok(self.reaches(target)))?;
        let denied = self.denied(Some(target))?.saturating_sub(before);
        ensure!(denied == 0, "{target}: {denied} packets were denied");
        Ok(())
    }

    /// Asks for a name, and takes what comes.
    fn ask(&self, name: &str) -> Result<()> {
        let answer = ask(self.client.space(), self.resolver, By::Datagram, name)?;
        ensure!(answer.is_some_and(|(code, _)| code == 0), "{name}: {answer:?}");
        Ok(())
    }

    /// The row of `weir names list` of a name.
    fn listed(&self, name: &str) -> Result<Option<Value>> {
        let rows = self.lab.node(1).weir_json(&["names", "list"])?;
        let rows = rows.as_array().context("a list")?;
        Ok(rows.iter().find(|row| row["name"] == name).cloned())
    }
}

#[test]
fn an_answer_opens_its_addresses_before_the_pod_has_it() -> Result<()> {
    require_lab!();
    let world = World::start(&[])?;
    let (lab, client) = (&world.lab, &world.client);
    world.zone.set("open.test", &of_server(1), 300);
    world.zone.set("closed.test", &of_server(2), 300);
    ensure!(!world.reaches(of_server(1)[0]), "nobody has asked");
    let found = look_up(lab, client.space(), world.resolver, By::Datagram, "open.test")?;
    ensure!(found == of_server(1), "{found:?}");
    let closed = look_up(lab, client.space(), world.resolver, By::Connection, "closed.test")?;
    ensure!(closed == of_server(2), "{closed:?}");
    for target in of_server(1) {
        world.expect_open(target).context("it has an allowed name")?;
        let other_port = client.probe(Via::Tcp, (target, WEB + 1).into());
        ensure!(!other_port.is_answered(), "{target} at another port: {other_port}");
    }
    ensure!(!of_server(2).into_iter().any(|target| world.reaches(target)), "no rule names closed.test");
    ensure!(!world.reaches(of_server(3)[0]), "no name has it");
    let row = world.listed("open.test")?.context("a row of open.test")?;
    ensure!(row["pod"]["name"] == "client" && row["policies"][0]["name"] == "names", "{row}");
    ensure!(row["addresses"].as_array().is_some_and(|all| all.len() == 2), "{row}");

    let listed = lab.node(1).weir(&["policy", "list"])?;
    ensure!(listed.contains("dns,names"), "{listed}");
    let explain = |to: &str, port: &str| {
        lab.node(1).weir(&["policy", "explain", "--from", "shop/client", "--to", to, "--port", port])
    };
    let (by_name, by_proxy) = (explain("198.18.0.1", "7070")?, explain("198.18.0.2", "53")?);
    ensure!(by_name.contains(": ALLOWED"), "{by_name}");
    ensure!(by_proxy.contains("a proxy judges each request by {\"dns\""), "{by_proxy}");

    // The first packet to an address that was never seen before passes, every time.
    let before = world.denied(None)?;
    for number in 0..150_u16 {
        let (name, targets) = (format!("n{number}.open.test"), of_server(1000 + number));
        world.zone.set(&name, &targets, 30);
        world.ask(&name)?;
        wait_for(&name, || Ok(world.reaches(targets[0])))?;
    }
    ensure!(world.denied(None)? == before, "a connection was denied after its answer");
    ensure!(lab.node(1).metric("weir_names_late_total", &[])? == 0.0, "some answer passed too early");
    let flows = lab.node(1).flows(&["--port", "7070"])?;
    let says = |flow: &Value| flow["destination"]["labels"].to_string().contains("fqdn:*.open.test");
    ensure!(flows.iter().any(says), "no flow names the rule: {:?}", flows.last());
    Ok(())
}

#[test]
fn names_survive_the_agent_and_are_learned_without_it() -> Result<()> {
    require_lab!();
    let world = World::start(&[])?;
    let node = world.lab.node(1);
    world.zone.set("open.test", &of_server(1), 300);
    world.zone.set("new.open.test", &of_server(2), 300);
    world.ask("open.test")?;
    world.expect_open(of_server(1)[0])?;
    let file = node.directory().join("state/names.json");
    wait_for("the name to be on the disk", || {
        Ok(std::fs::read_to_string(&file).is_ok_and(|text| text.contains("open.test")))
    })?;

    node.kill_agent()?;
    wait_for("what was learned to count without an agent", || Ok(world.reaches(of_server(1)[0])))?;
    let began = Instant::now();
    world.ask("open.test")?;
    world.ask("new.open.test")?;
    ensure!(began.elapsed() < Duration::from_secs(2), "answers wait for nobody: {:?}", began.elapsed());
    ensure!(!world.reaches(of_server(2)[0]), "nobody has put it into the maps");
    node.start_agent()?;
    node.wait_ready()?;
    world.expect_open(of_server(1)[0]).context("the next agent knows it")?;
    wait_for("what was told without an agent to be learned", || Ok(world.reaches(of_server(2)[0])))
}

#[test]
fn answers_open_nothing_of_the_cluster_and_no_more_than_they_may() -> Result<()> {
    require_lab!();
    let world = World::start(&["--names-per-endpoint-max", "100"])?;
    let lab = &world.lab;
    let victim = lab.pod(1, "shop/victim").create()?;
    let other = lab.pod(1, "shop/other").label("app", "other").create()?;
    let _server = Server::start(victim.space(), "victim", &[Ipv6Addr::UNSPECIFIED.into()], &[WEB])?;
    lab.manifests().apply(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: other, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: other}}
  egress:
  - toFQDNs: [{matchName: another.test}]
",
    )?;
    let node_address = lab.node(1).addresses()[0];
    let free = address("10.1.0.250");
    let metadata = address("169.254.169.254");
    let outside = of_server(5)[0];
    let all = [victim.address(true), node_address, free, metadata, address("127.0.0.1"), outside];
    world.zone.set("evil.open.test", &all, 300);
    world.ask("evil.open.test")?;
    world.expect_open(outside).context("what is outside counts")?;
    for target in &all[..4] {
        ensure!(!world.reaches(*target), "{target} was opened by a name");
    }
    wait_for("the other pod to be closed", || {
        Ok(!other.probe(Via::Tcp, (victim.address(true), WEB).into()).is_answered())
    })?;
    ensure!(
        !other.probe(Via::Tcp, (outside, WEB).into()).is_answered(),
        "an answer counts for the rules of the pod that asked"
    );
    ensure!(lab.node(1).metric("weir_names_refused_total", &[])? >= 2.0);

    // More addresses than one name may have, and then more names than one pod may have.
    let many: Vec<IpAddr> = (0..2000).map(|number| of_server(2000 + number)[0]).collect();
    world.zone.set("many.open.test", &many, 300);
    let answer = ask(world.client.space(), world.resolver, By::Connection, "many.open.test")?;
    ensure!(answer == Some((0, 2000)), "{answer:?}");
    for number in 0..20 {
        let name = format!("m{number}.open.test");
        world.zone.set(&name, &many[number * 10..number * 10 + 10], 300);
        world.ask(&name)?;
    }
    world.expect_open(many[195]).context("the last answer counts")?;
    ensure!(lab.node(1).metric("weir_names_addresses", &[])? <= 100.0);
    // The proxy reads a thousand records of an answer.
    ensure!(lab.node(1).metric("weir_names_evicted_total", &[])? > 1000.0);
    Ok(())
}

#[test]
fn an_address_counts_until_its_time_has_passed_and_connections_have_ended() -> Result<()> {
    require_lab!();
    let world = World::start(&["--names-min-ttl-seconds", "10"])?;
    world.zone.set("open.test", &[of_server(1)[0], of_server(2)[0]], 1);
    world.ask("open.test")?;
    let kept = Traffic::tcp(world.client.space(), (of_server(1)[0], WEB).into());
    kept.wait_for_answers(1)?;
    world.expect_open(of_server(2)[0])?;
    // Ten seconds, and until it is looked.
    let began = Instant::now();
    while world.denied(Some(of_server(2)[0]))? == 0 {
        ensure!(began.elapsed() < Duration::from_secs(60), "the address counts for ever");
        world.reaches(of_server(2)[0]);
    }
    world.expect_open(of_server(1)[0]).context("a connection runs there")?;
    kept.wait_for_answers(5)?;
    world.ask("open.test")?;
    wait_for("what is asked again to be open again", || Ok(world.reaches(of_server(2)[0])))?;
    kept.stop()?;
    Ok(())
}

/// Serves every connection to an address by a thread of its own, until the test ends.
pub fn serve(space: &Space, address: SocketAddr, answer: fn(&[u8]) -> Vec<u8>) -> Result<()> {
    let listener = space.run(move || TcpListener::bind(address))?;
    space.start(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut bytes = [0; 4096];
            // A client that goes away needs no answer.
            if let Ok(length) = stream.read(&mut bytes) {
                let _ = stream.write_all(&answer(&bytes[..length]));
            }
        }
    });
    Ok(())
}

#[test]
fn what_is_shown_is_not_denied() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    lab.outside().configure(&["route add local 198.18.0.0/16 dev lo"])?;
    let [web, other] = [1, 2].map(|number| SocketAddr::new(of_server(number)[0], 8080));
    serve(lab.outside(), web, |_| b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec())?;
    serve(lab.outside(), other, <[u8]>::to_vec)?;
    lab.manifests().apply(
        "apiVersion: v1
kind: Namespace
metadata: {name: shown, annotations: {weir.dev/visibility: 'http, dns'}}
",
    )?;
    let [shown, plain] = [lab.pod(1, "shown/client").create()?, lab.pod(1, "shop/client").create()?];
    let dns = lab.pod(1, "kube-system/dns").create()?;
    let zone = Zone::start(dns.space())?;
    zone.set("web.test", &[web.ip()], 60);
    let node = lab.node(1);
    wait_for("requests to be shown", || {
        let (status, _) = shown.space().http_get(web, "/hello")?;
        ensure!(status == 200);
        Ok(node.flows(&["--type", "l7"])?.iter().any(|flow| flow.to_string().contains("/hello")))
    })?;
    for pod in [&shown, &plain] {
        ensure!(ask(pod.space(), dns.address(true), By::Datagram, "web.test")? == Some((0, 1)));
        ensure!(pod.space().http_get(web, &format!("/{}", pod.namespace()))?.0 == 200);
        let echoed = pod.space().run(move || -> Result<Vec<u8>> {
            let mut stream = TcpStream::connect(other)?;
            stream.write_all(b"no HTTP at all\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        })?;
        ensure!(echoed == b"no HTTP at all\n", "{echoed:?}");
    }
    wait_for("questions to be shown", || {
        let flows = node.flows(&["--type", "l7"])?;
        Ok(flows.iter().any(|flow| flow["l7"]["dns"]["query"].to_string().contains("web.test")))
    })?;
    let flows = node.flows(&["--type", "l7"])?;
    ensure!(flows.iter().any(|flow| flow.to_string().contains("/shown")));
    ensure!(!flows.iter().any(|flow| flow.to_string().contains("/shop\"")), "nobody asked to see this");
    ensure!(!flows.iter().any(|flow| flow["verdict"] == "DROPPED"), "{flows:?}");

    // What a policy denies is denied, shown or not.
    lab.manifests().apply(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: none, namespace: shown}
spec: {podSelector: {}, policyTypes: [Egress]}
",
    )?;
    wait_for("the policy to be in force", || Ok(shown.space().http_get(web, "/denied").is_err()))
}

/// Stops the proxy of a node, and lets it go on when it is dropped.
struct Stopped(Pid);

impl Stopped {
    fn proxy(directory: &std::path::Path) -> Result<Self> {
        let pid = std::fs::read_to_string(directory.join("state/proxy.pid")).context("reading proxy.pid")?;
        let pid = Pid::from_raw(pid.trim().parse()?);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

#[test]
fn what_the_kernel_judges_needs_neither_the_agent_nor_the_proxy() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup {
        nodes: 2,
        agent_arguments: vec!["--dns-denied=nxdomain".into()],
        ..Setup::default()
    })?;
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    let servers = [lab.pod(1, "kube-system/near").create()?, lab.pod(2, "kube-system/far").create()?];
    let zones = servers.iter().map(|server| Zone::start(server.space())).collect::<Result<Vec<_>>>()?;
    for zone in &zones {
        for name in ["a.test", "a.denied"] {
            zone.set(name, &[address("198.51.100.1"), address("2001:db8::1")], 60);
        }
    }
    allow_names(&lab, "[{matchPattern: '*.test'}]", "")?;
    let node = lab.node(1);
    let addresses: Vec<IpAddr> = servers.iter().flat_map(|server| server.addresses().to_vec()).collect();
    let ask_all = |what: &str| -> Result<()> {
        for server in &addresses {
            let answer = ask(client.space(), *server, By::Datagram, "a.test").context(what.to_owned())?;
            ensure!(answer == Some((0, 1)), "{what}: {server}: {answer:?}");
            let denied = ask(client.space(), *server, By::Datagram, "a.denied").context(what.to_owned())?;
            ensure!(denied == Some((NXDOMAIN, 0)), "{what}: {server}: {denied:?}");
        }
        Ok(())
    };
    for (server, by) in addresses.iter().zip([BOTH; 4]).flat_map(|(server, by)| by.map(|by| (server, by))) {
        let is_denied = || Ok(ask(client.space(), *server, by, "a.denied")? == Some((NXDOMAIN, 0)));
        wait_for("the policy to be in force", is_denied)?;
    }
    let stopped = Stopped::proxy(node.directory())?;
    ask_all("without the proxy")?;
    wait_for("questions and answers to be shown", || {
        let flows = node.flows(&["--type", "l7"])?;
        let shows = |query: &str, what: &str| {
            flows.iter().any(|flow| {
                let text = flow.to_string();
                text.contains(query) && text.contains(what) && text.contains("\"client\"")
            })
        };
        Ok(shows("a.test", "198.51.100.1") && shows("a.denied", "DROPPED"))
    })?;
    ensure!(node.metric("weir_proxy_requests_total", &["protocol=\"dns\"", "verdict=\"denied\""])? >= 4.0);
    node.kill_agent()?;
    ask_all("without agent and proxy")?;
    drop(stopped);
    ask_all("without the agent")?;
    node.start_agent()?;
    node.wait_ready()?;
    ask_all("with the next agent")
}

#[test]
fn names_whose_addresses_rotate_deny_no_connection_after_their_answer() -> Result<()> {
    require_lab!();
    // The whole of it takes minutes: WEIR_TEST_NAMES=10000.
    let count = std::env::var("WEIR_TEST_NAMES").ok().and_then(|count| count.parse().ok()).unwrap_or(300_u16);
    let world = World::start(&["--names-min-ttl-seconds", "1"])?;
    let before = world.denied(None)?;
    let began = Instant::now();
    let mut answered = 0;
    for number in 0..count {
        // Each name comes twice, with other addresses, and addresses come again under other names.
        let name = format!("n{}.open.test", number / 2);
        let [four, six] = of_server(1000 + number.wrapping_mul(7919) % 20_000);
        world.zone.set(&name, &[four, six], 1);
        world.ask(&name)?;
        answered += u32::from(world.reaches(four));
    }
    let took = began.elapsed();
    let denied = world.denied(None)? - before;
    let late = world.lab.node(1).metric("weir_names_late_total", &[])?;
    println!(
        "{count} names in {took:?}: {answered} connections, {denied} packets denied, {late} answers late"
    );
    ensure!(u32::from(count) == answered, "{answered} of {count} connections");
    ensure!(denied == 0 && late == 0.0, "{denied} denied, {late} late");
    Ok(())
}

#[test]
fn an_answer_that_is_only_shown_opens_nothing() -> Result<()> {
    require_lab!();
    let world = World::start(&[])?;
    let lab = &world.lab;
    lab.manifests().apply(
        "apiVersion: v1
kind: Namespace
metadata: {name: shown, annotations: {weir.dev/visibility: dns}}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: shown, namespace: shown}
spec:
  endpointSelector: {matchLabels: {app: shown}}
  egress:
  - toEntities: [cluster]
  - toFQDNs: [{matchName: open.test}]
",
    )?;
    let shown = lab.pod(1, "shown/client").label("app", "shown").create()?;
    world.zone.set("open.test", &of_server(1), 300);
    let node = lab.node(1);
    wait_for("the question to be shown", || {
        ask(shown.space(), world.resolver, By::Datagram, "open.test")?;
        let flows = node.flows(&["--type", "l7", "--from-pod", "shown/client"])?;
        Ok(flows.iter().any(|flow| {
            flow["l7"]["dns"]["ips"].to_string().contains("198.18.0.1")
                || flow.to_string().contains("open.test")
        }))
    })?;
    for target in of_server(1) {
        ensure!(!shown.probe(Via::Tcp, (target, WEB).into()).is_answered(), "{target} is open");
    }
    ensure!(world.listed("open.test")?.is_none(), "nobody vouches for the answer");
    // Whose own rules let the question pass is told of it, and its flows have the name.
    world.ask("open.test")?;
    world.expect_open(of_server(1)[0])
}
