//! A look at the wire: what passes there in plain.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::space::{Running, Space};
use super::wire::OUTSIDE;

/// What a test says so that it can be found on the wire.
pub const MARKER: &[u8] = b"weir-plain-marker";

const ESP: u8 = 50;

/// Sees every frame on the wire until it is asked.
pub struct Wall {
    stops: Arc<AtomicBool>,
    running: Running<Result<Seen>>,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Frames that should not have been seen in plain: what, and how many.
    pub plain: BTreeMap<String, u64>,
    /// Packets of WireGuard and of ESP.
    pub encrypted: u64,
    /// Packets to the addresses behind the outside host, by who seems to have sent them.
    pub leaving: BTreeMap<IpAddr, u64>,
}

impl Wall {
    /// Begins to look, in the namespace of the wire.
    pub(super) fn start(wire: &Space) -> Result<Self> {
        let socket = wire.run(|| -> Result<Socket> {
            let all = i32::from((libc::ETH_P_ALL as u16).to_be());
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)))?;
            socket.set_recv_buffer_size(64 << 20)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            Ok(socket)
        })?;
        let stops = Arc::new(AtomicBool::new(false));
        let asked = stops.clone();
        Ok(Self { stops, running: wire.start(move || look(socket, &asked)) })
    }

    /// An error unless there was traffic, and all of it encrypted.
    pub fn check(self) -> Result<Seen> {
        self.stops.store(true, Ordering::Relaxed);
        let seen = self.running.wait()?;
        if !seen.plain.is_empty() || seen.encrypted == 0 {
            return super::noting_failure(Err(anyhow::anyhow!("seen on the wire: {seen:?}")));
        }
        Ok(seen)
    }

    /// What was seen, whatever it is.
    pub fn stop(self) -> Result<Seen> {
        self.stops.store(true, Ordering::Relaxed);
        self.running.wait()
    }
}

fn look(mut socket: Socket, stops: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut frame = vec![0; 70_000];
    loop {
        match socket.read(&mut frame) {
            Ok(length) => note(&frame[..length], &mut seen),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stops.load(Ordering::Relaxed) {
                    return Ok(seen);
                }
            }
            Err(error) => bail!("looking at the wire: {error}"),
        }
    }
}

fn note(frame: &[u8], seen: &mut Seen) {
    let Some((ends, protocol, payload)) = parse(frame) else { return };
    let port = |at: usize| payload.get(at..at + 2).map_or(0, |port| u16::from_be_bytes([port[0], port[1]]));
    let is_udp = protocol == 17;
    let mut plain = |what: String| *seen.plain.entry(what).or_insert(0) += 1;
    if ends.iter().any(is_of_pod) {
        plain(format!("{} to {}, protocol {protocol}", ends[0], ends[1]));
    }
    if is_udp && [port(0), port(2)].contains(&8472) {
        plain(format!("a tunnel packet of {} to {}", ends[0], ends[1]));
    }
    if frame.windows(MARKER.len()).any(|part| part == MARKER) {
        plain(format!("the marker, from {} to {}", ends[0], ends[1]));
    }
    if OUTSIDE[2..].iter().any(|address| address.parse() == Ok(ends[1])) {
        *seen.leaving.entry(ends[0]).or_insert(0) += 1;
    }
    if protocol == ESP || is_udp && [51871, 51872].contains(&port(2)) {
        seen.encrypted += 1;
    }
}

fn is_of_pod(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..2] == [10, 1],
        IpAddr::V6(address) => address.segments()[..3] == [0xfd00, 1, 0],
    }
}

/// The ends of an IP packet, its protocol, and what follows its header.
fn parse(frame: &[u8]) -> Option<([IpAddr; 2], u8, &[u8])> {
    let packet = frame.get(14..)?;
    match u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]) {
        0x0800 => {
            let address = |at: usize| -> Option<IpAddr> {
                Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?).into())
            };
            let payload = packet.get(usize::from(packet.first()? & 0xf) * 4..)?;
            Some(([address(12)?, address(16)?], *packet.get(9)?, payload))
        }
        0x86dd => {
            let address = |at: usize| -> Option<IpAddr> {
                Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?).into())
            };
            Some(([address(8)?, address(24)?], *packet.get(6)?, packet.get(40..)?))
        }
        _ => None,
    }
}
