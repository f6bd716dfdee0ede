//! Probes and the servers that answer them.
//!
//! A server answers every connection and datagram with its name and the address that it
//! saw, then echoes: so one probe tells whether, by whom and as whom it was answered.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvmsg, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::space::{Running, Space};

/// How long a probe waits; a denied one takes as long.
pub const PATIENCE: Duration = Duration::from_millis(400);

/// What a probe sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// A connection, one line each way.
    Tcp,
    /// A datagram and its answer.
    Udp,
    /// An echo request and its reply.
    Ping,
    /// An ICMP timestamp request and its reply, which only IPv4 has.
    Timestamp,
}

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Answered {
        /// The name of the server; empty for a ping.
        by: String,
        /// The prober's address as the server saw it.
        seen_as: Option<SocketAddr>,
    },
    /// Refused at once: RST, or an ICMP error for the port.
    Refused,
    /// Refused at once by another ICMP error, or by the own host.
    Unreachable,
    /// Nothing came.
    TimedOut,
    /// Something else went wrong.
    Failed(String),
}

impl Outcome {
    /// Somebody answered.
    pub fn is_answered(&self) -> bool {
        matches!(self, Outcome::Answered { .. })
    }

    /// Denied so that the prober knows at once.
    pub fn is_refused(&self) -> bool {
        matches!(self, Outcome::Refused | Outcome::Unreachable)
    }

    /// Who answered.
    pub fn answered_by(&self) -> Option<&str> {
        match self {
            Outcome::Answered { by, .. } => Some(by),
            _ => None,
        }
    }

    /// The address that the server saw.
    pub fn seen_as(&self) -> Option<IpAddr> {
        match self {
            Outcome::Answered { seen_as: Some(address), .. } => Some(address.ip().to_canonical()),
            _ => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Answered { by, seen_as: Some(address) } => {
                write!(f, "answered by {by} (seen as {address})")
            }
            Outcome::Answered { .. } => f.write_str("answered"),
            Outcome::Refused => f.write_str("refused"),
            Outcome::Unreachable => f.write_str("unreachable"),
            Outcome::TimedOut => f.write_str("timed out"),
            Outcome::Failed(error) => write!(f, "failed: {error}"),
        }
    }
}

/// Probes `target` from the calling thread's namespace; the port means nothing to a ping.
pub fn probe(via: Via, target: SocketAddr) -> Outcome {
    let answered = match via {
        Via::Tcp => probe_tcp(target),
        Via::Udp => probe_udp(target, b"hello"),
        Via::Ping => ping(target.ip(), 56),
        Via::Timestamp => ask_icmp(target.ip(), 12, (13, 14)),
    };
    answered.unwrap_or_else(|error| match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Outcome::Refused,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::PermissionDenied => {
            Outcome::Unreachable
        }
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::TimedOut,
        // Dropped on its way out of the prober's own device.
        _ if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => Outcome::TimedOut,
        _ => Outcome::Failed(error.to_string()),
    })
}

fn probe_tcp(target: SocketAddr) -> std::io::Result<Outcome> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 256];
    let length = stream.read(&mut answer)?;
    Ok(answered(&answer[..length]))
}

/// Sends one datagram with `payload` and waits for its answer, which must echo it.
pub fn probe_udp(target: SocketAddr, payload: &[u8]) -> std::io::Result<Outcome> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(target)?;
    socket.send(payload)?;
    let mut answer = vec![0; 65536];
    let length = socket.recv(&mut answer)?;
    let answer = &answer[..length];
    let is_echo = answer.ends_with(payload);
    Ok(if is_echo { answered(answer) } else { Outcome::Failed("the answer is not the echo".to_owned()) })
}

/// Sends an echo request with `size` bytes and waits for its reply.
pub fn ping(target: IpAddr, size: usize) -> std::io::Result<Outcome> {
    ask_icmp(target, size, if target.is_ipv4() { (8, 0) } else { (128, 129) })
}

