//! Frames that nobody would send, made from those that everybody does. Whatever
//! they are, what policy denies is not delivered, and nothing is remembered of it; and whatever policy
//! allows, nobody speaks for others.
//!
//! `WEIR_TEST_FUZZ_SECONDS=600 cargo test --test it packets::fuzz` goes on for ten minutes, with a seed
//! that is printed; `WEIR_TEST_FUZZ_SEED` takes it again.

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};

use super::frame::{ACK, Packet, RST, SYN, echo, echo_reply, icmp, solicitation, tcp, udp, unreachable};
use super::world::{
    A, ANSWER, Arrival, Cast, EGRESS, INGRESS, PASS, REDIRECT, SHOT, World, casts, settings, within,
};
use crate::require::require_lab;

/// Frames for each program and family, unless seconds are given.
const ROUNDS: usize = 20_000;
/// The seed, unless seconds or another one are given.
const SEED: u64 = 0x5745_4952;

/// How long the frames of one program and family go on, and from which seed.
struct Budget {
    seed: u64,
    ends: Option<Instant>,
}

impl Budget {
    /// One of `runs` of a test; as the environment says.
    fn of_run(runs: usize) -> Result<Self> {
        let number = |name: &str| -> Result<Option<u64>> {
            Ok(std::env::var(name).ok().map(|text| text.parse()).transpose()?)
        };
        let seconds = number("WEIR_TEST_FUZZ_SECONDS")?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let fresh = if seconds.is_some() { now.as_nanos() as u64 | 1 } else { SEED };
        let seed = number("WEIR_TEST_FUZZ_SEED")?.unwrap_or(fresh);
        let ends =
            seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds as f64 / runs as f64));
        Ok(Self { seed, ends })
    }

    fn goes_on(&self, round: usize) -> bool {
        // The clock costs as much as a frame.
        self.ends.map_or(round < ROUNDS, |ends| !round.is_multiple_of(64) || Instant::now() < ends)
    }

    /// Past the test runner's capture.
    fn say(&self, program: &str, rounds: usize) {
        if self.ends.is_some() {
            let _ = writeln!(std::io::stderr().lock(), "{program}: {rounds} frames from seed {}", self.seed);
        }
    }
}

/// xorshift64*: the same frames for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end.max(1)
    }

    /// Mostly the headers, where the decisions are.
    fn position(&mut self, length: usize) -> usize {
        let end = if self.below(4) == 0 { length } else { length.min(80) };
        self.below(end)
    }
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.position(frame.len());
        match random.below(7) {
            0 => frame[at] ^= 1 << random.below(8),
            1 => frame[at] = random.below(256) as u8,
            2 => frame[at] = [0, 1, 6, 17, 44, 58, 60, 0x45, 0x4f, 0x60, 0x7f, 0xff][random.below(12)],
            3 => frame.truncate(14 + random.below(frame.len())),
            4 => frame.extend(vec![random.below(256) as u8; random.below(40)]),
            5 => {
                let other = &seeds[random.below(seeds.len())];
                let end = frame.len().min(other.len());
                frame[at.min(end)..end].copy_from_slice(&other[at.min(end)..end]);
            }
            _ => {
                // Address for address: whole fields, not only bits of them.
                let (from, length) = (14 + random.below(48), [2, 4, 16][random.below(3)]);
                let other = &seeds[random.below(seeds.len())];
                if from + length <= frame.len().min(other.len()) {
                    frame[from..from + length].copy_from_slice(&other[from..from + length]);
                }
            }
        }
    }
    frame
}

