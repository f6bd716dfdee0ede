//! What the node's own netfilter rules do with forwarded packets (linux/netfilter/nf_tables.h), which
//! packets past the node's stack do not meet. Of nf_tables alone, as iptables-nft writes it, too: the
//! older ip_tables has no way to ask that is worth it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::{Error, Result};

const SUBSYSTEM: u16 = 10 << 8;
const NFT_MSG_GETCHAIN: u16 = SUBSYSTEM | 4;
const NFT_MSG_NEWCHAIN: u16 = SUBSYSTEM | 3;
const NFT_MSG_GETRULE: u16 = SUBSYSTEM | 7;
const NFT_MSG_NEWRULE: u16 = SUBSYSTEM | 6;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// struct nlmsghdr, struct nfgenmsg.
const HEADER_BYTES: usize = 16;
const FAMILY_BYTES: usize = 4;
/// inet, IPv4, IPv6.
const FAMILIES: [u8; 3] = [1, 2, 10];
const NF_INET_FORWARD: u32 = 2;
const NF_DROP: u32 = 0;

/// Family, table and name.
type ChainKey = (u8, Vec<u8>, Vec<u8>);

#[derive(Default)]
struct Chain {
    is_forward: bool,
    drops: u32,
    jumps: Vec<ChainKey>,
}

/// How many rules and policies of the calling thread's network namespace drop or reject what is forwarded.
/// Needs CAP_NET_ADMIN.
pub fn forward_drops() -> Result<u32> {
    let ask = || {
        let mut chains = BTreeMap::new();
        dump(NFT_MSG_GETCHAIN, |family, message| add_chain(&mut chains, family, message))?;
        if chains.values().any(|chain| chain.is_forward) {
            dump(NFT_MSG_GETRULE, |family, message| add_rule(&mut chains, family, message))?;
        }
        io::Result::Ok(count(&chains))
    };
    ask().map_err(|error| Error::kernel("looking for netfilter rules on forwarded packets", error))
}

/// The drops of the chains at the forward hook, and of those that they lead to.
fn count(chains: &BTreeMap<ChainKey, Chain>) -> u32 {
    let mut seen = BTreeSet::new();
    let mut next: Vec<&ChainKey> =
        chains.iter().filter(|(_, chain)| chain.is_forward).map(|(key, _)| key).collect();
    let mut drops = 0_u32;
    while let Some(key) = next.pop() {
        let Some(chain) = chains.get(key).filter(|_| seen.insert(key)) else { continue };
        drops = drops.saturating_add(chain.drops);
        next.extend(&chain.jumps);
    }
    drops
}

/// Table 1, name 3, hook 4 (number 1), policy 5.
fn add_chain(chains: &mut BTreeMap<ChainKey, Chain>, family: u8, message: &[u8]) {
    let (Some(table), Some(name)) = (attribute(message, 1), attribute(message, 3)) else { return };
    let hook = attribute(message, 4).and_then(|hook| number(attribute(hook, 1)?));
    let is_forward = hook == Some(NF_INET_FORWARD);
    let policy = attribute(message, 5).and_then(number);
    let chain = chains.entry((family, table.to_vec(), name.to_vec())).or_default();
    chain.is_forward = is_forward;
    chain.drops += u32::from(is_forward && policy == Some(NF_DROP));
}

/// Table 1, chain 2, expressions 4, each with name 1 and data 2.
fn add_rule(chains: &mut BTreeMap<ChainKey, Chain>, family: u8, message: &[u8]) {
    let (Some(table), Some(name)) = (attribute(message, 1), attribute(message, 2)) else { return };
    let Some(chain) = chains.get_mut(&(family, table.to_vec(), name.to_vec())) else { return };
    let expressions = attribute(message, 4).unwrap_or_default();
    for (_, expression) in attributes(expressions) {
        let data = attribute(expression, 2).unwrap_or_default();
        match attribute(expression, 1) {
            Some(b"reject\0") => chain.drops += 1,
            // iptables-nft's own targets bear their name.
            Some(b"target\0") if attribute(data, 1) == Some(b"REJECT\0") => chain.drops += 1,
            // Immediate data 2, verdict 2: code 1, chain 2.
            Some(b"immediate\0") => {
                let verdict = attribute(data, 2).and_then(|data| attribute(data, 2)).unwrap_or_default();
                chain.drops += u32::from(attribute(verdict, 1).and_then(number) == Some(NF_DROP));
                let to = attribute(verdict, 2).map(|to| (family, table.to_vec(), to.to_vec()));
                chain.jumps.extend(to);
            }
            _ => {}
        }
    }
}

/// Asks for all of a kind and reads the answers, each without its headers.
fn dump(kind: u16, mut take: impl FnMut(u8, &[u8])) -> io::Result<()> {
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(()),
        socket => socket?,
    };
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(HEADER_BYTES + FAMILY_BYTES);
    request.extend(((HEADER_BYTES + FAMILY_BYTES) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend([0; 8 + FAMILY_BYTES]);
    socket.send(&request, 0)?;
    loop {
        let datagram = socket.recv_from_full()?.0;
        let mut rest = &datagram[..];
        while let Some((length, message)) = message(rest) {
            match (message.kind, message.body) {
                (NLMSG_DONE, _) => return Ok(()),
                (NLMSG_ERROR, body) => {
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    // A kernel without nf_tables.
                    let is_absent = matches!(-code, 0 | libc::EOPNOTSUPP | libc::EINVAL);
                    return if is_absent { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                (NFT_MSG_NEWCHAIN | NFT_MSG_NEWRULE, [family, _, _, _, body @ ..])
                    if FAMILIES.contains(family) =>
                {
                    take(*family, body);
                }
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

/// The first message and its length.
fn message(bytes: &[u8]) -> Option<(usize, Message<'_>)> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    Some((length, Message { kind, body: bytes.get(HEADER_BYTES..length)? }))
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // Two bits say how the value is encoded.
        Some((kind & 0x3fff, value))
    })
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}
