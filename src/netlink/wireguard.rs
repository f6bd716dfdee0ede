//! The kernel's WireGuard: a device, its key, its peers (uapi/linux/wireguard.h).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use super::connection::{Connection, Request};
use super::link::{delete_link, link};
use super::tun::{lower, raise};
use super::{Error, Result};
use crate::model::{EncryptionPeer, PeerState, PublicKey};

/// The kind's name in `ip link`.
const KIND: &str = "wireguard";
/// A device for a moment, to find out what the kernel has.
const PROBE: &str = "weir_wg_probe";
/// Answers of the kernel are at most this long.
const RECEIVE_BYTES: usize = 64 * 1024;
/// A peer that was added last begins the handshake at once, and a dead way is noticed.
pub const KEEPALIVE_SECONDS: u16 = 25;
/// Peers in one message: with two CIDRs and two addresses each far below what a message may have.
const PEERS_AT_ONCE: usize = 50;

/// Makes the device with this key and port, if there is none, and sets it up; its index, or `None` on a kernel
/// without WireGuard. Without a key it is down: it neither sends nor receives, and has no UDP port.
pub fn ensure_wireguard(
    name: &str,
    mtu: u32,
    private_key: Option<&[u8; 32]>,
    port: u16,
) -> Result<Option<u32>> {
    match link(name)? {
        Some(there) if there.kind == KIND => {}
        Some(_) => {
            // What has the name goes only where the kernel has something better.
            if !make(PROBE)? {
                return Ok(None);
            }
            delete_link(PROBE)?;
            delete_link(name)?;
            make(name)?;
        }
        None if make(name)? => {}
        None => return Ok(None),
    }
    let found = link(name)?.ok_or_else(|| Error::Different(format!("device {name} went away")))?;
    if private_key.is_none() {
        lower(name, found.index)?;
    }
    let mut family = Family::open()?;
    family.set(vec![
        WireguardAttribute::IfName(name.to_owned()),
        // All zeros take the key away.
        WireguardAttribute::PrivateKey(private_key.copied().unwrap_or_default()),
        WireguardAttribute::ListenPort(port),
    ])?;
    if private_key.is_some() {
        raise(name, &found, mtu)?;
    }
    Ok(Some(found.index))
}

/// True if there is a device of this name now, of any kind; false if the kernel has no WireGuard.
fn make(name: &str) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
    ];
    let request =
        Request::new(format!("making WireGuard device {name}"), RouteNetlinkMessage::NewLink(message))
            .create();
    match Connection::open()?.execute(vec![request]) {
        Ok(()) => Ok(true),
        Err(Error::Kernel { cause, .. }) if cause.raw_os_error() == Some(libc::EEXIST) => Ok(true),
        Err(Error::Kernel { cause, .. })
            if matches!(cause.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Makes the device's peers these: adds and changes first, then removes. An address that moves from one peer
/// to another does so in one step.
pub fn set_wireguard_peers(name: &str, peers: &[EncryptionPeer]) -> Result<()> {
    let mut family = Family::open()?;
    let there = family.peers(name)?;
    let wanted: BTreeMap<PublicKey, &EncryptionPeer> =
        peers.iter().map(|peer| (peer.public_key, peer)).collect();
    let changes: Vec<WireguardPeer> = wanted
        .values()
        .filter(|peer| there.get(&peer.public_key).is_none_or(|known| !known.is(peer)))
        .map(|peer| peer_message(peer, there.contains_key(&peer.public_key)))
        .collect();
    let gone = there.keys().filter(|key| !wanted.contains_key(*key)).map(|key| {
        WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ])
    });
    let all: Vec<WireguardPeer> = changes.into_iter().chain(gone).collect();
    for part in all.chunks(PEERS_AT_ONCE) {
        family.set(vec![
            WireguardAttribute::IfName(name.to_owned()),
            WireguardAttribute::Peers(part.to_vec()),
        ])?;
    }
    Ok(())
}

/// How the device's peers are.
pub fn wireguard_peers(name: &str) -> Result<Vec<PeerState>> {
    Ok(Family::open()?.peers(name)?.into_values().map(|peer| peer.state).collect())
}

fn peer_message(peer: &EncryptionPeer, is_known: bool) -> WireguardPeer {
    let allowed = peer.allowed.iter().map(|net| {
        let family =
            if net.addr().is_ipv4() { WireguardAddressFamily::Ipv4 } else { WireguardAddressFamily::Ipv6 };
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(family),
            WireguardAllowedIpAttr::IpAddr(net.network()),
            WireguardAllowedIpAttr::Cidr(net.prefix_len()),
        ])
    });
    let mut attributes = vec![
        WireguardPeerAttribute::PublicKey(peer.public_key.0),
        WireguardPeerAttribute::Endpoint(peer.endpoint),
        WireguardPeerAttribute::PersistentKeepalive(KEEPALIVE_SECONDS),
        WireguardPeerAttribute::AllowedIps(allowed.collect()),
    ];
    if is_known {
        // Its own list changed: what it does not have any more must go, and the call is one step.
        attributes.insert(1, WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
    }
    WireguardPeer(attributes)
}

/// A peer as the kernel has it.
struct Known {
    state: PeerState,
    keepalive: u16,
    allowed: Vec<IpNet>,
}

