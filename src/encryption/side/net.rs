//! The descriptors that the agent gives: the TUN device and the UDP sockets.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};

/// `struct virtio_net_hdr`, in front of each packet.
pub const HEADER_BYTES: usize = 10;
/// The longest packet that the kernel gives at once, with its header.
pub const PACKET_BYTES: usize = HEADER_BYTES + 65_536;
/// What WireGuard adds to a packet, and room for what it says by itself.
pub const OVERHEAD_BYTES: usize = 148;

/// Both sides of the process.
pub struct Net {
    tun: File,
    udp: Vec<UdpSocket>,
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
        Ok(Self { tun: tun.into(), udp })
    }

    /// The sockets that listen.
    pub fn sockets(&self) -> &[UdpSocket] {
        &self.udp
    }

    /// The next packet that is to be encrypted, behind its header.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.tun).read(buffer)
    }

    /// Gives a packet to the kernel.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        let parts = [IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(packet)];
        (&self.tun).write_vectored(&parts).map(drop)
    }

    /// Sends a datagram by the socket of the address's family.
    pub fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let is_of_family =
            |socket: &&UdpSocket| socket.local_addr().is_ok_and(|own| own.is_ipv4() == to.is_ipv4());
        let socket = self.udp.iter().find(is_of_family);
        let socket = socket.ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))?;
        socket.send_to(datagram, to).map(drop)
    }
}