fn seeds(cast: &Cast) -> Vec<Vec<u8>> {
    let (a, b) = ((cast.a, 40000), (cast.b, 80));
    let mut packets = vec![
        tcp(a, b, SYN),
        tcp(a, b, ACK).payload(&[1; 64]),
        tcp(a, b, RST),
        tcp(b, a, SYN | ACK).by(2),
        tcp(a, (cast.b, 81), SYN),
        udp(a, b),
        udp(b, a).by(2),
        udp(a, (cast.service, 80)),
        tcp(a, (cast.service, 80), SYN),
        tcp(a, (cast.service, 82), SYN),
        udp(a, (cast.remote, 80)),
        udp(a, (cast.world, 53)),
        udp((cast.world, 53), a),
        udp((cast.world, 53), (cast.node, 20001)),
        udp((cast.remote, 53), a),
        udp(a, (cast.node, 8472)),
        echo(cast.a, cast.b, 7),
        echo_reply(cast.b, cast.a, 7).by(2),
        unreachable(cast.b, &tcp(a, b, ACK)).by(2),
        unreachable(cast.world, &udp(a, (cast.world, 53))),
        icmp(cast.a, cast.b, 13, 0).payload(&[0; 12]),
        udp((cast.node, 53), a),
        udp((cast.other_node, 53), a),
        udp((cast.nobody, 53), a),
        udp((cast.elsewhere, 53), a),
        udp(a, (cast.nobody, 53)),
        udp(a, (cast.world, 8472)),
        udp((cast.world, 8472), (cast.node, 8000)),
        tcp((cast.world, 40000), (cast.node, 8000), SYN),
        udp((cast.remote, 53), (cast.node, 53)),
        icmp(cast.world, cast.a, 133, 0).payload(&[0x41; 40]),
        icmp(cast.node, cast.a, 135, 0).payload(&[0; 16]),
        udp(a, b).fragment(3, 0, true),
        udp(a, b).fragment(3, 64, false),
    ];
    if cast.a.is_ipv4() {
        let mut with_options = tcp(a, b, SYN);
        with_options.options = vec![7, 7, 4, 0, 0, 0, 0, 0];
        packets.push(with_options);
    } else {
        packets.push(tcp(a, b, SYN).extension(0, &[1, 4, 0, 0, 0, 0]).extension(60, &[1, 4, 0, 0, 0, 0]));
        packets.push(tcp(a, b, SYN).extension(43, &[2, 0, 0, 0, 0, 0]).fragment(9, 0, true));
        if let (IpAddr::V6(a), IpAddr::V6(b)) = (cast.a, cast.b) {
            packets.push(solicitation(a, b));
        }
    }
    for other in strange(cast) {
        packets.extend([udp(a, (other, 53)), udp((other, 53), a), unreachable(other, &udp(a, (other, 53)))]);
    }
    let is_addressed = |packet: &Packet| packet.macs.0[..2] == [0x02, 0x57] || packet.macs.0[0] == 0x33;
    packets
        .into_iter()
        .map(|packet| if is_addressed(&packet) { packet } else { packet.by(1) })
        .map(|packet| packet.bytes())
        .collect()
}

/// Addresses of every class that is no pod's, node's or service's.
fn strange(cast: &Cast) -> Vec<IpAddr> {
    let addresses: &[&str] = if cast.a.is_ipv4() {
        &[
            "0.0.0.0",
            "127.0.0.1",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "169.254.42.1",
            "10.1.0.99",
        ]
    } else {
        &["::", "::1", "fe80::1", "ff02::1", "::ffff:10.1.0.1", "fd57:6569:7200::2a:1", "fd01::99"]
    };
    addresses.iter().map(|address| address.parse().expect("an address of the table")).collect()
}

/// Everybody's way here: by the tunnel packets come from the other node, for a pod of its own.
fn arrival(cast: &Cast, program: &str) -> Arrival {
    let tunnel = (program == "from_overlay").then_some((Some(cast.other_node), super::world::R));
    Arrival { tunnel, ..Arrival::default() }
}

/// Calls `check` with every frame, the program, and what the program did.
fn run(
    world: &World,
    cast: &Cast,
    programs: &[&str],
    check: impl Fn(&[u8], &str, u32, u32) -> Result<()>,
) -> Result<()> {
    let seeds = seeds(cast);
    for program in programs {
        let budget = Budget::of_run(2 * programs.len())?;
        let mut random = Random(budget.seed);
        let act = world.actor(program, arrival(cast, program))?;
        let mut round = 0;
        while budget.goes_on(round) {
            round += 1;
            let frame = mutate(&mut random, &seeds);
            // Without room for an IP header the kernel does not even run the program.
            let (action, mark) = match act(&frame) {
                Err(_) if frame.len() < 54 => continue,
                result => result?,
            };
            let context =
                || format!("{program} seed {} round {round}: action {action} on {frame:02x?}", budget.seed);
            ensure!([PASS, SHOT, REDIRECT].contains(&action), "{}", context());
            check(&frame, program, action, mark).map_err(|error| error.context(context()))?;
        }
        budget.say(program, round);
    }
    Ok(())
}

fn deny_everything(world: &World, cast: &Cast) -> Result<()> {
    for id in 1..=4 {
        world.enforce(id, &[INGRESS, EGRESS])?;
    }
    // To itself through a service a pod always may.
    for (id, port, protocol) in [(900, 80, 6), (901, 80, 17), (902, 81, 6)] {
        world.service((cast.service, port, protocol), id, 1, &[(cast.remote, 80)])?;
    }
    Ok(())
}

