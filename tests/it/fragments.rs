//! Fragments between real stacks: out of order, and over a link that is narrower than the sender's.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{
    Lab, OUTSIDE, Outcome, PATIENCE, PORTS, Running, Server, Setup, Space, probe_udp, socket_address,
    wait_for,
};
use crate::packets::frame::{Layer4, Packet, udp};
use crate::require::require_lab;

/// The IP packets of a datagram in three fragments.
fn fragments(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<Vec<u8>> {
    const SIZE: usize = 1280;
    let header = 14 + if from.is_ipv4() { 20 } else { 40 };
    let whole = udp((from.ip(), from.port()), (to.ip(), to.port())).payload(payload).bytes();
    let content = &whole[header..];
    let id = 0x1234 ^ u32::from(from.port());
    let piece = |(index, part): (usize, &[u8])| {
        let offset = index * SIZE;
        let more = offset + part.len() < content.len();
        let packet = Packet::new(from.ip(), to.ip(), Layer4::Other(17)).payload(part);
        packet.fragment(id, offset as u16, more).bytes()[14..].to_vec()
    };
    content.chunks(SIZE).enumerate().map(piece).collect()
}

/// Sends packets as they are from the calling thread's namespace.
fn send_raw(to: IpAddr, packets: &[Vec<u8>], pause: Duration) -> Result<()> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    // IPPROTO_RAW: with headers of the sender's own.
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(255)))?;
    for (index, packet) in packets.iter().enumerate() {
        if index + 1 == packets.len() {
            std::thread::sleep(pause);
        }
        socket.send_to(packet, &SocketAddr::new(to, 0).into())?;
    }
    Ok(())
}

/// Asks a server with a datagram whose first fragment comes last.
fn ask_backwards(
    space: &Space,
    own: IpAddr,
    target: SocketAddr,
    pause: Duration,
) -> Running<Result<Vec<u8>>> {
    space.start(move || {
        let socket = UdpSocket::bind((own, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut packets = fragments(socket.local_addr()?, target, &[b'f'; 3000]);
        packets.reverse();
        send_raw(target.ip(), &packets, pause)?;
        let mut answer = vec![0; 8192];
        let length = socket.recv(&mut answer).context("no answer")?;
        answer.truncate(length);
        Ok(answer)
    })
}

/// The server answers it, and echoes all of it.
fn expect_answers(what: &str, space: &Space, own: IpAddr, target: SocketAddr) -> Result<()> {
    for pause in [0, 3, 20].map(Duration::from_millis) {
        // On a busy machine a pause may last longer than a fragment waits.
        let mut tries = (0..TRIES).map(|_| ask_backwards(space, own, target, pause).wait());
        let answer = tries.find(Result::is_ok).context("no answer")?;
        let answer = answer.with_context(|| format!("{what}, {target}, {pause:?} before the first"))?;
        ensure!(answer.ends_with(&[b'f'; 3000]), "{what}: {} bytes", answer.len());
    }
    Ok(())
}

const TRIES: usize = 5;

/// News of pods and neighbours may still be on their way.
fn wait_until_answered(space: &Space, target: SocketAddr) -> Result<()> {
    wait_for(&format!("an answer of {target}"), || {
        Ok(space.run(move || probe_udp(target, b"hello")).is_ok_and(|outcome| outcome.is_answered()))
    })
}

const FAMILIES: [bool; 2] = [true, false];

#[test]
fn fragments_arrive_in_any_order() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let client = lab.pod(1, "shop/client").create()?;
        let near = lab.pod(1, "shop/near").host_port("UDP", "", 8001, 81).create()?;
        let far = lab.pod(2, "shop/far").create()?;
        let outside = lab.outside();
        for is_ipv4 in FAMILIES {
            let own = client.address(is_ipv4);
            let at = |pod: &crate::lab::Pod| SocketAddr::new(pod.address(is_ipv4), 80);
            wait_until_answered(client.space(), at(&far))?;
            expect_answers("one node", client.space(), own, at(&near))?;
            expect_answers(routing, client.space(), own, at(&far))?;
            let outsider: IpAddr = OUTSIDE[usize::from(!is_ipv4)].parse()?;
            expect_answers("from outside", outside, outsider, at(&near))?;
            let node = lab.node(1).addresses()[usize::from(!is_ipv4)];
            expect_answers("a host port", outside, outsider, SocketAddr::new(node, 8001))?;
            let mut tries = (0..TRIES).map(|_| expect_masqueraded_answer(client.space(), outside, outsider));
            ensure!(tries.any(|answer| answer.is_ok()), "{own}: no answer to a masqueraded question");
        }
    }
    Ok(())
}

