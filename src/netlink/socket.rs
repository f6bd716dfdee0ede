//! Ending a socket from outside (sock_diag(7), SOCK_DESTROY of linux/sock_diag.h).

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use super::{Error, Result};

/// Of linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// INET_DIAG_NOCOOKIE of linux/inet_diag.h: whichever socket has the addresses.
const ANY_COOKIE: u64 = u64::MAX;
/// IPPROTO_TCP.
const TCP: u8 = 6;
/// TCP_LISTEN of linux/tcp_states.h.
const LISTENS: u8 = 10;
/// Of `struct inet_diag_msg` behind `struct nlmsghdr`.
const STATE_AT: usize = HEADER_BYTES + 1;
const COOKIE_AT: usize = HEADER_BYTES + 44;
/// NLMSG_ERROR of linux/netlink.h: also an acknowledgement, with error 0.
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;
/// `struct nlmsghdr` and `struct inet_diag_req_v2` of linux/inet_diag.h.
const REQUEST_BYTES: usize = HEADER_BYTES + 56;

/// Ends a socket of the calling thread's network namespace, whose owner gets ECONNABORTED.
/// `ifindex` is the device that it is bound to or 0, `cookie` is SO_COOKIE's. A socket that is
/// no more is no error. Needs CAP_NET_ADMIN, and CONFIG_INET_DIAG_DESTROY of the kernel.
pub fn destroy_socket(
    protocol: u8,
    local: SocketAddr,
    remote: SocketAddr,
    ifindex: u32,
    cookie: u64,
) -> Result<()> {
    let destroys = request((SOCK_DESTROY, NLM_F_ACK), protocol, local, remote, ifindex, cookie);
    let ended = open().and_then(|socket| outcome(&ask(&socket, &destroys)?));
    unless_gone(ended).map_err(|error| failed(local, remote, error))
}

/// Ends the TCP connection with these ends, as `destroy_socket` does. It has its own cookie: where there is no such
/// connection, the kernel takes the addresses for those of whoever listens for it, who must go on.
pub fn destroy_connection(local: SocketAddr, remote: SocketAddr) -> Result<()> {
    let finds = request((SOCK_DIAG_BY_FAMILY, 0), TCP, local, remote, 0, ANY_COOKIE);
    let found = open().and_then(|socket| connection_of(&ask(&socket, &finds)?));
    match found.map_err(|error| failed(local, remote, error))? {
        Some((ifindex, cookie)) => destroy_socket(TCP, local, remote, ifindex, cookie),
        None => Ok(()),
    }
}

fn failed(local: SocketAddr, remote: SocketAddr, error: io::Error) -> Error {
    Error::kernel(format!("ending the socket from {local} to {remote}"), error)
}

fn unless_gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        outcome => outcome,
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    Ok(socket)
}

fn ask(socket: &Socket, request: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(request, 0)?;
    Ok(socket.recv_from_full()?.0)
}

/// Device and cookie of the connection that the answer tells of; `None`: it tells of none.
fn connection_of(answer: &[u8]) -> io::Result<Option<(u32, u64)>> {
    let cut = || io::Error::new(io::ErrorKind::InvalidData, "the answer is cut short");
    let kind = answer.get(4..6).and_then(|field| field.try_into().ok()).map(u16::from_ne_bytes);
    if kind != Some(SOCK_DIAG_BY_FAMILY) {
        unless_gone(outcome(answer))?;
        return Ok(None);
    }
    let word = |at: usize| answer.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let ifindex = word(COOKIE_AT - 4).ok_or_else(cut)?;
    let low = word(COOKIE_AT).ok_or_else(cut)?;
    let high = word(COOKIE_AT + 4).ok_or_else(cut)?;
    let is_connection = *answer.get(STATE_AT).ok_or_else(cut)? != LISTENS;
    Ok(is_connection.then_some((ifindex, u64::from(high) << 32 | u64::from(low))))
}

fn request(
    (kind, flags): (u16, u16),
    protocol: u8,
    local: SocketAddr,
    remote: SocketAddr,
    ifindex: u32,
    cookie: u64,
) -> Vec<u8> {
    let family = if remote.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    // struct nlmsghdr: length, type, flags, sequence, port
    bytes.extend((REQUEST_BYTES as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    // struct inet_diag_req_v2: family, protocol, extensions, pad, states
    bytes.extend([family as u8, protocol, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    // struct inet_diag_sockid
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    for address in [local.ip(), remote.ip()] {
        let mut field = [0; 16];
        match address {
            IpAddr::V4(address) => field[..4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => field = address.octets(),
        }
        bytes.extend(field);
    }
    bytes.extend(ifindex.to_ne_bytes());
    bytes.extend((cookie as u32).to_ne_bytes());
    bytes.extend(((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

fn outcome(answer: &[u8]) -> io::Result<()> {
    let field = |at: usize| answer.get(at..at + 4).and_then(|field| field.try_into().ok());
    let kind = answer.get(4..6).and_then(|field| field.try_into().ok()).map(u16::from_ne_bytes);
    match (kind, field(HEADER_BYTES).map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(number)) => Err(io::Error::from_raw_os_error(-number)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is no acknowledgement")),
    }
}