#[test]
fn nothing_gets_past_a_policy_without_rules() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            deny_everything(world, &cast)?;
            let programs = ["from_pod", "from_network", "from_overlay", "to_pod"];
            run(world, &cast, &programs, |frame, program, action, mark| {
                let is_ip = matches!(frame[12..14], [0x08, 0x00] | [0x86, 0xdd]);
                match program {
                    // Only its own answers: ARP, neighbour discovery, refusals.
                    "from_pod" => {
                        ensure!(action == SHOT || (action == REDIRECT && mark == ANSWER));
                    }
                    // Only what is for the node's stack.
                    "from_network" => ensure!(action != REDIRECT),
                    // By the tunnel only what is for the node itself.
                    "from_overlay" => ensure!(action == SHOT || action == PASS && is_for(frame, cast.node)),
                    _ => ensure!(action == SHOT || !is_ip),
                }
                Ok(())
            })?;
            let flows = world.connections(0)?;
            ensure!(flows.is_empty(), "denied packets left {flows:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn is_for(frame: &[u8], address: IpAddr) -> bool {
    ends(frame).is_some_and(|(_, destination)| destination == address)
}

/// The protocol and what follows the IP headers, read as the standards say.
fn upper(frame: &[u8]) -> Option<(u8, &[u8])> {
    if frame[12..14] == [0x08, 0x00] {
        let start = 14 + usize::from(frame.get(14)? & 15) * 4;
        return Some((*frame.get(23)?, frame.get(start..)?));
    }
    let (mut next, mut offset) = (*frame.get(20)?, 54);
    while matches!(next, 0 | 43 | 44 | 60) {
        let header = frame.get(offset..offset + 8)?;
        offset += if next == 44 { 8 } else { 8 + usize::from(header[1]) * 8 };
        next = header[0];
    }
    Some((next, frame.get(offset..)?))
}

fn is_later_fragment(frame: &[u8]) -> bool {
    if frame[12..14] == [0x08, 0x00] {
        return frame.len() > 21 && (frame[20] & 0x1f != 0 || frame[21] != 0);
    }
    let (mut next, mut offset) = (frame[20], 54);
    while matches!(next, 0 | 43 | 44 | 60) {
        let Some(header) = frame.get(offset..offset + 8) else { return false };
        if next == 44 {
            return header[2] != 0 || header[3] & 0xf8 != 0;
        }
        offset += 8 + usize::from(header[1]) * 8;
        next = header[0];
    }
    false
}

fn ends(frame: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let four = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
    let six = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?));
    if frame[12..14] == [0x08, 0x00] { Some((four(26)?, four(30)?)) } else { Some((six(22)?, six(38)?)) }
}

#[test]
fn only_what_a_rule_allows_is_delivered() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            deny_everything(world, &cast)?;
            world.allow(1, EGRESS, super::world::B, (6, 80))?;
            world.allow(2, INGRESS, A, (6, 80))?;
            run(
                world,
                &cast,
                &["from_pod", "from_network", "from_overlay"],
                |frame, program, action, mark| {
                    let is_stacks =
                        program == "from_network" || program == "from_overlay" && is_for(frame, cast.node);
                    if action == SHOT || mark == ANSWER || (is_stacks && action == PASS) {
                        return Ok(());
                    }
                    ensure!(program == "from_pod", "from outside nobody has a rule");
                    let (source, destination) = ends(frame).context("it is no packet")?;
                    let pair = [(cast.a, cast.b), (cast.b, cast.a)].contains(&(source, destination));
                    if is_later_fragment(frame) {
                        // Ports are where its first fragment was. What follows the fragment's header is no
                        // header, whatever the fragment says of it.
                        ensure!(pair);
                        return Ok(());
                    }
                    let (protocol, rest) = upper(frame).context("it is no packet")?;
                    if matches!(protocol, 1 | 58) {
                        // An error about a flow that may be: to the one end, from the other.
                        ensure!(pair);
                        let (kind, quote) = (rest[0], &rest[8..]);
                        ensure!(if protocol == 1 { [3, 11, 12].contains(&kind) } else { kind < 128 });
                        let quoted = [&frame[..14], quote].concat();
                        ensure!(ends(&quoted) == Some((destination, source)));
                        ensure!(upper(&quoted).is_some_and(|(protocol, _)| protocol == 6));
                        return Ok(());
                    }
                    ensure!(protocol == 6, "the protocol is {protocol}");
                    let ports = [rest[0], rest[1], rest[2], rest[3]];
                    let [http_source, http_destination] = [ports[..2] == [0, 80], ports[2..] == [0, 80]];
                    ensure!(
                        ((source, destination) == (cast.a, cast.b) && http_destination)
                            || ((source, destination) == (cast.b, cast.a) && http_source),
                        "from {source} to {destination} {ports:?}"
                    );
                    Ok(())
                },
            )?;
            for (key, flow) in world.connections(0)? {
                ensure!(flow.identity == [A, super::world::B] && key.protocol == 6, "{key:?} {flow:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What a frame says, read as the standards say.
struct Read<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Layer 4; of later fragments what is there.
    rest: &'a [u8],
    is_later_fragment: bool,
}

impl<'a> Read<'a> {
    fn of(frame: &'a [u8]) -> Option<Self> {
        let (source, destination) = ends(frame)?;
        // 59: nothing, where a header promises more than there is.
        let (protocol, rest) = upper(frame).unwrap_or((59, &[]));
        Some(Self { source, destination, protocol, rest, is_later_fragment: is_later_fragment(frame) })
    }

    fn is_error(&self) -> bool {
        let kind = self.rest.first().copied().unwrap_or_default();
        match self.protocol {
            1 => matches!(kind, 3 | 11 | 12),
            58 => kind < 128,
            _ => false,
        }
    }

    fn is_control(&self) -> bool {
        self.protocol == 58 && matches!(self.rest.first(), Some(130..=137 | 143)) && !self.is_later_fragment
    }

    fn is_tunnel(&self) -> bool {
        self.protocol == 17 && !self.is_later_fragment && self.rest.get(2..4) == Some(&[0x21, 0x18])
    }
}

/// No packet on its way comes from there, or goes there.
fn is_nobody(address: IpAddr, cast: &Cast) -> bool {
    let is_of_one_link = |address: Ipv6Addr| address.segments()[0] & 0xffc0 == 0xfe80;
    address == cast.loopback
        || address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || match address {
            IpAddr::V4(address) => address.is_broadcast() || matches!(address.octets()[0], 0 | 127),
            IpAddr::V6(address) => is_of_one_link(address) || address.to_ipv4_mapped().is_some(),
        }
}

fn is_in_pod_cidr(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => matches!(address.octets()[..2], [10, 1 | 2]),
        IpAddr::V6(address) => matches!(address.segments()[0], 0xfd01 | 0xfd02),
    }
}

