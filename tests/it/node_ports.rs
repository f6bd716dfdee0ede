//! Node ports and load balancers' addresses: every place of a client, every place of a backend.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Lab, Node, OUTSIDE, Pod, ServicePort, Setup, Space, Traffic, Via, backend, probe, wait_for,
};
use crate::packets::world::load_test_program;
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const BALANCER_IPS: [&str; 2] = ["203.0.113.10", "2001:db8:cb::10"];
const NODE_PORT: u16 = 30080;
const PASS: &str = "tests/it/node_ports/pass.bpf.c";

pub struct World {
    near: Pod,
    pub far: Pod,
    client: Pod,
    /// Its sockets are outside the node's cgroup.
    packets: Pod,
    far_client: Pod,
    pub lab: Lab,
}

impl World {
    pub fn start(routing: &str) -> Result<Self> {
        Self::of(Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?)
    }

    /// With native routing; the drivers of the nodes' devices send on what passes the nodes.
    fn start_with_drivers() -> Result<Self> {
        let agent_arguments = ["--xdp", "native", "--device", "eth0"].map(str::to_owned).to_vec();
        let routing = "native".to_owned();
        let lab = Lab::start(Setup {
            nodes: 2,
            routing,
            agent_arguments,
            starts_agents: false,
            ..Setup::default()
        })?;
        be_hardware(&lab)?;
        lab.start_agents()?;
        let world = Self::of(lab)?;
        for number in [1, 2] {
            world.wait_for_driver(number, "eth0: native")?;
        }
        Ok(world)
    }

    /// Waits until `weir status` says so of a node's driver.
    fn wait_for_driver(&self, number: usize, how: &str) -> Result<()> {
        wait_for(&format!("{how} at node{number}"), || {
            Ok(self.lab.node(number).status()?.to_string().contains(how))
        })
    }

    fn of(lab: Lab) -> Result<Self> {
        let near = lab.pod(1, "shop/near").label("app", "server").create()?;
        let far = lab.pod(2, "shop/far").label("app", "server").create()?;
        let client = lab.pod(1, "shop/client").create()?;
        let packets = lab.pod(1, "shop/packets").outside_cgroup().create()?;
        let far_client = lab.pod(2, "shop/far-client").create()?;
        for (balancer, node) in BALANCER_IPS.iter().zip(lab.node(1).addresses()) {
            lab.outside().ip(&format!("route add {balancer} via {node}"))?;
        }
        Ok(Self { near, far, client, packets, far_client, lab })
    }

    /// A Service of the type LoadBalancer with these backends.
    pub fn serve(&self, policy: &str, pods: &[&Pod]) -> Result<()> {
        self.serve_so(policy, pods, "None", "snat")
    }

    /// The same with session affinity and forwarding.
    fn serve_so(&self, policy: &str, pods: &[&Pod], affinity: &str, forwarding: &str) -> Result<()> {
        let ports = [("web", "TCP", 1080, 80), ("query", "UDP", 1080, 8080)];
        let spec_ports: Vec<_> = ports
            .iter()
            .map(|(name, protocol, port, target)| {
                json!({ "name": name, "protocol": protocol, "port": port, "targetPort": target,
                        "nodePort": NODE_PORT })
            })
            .collect();
        self.lab.manifests().write(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "server", "namespace": "shop", "annotations": { "weir.dev/forwarding": forwarding },
            },
            "spec": {
                "type": "LoadBalancer", "clusterIP": CLUSTER_IPS[0], "clusterIPs": CLUSTER_IPS,
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "externalTrafficPolicy": policy, "sessionAffinity": affinity, "ports": spec_ports,
            },
            "status": { "loadBalancer": { "ingress": BALANCER_IPS.map(|ip| json!({ "ip": ip })) } },
        }))?;
        let backends: Vec<_> = pods.iter().map(|pod| backend(pod, true)).collect();
        self.lab.manifests().slices(("shop", "server"), &ports.map(ServicePort::from), &backends)
    }

    /// The node ports of a node.
    pub fn node_ports(&self, number: usize) -> Vec<(Via, SocketAddr)> {
        let addresses = self.lab.node(number).addresses().iter();
        addresses.flat_map(|address| both(*address, NODE_PORT)).collect()
    }

    fn balancers(&self) -> Result<Vec<(Via, SocketAddr)>> {
        let mut targets = Vec::new();
        for address in BALANCER_IPS {
            targets.extend(both(address.parse()?, 1080));
        }
        Ok(targets)
    }

    fn everything(&self) -> Result<Vec<(Via, SocketAddr)>> {
        Ok([self.node_ports(1), self.node_ports(2), self.balancers()?].concat())
    }

    /// Everybody within the cluster.
    fn inside(&self) -> [(&Space, &str); 5] {
        [
            (self.client.space(), "client"),
            (self.packets.space(), "packets"),
            (self.far_client.space(), "far-client"),
            (self.lab.node(1).space(), "node1"),
            (self.lab.node(2).space(), "node2"),
        ]
    }
}

