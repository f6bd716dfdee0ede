//! News of the kernel: that something changed, never what. Who hears it looks for itself.

use std::io;
use std::thread;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::sync::watch;

use super::{Error, Result};

/// What changed in the calling thread's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// A device came, went or changed.
    Links,
    /// A route went or was replaced, or an address went and took its routes along.
    Routes,
    /// A filter of a device, or what filters are attached to, went.
    Filters,
    /// A setting of the network, as `ip_forward`.
    Settings,
}

/// All news, for somebody who missed some.
pub const ALL_NEWS: [News; 4] = [News::Links, News::Routes, News::Filters, News::Settings];

/// How often there was news of each kind.
pub type Heard = [u64; ALL_NEWS.len()];

/// RTNLGRP_* of linux/rtnetlink.h: LINK, TC, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_NETCONF,
/// IPV6_NETCONF.
const GROUPS: [u32; 8] = [1, 4, 5, 7, 9, 11, 24, 25];

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_DELQDISC: u16 = 37;
const RTM_DELTFILTER: u16 = 45;
const RTM_NEWNETCONF: u16 = 80;
/// Of linux/netlink.h: the message says that something was replaced.
const NLM_F_REPLACE: u16 = 0x100;
const HEADER_BYTES: usize = 16;

/// Changes whenever there is news in the calling thread's namespace; several changes may be one. Devices of
/// which `is_other` says so are nobody's business here. The channel closes when the kernel can no longer
/// be heard.
pub fn kernel_news(is_other: fn(&str) -> bool) -> Result<watch::Receiver<Heard>> {
    let open = || {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        let (news, heard) = watch::channel(Heard::default());
        let listen = move || {
            while let Ok(all) = hear(&socket, is_other) {
                let is_news = |heard: &mut Heard| {
                    all.iter().for_each(|news| heard[*news as usize] += 1);
                    !all.is_empty()
                };
                news.send_if_modified(is_news);
                if news.is_closed() {
                    return;
                }
            }
        };
        thread::Builder::new().name("kernel-news".to_owned()).spawn(listen)?;
        io::Result::Ok(heard)
    };
    open().map_err(|error| Error::kernel("listening for changes of the network", error))
}

fn hear(socket: &Socket, is_other: fn(&str) -> bool) -> io::Result<Vec<News>> {
    match socket.recv_from_full() {
        Ok((datagram, _)) => {
            Ok(messages(&datagram).filter_map(|message| news_of(message, is_other)).collect())
        }
        // More came than the kernel kept.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(ALL_NEWS.to_vec()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn messages(datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = rest.get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes)? as usize;
        if length < HEADER_BYTES || length > rest.len() {
            return None;
        }
        let message = &rest[..length];
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        Some(message)
    })
}

fn news_of(message: &[u8], is_other: fn(&str) -> bool) -> Option<News> {
    let short =
        |at: usize| message.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let (kind, flags) = (short(4)?, short(6)?);
    match kind {
        RTM_NEWLINK | RTM_DELLINK => {
            (!link_name(message).is_some_and(|name| is_other(&name))).then_some(News::Links)
        }
        RTM_NEWROUTE if flags & NLM_F_REPLACE == 0 => None,
        RTM_NEWROUTE | RTM_DELROUTE | RTM_DELADDR => Some(News::Routes),
        RTM_DELQDISC | RTM_DELTFILTER => Some(News::Filters),
        RTM_NEWNETCONF => Some(News::Settings),
        _ => None,
    }
}

fn link_name(message: &[u8]) -> Option<String> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).ok()?;
    let NetlinkPayload::InnerMessage(
        RouteNetlinkMessage::NewLink(LinkMessage { attributes, .. })
        | RouteNetlinkMessage::DelLink(LinkMessage { attributes, .. }),
    ) = message.payload
    else {
        return None;
    };
    attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    })
}
