//! IPsec states and policies of an xfrm interface (ip-xfrm(8), linux/xfrm.h): ESP in tunnel mode by AES-GCM.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::{Socket, protocols::NETLINK_XFRM};

use super::{Error, Result};

// Of linux/xfrm.h.
const XFRM_MSG_NEWSA: u16 = 0x10;
const XFRM_MSG_DELSA: u16 = 0x11;
const XFRM_MSG_GETSA: u16 = 0x12;
const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_DELPOLICY: u16 = 0x14;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_MSG_UPDPOLICY: u16 = 0x19;
const XFRMA_TMPL: u16 = 5;
const XFRMA_ALG_AEAD: u16 = 18;
const XFRMA_REPLAY_ESN_VAL: u16 = 23;
const XFRMA_IF_ID: u16 = 31;
const XFRM_MODE_TUNNEL: u8 = 1;
const XFRM_STATE_AF_UNSPEC: u8 = 32;
const XFRM_STATE_ESN: u8 = 128;
/// `struct xfrm_selector`, `xfrm_usersa_info`, `xfrm_userpolicy_info`.
const SELECTOR_BYTES: usize = 56;
const STATE_BYTES: usize = 224;
const POLICY_BYTES: usize = 168;
/// Of linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const ESP: u8 = 50;
/// Two processors reorder what they encrypt: a small window drops that.
const REPLAY_WINDOW: u32 = 1024;
/// The key of AES-256, and the salt of RFC 4106.
pub const XFRM_KEY_BYTES: usize = 36;
const TAG_BITS: u32 = 128;
const ALGORITHM: &[u8] = b"rfc4106(gcm(aes))";

/// What encrypts or decrypts in one direction between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct XfrmState {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// Its number, of the receiver.
    pub spi: u32,
    /// What policies know it by.
    pub reqid: u32,
}

/// What a state has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XfrmCounts {
    /// Of whole packets.
    pub bytes: u64,
    /// Packets that came again or too late, and those that were not the peer's.
    pub errors: u64,
}

/// Of which packets a policy speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum XfrmWay {
    /// What has been decrypted for this node; all of it.
    In,
    /// What leaves, to this destination.
    Out,
    /// What has been decrypted and goes on; all of it.
    Forward,
}

/// What is to be encrypted, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct XfrmPolicy {
    /// Which packets.
    pub way: XfrmWay,
    /// Their destination.
    pub net: IpNet,
    /// The ends of the tunnel; unspecified: any.
    pub tunnel: (IpAddr, IpAddr),
    /// The states' number; 0: any.
    pub reqid: u32,
}

/// A socket to the kernel's IPsec in the calling thread's network namespace.
pub struct Xfrm {
    socket: Socket,
    interface: u32,
    sequence: u32,
}

impl Xfrm {
    /// For the states and policies of the interface with this number alone.
    pub fn open(interface: u32) -> Result<Self> {
        let socket =
            socket().map_err(|cause| Error::kernel("opening a socket to the kernel's IPsec", cause))?;
        Ok(Self { socket, interface, sequence: 0 })
    }

    /// The same; `None` on a kernel without IPsec.
    pub fn open_if_there(interface: u32) -> Result<Option<Self>> {
        match socket() {
            Ok(socket) => Ok(Some(Self { socket, interface, sequence: 0 })),
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(None),
            Err(cause) => Err(Error::kernel("opening a socket to the kernel's IPsec", cause)),
        }
    }

    /// Every state of the interface.
    pub fn states(&mut self) -> Result<Vec<(XfrmState, XfrmCounts)>> {
        let rows = self
            .call(XFRM_MSG_GETSA, NLM_F_REQUEST | NLM_F_DUMP, &[])
            .map_err(|cause| Error::kernel("listing IPsec states", cause))?;
        let of_interface = |row: &&Vec<u8>| self.is_ours(row, STATE_BYTES);
        Ok(rows.iter().filter(of_interface).filter_map(|row| read_state(row)).collect())
    }

    /// Every policy of the interface, and how many there are beside them.
    pub fn policies(&mut self) -> Result<(Vec<XfrmPolicy>, u32)> {
        let rows = self
            .call(XFRM_MSG_GETPOLICY, NLM_F_REQUEST | NLM_F_DUMP, &[])
            .map_err(|cause| Error::kernel("listing IPsec policies", cause))?;
        let (ours, others): (Vec<_>, Vec<_>) = rows.iter().partition(|row| self.is_ours(row, POLICY_BYTES));
        Ok((ours.into_iter().filter_map(|row| read_policy(row)).collect(), others.len() as u32))
    }

