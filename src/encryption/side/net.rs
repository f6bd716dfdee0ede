//! The descriptors that the agent gives: the TUN device and the UDP sockets.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};

use super::segment::HEADER_BYTES;

/// The longest packet that the kernel gives at once, with its header.
pub const PACKET_BYTES: usize = HEADER_BYTES + 65_536;
/// What WireGuard adds to a packet, and room for what it says by itself.
pub const OVERHEAD_BYTES: usize = 148;

/// Both sides of the process.
pub struct Net {
    tun: File,
    udp: Vec<UdpSocket>,
    /// The way out can send several datagrams at once.
    sends_many: AtomicBool,
}

impl Net {
    /// Of the descriptors in the order in which they came: the device, then one socket of a family or two.
    pub fn new(descriptors: Vec<OwnedFd>) -> Result<Self> {
        let mut descriptors = descriptors.into_iter();
        let tun = descriptors.next().context("no device came")?;
        let udp: Vec<UdpSocket> = descriptors.map(UdpSocket::from).collect();
        if udp.is_empty() {
            bail!("no UDP socket came");
        }
        fcntl(&tun, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("reading the device without waiting")?;
        for socket in &udp {
            // Several datagrams of a peer at once; without it one at a time.
            let _ = setsockopt(socket, sockopt::UdpGroSegment, &true);
        }
        Ok(Self { tun: tun.into(), udp, sends_many: AtomicBool::new(true) })
    }

    /// The sockets that listen.
    pub fn sockets(&self) -> &[UdpSocket] {
        &self.udp
    }

    /// The next packet that is to be encrypted, behind its header; none: there is none now.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.tun).read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until there is a packet, or the device is gone.
    pub fn wait(&self) {
        let mut ready = [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ready, PollTimeout::NONE);
    }

    /// Gives a packet to the kernel.
    pub fn write(&self, header: &[u8; HEADER_BYTES], packet: &[u8]) -> io::Result<()> {
        (&self.tun).write_vectored(&[IoSlice::new(header), IoSlice::new(packet)]).map(drop)
    }

    /// Sends a datagram by the socket of the address's family.
    pub fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.socket(to)?.send_to(datagram, to).map(drop)
    }

    /// Sends datagrams of `size` bytes each, but for the last one, which may be shorter.
    pub fn send_all(&self, datagrams: &[u8], size: usize, to: SocketAddr) -> io::Result<()> {
        if datagrams.len() > size && self.sends_many.load(Ordering::Relaxed) {
            let segment = u16::try_from(size).unwrap_or(u16::MAX);
            let sent = sendmsg(
                self.socket(to)?.as_raw_fd(),
                &[IoSlice::new(datagrams)],
                &[ControlMessage::UdpGsoSegments(&segment)],
                MsgFlags::empty(),
                Some(&SockaddrStorage::from(to)),
            );
            match sent {
                Ok(_) => return Ok(()),
                // A device that cannot: then one at a time, from now on.
                Err(nix::errno::Errno::EIO | nix::errno::Errno::EOPNOTSUPP) => {
                    tracing::info!("datagrams are sent one at a time: the way out takes no more");
                    self.sends_many.store(false, Ordering::Relaxed);
                }
                // Longer than the wire takes, of a pod that is older than the MTU: the kernel cuts each.
                Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EMSGSIZE) => {}
                Err(error) => return Err(error.into()),
            }
        }
        datagrams.chunks(size).try_for_each(|datagram| self.send(datagram, to))
    }

    fn socket(&self, to: SocketAddr) -> io::Result<&UdpSocket> {
        let is_of_family =
            |socket: &&UdpSocket| socket.local_addr().is_ok_and(|own| own.is_ipv4() == to.is_ipv4());
        self.udp.iter().find(is_of_family).ok_or_else(|| ErrorKind::AddrNotAvailable.into())
    }

    /// Receives datagrams of one sender: how many bytes, how many of them each but the last one has, and from whom.
    pub fn receive(&self, number: usize, buffer: &mut [u8]) -> io::Result<(usize, usize, SocketAddr)> {
        let mut control = nix::cmsg_space!(i32);
        let mut parts = [IoSliceMut::new(buffer)];
        let socket = self.udp[number].as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(socket, &mut parts, Some(&mut control), MsgFlags::empty())?;
        let size = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
            _ => None,
        });
        let from = message.address.as_ref().and_then(address_of);
        let from = from.ok_or_else(|| io::Error::from(ErrorKind::AddrNotAvailable))?;
        Ok((message.bytes, size.unwrap_or(message.bytes).max(1), from))
    }
}

fn address_of(address: &SockaddrStorage) -> Option<SocketAddr> {
    let ipv4 = address.as_sockaddr_in().map(|ipv4| SocketAddr::from((ipv4.ip(), ipv4.port())));
    ipv4.or_else(|| address.as_sockaddr_in6().map(|ipv6| SocketAddr::from((ipv6.ip(), ipv6.port()))))
}