/// Makes the wire one that drivers can send on by themselves: every frame has its checksum, and the wire's ports
/// take what a driver sends. They do so as long as this process lives.
fn be_hardware(lab: &Lab) -> Result<()> {
    for host in lab.nodes().iter().map(Node::space).chain([lab.outside()]) {
        host.run(|| weir::netlink::set_tx_checksum("eth0", false))?;
    }
    let mut ports: Vec<String> = lab.nodes().iter().map(|node| node.name().to_owned()).collect();
    ports.push("outside".to_owned());
    let directory = lab.directory().to_owned();
    lab.wire().run(move || {
        for port in ports {
            let object = load_test_program(PASS, &directory.join("pass.bpf.o"), &[])?;
            let program = object.progs_mut().next().context("a program")?;
            let index = nix::net::if_::if_nametoindex(port.as_str())?;
            std::mem::forget(program.attach_xdp(i32::try_from(index)?)?);
        }
        Ok(())
    })
}

fn both(address: IpAddr, port: u16) -> [(Via, SocketAddr); 2] {
    [Via::Tcp, Via::Udp].map(|via| (via, SocketAddr::new(address, port)))
}

fn rows<'a>(
    (space, name): (&'a Space, &str),
    targets: &[(Via, SocketAddr)],
    expected: Expected,
) -> Vec<Row<'a>> {
    let row = |(via, target): &(Via, SocketAddr)| Row::from_space(space, name, *via, *target, expected);
    targets.iter().map(row).collect()
}

/// Probes from outside until this pod answers; as whom it saw the client.
fn answer(world: &World, pod: &Pod, via: Via, target: SocketAddr) -> Result<IpAddr> {
    let mut seen = None;
    wait_for(&format!("an answer of {} from {target}", pod.name()), || {
        let outcome = world.lab.outside().run(move || probe(via, target));
        seen = outcome.answered_by().filter(|name| *name == pod.name()).and_then(|_| outcome.seen_as());
        Ok(seen.is_some())
    })?;
    seen.context("an answer that says whom")
}

#[test]
fn everybody_reaches_a_service_by_every_address_wherever_its_backend_is() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native", "drivers"] {
        let world = if routing == "drivers" { World::start_with_drivers()? } else { World::start(routing)? };
        let targets = world.everything()?;
        for backend in [&world.near, &world.far] {
            world.serve("Cluster", &[backend])?;
            let mut table = rows((world.lab.outside(), "outside"), &targets, Expected::Answered);
            for place in world.inside() {
                table.extend(rows(place, &targets, Expected::Answered));
            }
            expect_all(&table).with_context(|| format!("{routing}, backend {}", backend.name()))?;
            // A backend of the node that is asked sees the client, another node's sees that node.
            for (via, target) in world.node_ports(1) {
                let seen = answer(&world, backend, via, target)?;
                let is_near = backend.name() == "near";
                let family = usize::from(target.is_ipv6());
                let expected = if is_near { OUTSIDE[family].parse()? } else { target.ip() };
                ensure!(seen == expected, "{routing} {target}: {} saw {seen}", backend.name());
            }
        }
        // What nobody serves is refused, by everybody's way.
        world.serve("Cluster", &[])?;
        let mut table = rows((world.lab.outside(), "outside"), &targets, Expected::Refused);
        for place in world.inside() {
            table.extend(rows(place, &targets, Expected::Refused));
        }
        expect_all(&table).with_context(|| format!("{routing}, no backend"))?;
    }
    Ok(())
}

/// A socket that sees every frame of a namespace's devices.
fn look(space: &Space) -> Result<Socket> {
    let socket = space.run(|| -> Result<Socket> {
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)))?;
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20))?;
        Ok(socket)
    })?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The segments to the node port among what was seen.