/// Sends a message of one type and waits for one of the other type with its number and beginning.
fn ask_icmp(target: IpAddr, size: usize, (request, reply): (u8, u8)) -> std::io::Result<Outcome> {
    let (family, protocol) = match target {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
    let identifier = (nix::unistd::gettid().as_raw() as u16).to_be_bytes();
    let mut packet = vec![request, 0, 0, 0, identifier[0], identifier[1], 0, 1];
    packet.resize(8 + size, b'w');
    if target.is_ipv4() {
        let checksum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&checksum);
    }
    let address = SockaddrStorage::from(SocketAddr::new(target, 0));
    sendto(socket.as_raw_fd(), &packet, &address, MsgFlags::empty())?;
    let deadline = Instant::now() + PATIENCE;
    let mut received = vec![0; 65536];
    while Instant::now() < deadline {
        let mut parts = [IoSliceMut::new(&mut received)];
        let length = match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, None, MsgFlags::empty())
        {
            Ok(message) => message.bytes,
            Err(nix::errno::Errno::EAGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        // A raw IPv4 socket delivers the IP header too.
        let start = if target.is_ipv4() { usize::from(received[0] & 15) * 4 } else { 0 };
        let message = &received[start.min(length)..length];
        // The times in an answer are its own.
        let same = if request == 13 { 4..12 } else { 4..packet.len() };
        if message.len() == packet.len() && message[0] == reply && message[same.clone()] == packet[same] {
            return Ok(Outcome::Answered { by: String::new(), seen_as: None });
        }
    }
    Ok(Outcome::TimedOut)
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let folded = (sum >> 16) + (sum & 0xffff);
    !((folded >> 16) + (folded & 0xffff)) as u16
}

fn answered(answer: &[u8]) -> Outcome {
    let line = String::from_utf8_lossy(answer);
    let mut words = line.lines().next().unwrap_or_default().split(' ');
    let by = words.next().unwrap_or_default().to_owned();
    match words.next().and_then(|address| address.parse().ok()) {
        Some(address) => Outcome::Answered { by, seen_as: Some(address) },
        None => Outcome::Failed(format!("a server that is not ours: {line:?}")),
    }
}

/// A thread that answers probes on its ports until it is dropped.
#[derive(Debug)]
pub struct Server {
    _open: UnixStream,
}

impl Server {
    /// Listens in `space` on `ports` of every one of `addresses`; `::` is all addresses of both families.
    pub fn start(space: &Space, name: &str, addresses: &[IpAddr], ports: &[u16]) -> Result<Self> {
        let (open, closed) = UnixStream::pair()?;
        let name = name.to_owned();
        let all: Vec<SocketAddr> = addresses
            .iter()
            .flat_map(|address| ports.iter().map(|port| SocketAddr::new(*address, *port)))
            .collect();
        let bound: Running<Result<(Vec<TcpListener>, Vec<UdpSocket>)>> = space.start(move || {
            let listeners = all.iter().map(TcpListener::bind).collect::<Result<Vec<_>, _>>();
            let sockets = all.iter().map(UdpSocket::bind).collect::<Result<Vec<_>, _>>();
            Ok((listeners.context("listening for TCP")?, sockets.context("listening for UDP")?))
        });
        let (listeners, sockets) = bound.wait()?;
        space.start(move || {
            if let Err(error) = answer(&name, &closed, &listeners, &sockets) {
                eprintln!("the server of {name} ended: {error:#}");
            }
        });
        Ok(Self { _open: open })
    }
}

/// Lets a socket hold seconds of datagrams: on a busy machine its thread may not run for a while.
pub fn hold_many_datagrams(socket: &UdpSocket) -> Result<()> {
    Ok(setsockopt(socket, sockopt::RcvBufForce, &(16 << 20))?)
}

fn answer(name: &str, closed: &UnixStream, listeners: &[TcpListener], sockets: &[UdpSocket]) -> Result<()> {
    for listener in listeners {
        listener.set_nonblocking(true)?;
    }
    for socket in sockets {
        socket.set_nonblocking(true)?;
        hold_many_datagrams(socket)?;
    }
    let mut streams: BTreeMap<i32, TcpStream> = BTreeMap::new();
    loop {
        let mut waiting = vec![PollFd::new(closed.as_fd(), PollFlags::POLLIN)];
        waiting.extend(listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        waiting.extend(sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        waiting.extend(streams.values().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
        poll(&mut waiting, PollTimeout::NONE)?;
        if waiting[0].any() == Some(true) {
            return Ok(());
        }
        drop(waiting);
        for listener in listeners {
            while let Ok((mut stream, peer)) = listener.accept() {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                if stream.write_all(format!("{name} {}\n", canonical(peer)).as_bytes()).is_ok() {
                    streams.insert(stream.as_raw_fd(), stream);
                }
            }
        }
        for socket in sockets {
            echo_datagrams(name, socket);
        }
        streams.retain(|_, stream| echo_stream(stream));
    }
}

fn echo_datagrams(name: &str, socket: &UdpSocket) {
    let mut datagram = vec![0; 65536];
    while let Ok((length, peer)) = socket.recv_from(&mut datagram) {
        let mut answer = format!("{name} {}\n", canonical(peer)).into_bytes();
        answer.extend_from_slice(&datagram[..length]);
        // A peer that is gone is its own loss.
        let _ = socket.send_to(&answer, peer);
    }
}

/// Echoes what has come; false when the stream is at its end.
fn echo_stream(stream: &mut TcpStream) -> bool {
    let mut bytes = [0; 16384];
    match stream.read(&mut bytes) {
        Ok(0) => false,
        Ok(length) => stream.write_all(&bytes[..length]).is_ok(),
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
