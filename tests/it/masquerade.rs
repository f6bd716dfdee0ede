//! Masquerading on whole nodes: whose ports and addresses pods' packets leave with.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::lab::{
    Lab, OUTSIDE, PATIENCE, Pod, Server, Setup, Space, Via, pod_cidrs, route_to_pods, socket_address,
    wait_for,
};
use crate::require::require_lab;

/// The node's own ports, and all that masquerading may use.
const PORTS: [u16; 2] = [10250, 10251];
/// Of the remote end that pods and the node speak with.
const REMOTE: u16 = 45000;

fn any(family_of: SocketAddr) -> IpAddr {
    if family_of.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() }
}

/// Connects from a port; what the server says first.
fn connect_from(port: u16, target: SocketAddr) -> io::Result<String> {
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let patience = TimeVal::milliseconds(PATIENCE.as_millis() as i64);
    // Of connect(), too.
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any(target), port)))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
    first_word(io::Read::bytes(TcpStream::from(socket)).take_while(|byte| !matches!(byte, Ok(b' '))))
}

fn first_word(bytes: impl Iterator<Item = io::Result<u8>>) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&bytes.collect::<io::Result<Vec<u8>>>()?).into_owned())
}

/// Sends a datagram from a port; who answered.
fn ask_from(port: u16, target: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind((any(target), port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"hello", target)?;
    let mut answer = [0; 256];
    let length = socket.recv(&mut answer)?;
    first_word(answer[..length].iter().map(|byte| Ok(*byte)).take_while(|byte| !matches!(byte, Ok(b' '))))
}

/// What the kubelet of a node says to `from`, by both protocols.
fn asks_kubelet(from: &Space, node: IpAddr) -> Vec<(SocketAddr, io::Result<String>)> {
    let targets = PORTS.map(|port| SocketAddr::new(node, port));
    let ask = move || {
        let tcp = targets.map(|target| (target, connect_from(REMOTE, target)));
        tcp.into_iter().chain(targets.map(|target| (target, ask_from(REMOTE, target)))).collect()
    };
    from.run(ask)
}

#[test]
fn a_pod_takes_no_connection_of_the_nodes_daemons() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let ports = ["--nat-port-min", "10250", "--nat-port-max", "10251"].map(str::to_owned);
        let setup =
            Setup { routing: routing.to_owned(), agent_arguments: ports.to_vec(), ..Setup::default() };
        let lab = Lab::start(setup)?;
        let pod = lab.pod(1, "shop/evil").create()?;
        let (node, outside) = (lab.node(1), lab.outside());
        let remote: [IpAddr; 2] = [OUTSIDE[0].parse()?, OUTSIDE[1].parse()?];
        let pod_asks = move || {
            let tries = remote.into_iter().flat_map(|remote| (1..=8).map(move |source| (source, remote)));
            for (source, remote) in tries {
                let target = SocketAddr::new(remote, REMOTE);
                let _refused = connect_from(40000 + source, target);
                let _unanswered = ask_from(40000 + source, target);
            }
        };
        // While nobody of the node listens the pod has these ports towards the remote end.
        let all = "two ports of two protocols and families, both ways";
        wait_for(&format!("{routing}: 16 rows: {all}"), || {
            pod.space().run(pod_asks);
            Ok(node.map("nat")?.len() == 16)
        })?;
        let any: IpAddr = "::".parse()?;
        let _kubelet = Server::start(node.space(), "kubelet", &[any], &PORTS)?;
        for address in node.addresses().to_vec() {
            wait_for("the node's daemon to be reached", || {
                let answers = asks_kubelet(outside, address);
                let is_kubelet = |(_, answer): &(_, io::Result<String>)| matches!(answer, Ok(answer) if answer == "kubelet");
                Ok(answers.iter().all(is_kubelet))
            })?;
        }
        // And never again.
        pod.space().run(pod_asks);
        for address in node.addresses() {
            for (target, answer) in asks_kubelet(outside, *address) {
                ensure!(matches!(&answer, Ok(answer) if answer == "kubelet"), "{target}: {answer:?}");
            }
        }
        let of_pods = node.map("nat")?.into_iter().filter(|row| {
            row["direction"] == "ingress"
                && !node.addresses().iter().any(|own| row["address"] == own.to_string())
        });
        ensure!(of_pods.count() == 0, "{routing}: {:?}", node.map("nat")?);
    }
    Ok(())
}

