//! Links that lie ready: veth pairs whose ends are both on the node, and down.
//!
//! A pod's programs can be attached to such a pair ahead of time; to connect the
//! pod then takes a new name and the move of one end into its namespace.

use std::os::fd::AsRawFd;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};

use super::connection::{Connection, Request};
use super::pod::{PodLink, PodLinkSpec, configure_host_side, configure_pod_link, index_of};
use super::{Link, Result, delete_link_at, links, namespace};

/// What the ends of spare pairs are called: `weir_spare3`, and `weir_spare3p` for the pod's.
const SPARE_PREFIX: &str = "weir_spare";

/// A pair that no pod has yet: both ends on the node, and down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparePair {
    /// The number in its name.
    pub number: usize,
    /// The index of the end that stays on the node.
    pub host_ifindex: u32,
    peer_ifindex: u32,
}

/// True for the name of either end of a spare pair.
pub fn is_spare(name: &str) -> bool {
    name.strip_prefix(SPARE_PREFIX).is_some_and(|rest| {
        let digits = rest.strip_suffix('p').unwrap_or(rest);
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// Makes the pair of that number.
pub fn create_spare_pair(number: usize) -> Result<SparePair> {
    let (host, peer) = spare_names(number);
    let mut peer_message = LinkMessage::default();
    peer_message.attributes = vec![LinkAttribute::IfName(peer.clone())];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(host.clone()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer_message))),
        ]),
    ];
    let request = Request::new(format!("making {host}"), RouteNetlinkMessage::NewLink(message)).create();
    Connection::open()?.execute(vec![request])?;
    configure_host_side(&host)?;
    Ok(SparePair { number, host_ifindex: index_of(&host)?, peer_ifindex: index_of(&peer)? })
}

/// The spare pairs that are there, those of an agent before us among them. What is left of
/// one, or was set up by somebody, is removed.
pub fn spare_pairs() -> Result<Vec<SparePair>> {
    let links = links()?;
    let is_intact = |link: &&Link| link.kind == "veth" && !link.is_up;
    let find = |name: &str| links.iter().find(|link| link.name == name).filter(is_intact);
    let mut pairs = Vec::new();
    for link in links.iter().filter(|link| is_spare(&link.name)) {
        let digits = link.name.trim_start_matches(SPARE_PREFIX).trim_end_matches('p');
        let Ok(number) = digits.parse::<usize>() else { continue };
        let (host, peer) = spare_names(number);
        match (find(&host), find(&peer)) {
            (Some(host), Some(peer)) if link.name == host.name => {
                pairs.push(SparePair { number, host_ifindex: host.index, peer_ifindex: peer.index });
            }
            (Some(_), Some(_)) => {}
            _ => delete_link_at(link.index)?,
        }
    }
    Ok(pairs)
}

/// Removes a spare pair; one that is gone is removed.
pub fn delete_spare_pair(pair: &SparePair) -> Result<()> {
    delete_link_at(pair.host_ifindex)
}

fn spare_names(number: usize) -> (String, String) {
    (format!("{SPARE_PREFIX}{number}"), format!("{SPARE_PREFIX}{number}p"))
}

/// As `create_pod_link`, out of a spare pair. On failure nothing is left, the pair neither.
pub fn claim_pod_link(spec: &PodLinkSpec, pair: &SparePair) -> Result<PodLink> {
    let namespace = namespace::open_namespace(&spec.netns)?;
    let set = |index, attributes, what: &str| {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        Request::new(format!("making {what} of a spare pair"), RouteNetlinkMessage::SetLink(message))
    };
    let peer = vec![
        LinkAttribute::IfName(spec.interface.clone()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::Address(spec.pod_mac.0.to_vec()),
        LinkAttribute::NetNsFd(namespace.as_raw_fd()),
    ];
    let host = vec![
        LinkAttribute::IfName(spec.host_interface.clone()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::Address(spec.host_mac.0.to_vec()),
    ];
    let claimed = Connection::open()?.execute(vec![
        set(pair.peer_ifindex, peer, &spec.interface),
        set(pair.host_ifindex, host, &spec.host_interface),
    ]);
    if let Err(error) = claimed {
        // One end may be in the pod already: the pair goes with the other.
        delete_link_at(pair.host_ifindex)?;
        return Err(error);
    }
    configure_pod_link(spec, &namespace)
}