impl Known {
    fn is(&self, peer: &EncryptionPeer) -> bool {
        let mut wanted = peer.allowed.clone();
        wanted.sort_unstable();
        self.state.endpoint == Some(peer.endpoint)
            && self.keepalive == KEEPALIVE_SECONDS
            && self.allowed == wanted
    }
}

/// A socket to the kernel's family of messages for WireGuard.
struct Family {
    socket: Socket,
    id: u16,
    sequence: u32,
}

impl Family {
    fn open() -> Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_GENERIC)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            io::Result::Ok(socket)
        };
        let socket = open().map_err(|cause| Error::kernel("opening a generic netlink socket", cause))?;
        let mut family = Self { socket, id: 0, sequence: 0 };
        family.id = family
            .resolve()
            .map_err(|cause| Error::kernel("looking for the kernel's WireGuard messages", cause))?;
        Ok(family)
    }

    fn resolve(&mut self) -> io::Result<u16> {
        let ask =
            GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![GenlCtrlAttrs::FamilyName(KIND.to_owned())] };
        let mut message = NetlinkMessage::from(GenlMessage::from_payload(ask));
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut id = None;
        self.exchange(message, |answer: GenlCtrl| {
            for attribute in &answer.nlas {
                if let GenlCtrlAttrs::FamilyId(found) = attribute {
                    id = Some(*found);
                }
            }
        })?;
        id.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn set(&mut self, attributes: Vec<WireguardAttribute>) -> Result<()> {
        let ask = WireguardMessage { cmd: WireguardCmd::SetDevice, attributes };
        self.send(ask, NLM_F_REQUEST | NLM_F_ACK, |_| {})
            .map_err(|cause| Error::kernel("configuring WireGuard", cause))
    }

    fn peers(&mut self, name: &str) -> Result<BTreeMap<PublicKey, Known>> {
        let ask = WireguardMessage {
            cmd: WireguardCmd::GetDevice,
            attributes: vec![WireguardAttribute::IfName(name.to_owned())],
        };
        let mut peers: BTreeMap<PublicKey, Known> = BTreeMap::new();
        self.send(ask, NLM_F_REQUEST | NLM_F_DUMP, |answer| {
            for attribute in answer.attributes {
                let WireguardAttribute::Peers(rows) = attribute else { continue };
                for (key, row) in rows.into_iter().filter_map(read_peer) {
                    // A peer with many addresses comes in parts.
                    match peers.get_mut(&key) {
                        Some(known) => known.allowed.extend(row.allowed),
                        None => drop(peers.insert(key, row)),
                    }
                }
            }
        })
        .map_err(|cause| Error::kernel("reading WireGuard's peers", cause))?;
        peers.values_mut().for_each(|peer| peer.allowed.sort_unstable());
        Ok(peers)
    }

    fn send(
        &mut self,
        ask: WireguardMessage,
        flags: u16,
        take: impl FnMut(WireguardMessage),
    ) -> io::Result<()> {
        let mut message = GenlMessage::from_payload(ask);
        message.set_resolved_family_id(self.id);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        self.exchange(message, take)
    }

    /// Sends, and reads until the acknowledgement or the end of the dump.
    fn exchange<T>(
        &mut self,
        mut message: NetlinkMessage<GenlMessage<T>>,
        mut take: impl FnMut(T),
    ) -> io::Result<()>
    where
        T: std::fmt::Debug,
        GenlMessage<T>: netlink_packet_core::NetlinkSerializable + netlink_packet_core::NetlinkDeserializable,
    {
        self.sequence += 1;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = &buffer[..];
            while !rest.is_empty() {
                let broken = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
                let answer = NetlinkMessage::<GenlMessage<T>>::deserialize(rest).map_err(broken)?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(answer) => take(answer.payload),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) if error.raw_code() == 0 => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return Err(io::Error::from_raw_os_error(-error.raw_code()));
                    }
                    _ => {}
                }
            }
        }
    }
}

fn read_peer(peer: WireguardPeer) -> Option<(PublicKey, Known)> {
    let mut key = None;
    let mut known = Known {
        state: PeerState {
            public_key: PublicKey([0; 32]),
            endpoint: None,
            last_handshake_seconds: None,
            received_bytes: 0,
            sent_bytes: 0,
            errors: 0,
        },
        keepalive: 0,
        allowed: Vec::new(),
    };
    for attribute in peer.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(bytes) => key = Some(PublicKey(bytes)),
            WireguardPeerAttribute::Endpoint(endpoint) => known.state.endpoint = Some(endpoint),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => known.keepalive = seconds,
            WireguardPeerAttribute::RxBytes(bytes) => known.state.received_bytes = bytes,
            WireguardPeerAttribute::TxBytes(bytes) => known.state.sent_bytes = bytes,
            WireguardPeerAttribute::LastHandshake(at) if at.seconds > 0 => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
                let at = u64::try_from(at.seconds).unwrap_or(0);
                known.state.last_handshake_seconds = Some(now.saturating_sub(at));
            }
            WireguardPeerAttribute::AllowedIps(rows) => {
                known.allowed.extend(rows.into_iter().filter_map(read_allowed));
            }
            _ => {}
        }
    }
    let key = key?;
    known.state.public_key = key;
    Some((key, known))
}

fn read_allowed(row: WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut length): (Option<IpAddr>, _) = (None, None);
    for attribute in row.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(found) => address = Some(found),
            WireguardAllowedIpAttr::Cidr(found) => length = Some(found),
            _ => {}
        }
    }
    IpNet::new(address?, length?).ok()
}
