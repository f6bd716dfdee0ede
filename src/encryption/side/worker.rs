//! The packets' way: from the device, encrypted, to a peer; from a peer, decrypted, to the device.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519;

use super::super::PrivateKey;
use super::net::{Net, OVERHEAD_BYTES, PACKET_BYTES};
use super::peers::{Peer, Table};
use super::segment::{self, HEADER_BYTES, Merger};
use crate::model::{EncryptionPeer, PeerState, PublicKey};

/// Handshakes of a second that are answered without asking for a cookie first.
const HANDSHAKES_PER_SECOND: u64 = 1000;
/// The protocol's clocks are looked at this often.
const TICK: Duration = Duration::from_millis(100);
/// A peer that does not answer is called again after so many ticks.
const RECALL_TICKS: u64 = 20;

/// What the protocol adds to a packet.
const DATA_BYTES: usize = 32;
/// The kernel takes so many datagrams at once (UDP_MAX_SEGMENTS), and so many bytes.
const BATCH_DATAGRAMS: usize = 64;
const BATCH_BYTES: usize = 65_000;

/// Datagrams for one peer that are sent at once: all of one size, but for the last one.
#[derive(Default)]
struct Batch {
    peer: Option<Arc<Peer>>,
    bytes: Vec<u8>,
    used: usize,
    size: usize,
    /// The last one was shorter: no other can follow.
    is_full: bool,
}

impl Batch {
    fn takes(&self, peer: &Arc<Peer>, length: usize) -> bool {
        let Some(own) = &self.peer else { return true };
        Arc::ptr_eq(own, peer)
            && !self.is_full
            && length <= self.size
            && self.used + length <= BATCH_BYTES
            && self.used / self.size.max(1) < BATCH_DATAGRAMS
    }

    fn add(&mut self, peer: &Arc<Peer>, length: usize) {
        if self.peer.is_none() {
            (self.peer, self.size) = (Some(peer.clone()), length);
        }
        self.used += length;
        self.is_full = length < self.size;
    }
}

/// What the threads share.
pub struct Worker {
    net: Net,
    private_key: PrivateKey,
    secret: x25519::StaticSecret,
    public: x25519::PublicKey,
    limiter: Arc<RateLimiter>,
    table: ArcSwap<Table>,
    /// Whoever holds it may change the table.
    writing: Mutex<()>,
    without_peer: AtomicU64,
}

