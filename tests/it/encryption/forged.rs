//! Nodes that lie: what comes encrypted from a node is that node's, or nobody's.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::{has_ipsec, has_kernel_wireguard, setup_by};
use crate::lab::{Lab, Setup, patience};
use crate::packets::frame::udp;
use crate::require::{require_lab, say_skipped};
use crate::verdicts::expect_full_mesh;

/// Where the pod listens that is lied to.
const PORT: u16 = 9999;

/// Gives a datagram to the device that encrypts, as if it were of `from`.
fn say(device: &str, from: IpAddr, to: IpAddr, text: &[u8]) -> Result<()> {
    let packet = udp((from, PORT), (to, PORT)).payload(text).bytes()[14..].to_vec();
    // IPPROTO_RAW: with a header of the sender's own.
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
    socket.bind_device(Some(device.as_bytes()))?;
    socket.send_to(&packet, &SocketAddr::new(to, 0).into())?;
    Ok(())
}

/// Of two datagrams, sent one after the other, the first one is a lie.
fn a_lie_is_not_heard(by: &str, device: &'static str) -> Result<()> {
    let lab = Lab::start(Setup { nodes: 3, ..setup_by(by, "native") })?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let c = lab.pod(3, "shop/c").create()?;
    expect_full_mesh(&[&a, &b, &c])?;
    let [target, liar, victim] = [&a, &b, &c].map(|pod| pod.address(true));
    let socket = a.space().run(move || UdpSocket::bind((target, PORT)))?;
    socket.set_read_timeout(Some(patience()))?;
    lab.node(2).space().run(move || -> Result<()> {
        say(device, victim, target, b"a lie")?;
        say(device, liar, target, b"the truth")
    })?;
    let mut text = [0; 100];
    let length = socket.recv(&mut text)?;
    let heard = &text[..length];
    ensure!(heard == b"the truth", "heard: {}", String::from_utf8_lossy(heard));
    wall.check().map(drop)
}

#[test]
fn a_node_does_not_speak_as_another_nodes_pod() -> Result<()> {
    require_lab!();
    a_lie_is_not_heard("user", "weir_wg")
}

#[test]
fn a_node_does_not_speak_as_another_nodes_pod_by_the_kernel() -> Result<()> {
    require_lab!();
    if !has_kernel_wireguard()? || !has_ipsec()? {
        say_skipped("needs WireGuard, ESP and xfrm interfaces in the kernel: `make kernels`");
        return Ok(());
    }
    a_lie_is_not_heard("kernel", "weir_wg")?;
    a_lie_is_not_heard("ipsec", "weir_ipsec")
}
