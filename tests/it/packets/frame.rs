//! Ethernet frames from a description, with every length and checksum right
//! unless the description says otherwise. Expected output is described the same
//! way and compared byte by byte, so a wrong checksum is a failed test.

use std::net::{IpAddr, Ipv6Addr};

/// TCP flags.
pub const FIN: u8 = 0x01;
/// TCP flags.
pub const SYN: u8 = 0x02;
/// TCP flags.
pub const RST: u8 = 0x04;
/// TCP flags.
pub const ACK: u8 = 0x10;

/// The sending pod's MAC address in every frame.
pub const POD_MAC: [u8; 6] = [0x0a, 0, 0, 0, 0, 7];

/// What layer 4 is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer4 {
    /// Ports, sequence and acknowledgment number, flags.
    Tcp { ports: (u16, u16), sequence: u32, acknowledgment: u32, flags: u8 },
    /// Ports.
    Udp { ports: (u16, u16), has_checksum: bool },
    /// ICMP or ICMPv6 by the family; the four bytes behind the checksum.
    Icmp { kind: u8, code: u8, rest: [u8; 4] },
    /// Anything else.
    Other(u8),
}

/// A description of a frame.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Ethernet addresses: destination, source.
    pub macs: ([u8; 6], [u8; 6]),
    /// IP source.
    pub source: IpAddr,
    /// IP destination.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Layer 4.
    pub layer4: Layer4,
    /// Behind the header of layer 4.
    pub payload: Vec<u8>,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: type and content behind the first two bytes.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Identification, offset in bytes, whether more follow.
    pub fragment: Option<(u32, u16, bool)>,
    /// IPv4's "do not fragment".
    pub is_unfragmentable: bool,
    /// IPv4's protocol or IPv6's next header where it is not layer 4's own.
    pub protocol: Option<u8>,
}

/// The host side's MAC address of an endpoint.
pub fn host_mac(id: u16) -> [u8; 6] {
    let [high, low] = id.to_be_bytes();
    [0x02, 0x57, 0x65, 0x69, high, low]
}

/// A TCP segment.
pub fn tcp(source: (IpAddr, u16), destination: (IpAddr, u16), flags: u8) -> Packet {
    let ports = (source.1, destination.1);
    Packet::new(source.0, destination.0, Layer4::Tcp { ports, sequence: 1000, acknowledgment: 0, flags })
}

/// A UDP datagram with some payload.
pub fn udp(source: (IpAddr, u16), destination: (IpAddr, u16)) -> Packet {
    let ports = (source.1, destination.1);
    Packet::new(source.0, destination.0, Layer4::Udp { ports, has_checksum: true })
        .payload(b"forty-two bytes of payload for a datagram.")
}

/// An SCTP packet with some bytes of chunks, and its checksum.
pub fn sctp(source: (IpAddr, u16), destination: (IpAddr, u16), chunks: &[u8]) -> Packet {
    let ports = [source.1.to_be_bytes(), destination.1.to_be_bytes()].concat();
    let mut payload = [&ports[..], &[1, 2, 3, 4, 0, 0, 0, 0], chunks].concat();
    let sum = payload.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| sum >> 1 ^ (0x82f6_3b78 & (sum & 1).wrapping_neg()))
    });
    payload[8..12].copy_from_slice(&(!sum).to_le_bytes());
    Packet::new(source.0, destination.0, Layer4::Other(132)).payload(&payload)
}

/// An ICMP message of the addresses' family.
pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8) -> Packet {
    Packet::new(source, destination, Layer4::Icmp { kind, code, rest: [0; 4] })
}

/// An echo request.
pub fn echo(source: IpAddr, destination: IpAddr, id: u16) -> Packet {
    echo_of(source, destination, id, if source.is_ipv4() { 8 } else { 128 })
}

/// An echo reply.
pub fn echo_reply(source: IpAddr, destination: IpAddr, id: u16) -> Packet {
    echo_of(source, destination, id, if source.is_ipv4() { 0 } else { 129 })
}