/// What is delivered, to a pod or beyond this node, comes from whom it says.
fn check_delivered(cast: &Cast, program: &str, action: u32, read: &Read<'_>) -> Result<()> {
    let (source, destination) = (read.source, read.destination);
    let own_pods = [cast.a, cast.b];
    // That pod is on another device than the frames come by.
    let is_own_pods = own_pods.contains(&destination) || destination == cast.elsewhere;
    ensure!(!is_nobody(source, cast), "from {source}");
    ensure!(!read.is_control(), "neighbour discovery");
    let to_pod = is_own_pods || destination == cast.remote;
    match program {
        "from_pod" => {
            ensure!(own_pods.contains(&source), "from {source}");
            // What stands for the pod itself is answered where it has reached itself.
            ensure!(destination == cast.loopback || !is_nobody(destination, cast), "to {destination}");
            ensure!(!read.is_tunnel() || to_pod, "a tunnel packet to {destination}");
        }
        // Host ports are pods'.
        "from_network" => {
            ensure!(to_pod || destination == cast.node, "to {destination}");
            ensure!(destination != cast.remote, "past the tunnel");
            let is_others = is_in_pod_cidr(source) || source == cast.node;
            ensure!(!is_others || read.is_error(), "from {source}");
        }
        "from_overlay" if action == PASS => {
            ensure!(destination == cast.node && !read.is_tunnel(), "to {destination}");
            ensure!(source != cast.node && !own_pods.contains(&source), "from {source}");
        }
        "from_overlay" => {
            ensure!(is_own_pods, "to {destination}");
            let is_other_nodes = [cast.remote, cast.nobody, cast.other_node].contains(&source)
                || match (source, cast.nobody) {
                    (IpAddr::V4(source), IpAddr::V4(other)) => source.octets()[..2] == other.octets()[..2],
                    (IpAddr::V6(source), IpAddr::V6(other)) => source.segments()[0] == other.segments()[0],
                    _ => false,
                };
            ensure!(is_other_nodes || read.is_error(), "from {source}");
        }
        _ => {
            ensure!(own_pods.contains(&destination), "to {destination}");
            let is_others = [cast.remote, cast.nobody, cast.elsewhere].contains(&source);
            ensure!(!is_others || read.is_error(), "from {source}");
        }
    }
    Ok(())
}

#[test]
fn whatever_policy_allows_nobody_speaks_for_others() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            for (id, protocol) in [(910, 6), (911, 17)] {
                world.host_port((cast.node, 8000, protocol), id, (cast.b, 80))?;
            }
            let programs = ["from_pod", "from_network", "from_overlay", "to_pod"];
            run(world, &cast, &programs, |frame, program, action, mark| {
                let is_ip = matches!(frame[12..14], [0x08, 0x00] | [0x86, 0xdd]);
                let is_stacks = program == "from_network" && action == PASS || program == "to_pod" && !is_ip;
                if action == SHOT || mark == ANSWER || is_stacks {
                    return Ok(());
                }
                let read = Read::of(frame).context("it is no packet")?;
                check_delivered(&cast, program, action, &read)
            })
        })?;
    }
    Ok(())
}
