//! IPsec policies of the node's own (ip-xfrm(8), linux/xfrm.h).

use std::io;

use netlink_packet_core::NLM_F_REQUEST;
use netlink_sys::{Socket, protocols::NETLINK_XFRM};
use tokio::sync::watch;

use super::listen::listen;
use super::xfrm::Xfrm;
use super::{Error, Result};

/// Of linux/xfrm.h: what the policies are all in all, and the answer's attribute with their counts.
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
const XFRM_MSG_NEWSPDINFO: u16 = 0x24;
const XFRMA_SPD_INFO: u16 = 1;
/// XFRMNLGRP_POLICY.
const GROUPS: [u32; 1] = [4];
/// NLMSG_ERROR of linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;
const FLAGS_BYTES: usize = 4;
const ATTRIBUTE_BYTES: usize = 4;

/// How many IPsec policies there are in the calling thread's network namespace beside those of our interface
/// with the number `own`; 0 on a kernel without IPsec. Needs CAP_NET_ADMIN.
pub fn ipsec_policies(own: u32) -> Result<u32> {
    match all_policies()? {
        0 => Ok(0),
        _ => Ok(Xfrm::open(own)?.policies()?.1),
    }
}

fn all_policies() -> Result<u32> {
    let ask = || {
        let mut socket = match Socket::new(NETLINK_XFRM) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(0),
            socket => socket?,
        };
        socket.bind_auto()?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + FLAGS_BYTES);
        // struct nlmsghdr: length, type, flags, sequence, port
        bytes.extend(((HEADER_BYTES + FLAGS_BYTES) as u32).to_ne_bytes());
        bytes.extend(XFRM_MSG_GETSPDINFO.to_ne_bytes());
        bytes.extend(NLM_F_REQUEST.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(u32::MAX.to_ne_bytes());
        socket.send(&bytes, 0)?;
        count(&socket.recv_from_full()?.0)
    };
    ask().map_err(|error| Error::kernel("counting IPsec policies", error))
}

/// Changes whenever an IPsec policy of the calling thread's network namespace comes, changes or goes; `None` on
/// a kernel without IPsec. The channel closes when the kernel can no longer be heard. Needs CAP_NET_ADMIN.
pub fn ipsec_news() -> Result<Option<watch::Receiver<()>>> {
    match listen(NETLINK_XFRM, &GROUPS, "ipsec") {
        Ok(news) => Ok(Some(news)),
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(None),
        Err(error) => Err(Error::kernel("listening for IPsec policies", error)),
    }
}

/// The sum of `struct xfrmu_spdinfo`'s first three numbers: in, out, forward.
fn count(answer: &[u8]) -> io::Result<u32> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the answer has no counts");
    let long = |at: usize| {
        let bytes = answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(invalid)
    };
    let short = |at: usize| {
        let bytes = answer.get(at..at + 2).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u16::from_ne_bytes).ok_or_else(invalid)
    };
    match short(4)? {
        XFRM_MSG_NEWSPDINFO => {}
        NLMSG_ERROR => return Err(io::Error::from_raw_os_error((long(HEADER_BYTES)? as i32).wrapping_neg())),
        _ => return Err(invalid()),
    }
    let mut at = HEADER_BYTES + FLAGS_BYTES;
    while at + ATTRIBUTE_BYTES <= answer.len() {
        let (length, kind) = (usize::from(short(at)?), short(at + 2)?);
        if kind == XFRMA_SPD_INFO {
            let first = at + ATTRIBUTE_BYTES;
            let sum = long(first)?.saturating_add(long(first + 4)?).saturating_add(long(first + 8)?);
            return Ok(sum);
        }
        at += length.max(ATTRIBUTE_BYTES).next_multiple_of(4);
    }
    Err(invalid())
}