impl Worker {
    /// Begins to carry packets.
    pub fn start(key: &PrivateKey, descriptors: Vec<std::os::fd::OwnedFd>) -> Result<Arc<Self>> {
        let (secret, public) = (key.secret(), x25519::PublicKey::from(&key.secret()));
        let worker = Arc::new(Self {
            net: Net::new(descriptors)?,
            private_key: key.clone(),
            secret,
            public,
            limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND)),
            table: ArcSwap::default(),
            writing: Mutex::new(()),
            without_peer: AtomicU64::new(0),
        });
        for number in 0..worker.net.sockets().len() {
            let receiving = worker.clone();
            spawn("from peers", move || receiving.receive(number))?;
        }
        let reading = worker.clone();
        spawn("to peers", move || reading.read())?;
        let ticking = worker.clone();
        spawn("clocks", move || ticking.tick())?;
        Ok(worker)
    }

    /// Makes these all peers. New ones are called at once.
    pub fn set_peers(&self, peers: &[EncryptionPeer]) {
        let _one_writer = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (table, new) = self.table.load().with(peers, &self.private_key, &self.limiter);
        self.table.store(Arc::new(table));
        let mut buffer = vec![0; OVERHEAD_BYTES];
        for peer in new {
            self.call(&peer, &mut buffer);
        }
    }

    /// How the peers are.
    pub fn states(&self) -> Vec<PeerState> {
        self.table.load().states()
    }

    /// Packets to addresses that no peer has.
    pub fn without_peer(&self) -> u64 {
        self.without_peer.load(Ordering::Relaxed)
    }

    /// Begins a handshake.
    fn call(&self, peer: &Peer, buffer: &mut [u8]) {
        let mut tunnel = peer.tunnel();
        let result = tunnel.format_handshake_initiation(buffer, true);
        self.deliver(peer, &result);
    }

    /// From the device, until it is gone. What can be read at once is sent at once.
    fn read(&self) {
        let (mut packet, mut room) = (vec![0; PACKET_BYTES], vec![0; PACKET_BYTES]);
        let mut batch = Batch::default();
        loop {
            match self.net.read(&mut packet) {
                Ok(Some(length)) if length > HEADER_BYTES => {
                    let each = |packet: &[u8]| self.encrypt(packet, &mut batch);
                    if !segment::split(&mut packet[..length], &mut room, each) {
                        self.without_peer.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => {
                    self.send(&mut batch);
                    self.net.wait();
                }
                Err(error) => {
                    tracing::error!(%error, "the device cannot be read any more: ending");
                    std::process::exit(1);
                }
            }
        }
    }

    /// Adds a packet to what is sent next; sends before where it does not belong there.
    fn encrypt(&self, packet: &[u8], batch: &mut Batch) {
        let table = self.table.load();
        let Some(peer) = Tunn::dst_address(packet).and_then(|address| table.owner(address)) else {
            self.without_peer.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let length = packet.len() + DATA_BYTES;
        if !batch.takes(peer, length) {
            self.send(batch);
        }
        let start = batch.used;
        batch.bytes.resize((start + length + OVERHEAD_BYTES).max(batch.bytes.len()), 0);
        let mut tunnel = peer.tunnel();
        match tunnel.encapsulate(packet, &mut batch.bytes[start..]) {
            // Of this length are data alone, or all but: a handshake goes by itself.
            TunnResult::WriteToNetwork(datagram) if datagram.len() == length => {
                drop(tunnel);
                batch.add(peer, length);
            }
            other => self.deliver(peer, &other),
        }
    }

    fn send(&self, batch: &mut Batch) {
        let Some(peer) = batch.peer.take() else { return };
        let sent = self.net.send_all(&batch.bytes[..batch.used], batch.size, **peer.endpoint.load());
        if let Err(error) = sent {
            peer.count_error();
            tracing::debug!(%error, peer = %peer.key, "sending");
        }
        (batch.used, batch.size, batch.is_full) = (0, 0, false);
    }

    /// From the peers by one socket.
    fn receive(&self, number: usize) {
        let (mut datagrams, mut buffer) = (vec![0; PACKET_BYTES], vec![0; PACKET_BYTES + OVERHEAD_BYTES]);
        let mut merger = Merger::default();
        loop {
            match self.net.receive(number, &mut datagrams) {
                Ok((length, size, from)) => {
                    for datagram in datagrams[..length].chunks(size) {
                        self.decrypt(datagram, from, &mut buffer, &mut merger);
                    }
                    // The device has no room, or the packet is none: TCP sends it again.
                    let _ = merger.flush(&mut |header, packet| self.net.write(header, packet));
                }
                // An ICMP error for what was sent before: the peer is away.
                Err(error) => tracing::debug!(%error, "receiving"),
            }
        }
    }

    fn decrypt(&self, datagram: &[u8], from: SocketAddr, buffer: &mut [u8], merger: &mut Merger) {
        let mut cookie = [0; OVERHEAD_BYTES];
        let packet = match self.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                // Who does not get it asks again.
                let _ = self.net.send(cookie, from);
                return;
            }
            Err(_) => return,
        };
        let table = self.table.load();
        let Some(peer) = self.sender(&table, &packet) else { return };
        let is_data = matches!(packet, Packet::PacketData(_));
        let mut tunnel = peer.tunnel();
        let mut result = tunnel.decapsulate(Some(from.ip()), datagram, buffer);
        let has_session = is_data && !matches!(result, TunnResult::Err(_));
        let mut has_more = self.take(&table, peer, &result, merger) || has_session;
        // What waited for the session.
        while has_more {
            result = tunnel.decapsulate(None, &[], buffer);
            has_more = self.take(&table, peer, &result, merger);
        }
    }

    fn sender<'a>(&self, table: &'a Table, packet: &Packet<'_>) -> Option<&'a Arc<Peer>> {
        match packet {
            Packet::HandshakeInit(handshake) => {
                let half = parse_handshake_anon(&self.secret, &self.public, handshake).ok()?;
                table.by_key(&PublicKey(half.peer_static_public))
            }
            Packet::HandshakeResponse(packet) => table.by_session(packet.receiver_idx),
            Packet::PacketCookieReply(packet) => table.by_session(packet.receiver_idx),
            Packet::PacketData(packet) => table.by_session(packet.receiver_idx),
        }
    }

    /// Takes what came out of a datagram; true if something went to the peer and more may have to.
    fn take(&self, table: &Table, peer: &Arc<Peer>, result: &TunnResult<'_>, merger: &mut Merger) -> bool {
        let (packet, source) = match result {
            TunnResult::WriteToTunnelV4(packet, source) => (packet, (*source).into()),
            TunnResult::WriteToTunnelV6(packet, source) => (packet, (*source).into()),
            other => {
                self.deliver(peer, other);
                return matches!(other, TunnResult::WriteToNetwork(_));
            }
        };
        // Another peer's address, or nobody's.
        let is_own = table.owner(source).is_some_and(|owner| Arc::ptr_eq(owner, peer));
        let mut write = |header: &[u8; HEADER_BYTES], packet: &[u8]| self.net.write(header, packet);
        if !is_own || merger.push(packet, &mut write).is_err() {
            peer.count_error();
        }
        false
    }

    /// Sends to the peer what is to be sent.
    fn deliver(&self, peer: &Peer, result: &TunnResult<'_>) {
        match result {
            TunnResult::WriteToNetwork(datagram) => {
                if let Err(error) = self.net.send(datagram, **peer.endpoint.load()) {
                    peer.count_error();
                    tracing::debug!(%error, peer = %peer.key, "sending");
                }
            }
            TunnResult::Err(error) => {
                peer.count_error();
                tracing::debug!(?error, peer = %peer.key, "the protocol refuses");
            }
            _ => {}
        }
    }

    /// Looks at the protocol's clocks. A peer that has given up is called again and again: its node is in the
    /// cluster, so it comes back.
    fn tick(&self) {
        let mut buffer = vec![0; PACKET_BYTES];
        for tick in 0_u64.. {
            thread::sleep(TICK);
            self.limiter.reset_count();
            for peer in self.table.load().peers() {
                let mut tunnel = peer.tunnel();
                let result = tunnel.update_timers(&mut buffer);
                if !matches!(result, TunnResult::Err(WireGuardError::ConnectionExpired)) {
                    self.deliver(peer, &result);
                    continue;
                }
                if tick % RECALL_TICKS == 0 {
                    let result = tunnel.format_handshake_initiation(&mut buffer, true);
                    self.deliver(peer, &result);
                }
            }
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).with_context(|| format!("starting the thread \"{name}\""))
}