/// An answer from outside to a masqueraded question, the first fragment last.
fn expect_masqueraded_answer(pod: &Space, outside: &Space, outsider: IpAddr) -> Result<()> {
    let (bound, at) = std::sync::mpsc::channel();
    let server = outside.start(move || -> Result<()> {
        let socket = UdpSocket::bind((outsider, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        bound.send(socket.local_addr()?)?;
        let (_, asker) = socket.recv_from(&mut [0; 64])?;
        let mut packets = fragments(socket.local_addr()?, asker, &[b'a'; 3000]);
        packets.reverse();
        send_raw(asker.ip(), &packets, Duration::from_millis(3))
    });
    let target = at.recv()?;
    let answer = pod.run(move || -> Result<usize> {
        let unspecified = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(unspecified)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(target)?;
        socket.send(b"hello")?;
        socket.recv(&mut [0; 8192]).context("no answer to a masqueraded question")
    });
    server.wait()?;
    ensure!(answer? == 3000);
    Ok(())
}

#[test]
fn a_fragment_whose_first_never_comes_is_dropped_and_counted() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(1, "shop/b").create()?);
    let dropped =
        || lab.node(1).metric("weir_dropped_packets_total", &["FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND"]);
    ensure!(lab.node(1).weir(&["status"])?.contains("wait for the first"));
    for is_ipv4 in FAMILIES {
        let before = dropped()?;
        let (from, to) = (a.address(is_ipv4), b.address(is_ipv4));
        let packets = fragments(SocketAddr::new(from, 4000), SocketAddr::new(to, 80), &[0; 3000]);
        a.space().run(move || send_raw(to, &packets[1..], Duration::ZERO))?;
        wait_for("two dropped fragments", || Ok(dropped()? == before + 2.0))?;
    }
    Ok(())
}

/// Behind the outside host, over a link of 1300 bytes.
const BEYOND: [&str; 2] = ["192.0.2.77", "2001:db8:77::77"];

/// A host there that answers like every server.
fn beyond(lab: &Lab) -> Result<(Space, Server)> {
    let space = Space::create(&format!("{}-beyond", lab.name()), None)?;
    lab.outside().set_sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
    lab.outside().configure(&[
        &format!("link add narrow mtu 1300 type veth peer name eth0 mtu 1300 netns {}", space.name()),
        "addr add 192.0.2.1/24 dev narrow",
        "addr add 2001:db8:77::1/64 dev narrow nodad",
        "link set narrow up",
    ])?;
    space.configure(&[
        &format!("addr add {}/24 dev eth0", BEYOND[0]),
        &format!("addr add {}/64 dev eth0 nodad", BEYOND[1]),
        "link set eth0 up",
        "route add default via 192.0.2.1",
        "route add default via 2001:db8:77::1",
    ])?;
    let server = Server::start(&space, "beyond", &BEYOND.map(|ip| ip.parse().expect("addresses")), &PORTS)?;
    Ok((space, server))
}

#[test]
fn large_datagrams_pass_a_narrow_link() -> Result<()> {
    require_lab!();
    for (routing, masquerade) in [("tunnel", "true"), ("native", "true"), ("native", "false")] {
        let agent_arguments = ["--masquerade", masquerade].map(str::to_owned).to_vec();
        let lab = Lab::start(Setup { routing: routing.to_owned(), agent_arguments, ..Setup::default() })?;
        let pod = lab.pod(1, "shop/client").create()?;
        let (_space, _server) = beyond(&lab)?;
        for address in BEYOND {
            let target = socket_address(address, 80);
            wait_until_answered(pod.space(), target)?;
            // With IPv6 the first one is lost, and tells how large fragments may be.
            let ask = || pod.space().run(move || probe_udp(target, &[b'f'; 4000]));
            let answered = (0..3).any(|_| ask().is_ok_and(|outcome| outcome.is_answered()));
            ensure!(answered, "{routing}, masquerade {masquerade}: no answer of {address}");
        }
    }
    Ok(())
}

/// What a datagram with this TTL meets: its answer, or an error.
fn ask_with_ttl(space: &Space, target: SocketAddr, ttl: u32) -> Result<Outcome> {
    space.run(move || {
        let socket = Socket::new(Domain::for_address(target), Type::DGRAM, None)?;
        if target.is_ipv4() {
            socket.set_ttl_v4(ttl)?;
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        } else {
            socket.set_unicast_hops_v6(ttl)?;
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        }
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(&target.into())?;
        let socket = UdpSocket::from(socket);
        socket.send(b"hello")?;
        match socket.recv(&mut [0; 256]) {
            Ok(_) => Ok(Outcome::Answered { by: String::new(), seen_as: None }),
            Err(error) if error.kind() == ErrorKind::HostUnreachable => Ok(Outcome::Unreachable),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Outcome::TimedOut),
            Err(error) => Err(error.into()),
        }
    })
}

#[test]
fn the_node_is_a_hop_on_the_way_to_other_nodes_and_the_world() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let pod = lab.pod(1, "shop/client").create()?;
        let near = lab.pod(1, "shop/near").create()?;
        let far = lab.pod(2, "shop/far").create()?;
        for is_ipv4 in FAMILIES {
            let at = |address: IpAddr| SocketAddr::new(address, 80);
            let outsider: IpAddr = OUTSIDE[usize::from(!is_ipv4)].parse()?;
            for target in [at(far.address(is_ipv4)), at(outsider)] {
                wait_until_answered(pod.space(), target)?;
                let outcome = ask_with_ttl(pod.space(), target, 1)?;
                ensure!(outcome == Outcome::Unreachable, "{routing}: TTL 1 to {target}: {outcome}");
                let outcome = ask_with_ttl(pod.space(), target, 2)?;
                ensure!(outcome.is_answered(), "{routing}: TTL 2 to {target}: {outcome}");
            }
            let outcome = ask_with_ttl(pod.space(), at(near.address(is_ipv4)), 1)?;
            ensure!(outcome.is_answered(), "{routing}: one node: {outcome}");
        }
    }
    Ok(())
}
