//! Masquerading on whole nodes: whose ports and addresses pods' packets leave with.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Result, ensure};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::lab::{Lab, OUTSIDE, PATIENCE, Server, Setup, Space, wait_for};
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
        pod.space().run(pod_asks);
        let taken = node.map("nat")?.len();
        ensure!(taken == 16, "{routing}: {taken} rows: two ports of two protocols and families, both ways");
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