    fn is_ours(&self, row: &[u8], fixed: usize) -> bool {
        let mut found = attributes(row.get(fixed..).unwrap_or_default());
        found.any(|(kind, value)| kind == XFRMA_IF_ID && value == self.interface.to_ne_bytes())
    }

    /// Adds a state with its key. One that is there stays as it is.
    pub fn add_state(&mut self, state: &XfrmState, key: &[u8; XFRM_KEY_BYTES]) -> Result<()> {
        let mut body = selector(None);
        body.extend(state_id(state));
        body.extend(address_field(state.source));
        body.extend(lifetime());
        body.resize(204, 0); // curlft, stats
        body.extend(0_u32.to_ne_bytes()); // seq
        body.extend(state.reqid.to_ne_bytes());
        body.extend(family(state.destination).to_ne_bytes());
        body.extend([XFRM_MODE_TUNNEL, 0, XFRM_STATE_ESN | XFRM_STATE_AF_UNSPEC]);
        body.resize(STATE_BYTES, 0);
        let mut algorithm = [0; 64];
        algorithm[..ALGORITHM.len()].copy_from_slice(ALGORITHM);
        let mut aead = algorithm.to_vec();
        aead.extend((XFRM_KEY_BYTES as u32 * 8).to_ne_bytes());
        aead.extend(TAG_BITS.to_ne_bytes());
        aead.extend(key);
        push_attribute(&mut body, XFRMA_ALG_AEAD, &aead);
        // struct xfrm_replay_state_esn: words of the bitmap, four counters, the window, the bitmap
        let words = REPLAY_WINDOW / 32;
        let mut replay = words.to_ne_bytes().to_vec();
        replay.resize(20, 0);
        replay.extend(REPLAY_WINDOW.to_ne_bytes());
        replay.resize(24 + words as usize * 4, 0);
        push_attribute(&mut body, XFRMA_REPLAY_ESN_VAL, &replay);
        push_attribute(&mut body, XFRMA_IF_ID, &self.interface.to_ne_bytes());
        match self.call(XFRM_MSG_NEWSA, NLM_F_REQUEST | NLM_F_ACK, &body) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            done => {
                let what = format!("adding the IPsec state from {} to {}", state.source, state.destination);
                done.map(drop).map_err(|cause| Error::kernel(what, cause))
            }
        }
    }

    /// Removes a state; one that is no more is no error.
    pub fn delete_state(&mut self, state: &XfrmState) -> Result<()> {
        // struct xfrm_usersa_id
        let mut body = address_field(state.destination).to_vec();
        body.extend(state.spi.to_be_bytes());
        body.extend(family(state.destination).to_ne_bytes());
        body.extend([ESP, 0]);
        match self.call(XFRM_MSG_DELSA, NLM_F_REQUEST | NLM_F_ACK, &body) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            done => done.map(drop).map_err(|cause| Error::kernel("removing an IPsec state", cause)),
        }
    }

    /// Adds a policy, or changes the one for the same packets in one step.
    pub fn put_policy(&mut self, policy: &XfrmPolicy) -> Result<()> {
        let mut body = selector(Some(policy.net));
        body.extend(lifetime());
        body.resize(POLICY_BYTES - 8, 0); // curlft, priority, index
        body.extend([way_number(policy.way), 0, 0, 0]);
        body.resize(POLICY_BYTES, 0);
        // struct xfrm_user_tmpl
        let (source, destination) = policy.tunnel;
        let mut template = address_field(destination).to_vec();
        template.extend(0_u32.to_be_bytes());
        template.extend([ESP, 0, 0, 0]);
        template.extend(family(destination).to_ne_bytes());
        template.extend([0; 2]);
        template.extend(address_field(source));
        template.extend(policy.reqid.to_ne_bytes());
        template.extend([XFRM_MODE_TUNNEL, 0, 0, 0]);
        template.extend([0xff; 12]);
        push_attribute(&mut body, XFRMA_TMPL, &template);
        push_attribute(&mut body, XFRMA_IF_ID, &self.interface.to_ne_bytes());
        self.call(XFRM_MSG_UPDPOLICY, NLM_F_REQUEST | NLM_F_ACK, &body)
            .map(drop)
            .map_err(|cause| Error::kernel(format!("adding the IPsec policy for {}", policy.net), cause))
    }

    /// Removes a policy; one that is no more is no error.
    pub fn delete_policy(&mut self, policy: &XfrmPolicy) -> Result<()> {
        // struct xfrm_userpolicy_id
        let mut body = selector(Some(policy.net));
        body.extend(0_u32.to_ne_bytes());
        body.extend([way_number(policy.way), 0, 0, 0]);
        push_attribute(&mut body, XFRMA_IF_ID, &self.interface.to_ne_bytes());
        match self.call(XFRM_MSG_DELPOLICY, NLM_F_REQUEST | NLM_F_ACK, &body) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done.map(drop).map_err(|cause| Error::kernel("removing an IPsec policy", cause)),
        }
    }

    /// Sends, and reads the bodies of the answers until the acknowledgement or the end.
    fn call(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
        message.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0_u32.to_ne_bytes());
        message.extend(body);
        self.socket.send(&message, 0)?;
        let mut rows = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = &bytes[..];
            while let Some((kind, sequence, body, next)) = split(rest) {
                rest = next;
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(rows),
                    NLMSG_ERROR => {
                        let code = body.get(..4).and_then(|code| code.try_into().ok());
                        return match code.map_or(-libc::EPROTO, i32::from_ne_bytes) {
                            0 => Ok(rows),
                            code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                        };
                    }
                    XFRM_MSG_NEWSA | XFRM_MSG_NEWPOLICY => rows.push(body.to_vec()),
                    _ => {}
                }
            }
        }
    }
}

