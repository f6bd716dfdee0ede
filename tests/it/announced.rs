//! Load balancers' addresses on the link: an outside host on the wire asks by ARP and neighbour discovery, one
//! node answers, and another one when that is dead.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::lab::{Lab, Node, Outcome, Pod, ServicePort, Setup, Via, backend, probe, wait_for};
use crate::require::require_lab;

/// On the wire, of nobody.
const ADDRESSES: [&str; 2] = ["10.200.0.150", "fd00:200::150"];
const PORT: u16 = 1080;
const POOL: &str = "{apiVersion: weir.dev/v1alpha1, kind: LoadBalancerPool, metadata: {name: office}, spec: {blocks: \
    [{cidr: 10.200.0.144/28}, {start: 'fd00:200::140', stop: 'fd00:200::15f'}], announce: {interfaces: ['^eth']}}}";

struct World {
    pods: [Pod; 2],
    lab: Lab,
}

impl World {
    fn start(lease_seconds: &str) -> Result<Self> {
        Self::start_with(&["--announce-lease-seconds", lease_seconds])
    }

    fn start_with(arguments: &[&str]) -> Result<Self> {
        let agent_arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let lab = Lab::start(Setup { nodes: 2, agent_arguments, ..Setup::default() })?;
        let pods =
            [1, 2].map(|number| lab.pod(number, &format!("shop/web{number}")).label("app", "web").create());
        let [one, two] = pods;
        Ok(Self { pods: [one?, two?], lab })
    }

    fn serve(&self, policy: &str, pods: &[&Pod]) -> Result<()> {
        self.lab.manifests().write(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "shop" },
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"],
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "externalTrafficPolicy": policy,
                "ports": [{ "name": "web", "protocol": "TCP", "port": PORT, "targetPort": 80 }],
            },
            "status": { "loadBalancer": { "ingress": ADDRESSES.map(|ip| json!({ "ip": ip })) } },
        }))?;
        let backends: Vec<_> = pods.iter().map(|pod| backend(pod, true)).collect();
        self.lab.manifests().slices(
            ("shop", "web"),
            &[ServicePort::from(("web", "TCP", PORT, 80))],
            &backends,
        )
    }

    /// The node that leads, as `of` says.
    fn leader(&self, of: &Node) -> Result<String> {
        let rows = of.weir(&["service", "get", "shop/web"])?;
        let rows: serde_json::Value = serde_json::from_str(&rows)?;
        let of_balancer = |row: &&serde_json::Value| row["address"] == ADDRESSES[0];
        let row = rows.as_array().into_iter().flatten().find(of_balancer).context("no row of the address")?;
        Ok(row["leader"].as_str().unwrap_or_default().to_owned())
    }

    fn wait_leader(&self, of: &Node, name: &str) -> Result<()> {
        wait_for(&format!("{name} to lead"), || Ok(self.leader(of)? == name))
    }

    /// Who has the address, by the neighbour table of the outside host; it asks if it does not know.
    fn neighbour(&self, address: &str) -> Result<Option<String>> {
        let shown = self.lab.outside().ip(&format!("neigh show {address}"))?;
        let mac = shown.split_once("lladdr ").and_then(|(_, rest)| rest.split(' ').next());
        Ok(mac.map(str::to_owned))
    }

    fn forget_neighbours(&self) -> Result<()> {
        ADDRESSES
            .iter()
            .try_for_each(|address| self.lab.outside().ip(&format!("neigh flush to {address}")).map(drop))
    }

    fn probe(&self, address: &str) -> Result<Outcome> {
        let target = SocketAddr::new(address.parse::<IpAddr>()?, PORT);
        Ok(self.lab.outside().run(move || probe(Via::Tcp, target)))
    }

    /// Both addresses answer, and the node that has them on the link is this one.
    fn expect_led_by(&self, node: &Node) -> Result<()> {
        let mac = mac_of(node)?;
        for address in ADDRESSES {
            wait_for(&format!("{address} to be at {}", node.name()), || {
                let answered = self.probe(address)?.answered_by().is_some();
                Ok(answered && self.neighbour(address)?.as_deref() == Some(&*mac))
            })?;
        }
        Ok(())
    }
}

fn mac_of(node: &Node) -> Result<String> {
    let shown = node.space().ip("-oneline link show dev eth0")?;
    let mac = shown.split_once("link/ether ").and_then(|(_, rest)| rest.split(' ').next());
    mac.map(str::to_owned).context("eth0 has no MAC address")
}

