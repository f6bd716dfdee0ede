//! Telling the link that an address is this node's now, and hearing who asks for it.

use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Error, Result};
use crate::model::MacAddress;

const BROADCAST: [u8; 6] = [0xff; 6];
/// ff02::1 on the link.
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Sends gratuitous ARP (RFC 5227: a request, and an answer for those that heed only these), or an unsolicited
/// neighbour advertisement, by a device.
pub fn announce(ifindex: u32, mac: MacAddress, address: IpAddr) -> Result<()> {
    let send = || {
        let socket = packet_socket()?;
        for frame in frames(mac.0, address) {
            send_frame(&socket, ifindex, &frame)?;
        }
        Ok(())
    };
    send().map_err(|error: io::Error| Error::kernel(format!("announcing {address}"), error))
}

/// The membership of a device in the group that is asked for an IPv6 address; it ends with the value. Without
/// it neither the switch nor the card passes the questions on.
#[derive(Debug)]
pub struct Listening(#[allow(dead_code, reason = "holds the membership")] UdpSocket);

impl Listening {
    /// Joins the solicited-node group of an address.
    pub fn to(ifindex: u32, address: Ipv6Addr) -> Result<Self> {
        let join = || {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
            socket.join_multicast_v6(&solicited_group(address), ifindex)?;
            Ok(socket)
        };
        join()
            .map(Self)
            .map_err(|error: io::Error| Error::kernel(format!("listening to questions for {address}"), error))
    }
}

/// RFC 4291, 2.7.1.
pub fn solicited_group(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]))
}

fn frames(mac: [u8; 6], address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => [1_u16, 2]
            .iter()
            .map(|operation| {
                let mut frame = header(BROADCAST, mac, ETHERTYPE_ARP);
                frame.extend([0, 1, 8, 0, 6, 4]);
                frame.extend(operation.to_be_bytes());
                frame.extend(mac);
                frame.extend(address.octets());
                frame.extend(if *operation == 1 { [0; 6] } else { mac });
                frame.extend(address.octets());
                frame
            })
            .collect(),
        IpAddr::V6(address) => {
            let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            // Type, code, checksum, flags (override), target, option.
            let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
            message.extend(address.octets());
            message.extend([2, 1]);
            message.extend(mac);
            let check = checksum(address, group, &message);
            message[2..4].copy_from_slice(&check.to_be_bytes());
            let mut frame = header(ALL_NODES, mac, ETHERTYPE_IPV6);
            frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
            frame.extend(address.octets());
            frame.extend(group.octets());
            frame.extend(message);
            vec![frame]
        }
    }
}

fn header(to: [u8; 6], from: [u8; 6], ethertype: u16) -> Vec<u8> {
    [&to[..], &from, &ethertype.to_be_bytes()].concat()
}

/// Of an ICMPv6 message, over its pseudo-header.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let pseudo =
        [&source.octets()[..], &destination.octets(), &(message.len() as u32).to_be_bytes(), &[0, 0, 0, 58]];
    let bytes = [&pseudo.concat()[..], message].concat();
    let words =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[allow(unsafe_code)]
fn packet_socket() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers. Protocol 0: the socket receives nothing.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[allow(unsafe_code)]
fn send_frame(socket: &OwnedFd, ifindex: u32, frame: &[u8]) -> io::Result<()> {
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(ifindex).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    // SAFETY: both pointers are to values that live through the call, with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            std::ptr::from_ref(&to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_an_address_asks_its_group() {
        let group = solicited_group("2001:db8::12:3456".parse().expect("an address"));
        assert_eq!(group.to_string(), "ff02::1:ff12:3456");
    }

    #[test]
    fn an_advertisement_has_a_right_checksum() {
        let address: Ipv6Addr = "2001:db8::1".parse().expect("an address");
        let frames = frames([2, 0, 0, 0, 0, 1], IpAddr::V6(address));
        let [frame] = &frames[..] else { panic!("{frames:?}") };
        assert_eq!(frame.len(), 14 + 40 + 32);
        // Over a message with its checksum the sum is all ones.
        assert_eq!(checksum(address, "ff02::1".parse().expect("an address"), &frame[54..]), 0);
    }
}