fn socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// The first message: its type, its number, its body, and what follows.
fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((kind, sequence, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn push_attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(((4 + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn family(address: IpAddr) -> u16 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u16
}

fn address_field(address: IpAddr) -> [u8; 16] {
    let mut field = [0; 16];
    match address {
        IpAddr::V4(address) => field[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => field = address.octets(),
    }
    field
}

/// `struct xfrm_selector`: everything, or what goes to `net`.
fn selector(net: Option<IpNet>) -> Vec<u8> {
    let Some(net) = net else { return vec![0; SELECTOR_BYTES] };
    let mut field = address_field(net.network()).to_vec();
    field.resize(40, 0); // source, ports
    field.extend(family(net.network()).to_ne_bytes());
    field.push(net.prefix_len());
    field.resize(SELECTOR_BYTES, 0);
    field
}

/// `struct xfrm_id`.
fn state_id(state: &XfrmState) -> [u8; 24] {
    let mut field = [0; 24];
    field[..16].copy_from_slice(&address_field(state.destination));
    field[16..20].copy_from_slice(&state.spi.to_be_bytes());
    field[20] = ESP;
    field
}

/// `struct xfrm_lifetime_cfg`: four limits that are none, four times that are none.
fn lifetime() -> [u8; 64] {
    let mut field = [0; 64];
    field[..32].fill(0xff);
    field
}

fn way_number(way: XfrmWay) -> u8 {
    match way {
        XfrmWay::In => 0,
        XfrmWay::Out => 1,
        XfrmWay::Forward => 2,
    }
}

fn read_address(field: &[u8], family: u16) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(field.get(..4)?).ok()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(field.get(..16)?).ok()?).into()),
        _ => None,
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn read_state(row: &[u8]) -> Option<(XfrmState, XfrmCounts)> {
    let family = read_u16(row, 212)?;
    let state = XfrmState {
        source: read_address(row.get(80..)?, family)?,
        destination: read_address(row.get(56..)?, family)?,
        spi: u32::from_be(read_u32(row, 72)?),
        reqid: read_u32(row, 208)?,
    };
    let bytes = u64::from_ne_bytes(row.get(160..168)?.try_into().ok()?);
    let errors = [192, 196, 200].into_iter().filter_map(|at| read_u32(row, at)).map(u64::from).sum();
    Some((state, XfrmCounts { bytes, errors }))
}

fn read_policy(row: &[u8]) -> Option<XfrmPolicy> {
    let way = match row.get(160)? {
        0 => XfrmWay::In,
        1 => XfrmWay::Out,
        _ => XfrmWay::Forward,
    };
    let net = IpNet::new(read_address(row, read_u16(row, 40)?)?, *row.get(42)?).ok()?;
    let mut found = attributes(row.get(POLICY_BYTES..)?);
    let (_, template) = found.find(|(kind, _)| *kind == XFRMA_TMPL)?;
    let family = read_u16(template, 24)?;
    let tunnel = (read_address(template.get(28..)?, family)?, read_address(template, family)?);
    Some(XfrmPolicy { way, net, tunnel, reqid: read_u32(template, 44)? })
}