#[test]
fn one_node_answers_on_the_link_and_another_when_it_is_dead() -> Result<()> {
    require_lab!();
    let world = World::start("2")?;
    let lab = &world.lab;
    world.serve("Cluster", &[&world.pods[0], &world.pods[1]])?;
    ensure!(world.probe(ADDRESSES[0])?.answered_by().is_none(), "no pool asks for it yet");
    lab.manifests().apply(POOL)?;
    wait_for("a leader", || Ok(!world.leader(lab.node(1))?.is_empty()))?;
    let name = world.leader(lab.node(1))?;
    let number = if name == "node1" { 1 } else { 2 };
    let (leader, other) = (lab.node(number), lab.node(3 - number));
    world.wait_leader(other, &name)?;
    world.forget_neighbours()?;
    world.expect_led_by(leader)?;
    ensure!(other.map("announced")?.is_empty(), "{:?}", other.map("announced")?);
    ensure!(leader.map("announced")?.len() == 2, "{:?}", leader.map("announced")?);
    let status = leader.status()?;
    ensure!(
        status["announced"][0]["node"] == name && status["announced"][0]["devices"][0] == "eth0",
        "{status}"
    );

    // A crash: nobody gives the address back. The link hears of it without asking.
    let mac = mac_of(other)?;
    leader.kill_agent()?;
    let died = Instant::now();
    wait_for("the outside host to hear of the other node", || {
        Ok(world.neighbour(ADDRESSES[0])?.as_deref() == Some(&*mac))
    })?;
    eprintln!("the other node has the address {:?} after the leader's death (Lease of 2 s)", died.elapsed());
    world.expect_led_by(other)?;
    // What the dead agent has left in the kernel answers for nothing.
    world.forget_neighbours()?;
    world.expect_led_by(other)?;
    // It comes back, and leads nothing.
    leader.start_agent()?;
    leader.wait_ready()?;
    world.wait_leader(leader, other.name())?;
    wait_for("the rows of the dead agent to go", || Ok(leader.map("announced")?.is_empty()))?;

    // The wish is taken back: nobody answers.
    lab.manifests().delete(POOL)?;
    wait_for("the rows to go", || Ok(other.map("announced")?.is_empty()))?;
    world.forget_neighbours()?;
    for address in ADDRESSES {
        ensure!(world.probe(address)?.answered_by().is_none(), "{address}");
        ensure!(world.neighbour(address)?.is_none(), "{address}");
    }
    Ok(())
}

#[test]
fn a_leader_of_a_local_service_has_an_endpoint() -> Result<()> {
    require_lab!();
    let world = World::start("2")?;
    let lab = &world.lab;
    lab.manifests().apply(
        "{apiVersion: cilium.io/v2alpha1, kind: CiliumL2AnnouncementPolicy, metadata: {name: all}, \
         spec: {loadBalancerIPs: true, serviceSelector: {matchLabels: {io.kubernetes.service.namespace: shop}}}}",
    )?;
    for number in [1, 2, 1] {
        world.serve("Local", &[&world.pods[number - 1]])?;
        let node = lab.node(number);
        world.wait_leader(node, node.name())?;
        world.expect_led_by(node)?;
        let other = lab.node(3 - number);
        wait_for("the other node to be silent", || Ok(other.map("announced")?.is_empty()))?;
    }
    world.serve("Local", &[])?;
    wait_for("nobody to lead", || Ok(world.leader(lab.node(1))?.is_empty()))?;
    wait_for("the rows to go", || Ok(lab.node(1).map("announced")?.is_empty()))
}

#[test]
fn a_leader_that_is_stopped_hands_over_and_waits_for_no_lease() -> Result<()> {
    require_lab!();
    // Longer than any test waits.
    let world = World::start_with(&["--announce-lease-seconds", "120", "--announce-hand-over", "true"])?;
    let lab = &world.lab;
    world.serve("Cluster", &[&world.pods[0], &world.pods[1]])?;
    lab.manifests().apply(POOL)?;
    wait_for("a leader", || Ok(!world.leader(lab.node(1))?.is_empty()))?;
    let number = if world.leader(lab.node(1))? == "node1" { 1 } else { 2 };
    let (leader, other) = (lab.node(number), lab.node(3 - number));
    world.wait_leader(other, leader.name())?;
    world.expect_led_by(leader)?;
    leader.stop_agent()?;
    let stopped = Instant::now();
    ensure!(leader.map("announced")?.is_empty(), "who hands over answers no more");
    world.wait_leader(other, other.name())?;
    eprintln!("the other node leads {:?} after the leader's agent was stopped", stopped.elapsed());
    world.expect_led_by(other)?;
    leader.start_agent()?;
    leader.wait_ready()?;
    world.wait_leader(leader, other.name())
}