fn requests(look: &Socket) -> u64 {
    let (mut look, mut frame, mut count) = (look, [0; 2048], 0);
    while let Ok(length) = look.read(&mut frame) {
        let (protocol, port) = if frame[12..14] == [8, 0] { (23, 36) } else { (20, 56) };
        let is_one = length > port + 2 && frame[protocol] == 6;
        count += u64::from(is_one && frame[port..port + 2] == NODE_PORT.to_be_bytes());
    }
    count
}

#[test]
fn drivers_go_on_with_connections_but_not_on_a_device_with_a_vlan() -> Result<()> {
    require_lab!();
    let world = World::start_with_drivers()?;
    world.serve("Cluster", &[&world.far])?;
    expect_all(&rows((world.lab.outside(), "outside"), &world.everything()?, Expected::Answered))?;
    let node = world.lab.node(1);
    let look = look(node.space())?;
    let streams: Vec<Traffic> = world
        .node_ports(1)
        .iter()
        .filter(|(via, _)| *via == Via::Tcp)
        .map(|(_, target)| Traffic::tcp(world.lab.outside(), *target))
        .collect();
    for stream in &streams {
        stream.wait_for_answers(500)?;
    }
    // What a driver sends on, no socket that looks at the device sees.
    let (seen, answered) = (requests(&look), streams.iter().map(Traffic::answered).sum::<u64>());
    ensure!(seen > 0 && seen * 2 < answered, "{seen} requests were seen of {answered} that were answered");
    // With a VLAN on the device its driver has no program, and the connections go on.
    match node.space().configure(&["link add link eth0 name eth0.7 type vlan id 7"]) {
        Err(error) if error.to_string().contains("Unknown device type") => {
            println!("SKIPPED (needs VLAN devices, CONFIG_VLAN_8021Q): a VLAN on the device");
            return Ok(());
        }
        made => made?,
    }
    world.wait_for_driver(1, "the VLAN eth0.7 is on it")?;
    for stream in &streams {
        stream.wait_for_answers(50)?;
    }
    node.space().configure(&["link delete eth0.7"])?;
    world.wait_for_driver(1, "eth0: native")?;
    for stream in streams {
        stream.wait_for_answers(50)?;
        stream.stop()?;
    }
    Ok(())
}

#[test]
fn a_local_policy_keeps_the_client_and_to_the_node() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        world.serve("Local", &[&world.near])?;
        let here = [world.node_ports(1), world.balancers()?].concat();
        let elsewhere = world.node_ports(2);
        let mut table = rows((world.lab.outside(), "outside"), &here, Expected::Answered);
        table.extend(rows((world.lab.outside(), "outside"), &elsewhere, Expected::Denied));
        // From within the cluster it leads to every backend.
        for place in world.inside() {
            table.extend(rows(place, &[&here[..], &elsewhere].concat(), Expected::Answered));
        }
        expect_all(&table).with_context(|| routing.to_owned())?;
        for (via, target) in here {
            let seen = answer(&world, &world.near, via, target)?;
            let outside: IpAddr = OUTSIDE[usize::from(target.is_ipv6())].parse()?;
            ensure!(seen == outside, "{routing} {target}: near saw {seen}");
        }
    }
    Ok(())
}

#[test]
fn a_policy_for_nodes_lets_nobody_in_from_outside() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    world.serve("Cluster", &[&world.far])?;
    let targets = world.node_ports(1);
    expect_all(&rows((world.lab.outside(), "outside"), &targets, Expected::Answered))?;
    let nodes: Vec<String> = world
        .lab
        .nodes()
        .iter()
        .flat_map(|node| node.addresses())
        .map(|address| {
            format!("{{ipBlock: {{cidr: '{address}/{}'}}}}", if address.is_ipv4() { 32 } else { 128 })
        })
        .collect();
    let policy = |from: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: from, namespace: shop}}\n\
             spec: {{podSelector: {{matchLabels: {{app: server}}}}, ingress: [{{from: [{from}]}}]}}\n"
        )
    };
    // The client is nobody that the policy names.
    world.lab.manifests().apply(&policy("{podSelector: {}}"))?;
    expect_all(&rows((world.lab.outside(), "outside"), &targets, Expected::Denied))?;
    // A rule with the nodes' addresses is one for what bears them.
    world.lab.manifests().apply(&policy(&nodes.join(", ")))?;
    expect_all(&rows((world.lab.outside(), "outside"), &targets, Expected::Answered))
}