fn echo_of(source: IpAddr, destination: IpAddr, id: u16, kind: u8) -> Packet {
    let [high, low] = id.to_be_bytes();
    Packet::new(source, destination, Layer4::Icmp { kind, code: 0, rest: [high, low, 0, 1] })
        .payload(b"are you there")
}

/// A frame without options that a router has passed on: one hop less.
pub fn passed_on(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame[12..14] == [0x86, 0xdd] {
        frame[21] -= 1;
        return frame;
    }
    frame[22] -= 1;
    // As RFC 1624 says, right or wrong as it was.
    let check = u32::from(u16::from_be_bytes([frame[24], frame[25]])) + 0x100;
    let check = check + u32::from(check >= 0xffff);
    frame[24..26].copy_from_slice(&(check as u16).to_be_bytes());
    frame
}

/// "Port unreachable" about a packet, sent by `source` to that packet's sender.
pub fn unreachable(source: IpAddr, about: &Packet) -> Packet {
    let (kind, code) = if source.is_ipv4() { (3, 3) } else { (1, 4) };
    let header = if source.is_ipv4() { 20 } else { 40 };
    let quote = &about.bytes()[14..14 + header + 8];
    icmp(source, about.source, kind, code).payload(quote)
}

/// An error with the checksum of another packet in the quoted layer 4: the checksum covers
/// what is not quoted, and stays as it was.
pub fn quoting(error: &Packet, quoted: &Packet) -> Packet {
    let mut error = error.clone();
    let start = if error.source.is_ipv4() { 34 } else { 54 };
    let end = error.payload.len();
    error.payload[end - 2..].copy_from_slice(&quoted.bytes()[start + 6..start + 8]);
    error
}

impl Packet {
    /// A packet without anything special.
    pub fn new(source: IpAddr, destination: IpAddr, layer4: Layer4) -> Self {
        Self {
            macs: ([0x0a, 0, 0, 0, 0, 1], POD_MAC),
            source,
            destination,
            ttl: 64,
            layer4,
            payload: Vec::new(),
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            is_unfragmentable: false,
            protocol: None,
        }
    }

    /// Addressed to the host side of an endpoint's link.
    pub fn by(mut self, endpoint: u16) -> Self {
        self.macs.0 = host_mac(endpoint);
        self
    }

    /// With this behind layer 4's header.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// As a fragment: identification, offset in bytes, whether more follow.
    pub fn fragment(mut self, id: u32, offset: u16, more: bool) -> Self {
        self.fragment = Some((id, offset, more));
        self
    }

    /// With an extension header.
    pub fn extension(mut self, kind: u8, content: &[u8]) -> Self {
        self.extensions.push((kind, content.to_vec()));
        self
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = [self.macs.0, self.macs.1].concat();
        let is_ipv4 = self.source.is_ipv4();
        frame.extend(if is_ipv4 { [0x08, 0x00] } else { [0x86, 0xdd] });
        let layer4 = self.layer4_bytes();
        if is_ipv4 {
            self.push_ipv4(&mut frame, &layer4)
        } else {
            self.push_ipv6(&mut frame, &layer4)
        }
        frame
    }

    fn protocol_number(&self) -> u8 {
        match self.layer4 {
            Layer4::Tcp { .. } => 6,
            Layer4::Udp { .. } => 17,
            Layer4::Icmp { .. } if self.source.is_ipv4() => 1,
            Layer4::Icmp { .. } => 58,
            Layer4::Other(protocol) => protocol,
        }
    }

