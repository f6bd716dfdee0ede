//! The peers: their tunnels, by key, by number, and by the addresses that they have.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use boringtun::noise::Tunn;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;

use super::super::PrivateKey;
use crate::model::{EncryptionPeer, PeerState, PublicKey};

/// Of persistent keepalive: a peer that was added last begins the handshake, and a dead way is noticed.
const KEEPALIVE_SECONDS: u16 = 25;
/// The protocol keeps 24 bits for the number of a peer.
const NUMBER_MAX: u32 = 0x00ff_ffff;

/// Another node.
pub struct Peer {
    /// Its key.
    pub key: PublicKey,
    /// Where its packets go.
    pub endpoint: ArcSwap<SocketAddr>,
    /// Packets that could not be encrypted, decrypted or sent, or had a source that is not the peer's.
    pub errors: AtomicU64,
    tunnel: Mutex<Tunn>,
}

impl Peer {
    /// The state of the protocol; one packet at a time.
    pub fn tunnel(&self) -> MutexGuard<'_, Tunn> {
        // A state that a panic left is dropped with its process, which panics as a whole.
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more error.
    pub fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    fn state(&self) -> PeerState {
        let (since, sent, received, ..) = self.tunnel().stats();
        PeerState {
            public_key: self.key,
            endpoint: Some(**self.endpoint.load()),
            last_handshake_seconds: since.map(|since| since.as_secs()),
            received_bytes: received as u64,
            sent_bytes: sent as u64,
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}

/// Who has a prefix, of one length.
type ByPrefix = HashMap<u128, Arc<Peer>>;

/// All peers at one moment.
#[derive(Default)]
pub struct Table {
    by_key: HashMap<PublicKey, Arc<Peer>>,
    by_number: HashMap<u32, Arc<Peer>>,
    numbers: HashMap<PublicKey, u32>,
    /// By family and length of prefix, the longest first: who has the prefix.
    allowed: [Vec<(u8, ByPrefix)>; 2],
}

impl Table {
    /// The table of these peers, with the states of those that `self` has; and the peers that are new.
    pub fn with(
        &self,
        peers: &[EncryptionPeer],
        key: &PrivateKey,
        limiter: &Arc<RateLimiter>,
    ) -> (Self, Vec<Arc<Peer>>) {
        let mut next = Self::default();
        let mut new = Vec::new();
        let mut allowed: [BTreeMap<u8, HashMap<u128, Arc<Peer>>>; 2] = Default::default();
        for wanted in peers {
            let (peer, number) = match self.by_key.get(&wanted.public_key) {
                Some(peer) => {
                    peer.endpoint.store(Arc::new(wanted.endpoint));
                    (peer.clone(), self.numbers[&wanted.public_key])
                }
                None => {
                    let Some(number) = self.free_number(&next) else { continue };
                    let peer = Arc::new(make(wanted, number, key, limiter));
                    new.push(peer.clone());
                    (peer, number)
                }
            };
            for net in &wanted.allowed {
                let lengths = &mut allowed[family(net.addr())];
                let key = masked(net.network(), net.prefix_len());
                lengths.entry(net.prefix_len()).or_default().insert(key, peer.clone());
            }
            next.numbers.insert(wanted.public_key, number);
            next.by_number.insert(number, peer.clone());
            next.by_key.insert(wanted.public_key, peer);
        }
        next.allowed = allowed.map(|lengths| lengths.into_iter().rev().collect());
        (next, new)
    }

    fn free_number(&self, next: &Self) -> Option<u32> {
        // By chance: who replays what was for a peer that is gone finds nobody.
        let is_free =
            |number: &u32| !self.by_number.contains_key(number) && !next.by_number.contains_key(number);
        (0..1000).map(|_| fastrand::u32(0..=NUMBER_MAX)).find(is_free)
    }

    /// Who has an address.
    pub fn owner(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        let lengths = &self.allowed[family(address)];
        lengths.iter().find_map(|(length, owners)| owners.get(&masked(address, *length)))
    }

    /// Whose key it is.
    pub fn by_key(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.by_key.get(key)
    }

    /// The peer of a message that names its receiver's session.
    pub fn by_session(&self, session: u32) -> Option<&Arc<Peer>> {
        self.by_number.get(&(session >> 8))
    }

    /// Every peer.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_key.values()
    }

    /// How every peer is, by key.
    pub fn states(&self) -> Vec<PeerState> {
        let mut states: Vec<PeerState> = self.by_key.values().map(|peer| peer.state()).collect();
        states.sort_by_key(|state| state.public_key);
        states
    }
}

fn make(wanted: &EncryptionPeer, number: u32, key: &PrivateKey, limiter: &Arc<RateLimiter>) -> Peer {
    let public = x25519::PublicKey::from(wanted.public_key.0);
    let tunnel =
        Tunn::new(key.secret(), public, None, Some(KEEPALIVE_SECONDS), number, Some(limiter.clone()));
    Peer {
        key: wanted.public_key,
        endpoint: ArcSwap::from_pointee(wanted.endpoint),
        errors: AtomicU64::new(0),
        tunnel: Mutex::new(tunnel),
    }
}

fn family(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

/// The first `length` bits, the address's own width on the left.
fn masked(address: IpAddr, length: u8) -> u128 {
    let bits = match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    };
    if length == 0 { 0 } else { bits & (u128::MAX << (128 - u32::from(length))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_has_the_address() {
        let directory = tempfile::tempdir().expect("a directory");
        let key = PrivateKey::of(&directory.path().join("key")).expect("a key");
        let limiter = Arc::new(RateLimiter::new(&x25519::PublicKey::from(key.public().0), 10));
        let peer = |byte: u8, allowed: &[&str]| EncryptionPeer {
            node: format!("node{byte}"),
            public_key: PublicKey([byte; 32]),
            endpoint: "192.0.2.1:51871".parse().expect("it is well formed"),
            allowed: allowed.iter().map(|net| net.parse().expect("it is well formed")).collect(),
        };
        let peers =
            [peer(1, &["10.1.0.0/16", "fd00:1::/64", "192.0.2.1/32"]), peer(2, &["10.1.2.0/24", "::/0"])];
        let (table, new) = Table::default().with(&peers, &key, &limiter);
        assert_eq!(new.len(), 2);
        let owner =
            |text: &str| table.owner(text.parse().expect("it is well formed")).map(|peer| peer.key.0[0]);
        assert_eq!(owner("10.1.1.9"), Some(1));
        assert_eq!(owner("10.1.2.9"), Some(2));
        assert_eq!(owner("192.0.2.1"), Some(1));
        assert_eq!(owner("192.0.2.2"), None);
        assert_eq!(owner("fd00:1::9"), Some(1));
        assert_eq!(owner("fd00:2::9"), Some(2));
        let (again, new) = table.with(&peers[1..], &key, &limiter);
        assert!(new.is_empty(), "a peer that stays keeps its sessions");
        assert!(again.owner("10.1.1.9".parse().expect("it is well formed")).is_none());
        let session = again.numbers[&PublicKey([2; 32])] << 8 | 7;
        assert_eq!(again.by_session(session).map(|peer| peer.key), Some(PublicKey([2; 32])));
    }
}