#[test]
fn with_dsr_a_backend_elsewhere_sees_the_client() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        world.serve_so("Cluster", &[&world.far], "None", "dsr")?;
        let targets = [world.node_ports(1), world.balancers()?].concat();
        let outside = (world.lab.outside(), "outside");
        expect_all(&rows(outside, &targets, Expected::Answered)).with_context(|| routing.to_owned())?;
        for (via, target) in targets {
            let seen = answer(&world, &world.far, via, target)?;
            let client: IpAddr = OUTSIDE[usize::from(target.is_ipv6())].parse()?;
            ensure!(seen == client, "{routing} {target}: far saw {seen}");
        }
    }
    Ok(())
}

#[test]
fn one_client_has_one_backend_by_every_way() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    world.serve_so("Cluster", &[&world.near, &world.far], "ClientIP", "snat")?;
    let targets = [world.node_ports(1), world.balancers()?].concat();
    let clients = [
        (world.lab.outside(), "outside"),
        (world.client.space(), "client"),
        (world.packets.space(), "packets"),
        (world.lab.node(2).space(), "node2"),
    ];
    for (space, name) in clients {
        expect_all(&rows((space, name), &targets, Expected::Answered))?;
        for (via, target) in targets.iter().copied() {
            let names: Vec<_> = (0..8)
                .filter_map(|_| space.run(move || probe(via, target)).answered_by().map(str::to_owned))
                .collect();
            ensure!(
                names.len() == 8 && names.iter().all(|one| *one == names[0]),
                "{name} {target}: {names:?}"
            );
        }
    }
    for address in CLUSTER_IPS {
        let target = SocketAddr::new(address.parse()?, 1080);
        let connected = world.client.probe(Via::Udp, target).answered_by().map(str::to_owned);
        let names = world.client.space().run(move || ask_unconnected(target))?;
        ensure!(
            names.iter().all(|name| Some(name) == connected.as_ref()),
            "{target}: {connected:?} {names:?}"
        );
    }
    Ok(())
}

/// Who answers each of eight sockets that are not connected, which all ask twice.
fn ask_unconnected(target: SocketAddr) -> Result<Vec<String>> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let mut names = Vec::new();
    for _ in 0..8 {
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        for _ in 0..2 {
            let mut answer = [0; 512];
            socket.send_to(b"hello", target)?;
            let (length, from) = socket.recv_from(&mut answer).context("waiting for an answer")?;
            ensure!(from == target, "asked {target}, {from} answered");
            let text = String::from_utf8_lossy(&answer[..length]);
            names.push(text.split(' ').next().unwrap_or_default().to_owned());
        }
    }
    Ok(names)
}

#[test]
fn a_load_balancers_address_leads_nowhere_by_a_port_that_no_service_has() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        world.serve("Cluster", &[&world.near])?;
        expect_all(&rows((world.lab.outside(), "outside"), &world.balancers()?, Expected::Answered))?;
        let mut others = Vec::new();
        for address in BALANCER_IPS {
            others.extend(both(address.parse()?, 1081));
        }
        let mut table = rows((world.lab.outside(), "outside"), &others, Expected::Denied);
        for place in world.inside() {
            table.extend(rows(place, &others, Expected::Refused));
        }
        // Dropped by a reason, and not sent back to where it came from.
        let dropped = || world.lab.node(1).metric("weir_dropped_packets_total", &[]);
        let before = dropped()?;
        expect_all(&table).with_context(|| routing.to_owned())?;
        ensure!(dropped()? > before, "{routing}: nothing was dropped");
    }
    Ok(())
}

#[test]
fn nobody_on_the_node_binds_a_node_port() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    world.serve("Cluster", &[&world.near])?;
    expect_all(&rows((world.lab.outside(), "outside"), &world.node_ports(1), Expected::Answered))?;
    let bind = |space: &Space, address: IpAddr, port: u16| {
        space.run(move || {
            let tcp = TcpListener::bind((address, port)).map(drop).map_err(|error| error.kind());
            let udp = UdpSocket::bind((address, port)).map(drop).map_err(|error| error.kind());
            [tcp, udp]
        })
    };
    let node = world.lab.node(1);
    let everywhere = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)];
    for address in everywhere.iter().chain(node.addresses()).copied() {
        assert_eq!(bind(node.space(), address, NODE_PORT), [Err(ErrorKind::AddrInUse); 2], "{address}");
        assert_eq!(bind(node.space(), address, NODE_PORT + 1), [Ok(()); 2], "{address}");
    }
    // A pod's ports are its own.
    for address in everywhere {
        assert_eq!(bind(world.client.space(), address, NODE_PORT), [Ok(()); 2], "{address}");
    }
    Ok(())
}