    fn push_ipv4(&self, frame: &mut Vec<u8>, layer4: &[u8]) {
        let start = frame.len();
        let length = 20 + self.options.len();
        frame.extend([0x40 | (length / 4) as u8, 0]);
        frame.extend(((length + layer4.len()) as u16).to_be_bytes());
        let (id, offset, more) = self.fragment.unwrap_or_default();
        frame.extend((id as u16).to_be_bytes());
        let flags = u16::from(self.is_unfragmentable) << 14 | u16::from(more) << 13;
        frame.extend((flags | (offset / 8)).to_be_bytes());
        frame.extend([self.ttl, self.protocol.unwrap_or(self.protocol_number()), 0, 0]);
        frame.extend(octets(self.source));
        frame.extend(octets(self.destination));
        frame.extend(&self.options);
        let check = checksum(&frame[start..], 0);
        frame[start + 10..start + 12].copy_from_slice(&check.to_be_bytes());
        frame.extend(layer4);
    }

    fn push_ipv6(&self, frame: &mut Vec<u8>, layer4: &[u8]) {
        let mut extensions: Vec<(u8, Vec<u8>)> = Vec::new();
        for (kind, content) in &self.extensions {
            let length = (content.len() + 2).div_ceil(8) - 1;
            let mut bytes = vec![0, length as u8];
            bytes.extend(content);
            bytes.resize((length + 1) * 8, 0);
            extensions.push((*kind, bytes));
        }
        if let Some((id, offset, more)) = self.fragment {
            let mut bytes = vec![0, 0];
            bytes.extend((offset | u16::from(more)).to_be_bytes());
            bytes.extend(id.to_be_bytes());
            extensions.push((44, bytes));
        }
        let last = self.protocol.unwrap_or(self.protocol_number());
        let kinds: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).chain([last]).collect();
        let length = extensions.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + layer4.len();
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((length as u16).to_be_bytes());
        frame.extend([kinds[0], self.ttl]);
        frame.extend(octets(self.source));
        frame.extend(octets(self.destination));
        for ((_, mut bytes), next) in extensions.into_iter().zip(&kinds[1..]) {
            bytes[0] = *next;
            frame.extend(bytes);
        }
        frame.extend(layer4);
    }

    fn layer4_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let check = match self.layer4 {
            // What follows the first fragment has no header.
            _ if self.fragment.is_some_and(|(_, offset, _)| offset > 0) => return self.payload.clone(),
            Layer4::Tcp { ports, sequence, acknowledgment, flags } => {
                bytes.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
                bytes.extend([sequence.to_be_bytes(), acknowledgment.to_be_bytes()].concat());
                bytes.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
                Some(16)
            }
            Layer4::Udp { ports, has_checksum } => {
                bytes.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                has_checksum.then_some(6)
            }
            Layer4::Icmp { kind, code, rest } => {
                bytes.extend([kind, code, 0, 0]);
                bytes.extend(rest);
                Some(2)
            }
            Layer4::Other(_) => None,
        };
        bytes.extend(&self.payload);
        if let Some(offset) = check {
            let sum = checksum(&bytes, self.pseudo_sum(bytes.len()));
            bytes[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    /// What layer 4's checksum takes from the IP header.
    fn pseudo_sum(&self, length: usize) -> u32 {
        if matches!(self.layer4, Layer4::Icmp { .. }) && self.source.is_ipv4() {
            return 0;
        }
        let addresses = [octets(self.source), octets(self.destination)].concat();
        let words = addresses.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        words.sum::<u32>() + length as u32 + u32::from(self.protocol_number())
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The internet checksum of `bytes` with `sum` added.
pub fn checksum(bytes: &[u8], sum: u32) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>() + sum;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A neighbour solicitation from `source` for `target`, with the sender's MAC address.
pub fn solicitation(source: Ipv6Addr, target: Ipv6Addr) -> Packet {
    let payload = [&target.octets()[..], &[1, 1], &POD_MAC].concat();
    let mut packet = icmp(source.into(), "ff02::1:ff00:1".parse().expect("an address"), 135, 0);
    packet.ttl = 255;
    packet.macs.0 = [0x33, 0x33, 0xff, 0, 0, 1];
    packet.payload(&payload)
}
