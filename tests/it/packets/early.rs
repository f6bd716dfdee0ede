//! What a driver sends on (XDP): exactly what `from_network` would, and nothing else.

use anyhow::{Context, Result, ensure};
use libbpf_rs::ProgramInput;
use weir::datapath::Settings;
use weir::datapath::abi::{Service, ServiceKey, addr_of};

use super::frame::{ACK, FIN, Layer4, Packet, RST, SYN, tcp, udp};
use super::network::{change_route, connect as connect_network, ip};
use super::world::{Cast, EXTERNAL, REDIRECT, World, casts, settings, within};
use crate::lab::wait_for;
use crate::require::require_lab;

const PORT: u16 = 30080;
const PSH: u8 = 0x08;
const PASS: u32 = 2;
const SENT: u32 = 3;
/// Of this node's device, and of the node with the backend and the router: both are behind it.
const MACS: [[u8; 6]; 2] = [[0x0a, 0, 0, 0, 0, 1], [0x0a, 0, 0, 0, 0, 2]];

/// The node is connected, and knows its neighbours.
fn start(world: &World, cast: &Cast) -> Result<()> {
    connect_network(cast, 1500)?;
    let [own, other] = MACS.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
    ip(&format!("link set uplink address {own}"))?;
    ip(&format!("neigh replace {} lladdr {other} dev uplink nud permanent", cast.other_node))?;
    ip(&format!("route add default via {}", cast.other_node))?;
    change_route("add", cast)?;
    world.forget_flows()
}

/// What `from_wire` does with a frame that comes by the device, and what becomes of the frame.
fn run(world: &World, bytes: &[u8]) -> Result<(u32, Vec<u8>)> {
    let device = nix::net::if_::if_nametoindex("uplink")?;
    let mut context = [0_u8; 24];
    context[4..8].copy_from_slice(&u32::try_from(bytes.len())?.to_ne_bytes());
    context[12..16].copy_from_slice(&device.to_ne_bytes());
    let mut frame = vec![0; bytes.len() + 256];
    let output = world.datapath.program("from_wire")?.test_run(ProgramInput {
        context_in: Some(&mut context),
        data_in: Some(bytes),
        data_out: Some(&mut frame),
        ..ProgramInput::default()
    });
    let output = output.context("running from_wire")?;
    let (action, length) = (output.return_value, output.data.context("no frame came out")?.len());
    frame.truncate(length);
    Ok((action, frame))
}

fn addressed(packet: &Packet) -> Packet {
    Packet { macs: (MACS[0], MACS[1]), ..packet.clone() }
}

/// Both programs send the packet on, and alike. The driver does it only for flows that `from_network` has seen
/// just now, so this is tried until the machine lets both run in time.
fn is_sent_alike(world: &mut World, packet: &Packet) -> Result<()> {
    let packet = addressed(packet);
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    wait_for("the driver to send the packet on", || {
        let outcome = world.send("from_network", &packet)?;
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        theirs = outcome.frame;
        let (action, frame) = run(world, &packet.bytes())?;
        ours = frame;
        Ok(action == SENT)
    })?;
    ensure!(ours[12..] == theirs[12..], "sent {ours:02x?}\nfrom_network {theirs:02x?}");
    ensure!(ours[..6] == MACS[1] && ours[6..12] == MACS[0], "sent to {:02x?}", &ours[..12]);
    Ok(())
}

fn is_left(world: &World, bytes: &[u8]) -> Result<()> {
    let (action, frame) = run(world, bytes)?;
    ensure!(action == PASS && frame == bytes, "action {action}: {frame:02x?}");
    Ok(())
}

/// The port of the node by which a client's packet leaves.
fn way_of(world: &mut World, cast: &Cast, packet: &Packet) -> Result<u16> {
    let outcome = world.send("from_network", packet)?;
    ensure!(outcome.action == REDIRECT, "{outcome:?}");
    let offset = if cast.a.is_ipv4() { 34 } else { 54 };
    Ok(u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]))
}

