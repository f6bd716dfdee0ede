//! What a pod that floods takes from others: nothing.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto, socket};
use serde_json::Value;

use crate::lab::{Lab, Node, Pod, Setup, Via, probe_udp, wait_for};
use crate::packets::frame::{Packet, SYN, tcp, udp};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

/// Where `calm` and its peers talk.
const PORT: u16 = 7000;
/// Connections of each of four kinds that rest during the floods.
const IDLE: usize = 50;
/// Packets of each flood; the map of connections has room for 8192.
const FLOOD: u16 = 30_000;

const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: calm, namespace: shop}
spec:
  podSelector: {matchLabels: {app: calm}}
  ingress: [{from: [{podSelector: {matchLabels: {app: peer}}}], ports: [{port: 7000}, {port: 81, protocol: UDP}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: peer}}}], ports: [{port: 7000}, {port: 81, protocol: UDP}]}]
";

/// The two ends of a connection.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

fn listen(pod: &Pod) -> Result<TcpListener> {
    Ok(pod.space().run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))?)
}

fn connect(client: &Pod, listener: &TcpListener, server: IpAddr) -> Result<Pair> {
    let target = SocketAddr::new(server, PORT);
    let client = client.space().run(move || TcpStream::connect_timeout(&target, Duration::from_secs(2)))?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(Duration::from_secs(2)))?;
        end.set_nodelay(true)?;
    }
    Ok(Pair { client, server })
}

impl Pair {
    /// One byte each way; true if both arrive.
    fn talk(&mut self, server_first: bool) -> bool {
        let (first, second) = match server_first {
            true => (&mut self.server, &mut self.client),
            false => (&mut self.client, &mut self.server),
        };
        let mut byte = [0];
        let mut say = |from: &mut TcpStream, to: &mut TcpStream| {
            from.write_all(b"x").is_ok() && to.read_exact(&mut byte).is_ok()
        };
        say(first, second) && say(second, first)
    }
}

/// Sends frames as they are out of the pod's device.
fn send(pod: &Pod, frames: impl Iterator<Item = Packet> + Send + 'static) -> Result<()> {
    pod.space().run(move || {
        let link = getifaddrs()?
            .filter(|interface| interface.interface_name == "eth0")
            .find_map(|interface| interface.address?.as_link_addr().copied())
            .context("a pod without eth0")?;
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None)?;
        for frame in frames {
            match sendto(socket.as_raw_fd(), &frame.bytes(), &link, MsgFlags::empty()) {
                Ok(_) | Err(Errno::ENOBUFS) => {}
                Err(error) => return Err(error).context("sending a frame"),
            }
        }
        Ok(())
    })
}

/// A pod's row of `weir endpoint list`.
fn row(node: &Node, pod: &Pod) -> Result<Value> {
    let rows = node.weir_json(&["endpoint", "list"])?;
    let rows = rows.as_array().context("a list")?;
    let found = rows.iter().find(|row| row["pod"]["name"] == pod.name());
    found.cloned().with_context(|| format!("no row of {} in {rows:?}", pod.name()))
}

#[test]
fn floods_of_one_pod_cost_no_other_a_connection_a_datagram_or_a_record() -> Result<()> {
    require_lab!();
    let agent_arguments = ["--connections-max", "8192", "--nat-max", "4096"].map(str::to_owned).into();
    let lab = Lab::start(Setup { nodes: 2, agent_arguments, ..Setup::default() })?;
    let node = lab.node(1);
    let evil = lab.pod(1, "shop/evil").create()?;
    let calm = lab.pod(1, "shop/calm").label("app", "calm").create()?;
    let near = lab.pod(1, "shop/near").label("app", "peer").create()?;
    let far = lab.pod(2, "shop/far").label("app", "peer").create()?;
    // What gets the floods has its own to do with them.
    let target = lab.pod(2, "shop/target").create()?;
    lab.manifests().apply(POLICY)?;
    let at = |pod: &Pod, is_ipv4, port| SocketAddr::new(pod.address(is_ipv4), port);
    expect_all(&[
        Row::new(&calm, Via::Tcp, at(&far, true, 80), Expected::Denied),
        Row::new(&calm, Via::Udp, at(&far, true, 81), Expected::Answered),
        Row::new(&far, Via::Udp, at(&calm, false, 81), Expected::Answered),
        Row::new(&evil, Via::Udp, at(&target, true, 81), Expected::Answered),
    ])?;
    let mut pairs = Vec::new();
    for (client, server) in [(&calm, &far), (&far, &calm), (&calm, &near), (&near, &calm)] {
        let listener = listen(server)?;
        for number in 0..IDLE {
            pairs.push(connect(client, &listener, server.address(number % 2 == 0))?);
        }
    }
    let id = u16::try_from(row(node, &evil)?["id"].as_u64().context("a number")?)?;

    for is_ipv4 in [true, false] {
        let (own, to, victim) = (evil.address(is_ipv4), target.address(is_ipv4), calm.address(is_ipv4));
        let ports = 1024..1024 + FLOOD;
        send(&evil, ports.clone().map(move |port| tcp((own, port), (to, 9999), SYN).by(id)))?;
        send(&evil, ports.clone().map(move |port| udp((own, port), (to, 9998)).by(id)))?;
        // First fragments, of its own and in another's name.
        send(
            &evil,
            ports.clone().map(move |port| udp((own, 5), (to, 81)).fragment(port.into(), 0, true).by(id)),
        )?;
        send(&evil, ports.map(move |port| udp((victim, 5), (to, 81)).fragment(port.into(), 0, true).by(id)))?;
    }

    let evils = row(node, &evil)?["usage"].clone();
    let broken = pairs.iter_mut().enumerate().filter_map(|(number, pair)| {
        let works = pair.talk(number % 2 == 0);
        (!works).then_some(number)
    });
    let broken: Vec<_> = broken.collect();
    ensure!(broken.is_empty(), "{} of {} are broken: {broken:?}; evil has {evils}", broken.len(), 4 * IDLE);
    ensure!(evils["refused"][1].as_u64() > Some(1000), "{evils}");
    ensure!(evils["records_suppressed"].as_u64() > Some(1000), "{evils}");
    let metric = node.metric("weir_endpoint_quota_exceeded_total", &["unanswered_connections"])?;
    ensure!(metric > 1000.0, "the metric says {metric}");

    // New flows, datagrams in fragments, and a record of what is denied.
    for is_ipv4 in [true, false] {
        for (client, server) in [(&calm, &far), (&far, &calm), (&calm, &near)] {
            let target = at(server, is_ipv4, 81);
            let answer = client.space().run(move || probe_udp(target, &[7; 4000]));
            ensure!(answer.as_ref().is_ok_and(|answer| answer.is_answered()), "{target}: {answer:?}");
        }
    }
    expect_all(&[Row::new(&calm, Via::Tcp, at(&near, true, 9090), Expected::Denied)])?;
    wait_for("the record of a denial", || {
        let filters =
            ["observe", "--all", "--from-pod", "shop/calm", "--verdict", "dropped", "--port", "9090"];
        Ok(node.weir(&filters)?.contains("calm"))
    })?;
    drop(pairs);
    wait_for("what is closed to be given back", || {
        let usage = &row(node, &calm)?["usage"];
        Ok(usage["opening"] == 0 && usage["connections"].as_u64().is_some_and(|count| count < 40))
    })
}
