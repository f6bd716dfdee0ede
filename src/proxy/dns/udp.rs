//! DNS over UDP: one socket hears every query, and each flow has a socket to its server.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::sockopt::{Ipv4OrigDstAddr, Ipv6OrigDstAddr, ReuseAddr};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};

use crate::model::Protocol;
use crate::model::l7::{DnsMessage, L7Message};
use crate::proxy::limits::{Payer, Share};
use crate::proxy::session::{Entry, Session, Shared};
use crate::proxy::upstream;

use super::{Asked, Pending, answered, ask};
use crate::model::l7::dns_message::MESSAGE_MAX;

/// A flow ends when nothing was asked for so long.
const IDLE: Duration = Duration::from_secs(10);
/// The most queries of a flow that wait to be judged.
const QUEUE: usize = 64;
/// Flows that have ended are forgotten when there are so many more.
const FORGET: usize = 1024;

type Flow = (SocketAddr, SocketAddr);

/// Serves a socket until `stopping` says so.
pub async fn serve(shared: Arc<Shared>, socket: UdpSocket, mut stopping: watch::Receiver<bool>) {
    let outcome = tokio::select! {
        outcome = hear(shared, socket) => outcome,
        _ = stopping.wait_for(|stops| *stops) => return,
    };
    if let Err(error) = outcome {
        tracing::error!("hearing DNS over UDP: {error}");
    }
}

async fn hear(shared: Arc<Shared>, socket: UdpSocket) -> io::Result<()> {
    let local = socket.local_addr()?;
    if local.is_ipv4() {
        setsockopt(&socket, Ipv4OrigDstAddr, &true)?;
    } else {
        setsockopt(&socket, Ipv6OrigDstAddr, &true)?;
    }
    // Sockets of clients that ask from this port must find room beside it.
    setsockopt(&socket, ReuseAddr, &true)?;
    let socket = Arc::new(socket);
    let mut flows: HashMap<Flow, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut forget_at = FORGET;
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        let received = socket.async_io(Interest::READABLE, || receive(&socket, &mut buffer)).await;
        let (length, client, server) = match received {
            Ok(received) => received,
            // An error that belongs to one packet only.
            Err(error) => {
                tracing::debug!("receiving a query: {error}");
                continue;
            }
        };
        let query = buffer[..length].to_vec();
        let Err(query) = hand_over(&flows, (client, server), query) else { continue };
        if let Some(sender) = begin(&shared, &socket, client, server) {
            // The channel is new and has room.
            let _ = sender.try_send(query);
            flows.insert((client, server), sender);
        }
        if flows.len() >= forget_at {
            flows.retain(|_, sender| !sender.is_closed());
            forget_at = flows.len() + FORGET;
        }
    }
}

/// Gives a query to the flow that runs; gives it back when none does. A flow whose queue is full loses it.
fn hand_over(
    flows: &HashMap<Flow, mpsc::Sender<Vec<u8>>>,
    flow: Flow,
    query: Vec<u8>,
) -> Result<(), Vec<u8>> {
    let Some(sender) = flows.get(&flow) else { return Err(query) };
    match sender.try_send(query) {
        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
        Err(mpsc::error::TrySendError::Closed(query)) => Err(query),
    }
}

/// Starts the task of a flow that somebody knows and pays for.
fn begin(
    shared: &Arc<Shared>,
    socket: &Arc<UdpSocket>,
    client: SocketAddr,
    server: SocketAddr,
) -> Option<mpsc::Sender<Vec<u8>>> {
    let Ok(session) = Session::new(shared, client, server, Protocol::Udp) else {
        tracing::debug!("nobody judges the queries of {client} to {server}");
        return None;
    };
    let payer = Payer::of(session.judges(), session.client.ip());
    let Some(share) = shared.shares.take(payer, &shared.limits) else {
        session.record(Entry::error(L7Message::Dns(DnsMessage::default()), "too many connections"));
        return None;
    };
    let (sender, queries) = mpsc::channel(QUEUE);
    let worker = Worker { session: Arc::new(session), socket: socket.clone(), pending: Pending::default() };
    tokio::spawn(worker.run(queries, share));
    Some(sender)
}

/// One flow.
struct Worker {
    session: Arc<Session>,
    socket: Arc<UdpSocket>,
    pending: Pending,
}