fn natively(work: fn(&mut World, Cast) -> Result<()>) -> Result<()> {
    for cast in casts() {
        let settings = Settings { tunnel_ifindex: None, ..settings() };
        within(settings, move |world| {
            start(world, &cast)?;
            work(world, cast)
        })?;
    }
    Ok(())
}

#[test]
fn a_driver_sends_on_what_from_network_would_and_alike() -> Result<()> {
    require_lab!();
    natively(|world, cast| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.node, PORT), (cast.remote, 8080));
        for protocol in [6, 17] {
            world.outside((cast.node, PORT, protocol), 100 + u32::from(protocol), 1, &[backend])?;
        }
        let way = way_of(world, &cast, &tcp(client, frontend, SYN))?;
        let back = |flags| tcp(backend, (cast.node, way), flags);
        world.send("from_network", &addressed(&back(SYN | ACK)))?;
        for flags in [ACK, ACK | PSH] {
            is_sent_alike(world, &tcp(client, frontend, flags).payload(b"a question"))?;
            is_sent_alike(world, &back(flags).payload(b"an answer of odd length"))?;
        }
        let way = way_of(world, &cast, &udp(client, frontend))?;
        is_sent_alike(world, &udp(client, frontend))?;
        let answer = udp(backend, (cast.node, way));
        world.send("from_network", &addressed(&answer))?;
        is_sent_alike(world, &answer)?;
        if cast.a.is_ipv4() {
            // It stays without.
            let layer4 = Layer4::Udp { ports: (client.1, frontend.1), has_checksum: false };
            is_sent_alike(world, &Packet { layer4, ..udp(client, frontend) })?;
        }
        Ok(())
    })
}

#[test]
fn a_driver_leaves_everything_else_to_from_network() -> Result<()> {
    require_lab!();
    natively(|world, cast| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.node, PORT), (cast.remote, 8080));
        world.outside((cast.node, PORT, 6), 106, 1, &[backend])?;
        let ask = |flags| addressed(&tcp(client, frontend, flags)).bytes();
        // No flow yet.
        is_left(world, &ask(ACK))?;
        let way = way_of(world, &cast, &tcp(client, frontend, SYN))?;
        let back = |flags| addressed(&tcp(backend, (cast.node, way), flags));
        // Nobody has answered.
        is_left(world, &back(ACK).bytes())?;
        world.send("from_network", &back(SYN | ACK))?;
        is_sent_alike(world, &tcp(client, frontend, ACK))?;
        is_sent_alike(world, &tcp(backend, (cast.node, way), ACK))?;
        for flags in [SYN, FIN | ACK, RST] {
            is_left(world, &ask(flags))?;
            is_left(world, &back(flags).bytes())?;
        }
        // For another machine, at its last hop, tagged, and of a stranger.
        let mut other = ask(ACK);
        other[5] ^= 1;
        is_left(world, &other)?;
        let mut last = ask(ACK);
        last[if cast.a.is_ipv4() { 22 } else { 21 }] = 1;
        is_left(world, &last)?;
        let mut tagged = ask(ACK);
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        is_left(world, &tagged)?;
        is_left(world, &addressed(&tcp((cast.world, 40001), frontend, ACK)).bytes())?;
        is_left(world, &addressed(&tcp((cast.nobody, 8080), (cast.node, way), ACK)).bytes())?;
        // Longer than the way takes.
        is_left(world, &addressed(&tcp(client, frontend, ACK).payload(&[0; 1500])).bytes())?;
        // Not seen by from_network for a while: it is to look again.
        world.change_connections(|_, row| row.last_seen_jiffies -= 1_000)?;
        is_left(world, &ask(ACK))?;
        world.change_mappings(|row| row.last_seen_jiffies -= 1_000)?;
        is_left(world, &back(ACK).bytes())?;
        is_sent_alike(world, &tcp(client, frontend, ACK))?;
        // No frontend any more.
        let key = ServiceKey { addr: addr_of(cast.node), port: PORT.to_be(), protocol: 6, scope: EXTERNAL };
        world.datapath.typed::<ServiceKey, Service>("services")?.remove(&key)?;
        is_left(world, &ask(ACK))
    })
}