/// Where pods' packets to the world seem to come from, by both families and protocols; `None`: unanswered.
fn seen_as(pod: &Pod) -> Vec<Option<IpAddr>> {
    let targets = OUTSIDE[2..].iter().map(|address| socket_address(address, 80));
    targets.flat_map(|target| [Via::Tcp, Via::Udp].map(|via| pod.probe(via, target).seen_as())).collect()
}

fn wait_to_be_seen_as(pod: &Pod, ipv4: &str, ipv6: &str) -> Result<()> {
    let expected: Vec<Option<IpAddr>> =
        [ipv4, ipv4, ipv6, ipv6].iter().map(|address| address.parse().ok()).collect();
    let mut seen = Vec::new();
    let waited = wait_for(&format!("packets to come from {ipv4} and {ipv6}"), || {
        seen = seen_as(pod);
        Ok(seen == expected)
    });
    waited.with_context(|| format!("seen as {seen:?}"))
}

#[test]
fn packets_bear_the_address_of_the_device_that_they_leave_by() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { routing: routing.to_owned(), ..Setup::default() })?;
        let pod = lab.pod(1, "shop/a").create()?;
        let (outside, node) = (lab.outside(), lab.node(1).space());
        wait_to_be_seen_as(&pod, "10.200.0.1", "fd00:200::1")?;
        // A card is added, and the way to the world leads by it.
        let devices = lab.node(1).map("devices")?.len();
        outside.configure(&[
            &format!("link add wan type veth peer name eth1 netns {}", node.name()),
            "addr add 10.201.0.1/24 dev wan",
            "addr add fd00:201::1/64 dev wan nodad",
            "link set wan up",
        ])?;
        let lead_by_it = |ipv4: &str, ipv6: &str| {
            node.configure(&[
                &format!("addr add {ipv4}/24 dev eth1"),
                &format!("addr add {ipv6}/64 dev eth1 nodad"),
                "link set eth1 up",
                &format!("route replace {}/32 via 10.201.0.1 dev eth1", OUTSIDE[2]),
                &format!("route replace {}/128 via fd00:201::1 dev eth1", OUTSIDE[3]),
            ])
        };
        lead_by_it("10.201.0.2", "fd00:201::2")?;
        wait_to_be_seen_as(&pod, "10.201.0.2", "fd00:201::2")?;
        ensure!(lab.node(1).map("devices")?.len() == devices + 1, "{:?}", lab.node(1).map("devices")?);
        // Its addresses change.
        node.configure(&["addr del 10.201.0.2/24 dev eth1", "addr del fd00:201::2/64 dev eth1"])?;
        lead_by_it("10.201.0.3", "fd00:201::3")?;
        wait_to_be_seen_as(&pod, "10.201.0.3", "fd00:201::3")?;
        // And it is gone.
        node.configure(&["link delete eth1"])?;
        wait_to_be_seen_as(&pod, "10.200.0.1", "fd00:200::1")?;
        wait_for("the device's row to go", || Ok(lab.node(1).map("devices")?.len() == devices))?;
    }
    Ok(())
}

#[test]
fn a_node_whose_address_changes_stays_reachable() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
        let both_ways = || {
            let ways = [(&a, &b), (&b, &a)].into_iter().flat_map(|(from, to)| {
                to.addresses().iter().map(move |address| from.probe(Via::Tcp, SocketAddr::new(*address, 80)))
            });
            Ok(ways.into_iter().all(|outcome| outcome.is_answered()))
        };
        wait_for("pods to reach one another", both_ways)?;
        lab.node(1).space().configure(&[
            "addr add 10.200.0.51/24 dev eth0",
            "addr add fd00:200::51/64 dev eth0 nodad",
            "addr del 10.200.0.1/24 dev eth0",
            "addr del fd00:200::1/64 dev eth0",
        ])?;
        // An address that goes takes its neighbours, and may take routes.
        let _left = lab.node(1).space().configure(&["addr add 10.200.0.51/24 dev eth0"]);
        let space = lab.node(1).space();
        space.configure(&[
            &format!("route replace default via {}", OUTSIDE[0]),
            &format!("route replace default via {}", OUTSIDE[1]),
        ])?;
        let addresses: [IpAddr; 2] = ["10.200.0.51".parse()?, "fd00:200::51".parse()?];
        let cidrs = pod_cidrs(1);
        lab.manifests().node(lab.node(1).name(), &addresses, &cidrs)?;
        route_to_pods(lab.outside(), &cidrs, &addresses)?;
        wait_for("pods to reach one another again", both_ways)?;
        wait_to_be_seen_as(&a, "10.200.0.51", "fd00:200::51")?;
    }
    Ok(())
}
