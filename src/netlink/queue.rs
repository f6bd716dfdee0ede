//! A pair of devices whose first end is a queue: what it is given comes out at the other end some time later.

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use super::connection::{Connection, Request};
use super::link::{get, raise};
use super::{Error, Result, delete_link, get_sysctl, set_sysctl};

/// Larger packets do not pass.
const MTU: u32 = 9216;
/// TCA_TBF_PARMS and TCA_TBF_BURST of linux/pkt_sched.h.
pub(super) const PARAMETERS: u16 = 1;
pub(super) const BURST: u16 = 6;
/// TC_LINKLAYER_ETHERNET.
pub(super) const ETHERNET: u8 = 1;

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Bytes a second.
    pub rate: u32,
    /// A packet counts as at least so many bytes.
    pub smallest_packet: u16,
    /// So many bytes leave at once.
    pub burst: u32,
    /// So many bytes wait at most.
    pub limit: u32,
}

impl TokenBucket {
    /// `struct tc_tbf_qopt`: two `struct tc_ratespec`, of which the second is not used, then limit, buffer, MTU.
    pub(super) fn parameters(&self) -> Vec<u8> {
        let mut bytes = vec![0, ETHERNET, 0, 0, 0, 0];
        bytes.extend(self.smallest_packet.to_ne_bytes());
        bytes.extend(self.rate.to_ne_bytes());
        bytes.extend([0; 12]);
        bytes.extend(self.limit.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes
    }
}

/// Makes the pair, or keeps the one that there is, and sets both ends up: the index of the end that is given
/// packets, and of the one where they come out. Fails on a kernel without `tbf`.
pub fn ensure_queue(names: [&str; 2], bucket: TokenBucket) -> Result<[u32; 2]> {
    let mut connection = Connection::open()?;
    let ends = ensure_pair(&mut connection, names)?;
    let gone = || Error::Different(format!("device {} went away", names[0]));
    let mut message = TcMessage::with_index(i32::try_from(ends[0]).map_err(|_| gone())?);
    message.header.parent = TcHandle::ROOT;
    message.attributes = vec![
        TcAttribute::Kind("tbf".to_owned()),
        TcAttribute::Options(vec![
            TcOption::Other(DefaultNla::new(PARAMETERS, bucket.parameters())),
            TcOption::Other(DefaultNla::new(BURST, bucket.burst.to_ne_bytes().to_vec())),
        ]),
    ];
    let action = format!("giving device {} a token bucket (tbf)", names[0]);
    let limited = Request::new(action, RouteNetlinkMessage::NewQueueDiscipline(message)).replace();
    connection.execute(vec![limited, raise(ends[0]), raise(ends[1])])?;
    Ok(ends)
}

/// Makes a pair of devices that nobody else uses, or keeps the one that there is: the indices of its ends.
pub(super) fn ensure_pair(connection: &mut Connection, names: [&str; 2]) -> Result<[u32; 2]> {
    if find(connection, names)?.is_none() {
        for name in names {
            delete_link(name)?;
        }
        make(connection, names)?;
    }
    find(connection, names)?.ok_or_else(|| Error::Different(format!("device {} went away", names[0])))
}

fn find(connection: &mut Connection, names: [&str; 2]) -> Result<Option<[u32; 2]>> {
    let mut index = |name| -> Result<Option<u32>> {
        Ok(get(connection, name)?
            .filter(|link| link.kind == "veth" && link.mtu == MTU)
            .map(|link| link.index))
    };
    Ok(index(names[0])?.zip(index(names[1])?).map(|(first, second)| [first, second]))
}

/// Without addresses, ARP and neighbour discovery: nobody is there.
fn make(connection: &mut Connection, names: [&str; 2]) -> Result<()> {
    let end = |name: &str| {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Noarp;
        message.header.change_mask = LinkFlags::Noarp;
        message.attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::Mtu(MTU)];
        message
    };
    let mut message = end(names[0]);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end(names[1])))),
    ]));
    let action = format!("making the devices {} and {}", names[0], names[1]);
    connection.execute(vec![Request::new(action, RouteNetlinkMessage::NewLink(message)).create()])?;
    for name in names {
        let generation = format!("net/ipv6/conf/{name}/addr_gen_mode");
        if get_sysctl(&generation)?.is_some() {
            set_sysctl(&generation, "1")?;
        }
    }
    Ok(())
}
