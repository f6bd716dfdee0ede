//! What pods may receive: a queue with a class for each pod that has a limit (`bpf/lib/limit.h`).
//!
//! In the node's namespace, where no pod can take a limit off. The programs choose the class (`skb->priority`);
//! what has none passes at once.

use std::collections::BTreeSet;

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use super::connection::{Connection, Request};
use super::link::raise;
use super::queue::{self, ETHERNET};
use super::{Error, Result};

/// The queue's number, as in `bpf/lib/limit.h`.
const QUEUE: u16 = 1;
/// So long a packet waits at most, in milliseconds, and the least room: some merged packets.
const WAITS_MILLISECONDS: u64 = 100;
const ROOM_LEAST: u64 = 262_144;
/// What may leave at once: ten milliseconds' worth, and no less than a merged packet.
const BURST_MILLISECONDS: u64 = 10;
const BURST_LEAST: u64 = 66_000;
/// The kernel's unit of time in classes, in nanoseconds.
const TICK: u64 = 64;

/// `TCA_HTB_PARMS` and `TCA_HTB_INIT` of linux/pkt_sched.h.
const CLASS: u16 = 1;
const INIT: u16 = 2;

/// Makes the pair of devices of the queue, or keeps the one that there is: the index of the end that is given
/// packets, and of the one where they come out. Fails on a kernel without `htb`.
pub fn ensure_classes(names: [&str; 2]) -> Result<[u32; 2]> {
    let mut connection = Connection::open()?;
    let ends = queue::ensure_pair(&mut connection, names)?;
    if !has_queue(&mut connection, ends[0])? {
        let mut message = message(ends[0], TcHandle::ROOT, TcHandle { major: QUEUE, minor: 0 })?;
        // `struct tc_htb_glob`: version, rate to quantum, the class of what has none, debug, what passed at once.
        let glob: Vec<u8> = [3u32, 10, 0, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        message.attributes = vec![
            TcAttribute::Kind("htb".to_owned()),
            TcAttribute::Options(vec![TcOption::Other(DefaultNla::new(INIT, glob))]),
        ];
        let action = format!("giving device {} a queue with classes (htb)", names[0]);
        let made = Request::new(action, RouteNetlinkMessage::NewQueueDiscipline(message)).replace();
        connection.execute(vec![made])?;
    }
    connection.execute(vec![raise(ends[0]), raise(ends[1])])?;
    Ok(ends)
}

/// Gives a class so many bytes a second.
pub fn limit_class(ifindex: u32, class: u16, rate: u64) -> Result<()> {
    let handle = TcHandle { major: QUEUE, minor: class };
    let mut of_class = message(ifindex, TcHandle { major: QUEUE, minor: 0 }, handle)?;
    of_class.attributes = vec![
        TcAttribute::Kind("htb".to_owned()),
        TcAttribute::Options(vec![TcOption::Other(DefaultNla::new(CLASS, class_options(rate)))]),
    ];
    let mut room = message(ifindex, handle, TcHandle { major: 0, minor: 0 })?;
    room.attributes = vec![TcAttribute::Kind("bfifo".to_owned()), TcAttribute::Other(room_option(rate))];
    let action = format!("letting class {class} of the queue for limited pods pass {rate} bytes a second");
    Connection::open()?.execute(vec![
        Request::new(action.clone(), RouteNetlinkMessage::NewTrafficClass(of_class)).replace(),
        Request::new(action, RouteNetlinkMessage::NewQueueDiscipline(room)).replace(),
    ])
}

/// Takes a class away, and what waits in it; no error if there is none.
pub fn delete_class(ifindex: u32, class: u16) -> Result<()> {
    let handle = TcHandle { major: QUEUE, minor: class };
    let message = message(ifindex, TcHandle { major: QUEUE, minor: 0 }, handle)?;
    let action = format!("deleting class {class} of the queue for limited pods");
    let deleted = Request::new(action, RouteNetlinkMessage::DelTrafficClass(message));
    Connection::open()?.execute(vec![deleted.tolerate(&[libc::ENOENT])])
}

/// The classes that there are.
pub fn classes(ifindex: u32) -> Result<BTreeSet<u16>> {
    let everything = TcHandle { major: 0, minor: 0 };
    let ask = RouteNetlinkMessage::GetTrafficClass(message(ifindex, everything, everything)?);
    let rows = Connection::open()?.dump("listing the classes of limited pods", ask)?;
    let class = |row: &RouteNetlinkMessage| match row {
        RouteNetlinkMessage::NewTrafficClass(message) => Some(message.header.handle.minor),
        _ => None,
    };
    Ok(rows.iter().filter_map(class).filter(|class| *class != 0).collect())
}

fn has_queue(connection: &mut Connection, ifindex: u32) -> Result<bool> {
    let everything = TcHandle { major: 0, minor: 0 };
    let ask = RouteNetlinkMessage::GetQueueDiscipline(message(ifindex, everything, everything)?);
    let rows = connection.dump("listing queues", ask)?;
    Ok(rows.iter().any(|row| match row {
        RouteNetlinkMessage::NewQueueDiscipline(message) => {
            u32::try_from(message.header.index) == Ok(ifindex)
                && message.header.handle.major == QUEUE
                && message.attributes.contains(&TcAttribute::Kind("htb".to_owned()))
        }
        _ => false,
    }))
}

fn message(ifindex: u32, parent: TcHandle, handle: TcHandle) -> Result<TcMessage> {
    let index = i32::try_from(ifindex);
    let index = index.map_err(|_| Error::Different(format!("there is no device {ifindex}")))?;
    let mut message = TcMessage::with_index(index);
    message.header.parent = parent;
    message.header.handle = handle;
    Ok(message)
}

/// `struct tc_htb_opt`: two `struct tc_ratespec`, the bursts as times, then quantum, level and priority.
fn class_options(rate: u64) -> Vec<u8> {
    let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    // More than this is more than the kernel's fields hold, and than any device here has.
    let rate = rate.clamp(1, u64::from(u32::MAX));
    let burst = (rate * BURST_MILLISECONDS / 1000).max(BURST_LEAST);
    let time = short(burst * 1_000_000_000 / rate / TICK);
    let mut bytes = Vec::new();
    for _ in 0..2 {
        bytes.extend([0, ETHERNET, 0, 0, 0, 0]);
        bytes.extend(64u16.to_ne_bytes());
        bytes.extend(short(rate).to_ne_bytes());
    }
    bytes.extend([time, time, short(BURST_LEAST), 0, 0].into_iter().flat_map(u32::to_ne_bytes));
    bytes
}

/// `struct tc_fifo_qopt`: so many bytes wait at most.
fn room_option(rate: u64) -> DefaultNla {
    let room = (rate / 1000 * WAITS_MILLISECONDS).max(ROOM_LEAST);
    let room = u32::try_from(room).unwrap_or(u32::MAX);
    DefaultNla::new(OPTIONS, room.to_ne_bytes().to_vec())
}

/// `TCA_OPTIONS`: those of `bfifo` are a struct, not attributes.
const OPTIONS: u16 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_as_long_as_the_kernel_wants_it() {
        assert_eq!(class_options(1_250_000).len(), 44);
        // 66,000 bytes at 1.25 million a second are 52.8 ms.
        assert_eq!(class_options(1_250_000)[24..28], 825_000u32.to_ne_bytes());
        assert_eq!(class_options(125)[24..28], u32::MAX.to_ne_bytes());
        assert_eq!(class_options(u64::from(u32::MAX) * 1000)[8..12], u32::MAX.to_ne_bytes());
    }
}