impl Worker {
    async fn run(mut self, mut queries: mpsc::Receiver<Vec<u8>>, share: Share) {
        let upstream = match upstream::datagrams(self.session.client, self.session.server).await {
            Ok(upstream) => upstream,
            Err(error) => {
                let message = L7Message::Dns(DnsMessage::default());
                self.session.record(Entry::error(message, format!("making a socket: {error}")));
                return;
            }
        };
        let mut deadline = Instant::now() + IDLE;
        let mut is_open = true;
        // What came until the channel was closed is still answered.
        while is_open || !(self.pending.is_empty() || Instant::now() >= deadline) {
            tokio::select! {
                query = queries.recv(), if is_open => match query {
                    Some(query) => {
                        deadline = Instant::now() + IDLE;
                        self.query(&upstream, &query).await;
                    }
                    None => is_open = false,
                },
                readable = upstream.readable() => if readable.is_ok() {
                    self.answer(&upstream);
                },
                () = tokio::time::sleep_until(deadline.into()) => queries.close(),
            }
        }
        drop(share);
    }

    async fn query(&mut self, upstream: &UdpSocket, query: &[u8]) {
        let Some(session) = self.fresh() else { return };
        match ask(&session, query) {
            Asked::Forward(question) => self.pending.push(question),
            Asked::Unread => {}
            Asked::Answer(answer) => return self.reply(&session, &answer),
            Asked::Drop => return,
        }
        if let Err(error) = upstream.send(query).await {
            tracing::debug!("sending a query to {}: {error}", session.server);
        }
    }

    /// The session, with judges that are not old.
    fn fresh(&mut self) -> Option<Arc<Session>> {
        // Answers that are on their way keep the judges of their questions.
        let mut session = Session::clone(&self.session);
        session.refresh().ok()?;
        self.session = Arc::new(session);
        Some(self.session.clone())
    }

    fn answer(&mut self, upstream: &UdpSocket) {
        let mut buffer = vec![0; MESSAGE_MAX];
        let Ok(length) = upstream.try_recv(&mut buffer) else { return };
        buffer.truncate(length);
        // It may wait for the agent's word, with many others.
        buffer.shrink_to_fit();
        let Some(answered) = answered(&self.session, &mut self.pending, &buffer) else { return };
        let (session, socket) = (self.session.clone(), self.socket.clone());
        // The next answer does not wait for the announcement of this one.
        tokio::spawn(async move {
            answered.announced(&session).await;
            send(&socket, &buffer, session.client, session.server);
        });
    }

    fn reply(&self, session: &Session, answer: &[u8]) {
        send(&self.socket, answer, session.client, session.server);
    }
}

/// Sends to the client in the server's name. What cannot be sent is lost, as datagrams are.
fn send(socket: &UdpSocket, bytes: &[u8], client: SocketAddr, server: SocketAddr) {
    let is_own_port = socket.local_addr().is_ok_and(|local| local.port() == server.port());
    let sent = if is_own_port {
        send_as(socket, bytes, client, server.ip())
    } else {
        send_beside(bytes, client, server)
    };
    if let Err(error) = sent {
        tracing::debug!("answering a query of {client}: {error}");
    }
}

fn send_as(socket: &UdpSocket, bytes: &[u8], client: SocketAddr, server: IpAddr) -> io::Result<()> {
    let parts = [IoSlice::new(bytes)];
    let client = SockaddrStorage::from(client);
    let send = |control: ControlMessage<'_>| {
        sendmsg(socket.as_raw_fd(), &parts, &[control], MsgFlags::MSG_DONTWAIT, Some(&client))
    };
    match server {
        IpAddr::V4(ip) => send(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr { s_addr: u32::from(ip).to_be() },
            ipi_addr: libc::in_addr { s_addr: 0 },
        })),
        IpAddr::V6(ip) => send(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
            ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
            ipi6_ifindex: 0,
        })),
    }?;
    Ok(())
}

/// By a socket of the server's address and port, which lives for this datagram only.
fn send_beside(bytes: &[u8], client: SocketAddr, server: SocketAddr) -> io::Result<()> {
    let socket = upstream::bound_datagrams(server)?;
    socket.send_to(bytes, &client.into())?;
    Ok(())
}

/// The next query: its length, and between whom it is.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, SocketAddr)> {
    let mut room = nix::cmsg_space!(libc::sockaddr_in6, libc::sockaddr_in);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_DONTWAIT)?;
    let client = message.address.as_ref().and_then(address).ok_or(io::ErrorKind::InvalidData)?;
    let server = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => Some(SocketAddr::V4(SocketAddrV4::new(
            u32::from_be(to.sin_addr.s_addr).into(),
            u16::from_be(to.sin_port),
        ))),
        ControlMessageOwned::Ipv6OrigDstAddr(to) => Some(SocketAddr::V6(SocketAddrV6::new(
            to.sin6_addr.s6_addr.into(),
            u16::from_be(to.sin6_port),
            0,
            0,
        ))),
        _ => None,
    });
    Ok((message.bytes, client, server.ok_or(io::ErrorKind::InvalidData)?))
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into())
}
