//! One rtnetlink socket: requests in batches, every one acknowledged; dumps.

use std::borrow::Cow;
use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::{Error, Result};

/// Datagrams of the kernel's dumps are at most this long.
const RECEIVE_BYTES: usize = 64 * 1024;
/// So many requests in one datagram that their answers fit any receive buffer.
const BATCH: usize = 64;
const LENGTH_BYTES: usize = 16;

/// A socket bound to the network namespace of the thread that opened it.
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// A message and what to make of the kernel's answer.
pub(super) struct Request {
    action: Cow<'static, str>,
    message: RouteNetlinkMessage,
    flags: u16,
    tolerated: &'static [i32],
}

impl Request {
    /// A request that changes or deletes; `action` says what it does, in the gerund.
    pub(super) fn new(action: impl Into<Cow<'static, str>>, message: RouteNetlinkMessage) -> Self {
        Self { action: action.into(), message, flags: NLM_F_REQUEST | NLM_F_ACK, tolerated: &[] }
    }

    /// Makes something new, which must not exist yet.
    pub(super) fn create(mut self) -> Self {
        self.flags |= NLM_F_CREATE | NLM_F_EXCL;
        self
    }

    /// Makes it, or makes it so.
    pub(super) fn replace(mut self) -> Self {
        self.flags |= NLM_F_CREATE | NLM_F_REPLACE;
        self
    }

    /// These error numbers are no errors.
    pub(super) fn tolerate(mut self, numbers: &'static [i32]) -> Self {
        self.tolerated = numbers;
        self
    }
}

impl Connection {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_cap_ack(true)?;
            io::Result::Ok(socket)
        };
        let socket = open().map_err(|source| Error::kernel("opening an rtnetlink socket", source))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Sends the requests in order and reads every answer; the first error that is not tolerated wins.
    pub(super) fn execute(&mut self, requests: Vec<Request>) -> Result<()> {
        let actions: Vec<_> = requests.iter().map(|request| request.action.clone()).collect();
        let outcomes = self.execute_each(requests)?;
        let mut failed = actions.into_iter().zip(outcomes);
        let first = failed.find_map(|(action, outcome)| Some(Error::kernel(action, outcome.err()?)));
        first.map_or(Ok(()), Err)
    }

    /// Sends the requests in order; the kernel's answer to each, in that order.
    pub(super) fn execute_each(&mut self, requests: Vec<Request>) -> Result<Vec<io::Result<()>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            outcomes.extend(self.execute_batch(requests.by_ref().take(BATCH).collect())?);
        }
        Ok(outcomes)
    }

    fn execute_batch(&mut self, requests: Vec<Request>) -> Result<Vec<io::Result<()>>> {
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::new();
        let mut expected = Vec::with_capacity(requests.len());
        for request in requests {
            self.append(&mut datagram, request.message, request.flags);
            expected.push(request.tolerated);
        }
        self.send(&datagram)?;
        let mut outcomes: Vec<io::Result<()>> = expected.iter().map(|_| Ok(())).collect();
        let mut missing = expected.len();
        while missing > 0 {
            self.receive(|header, payload| {
                let index = header.sequence_number.wrapping_sub(first) as usize;
                let Some((tolerated, outcome)) = expected.get(index).zip(outcomes.get_mut(index)) else {
                    return false;
                };
                if let NetlinkPayload::Error(error) = payload {
                    missing -= 1;
                    let number = -error.raw_code();
                    if number != 0 && !tolerated.contains(&number) {
                        *outcome = Err(io::Error::from_raw_os_error(number));
                    }
                }
                missing == 0
            })?;
        }
        Ok(outcomes)
    }

    /// Asks for one object; `None` when the kernel has none such.
    pub(super) fn get(
        &mut self,
        action: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>> {
        let mut datagram = Vec::new();
        // The acknowledgement ends it, also where the answer is not understood.
        let sequence = self.append(&mut datagram, message, NLM_F_REQUEST | NLM_F_ACK);
        self.send(&datagram)?;
        let mut answer = None;
        let mut outcome = Ok(());
        self.receive_until(|header, payload| {
            if header.sequence_number != sequence {
                return false;
            }
            match payload {
                NetlinkPayload::InnerMessage(message) => answer = Some(message),
                NetlinkPayload::Error(error) => {
                    match -error.raw_code() {
                        0 | libc::ENODEV | libc::ENOENT | libc::ESRCH => {}
                        number => {
                            outcome = Err(Error::kernel(action, io::Error::from_raw_os_error(number)));
                        }
                    }
                    return true;
                }
                _ => {}
            }
            false
        })?;
        outcome.map(|()| answer)
    }

    /// Everything of a kind. What this crate version cannot parse is left out: it is not ours.
    pub(super) fn dump(
        &mut self,
        action: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        let mut datagram = Vec::new();
        let sequence = self.append(&mut datagram, message, NLM_F_REQUEST | NLM_F_DUMP);
        self.send(&datagram)?;
        let mut rows = Vec::new();
        let mut outcome = Ok(());
        self.receive_until(|header, payload| {
            if header.sequence_number != sequence {
                return false;
            }
            match payload {
                NetlinkPayload::InnerMessage(message) => rows.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    outcome = Err(Error::kernel(action, error.to_io()));
                    return true;
                }
                NetlinkPayload::Done(_) => return true,
                _ => {}
            }
            false
        })?;
        outcome.map(|()| rows)
    }

    /// Lets the kernel apply the header fields of dump requests as filters.
    pub(super) fn filter_dumps(&self) {
        // Kernels before 4.20 lack it and give everything, which the callers sift anyway.
        let _ = self.socket.set_netlink_get_strict_chk(true);
    }

    fn append(&mut self, datagram: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = datagram.len();
        datagram.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut datagram[start..]);
        self.sequence
    }

    fn send(&self, datagram: &[u8]) -> Result<()> {
        self.socket.send(datagram, 0).map_err(|source| Error::kernel("sending to rtnetlink", source))?;
        Ok(())
    }

    fn receive_until(
        &mut self,
        mut until: impl FnMut(NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>) -> bool,
    ) -> Result<()> {
        while !self.receive(&mut until)? {}
        Ok(())
    }

    /// Reads one datagram; true when `until` said so for one of its messages.
    fn receive(
        &mut self,
        mut until: impl FnMut(NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>) -> bool,
    ) -> Result<bool> {
        self.buffer.clear();
        loop {
            match self.socket.recv(&mut self.buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::kernel("receiving from rtnetlink", error)),
                Ok(_) => break,
            }
        }
        let mut rest = self.buffer.as_slice();
        while rest.len() >= LENGTH_BYTES {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            if length < LENGTH_BYTES || length > rest.len() {
                break;
            }
            if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]) {
                let (header, payload) = message.into_parts();
                if until(header, payload) {
                    return Ok(true);
                }
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
        Ok(false)
    }
}
