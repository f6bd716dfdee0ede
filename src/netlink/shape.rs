//! What a pod may send: a queue with a rate on the pod's own end of its link.
//!
//! In the pod's namespace, since everything that the pod sends passes there, to whomever and whether it is
//! encrypted or not, and since its sockets are slowed down there without a loss.

use std::path::Path;

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use super::connection::{Connection, Request};
use super::link::link;
use super::namespace::{open_namespace, within};
use super::queue::{BURST, PARAMETERS, TokenBucket};
use super::{Error, Result};

/// So long a packet waits at most, in milliseconds.
const WAITS_MILLISECONDS: u64 = 50;
/// What may leave at once: ten milliseconds' worth, and no less than a merged packet.
const BURST_MILLISECONDS: u64 = 10;
const BURST_LEAST: u64 = 66_000;

/// Lets a pod's device send so many bytes a second, or as much as it can. True if that was not so before.
pub fn limit_pod(namespace: &Path, interface: &str, rate: Option<u64>) -> Result<bool> {
    let namespace = open_namespace(namespace)?;
    within(&namespace, || {
        let device = link(interface)?;
        let device = device.ok_or_else(|| Error::Different(format!("the pod has no device {interface}")))?;
        let gone = || Error::Different(format!("device {interface} went away"));
        let index = i32::try_from(device.index).map_err(|_| gone())?;
        let is_limited = has_bucket(index)?;
        let mut message = TcMessage::with_index(index);
        message.header.parent = TcHandle::ROOT;
        let request = match rate {
            None if !is_limited => return Ok(false),
            None => Request::new(
                format!("taking the limit from {interface}"),
                RouteNetlinkMessage::DelQueueDiscipline(message),
            ),
            Some(rate) => {
                let bucket = bucket(rate);
                message.attributes = vec![
                    TcAttribute::Kind("tbf".to_owned()),
                    TcAttribute::Options(vec![
                        TcOption::Other(DefaultNla::new(PARAMETERS, bucket.parameters())),
                        TcOption::Other(DefaultNla::new(BURST, bucket.burst.to_ne_bytes().to_vec())),
                    ]),
                ];
                let action = format!("limiting {interface} to {rate} bytes a second (tbf)");
                Request::new(action, RouteNetlinkMessage::NewQueueDiscipline(message)).replace()
            }
        };
        Connection::open()?.execute(vec![request])?;
        Ok(true)
    })
}

/// Whether the pod's device has a limit.
pub fn is_pod_limited(namespace: &Path, interface: &str) -> Result<bool> {
    let namespace = open_namespace(namespace)?;
    within(&namespace, || {
        let device = link(interface)?;
        let index = device.and_then(|device| i32::try_from(device.index).ok());
        index.map_or(Ok(false), has_bucket)
    })
}

/// Slower than a rate that the kernel's fields can hold is every device here.
fn bucket(rate: u64) -> TokenBucket {
    let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let burst = (rate * BURST_MILLISECONDS / 1000).max(BURST_LEAST);
    TokenBucket {
        rate: short(rate),
        smallest_packet: 64,
        burst: short(burst),
        limit: short(burst + rate * WAITS_MILLISECONDS / 1000),
    }
}

/// The kinds of the queues of a device, its root's first; a device without queues has none.
pub fn queue_kinds(index: u32) -> Result<Vec<String>> {
    let index = i32::try_from(index).unwrap_or(0);
    let ask = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(index));
    let rows = Connection::open()?.dump("listing queues", ask)?;
    let mut kinds = Vec::new();
    for row in &rows {
        let RouteNetlinkMessage::NewQueueDiscipline(message) = row else { continue };
        let kind = message.attributes.iter().find_map(|attribute| match attribute {
            TcAttribute::Kind(kind) => Some(kind.clone()),
            _ => None,
        });
        let Some(kind) = kind.filter(|_| message.header.index == index) else { continue };
        // The place of filters is no queue.
        if kind != "noqueue" && kind != "clsact" && !kinds.contains(&kind) {
            let place = if message.header.parent == TcHandle::ROOT { 0 } else { kinds.len() };
            kinds.insert(place, kind);
        }
    }
    Ok(kinds)
}

fn has_bucket(index: i32) -> Result<bool> {
    let ask = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(index));
    let rows = Connection::open()?.dump("listing queues", ask)?;
    Ok(rows.iter().any(|row| match row {
        RouteNetlinkMessage::NewQueueDiscipline(message) => {
            message.header.index == index
                && message.header.parent == TcHandle::ROOT
                && message.attributes.contains(&TcAttribute::Kind("tbf".to_owned()))
        }
        _ => false,
    }))
}
