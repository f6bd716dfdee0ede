//! Merged TCP packets: the kernel gives the process one for up to 64 KiB, which is cut here into the packets of the
//! wire; what comes from a peer in a row is merged again, and the kernel gets it at once. One system call then
//! stands for forty packets.

use std::io;
use std::ops::Range;

/// `struct virtio_net_hdr`, in front of each packet.
pub const HEADER_BYTES: usize = 10;

/// Of linux/virtio_net.h.
const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP_IPV4: u8 = 1;
const GSO_TCP_IPV6: u8 = 4;
/// It goes with each of them.
const GSO_ECN: u8 = 0x80;

const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const TCP: u8 = 6;
const TCP_BYTES: usize = 20;
/// Where the checksum is in a TCP header.
const TCP_CHECKSUM: usize = 16;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;
/// The longest IP packet.
const MERGED_BYTES: usize = 65_535;

/// What the kernel says of a packet that it leaves unfinished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    header_length: u16,
    gso_size: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let field = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        Some(Self {
            flags: *bytes.first()?,
            gso_type: *bytes.get(1)?,
            header_length: field(2)?,
            gso_size: field(4)?,
            checksum_start: field(6)?,
            checksum_offset: field(8)?,
        })
    }

    fn write(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        for (at, field) in
            [(2, self.header_length), (4, self.gso_size), (6, self.checksum_start), (8, self.checksum_offset)]
        {
            bytes[at..at + 2].copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}

/// Cuts what was read from the device into packets of the wire, each with its checksums, and gives them to `each`.
/// `room` is for one of them. False: it is nothing that can be cut.
pub fn split(read: &mut [u8], room: &mut [u8], mut each: impl FnMut(&[u8])) -> bool {
    let Some(header) = Header::read(read) else { return false };
    let packet = &mut read[HEADER_BYTES..];
    match header.gso_type & !GSO_ECN {
        GSO_NONE => {
            if header.flags & NEEDS_CHECKSUM != 0 && !finish_checksum(packet, &header) {
                return false;
            }
            each(packet);
            true
        }
        GSO_TCP_IPV4 | GSO_TCP_IPV6 => split_tcp(packet, &header, room, each),
        _ => false,
    }
}

/// The field holds the sum of the pseudo header; the rest is to be added.
fn finish_checksum(packet: &mut [u8], header: &Header) -> bool {
    let start = usize::from(header.checksum_start);
    let field = start + usize::from(header.checksum_offset);
    if start > packet.len() || field + 2 > packet.len() {
        return false;
    }
    let mut sum = !fold(add(0, &packet[start..]));
    // UDP: zero means none.
    if sum == 0 {
        sum = 0xffff;
    }
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

fn split_tcp(packet: &[u8], header: &Header, room: &mut [u8], mut each: impl FnMut(&[u8])) -> bool {
    let Some(parsed) = Tcp::parse_headers(packet) else { return false };
    let headers = parsed.payload.start;
    let size = usize::from(header.gso_size);
    if size == 0 || headers + size > room.len() {
        return false;
    }
    let first_sequence = parsed.sequence(packet);
    let parts = packet[headers..].chunks(size);
    let count = parts.len();
    for (number, part) in parts.enumerate() {
        let segment = &mut room[..headers + part.len()];
        segment[..headers].copy_from_slice(&packet[..headers]);
        segment[headers..].copy_from_slice(part);
        let offset = u32::try_from(number * size).unwrap_or(u32::MAX);
        let tcp = parsed.tcp;
        segment[tcp + 4..tcp + 8].copy_from_slice(&first_sequence.wrapping_add(offset).to_be_bytes());
        let flags = &mut segment[tcp + 13];
        if number > 0 {
            *flags &= !CWR;
        }
        if number + 1 < count {
            *flags &= !(FIN | PSH);
        }
        let id = u16::try_from(number).unwrap_or(u16::MAX);
        parsed.finish(segment, id);
        each(segment);
    }
    true
}

/// A TCP packet without IP options and extension headers, not a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tcp {
    is_ipv6: bool,
    /// Where the TCP header begins.
    tcp: usize,
    payload: Range<usize>,
}

impl Tcp {
    fn parse_headers(packet: &[u8]) -> Option<Self> {
        let (is_ipv6, tcp) = match packet.first()? >> 4 {
            4 => (false, IPV4_BYTES),
            6 => (true, IPV6_BYTES),
            _ => return None,
        };
        let fixed = packet.get(tcp..tcp + TCP_BYTES)?;
        let (protocol, is_whole) = if is_ipv6 {
            (packet[6], true)
        } else {
            (packet[9], packet[0] == 0x45 && packet[6] & 0x3f == 0 && packet[7] == 0)
        };
        let length = usize::from(fixed[12] >> 4) * 4;
        let is_tcp = protocol == TCP && is_whole && length >= TCP_BYTES;
        (is_tcp && tcp + length <= packet.len()).then(|| Self {
            is_ipv6,
            tcp,
            payload: tcp + length..packet.len(),
        })
    }

    fn sequence(&self, packet: &[u8]) -> u32 {
        u32::from_be_bytes([
            packet[self.tcp + 4],
            packet[self.tcp + 5],
            packet[self.tcp + 6],
            packet[self.tcp + 7],
        ])
    }

    /// The sum of the pseudo header, for a TCP part of this length.
    fn pseudo(&self, packet: &[u8], length: usize) -> u64 {
        let addresses = if self.is_ipv6 { &packet[8..40] } else { &packet[12..20] };
        add(u64::from(TCP) + length as u64, addresses)
    }

    /// Sets the length and the checksums of a packet that was cut.
    fn finish(&self, segment: &mut [u8], id_offset: u16) {
        self.set_length(segment);
        if !self.is_ipv6 {
            let id = u16::from_be_bytes([segment[4], segment[5]]).wrapping_add(id_offset);
            segment[4..6].copy_from_slice(&id.to_be_bytes());
            self.set_ip_checksum(segment);
        }
        let field = self.tcp + TCP_CHECKSUM;
        segment[field..field + 2].fill(0);
        let pseudo = self.pseudo(segment, segment.len() - self.tcp);
        let sum = !fold(add(pseudo, &segment[self.tcp..]));
        segment[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }

    fn set_length(&self, packet: &mut [u8]) {
        let (at, length) = if self.is_ipv6 { (4, packet.len() - IPV6_BYTES) } else { (2, packet.len()) };
        let length = u16::try_from(length).unwrap_or(u16::MAX);
        packet[at..at + 2].copy_from_slice(&length.to_be_bytes());
    }

    fn set_ip_checksum(&self, packet: &mut [u8]) {
        packet[10..12].fill(0);
        let sum = !fold(add(0, &packet[..IPV4_BYTES]));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }

    fn is_checksum_right(&self, packet: &[u8]) -> bool {
        let pseudo = self.pseudo(packet, packet.len() - self.tcp);
        fold(add(pseudo, &packet[self.tcp..])) == 0xffff
            && (self.is_ipv6 || fold(add(0, &packet[..IPV4_BYTES])) == 0xffff)
    }
}

/// A ones' complement sum of big endian words, not folded yet.
fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        sum += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let rest = words.remainder();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_be_bytes(last))
}

fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Packets on their way to the device: those of one TCP stream that follow one another become one.
#[derive(Default)]
pub struct Merger {
    packet: Vec<u8>,
    /// Of the packet, if more can be added; none: there is no packet.
    open: Option<Open>,
}

/// What is collected.
struct Open {
    tcp: Tcp,
    size: usize,
    next_sequence: u32,
    count: usize,
    may_grow: bool,
}

impl Merger {
    /// Takes a packet; what cannot wait for more goes to `write`, in the order in which it came.
    pub fn push(
        &mut self,
        packet: &[u8],
        write: &mut impl FnMut(&[u8; HEADER_BYTES], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mergeable = Tcp::parse_headers(packet).filter(|tcp| is_mergeable(tcp, packet));
        let Some(tcp) = mergeable else {
            self.flush(write)?;
            return write(&[0; HEADER_BYTES], packet);
        };
        if self.takes(&tcp, packet) {
            return Ok(());
        }
        self.flush(write)?;
        let size = tcp.payload.len();
        self.packet.clear();
        self.packet.extend_from_slice(packet);
        let next_sequence = tcp.sequence(packet).wrapping_add(u32::try_from(size).unwrap_or(u32::MAX));
        let may_grow = packet[tcp.tcp + 13] == ACK;
        self.open = Some(Open { tcp, size, next_sequence, count: 1, may_grow });
        Ok(())
    }

    /// Adds the packet to those that are collected, if it follows them.
    fn takes(&mut self, tcp: &Tcp, packet: &[u8]) -> bool {
        let Some(open) = &mut self.open else { return false };
        let (own, its) = (&self.packet[..open.tcp.payload.start], &packet[..tcp.payload.start]);
        let length = tcp.payload.len();
        let follows = open.may_grow
            && length <= open.size
            && self.packet.len() + length <= MERGED_BYTES
            && tcp.sequence(packet) == open.next_sequence
            && own.len() == its.len()
            && has_same_headers(&open.tcp, own, its);
        if !follows {
            return false;
        }
        let flags = packet[tcp.tcp + 13];
        self.packet[open.tcp.tcp + 13] |= flags;
        self.packet.extend_from_slice(&packet[tcp.payload.clone()]);
        open.next_sequence = open.next_sequence.wrapping_add(u32::try_from(length).unwrap_or(u32::MAX));
        open.count += 1;
        open.may_grow = length == open.size && flags == ACK;
        true
    }

    /// Writes what is collected.
    pub fn flush(
        &mut self,
        write: &mut impl FnMut(&[u8; HEADER_BYTES], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        if open.count == 1 {
            return write(&[0; HEADER_BYTES], &self.packet);
        }
        let tcp = &open.tcp;
        tcp.set_length(&mut self.packet);
        if !tcp.is_ipv6 {
            tcp.set_ip_checksum(&mut self.packet);
        }
        // The kernel adds the rest, or the card does.
        let pseudo = fold(tcp.pseudo(&self.packet, self.packet.len() - tcp.tcp));
        let field = tcp.tcp + TCP_CHECKSUM;
        self.packet[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
        let short = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        let header = Header {
            flags: NEEDS_CHECKSUM,
            gso_type: if tcp.is_ipv6 { GSO_TCP_IPV6 } else { GSO_TCP_IPV4 },
            header_length: short(tcp.payload.start),
            gso_size: short(open.size),
            checksum_start: short(tcp.tcp),
            checksum_offset: TCP_CHECKSUM as u16,
        };
        write(&header.write(), &self.packet)
    }
}

/// Plain data whose checksums are right: a wrong one must reach whom it is for as it is.
fn is_mergeable(tcp: &Tcp, packet: &[u8]) -> bool {
    let flags = packet[tcp.tcp + 13];
    // The length of the IP header is that of the packet: Noise has cut off what it was padded with.
    let has_length = if tcp.is_ipv6 {
        usize::from(u16::from_be_bytes([packet[4], packet[5]])) + IPV6_BYTES == packet.len()
    } else {
        usize::from(u16::from_be_bytes([packet[2], packet[3]])) == packet.len()
    };
    !tcp.payload.is_empty() && flags & !PSH == ACK && has_length && tcp.is_checksum_right(packet)
}

/// But for lengths, identification, checksums, sequence number and flags.
fn has_same_headers(tcp: &Tcp, one: &[u8], other: &[u8]) -> bool {
    let same = |range: Range<usize>| one[range.clone()] == other[range];
    let ip = if tcp.is_ipv6 { same(0..4) && same(6..40) } else { same(0..2) && same(6..10) && same(12..20) };
    let at = tcp.tcp;
    ip && same(at..at + 4) && same(at + 8..at + 13) && same(at + 14..at + 16) && same(at + 18..one.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(is_ipv6: bool, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = if is_ipv6 {
            let mut ip = vec![0; IPV6_BYTES];
            (ip[0], ip[6], ip[7]) = (0x60, TCP, 64);
            (ip[23], ip[39]) = (1, 2);
            ip
        } else {
            let mut ip = vec![0; IPV4_BYTES];
            (ip[0], ip[6], ip[8], ip[9]) = (0x45, 0x40, 64, TCP);
            ip[12..20].copy_from_slice(&[10, 1, 1, 2, 10, 1, 2, 3]);
            ip
        };
        let tcp = packet.len();
        packet.extend([0x9c, 0x40, 0, 80]);
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 9, 8 << 4, flags, 1, 0, 0, 0, 0, 0]);
        packet.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        packet.extend(payload);
        let parsed = Tcp { is_ipv6, tcp, payload: tcp + 32..packet.len() };
        parsed.finish(&mut packet, 0);
        packet
    }

    fn data(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    #[test]
    fn what_is_cut_becomes_whole_again() {
        for is_ipv6 in [true, false] {
            let whole = data(10_001);
            let mut parts = Vec::new();
            for (number, part) in whole.chunks(1000).enumerate() {
                let flags = if part.len() < 1000 { ACK | PSH } else { ACK };
                parts.push(packet(is_ipv6, 5_000_000 + number as u32 * 1000, flags, part));
            }
            let mut written = Vec::new();
            let mut write = |header: &[u8; HEADER_BYTES], packet: &[u8]| {
                written.push([&header[..], packet].concat());
                Ok(())
            };
            let mut merger = Merger::default();
            parts.iter().for_each(|part| merger.push(part, &mut write).expect("it is well formed"));
            merger.flush(&mut write).expect("it is well formed");
            assert_eq!(written.len(), 1, "one packet of {}", parts.len());
            let header = Header::read(&written[0]).expect("it is well formed");
            assert_eq!((header.gso_size, header.flags), (1000, NEEDS_CHECKSUM));
            let mut cut = Vec::new();
            assert!(split(&mut written[0].clone(), &mut vec![0; 2000], |part| cut.push(part.to_vec())));
            for part in cut.iter_mut().chain(parts.iter_mut()).filter(|part| part[0] == 0x45) {
                // Each has a number of its own.
                part[4..6].fill(0);
                Tcp::parse_headers(part).expect("it is well formed").set_ip_checksum(part);
            }
            assert_eq!(cut, parts);
        }
    }

    #[test]
    fn nothing_is_merged_that_does_not_follow() {
        let first = packet(false, 1000, ACK, &data(100));
        let mut wrong = packet(false, 1100, ACK, &data(100));
        wrong[60] ^= 1;
        let mut other_acknowledgement = packet(false, 1100, ACK, &data(100));
        other_acknowledgement[31] = 77;
        Tcp::parse_headers(&other_acknowledgement)
            .expect("it is well formed")
            .finish(&mut other_acknowledgement, 0);
        for second in [
            packet(false, 1101, ACK, &data(100)),
            packet(false, 1100, ACK, &data(101)),
            packet(false, 1100, ACK | FIN, &data(100)),
            packet(false, 1100, ACK, &[]),
            packet(true, 1100, ACK, &data(100)),
            wrong,
            other_acknowledgement,
        ] {
            let mut written = Vec::new();
            let mut write = |header: &[u8; HEADER_BYTES], packet: &[u8]| {
                assert_eq!(header, &[0; HEADER_BYTES]);
                written.push(packet.to_vec());
                Ok(())
            };
            let mut merger = Merger::default();
            merger.push(&first, &mut write).expect("it is well formed");
            merger.push(&second, &mut write).expect("it is well formed");
            merger.flush(&mut write).expect("it is well formed");
            assert_eq!(written, [first.clone(), second]);
        }
    }

    #[test]
    fn a_checksum_that_the_kernel_left_is_finished() {
        let whole = packet(false, 1, ACK, &data(333));
        let tcp = Tcp::parse_headers(&whole).expect("it is well formed");
        let mut unfinished = whole.clone();
        let pseudo = fold(tcp.pseudo(&whole, whole.len() - tcp.tcp));
        unfinished[36..38].copy_from_slice(&pseudo.to_be_bytes());
        let header =
            Header { flags: NEEDS_CHECKSUM, checksum_start: 20, checksum_offset: 16, ..Header::default() };
        let mut read = [&header.write()[..], &unfinished].concat();
        let mut came = Vec::new();
        assert!(split(&mut read, &mut [], |packet| came.push(packet.to_vec())));
        assert_eq!(came, [whole]);
        for nonsense in [0..3, 0..HEADER_BYTES + 5] {
            let mut cut = read[nonsense].to_vec();
            assert!(!split(&mut cut, &mut [], |_| {}) || cut.len() > HEADER_BYTES);
        }
    }
}
