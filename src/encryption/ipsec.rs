//! IPsec between nodes: the states and policies of an xfrm interface, from the nodes' keys.
//!
//! There is no shared secret. The two keys of a pair of nodes come from the Diffie-Hellman secret of their
//! published keys of one generation, so each pair, generation and direction has its own.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use sha2::{Digest, Sha256};

use super::ring::KeyRing;
use super::sent::Sent;
use super::{PrivateKey, lock};
use crate::model::{EncryptingNode, PeerState, PublicKey};
use crate::netlink::{self, XFRM_KEY_BYTES, Xfrm, XfrmCounts, XfrmPolicy, XfrmState, XfrmWay};

/// The device's name.
pub const IPSEC_DEVICE: &str = "weir_ipsec";
/// The device's number, by which its states and policies are known from others: "weir".
pub const IPSEC_NUMBER: u32 = 0x7765_6972;

/// The device.
#[derive(Debug)]
pub struct Ipsec {
    mtu: u32,
    ifindex: u32,
    /// This node's addresses between the nodes.
    own: Vec<IpAddr>,
    memory: Mutex<Memory>,
}

/// What is known from one call to the next.
#[derive(Debug)]
struct Memory {
    sent: Sent,
    /// Keys of others, and whether they hide anything.
    hides: BTreeMap<PublicKey, bool>,
    /// Nodes that nothing goes to, and why.
    problems: Vec<String>,
}

/// A state that is wanted, and whose keys it comes from.
struct Wanted<'a> {
    generation: u32,
    own: &'a PrivateKey,
    own_public: PublicKey,
    peer: PublicKey,
    sends: bool,
}

impl Ipsec {
    /// Makes the device, or finds it; an error says what the kernel lacks. `sent`: what this node has sent by.
    pub fn prepare(mtu: u32, own: Vec<IpAddr>, sent: Sent) -> Result<Self> {
        let made = netlink::ensure_xfrm_device(IPSEC_DEVICE, mtu, IPSEC_NUMBER)
            .context("making the IPsec device")?;
        let Some(ifindex) = made else {
            bail!("WEIR_ENCRYPTION=ipsec, and this kernel has no IPsec devices (module xfrm_interface)")
        };
        for (is_ipv4, nobody, module) in [(true, "192.0.2.1", "esp4"), (false, "2001:db8::1", "esp6")] {
            if own.iter().any(|address| address.is_ipv4() == is_ipv4) {
                try_state(nobody.parse()?).with_context(|| {
                    format!("WEIR_ENCRYPTION=ipsec, and this kernel has no ESP with AES-GCM (modules {module} and gcm)")
                })?;
            }
        }
        let memory = Memory { sent, hides: BTreeMap::new(), problems: Vec::new() };
        Ok(Self { mtu, ifindex, own, memory: Mutex::new(memory) })
    }

    /// The device's index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// The nodes that nothing goes to, and why.
    pub fn problems(&self) -> Vec<String> {
        lock(&self.memory).problems.clone()
    }

    fn own_for(&self, peer: IpAddr) -> Option<IpAddr> {
        self.own.iter().copied().find(|own| own.is_ipv4() == peer.is_ipv4())
    }

    /// The nodes that can be spoken to. Of two nodes with one number the first by name is one: what is wrong with a
    /// node costs that node alone.
    fn usable<'a>(
        &self,
        memory: &mut Memory,
        ring: &KeyRing,
        nodes: &'a [EncryptingNode],
    ) -> Vec<&'a EncryptingNode> {
        let mut sorted: Vec<&EncryptingNode> = nodes.iter().collect();
        sorted.sort_by(|one, other| one.name.cmp(&other.name));
        let own = ring.key(ring.generations().active);
        let mut numbers = BTreeMap::from_iter(self.own.iter().map(|own| (spi(*own, 0), "this node")));
        let mut problems = Vec::new();
        let mut is_usable = |node: &&'a EncryptingNode| {
            let mut hides = |key: &PublicKey| {
                *memory
                    .hides
                    .entry(*key)
                    .or_insert_with(|| own.is_some_and(|own| own.shared_with(key).is_some()))
            };
            let mut keys = std::iter::once(&node.key.active).chain(&node.key.other);
            if !keys.all(|key| hides(&key.public_key)) {
                problems.push(format!("node {}: its key hides nothing: nothing goes to its pods", node.name));
                return false;
            }
            match numbers.entry(spi(node.address, 0)) {
                Entry::Vacant(free) => {
                    free.insert(node.name.as_str());
                    true
                }
                Entry::Occupied(other) => {
                    problems.push(format!(
                        "node {}: its address {} has the number of {} for IPsec: nothing goes to its pods",
                        node.name,
                        node.address,
                        other.get()
                    ));
                    false
                }
            }
        };
        sorted.retain(|node| is_usable(node));
        let is_there = |key: &PublicKey| {
            let has = |node: &EncryptingNode| {
                node.key.active.public_key == *key || node.key.other.is_some_and(|it| it.public_key == *key)
            };
            nodes.iter().any(has)
        };
        if memory.hides.len() > 4 * (nodes.len() + 1) {
            memory.hides.retain(|key, _| is_there(key));
        }
        memory.problems = problems;
        sorted
    }

    /// Makes states and policies these of the nodes: what receives first, what is not wanted any more last. True:
    /// the node has a new key, which is to be published.
    pub fn sync(&self, ring: &mut KeyRing, nodes: &[EncryptingNode]) -> Result<bool> {
        netlink::put_xfrm_ways(IPSEC_DEVICE, self.ifindex)?;
        let memory = &mut *lock(&self.memory);
        let nodes = self.usable(memory, ring, nodes);
        let mut xfrm = Xfrm::open(IPSEC_NUMBER)?;
        let there: BTreeMap<_, XfrmState> =
            xfrm.states()?.into_iter().map(|(state, _)| (number(&state), state)).collect();
        let is_new = self.renew_used(memory, ring, &nodes, &there)?;
        let states = self.states(ring, &nodes);
        add_states(&mut xfrm, &mut memory.sent, &states, &there)?;
        let policies = self.policies(ring, &nodes);
        let known: BTreeSet<XfrmPolicy> = xfrm.policies()?.0.into_iter().collect();
        for policy in policies.difference(&known) {
            xfrm.put_policy(policy)?;
        }
        let wanted: BTreeSet<_> = policies.iter().map(|policy| (policy.way, policy.net)).collect();
        for policy in known.iter().filter(|policy| !wanted.contains(&(policy.way, policy.net))) {
            xfrm.delete_policy(policy)?;
        }
        let wanted: BTreeSet<_> = states.keys().map(number).collect();
        for (_, state) in there.iter().filter(|(number, _)| !wanted.contains(number)) {
            xfrm.delete_state(state)?;
        }
        Ok(is_new)
    }

    /// A state that has sent once and is gone would begin anew with its first number, under the same key: the node
    /// makes another key. True: it did.
    fn renew_used(
        &self,
        memory: &mut Memory,
        ring: &mut KeyRing,
        nodes: &[&EncryptingNode],
        there: &BTreeMap<(IpAddr, u32), XfrmState>,
    ) -> Result<bool> {
        let states = self.states(ring, nodes);
        let is_used = |(state, wanted): &(&XfrmState, &Wanted<'_>)| {
            wanted.sends
                && there.get(&number(state)) != Some(state)
                && memory.sent.has(&wanted.own_public, state.reqid)
        };
        let used: BTreeSet<u32> =
            states.iter().filter(is_used).map(|(_, wanted)| wanted.generation).collect();
        for generation in &used {
            tracing::warn!(
                generation,
                "IPsec states were gone that have sent: the node makes a new key, and other nodes reach it \
                 when they know that key"
            );
            ring.renew(*generation)?;
        }
        Ok(!used.is_empty())
    }

    fn states<'a>(&self, ring: &'a KeyRing, nodes: &[&EncryptingNode]) -> BTreeMap<XfrmState, Wanted<'a>> {
        let mut states = BTreeMap::new();
        let generations = ring.generations();
        for generation in std::iter::once(generations.active).chain(generations.other) {
            let Some(own) = ring.key(generation) else { continue };
            let own_public = own.public();
            for node in nodes {
                let Some(own_address) = self.own_for(node.address) else { continue };
                let Some(key) = node.key.at(generation) else { continue };
                let (peer, reqid) = (key.public_key, reqid(&own_public, &key.public_key));
                for sends in [true, false] {
                    let (source, destination) =
                        if sends { (own_address, node.address) } else { (node.address, own_address) };
                    let spi = spi(source, generation);
                    let wanted = Wanted { generation, own, own_public, peer, sends };
                    states.insert(XfrmState { source, destination, spi, reqid }, wanted);
                }
            }
        }
        states
    }

    /// What has been decrypted may come in; what is for a node leaves by the newest key that it shares.
    fn policies(&self, ring: &KeyRing, nodes: &[&EncryptingNode]) -> BTreeSet<XfrmPolicy> {
        let everything = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        // Of the family that the nodes speak: others' addresses are none of a tunnel's.
        let outer = if self.own.iter().any(IpAddr::is_ipv4) { everything[0] } else { everything[1] };
        let of = |way| everything.map(|any| (way, IpNet::new_assert(any, 0)));
        let both = [of(XfrmWay::In), of(XfrmWay::Forward)];
        let mut policies: BTreeSet<XfrmPolicy> = both
            .into_iter()
            .flatten()
            .map(|(way, net)| XfrmPolicy { way, net, tunnel: (outer, outer), reqid: 0 })
            .collect();
        let generations = ring.generations();
        let public = |generation: u32| Some((generation, ring.key(generation)?.public()));
        let held: Vec<(u32, PublicKey)> =
            std::iter::once(generations.active).chain(generations.other).filter_map(public).collect();
        // Of two nodes with one net the first one has it.
        let mut taken = BTreeSet::new();
        for node in nodes {
            let Some(own_address) = self.own_for(node.address) else { continue };
            let shared = |(generation, own): &(u32, PublicKey)| {
                Some(reqid(own, &node.key.at(*generation)?.public_key))
            };
            let Some(reqid) = held.iter().find_map(shared) else { continue };
            let tunnel = (own_address, node.address);
            let nets = node.allowed.iter().filter(|net| taken.insert(**net));
            policies.extend(nets.map(|net| XfrmPolicy { way: XfrmWay::Out, net: *net, tunnel, reqid }));
        }
        policies
    }

    /// How the peers are.
    pub fn peers(&self, ring: &KeyRing, nodes: &[EncryptingNode]) -> Result<Vec<PeerState>> {
        let (mut to, mut from) = (BTreeMap::new(), BTreeMap::new());
        for (state, counts) in Xfrm::open(IPSEC_NUMBER)?.states()? {
            for (sums, end) in [(&mut to, state.destination), (&mut from, state.source)] {
                let sum: &mut XfrmCounts = sums.entry(end).or_default();
                sum.bytes += counts.bytes;
                sum.errors += counts.errors;
            }
        }
        let of = |sums: &BTreeMap<IpAddr, XfrmCounts>, node: &EncryptingNode| {
            sums.get(&node.address).copied().unwrap_or_default()
        };
        let peer = |node: &EncryptingNode| {
            let (_, public_key) = shared_key(ring, node)?;
            let (sent, received) = (of(&to, node), of(&from, node));
            Some(PeerState {
                public_key,
                endpoint: Some((node.address, 0).into()),
                last_handshake_seconds: None,
                received_bytes: received.bytes,
                sent_bytes: sent.bytes,
                errors: sent.errors + received.errors,
            })
        };
        Ok(nodes.iter().filter_map(peer).collect())
    }

    /// What is wrong with the device.
    pub fn look(&self) -> Result<Option<String>> {
        let there = netlink::link(IPSEC_DEVICE)?.filter(|link| link.index == self.ifindex);
        Ok(match there {
            None => Some(format!("device {IPSEC_DEVICE} is gone")),
            Some(link) if !link.is_up => Some(format!("device {IPSEC_DEVICE} is down")),
            Some(link) if link.mtu != self.mtu => {
                Some(format!("device {IPSEC_DEVICE} has MTU {}, and not {}", link.mtu, self.mtu))
            }
            Some(_) => None,
        })
    }

    /// Whether states or policies are missing that the keys want; `sync` brings them back.
    pub fn is_whole(&self, ring: &KeyRing, nodes: &[EncryptingNode]) -> Result<bool> {
        let mut xfrm = Xfrm::open(IPSEC_NUMBER)?;
        let there: BTreeSet<XfrmState> = xfrm.states()?.into_iter().map(|(state, _)| state).collect();
        let known: BTreeSet<XfrmPolicy> = xfrm.policies()?.0.into_iter().collect();
        let nodes = self.usable(&mut lock(&self.memory), ring, nodes);
        let has_states = self.states(ring, &nodes).keys().all(|state| there.contains(state));
        Ok(has_states && self.policies(ring, &nodes).is_subset(&known))
    }

    /// Makes the device as it was. False: it has another index now.
    pub fn mend(&self) -> Result<bool> {
        Ok(netlink::ensure_xfrm_device(IPSEC_DEVICE, self.mtu, IPSEC_NUMBER)? == Some(self.ifindex))
    }
}

/// Removes policies, states, the IPv6 rule and the device; false if there was no device.
pub fn remove_ipsec() -> Result<bool> {
    // A kernel without IPsec has none of them.
    if let Some(mut xfrm) = Xfrm::open_if_there(IPSEC_NUMBER)? {
        for policy in xfrm.policies()?.0 {
            xfrm.delete_policy(&policy)?;
        }
        for (state, _) in xfrm.states()? {
            xfrm.delete_state(&state)?;
        }
    }
    netlink::remove_xfrm_ways(IPSEC_DEVICE)?;
    netlink::delete_link(IPSEC_DEVICE).context("removing the IPsec device")
}

/// Adds what is not there. What sends is noted first: it is never added a second time.
fn add_states(
    xfrm: &mut Xfrm,
    sent: &mut Sent,
    states: &BTreeMap<XfrmState, Wanted<'_>>,
    there: &BTreeMap<(IpAddr, u32), XfrmState>,
) -> Result<()> {
    let missing = || states.iter().filter(|(state, _)| there.get(&number(state)) != Some(state));
    let own: Vec<PublicKey> = states.values().map(|wanted| wanted.own_public).collect();
    let sending = missing().filter(|(_, wanted)| wanted.sends);
    sent.note(&own, sending.map(|(state, wanted)| (wanted.own_public, state.reqid)))?;
    for (state, wanted) in missing() {
        let key = wanted.key()?;
        // Of the same number with other keys: a node that has come anew.
        if let Some(former) = there.get(&number(state)) {
            xfrm.delete_state(former)?;
        }
        if let Err(error) = xfrm.add_state(state, &key) {
            if wanted.sends {
                sent.forget(&wanted.own_public, state.reqid)?;
            }
            return Err(error.into());
        }
    }
    Ok(())
}

/// The key by which a node is spoken to: of the active generation if it has one, else of the other one.
fn shared_key<'a>(ring: &'a KeyRing, node: &EncryptingNode) -> Option<(&'a PrivateKey, PublicKey)> {
    let generations = ring.generations();
    let mut held = std::iter::once(generations.active).chain(generations.other);
    held.find_map(|generation| Some((ring.key(generation)?, node.key.at(generation)?.public_key)))
}

/// Whether the kernel can: a state between nobody and nobody, for a moment.
fn try_state(nobody: IpAddr) -> Result<()> {
    let state = XfrmState { source: nobody, destination: nobody, spi: u32::MAX, reqid: 1 };
    let mut key = [0; XFRM_KEY_BYTES];
    fastrand::Rng::new().fill(&mut key);
    let mut xfrm = Xfrm::open(IPSEC_NUMBER)?;
    xfrm.add_state(&state, &key)?;
    Ok(xfrm.delete_state(&state)?)
}

/// What the kernel knows a state by.
fn number(state: &XfrmState) -> (IpAddr, u32) {
    (state.destination, state.spi)
}

/// The number of what a node sends with a generation: its address and the generation, so that a receiver has no
/// number twice.
fn spi(sender: IpAddr, generation: u32) -> u32 {
    let low = match sender {
        IpAddr::V4(address) => u32::from(address),
        IpAddr::V6(address) => first_word(&Sha256::digest(address.octets())),
    };
    0x8000_0000 | (generation & 7) << 28 | low & 0x0fff_ffff
}

/// What stands for the keys of both ends: a state with another number has other keys.
fn reqid(own: &PublicKey, peer: &PublicKey) -> u32 {
    let (low, high) = if own < peer { (own, peer) } else { (peer, own) };
    first_word(&Sha256::new().chain_update(low.0).chain_update(high.0).finalize()).max(1)
}

fn first_word(digest: &[u8]) -> u32 {
    digest.iter().take(4).fold(0, |word, byte| word << 8 | u32::from(*byte))
}

/// Stands for a key. A set of keys is stood for by all of them with exclusive or, in any order.
pub fn digest_of(key: &PublicKey) -> u64 {
    Sha256::digest(key.0).iter().take(8).fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
}

impl Wanted<'_> {
    /// The key of AES and the salt.
    fn key(&self) -> Result<[u8; XFRM_KEY_BYTES]> {
        let own = &self.own_public;
        let (sender, receiver) = if self.sends { (own, &self.peer) } else { (&self.peer, own) };
        let secret = self.own.shared_with(&self.peer).context("a node's key is none that hides anything")?;
        derive(&secret, sender, receiver)
    }
}

/// Of the bytes that a state wants.
struct KeyBytes;

impl KeyType for KeyBytes {
    fn len(&self) -> usize {
        XFRM_KEY_BYTES
    }
}

fn derive(secret: &[u8; 32], sender: &PublicKey, receiver: &PublicKey) -> Result<[u8; XFRM_KEY_BYTES]> {
    let mut key = [0; XFRM_KEY_BYTES];
    let salt = Salt::new(HKDF_SHA256, b"weir ipsec 1");
    let filled =
        salt.extract(secret).expand(&[&sender.0, &receiver.0], KeyBytes).and_then(|it| it.fill(&mut key));
    match filled {
        Ok(()) => Ok(key),
        Err(error) => bail!("deriving an IPsec key: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encryption::ring::Use;
    use crate::model::{KeyAt, KeyProtocol, NodeKey};

    #[test]
    fn both_ends_have_the_same_keys_and_each_direction_another() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let [a, b] = ["a", "b"].map(|name| PrivateKey::of(&directory.path().join(name)));
        let (a, b) = (a?, b?);
        let wanted = |own: &PrivateKey, peer: PublicKey, sends| {
            Wanted { generation: 0, own, own_public: own.public(), peer, sends }.key()
        };
        let key = |own: &PrivateKey, peer: &PrivateKey, sends| wanted(own, peer.public(), sends);
        assert_eq!(key(&a, &b, true)?, key(&b, &a, false)?);
        assert_ne!(key(&a, &b, true)?, key(&a, &b, false)?);
        assert!(wanted(&a, PublicKey([0; 32]), true).is_err());
        assert_eq!(reqid(&a.public(), &b.public()), reqid(&b.public(), &a.public()));
        Ok(())
    }

    #[test]
    fn senders_and_generations_have_numbers_of_their_own() {
        let address = |text: &str| text.parse::<IpAddr>().expect("it is well formed");
        let one = spi(address("10.0.0.1"), 1);
        assert!(one > 255 && one != spi(address("10.0.0.1"), 2) && one != spi(address("10.0.0.2"), 1));
        assert_ne!(spi(address("fd00::1"), 1), spi(address("fd00::2"), 1));
    }

    fn node(name: &str, address: &str, key: PublicKey) -> Result<EncryptingNode> {
        let active = KeyAt { public_key: key, port: 0, generation: 0, receives: None };
        let key = NodeKey { protocol: KeyProtocol::Ipsec, active, other: None };
        let allowed = vec!["10.1.0.0/24".parse()?];
        Ok(EncryptingNode { name: name.to_owned(), address: address.parse()?, key, allowed })
    }

    #[test]
    fn what_is_wrong_with_a_node_costs_that_node_alone() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let ring = KeyRing::open(directory.path(), Use::Ipsec)?;
        let key = |name: &str| PrivateKey::of(&directory.path().join(name)).map(|key| key.public());
        let nodes = [
            node("d", "10.0.0.2", key("d")?)?,
            node("b", "10.0.0.2", key("b")?)?,
            node("c", "10.0.0.3", PublicKey([0; 32]))?,
            node("a", "10.0.0.4", key("a")?)?,
            node("e", "10.0.0.1", key("e")?)?,
        ];
        let (sent, _) = Sent::open(directory.path())?;
        let memory = Mutex::new(Memory { sent, hides: BTreeMap::new(), problems: Vec::new() });
        let ipsec = Ipsec { mtu: 1440, ifindex: 1, own: vec!["10.0.0.1".parse()?], memory };
        let usable = ipsec.usable(&mut lock(&ipsec.memory), &ring, &nodes);
        assert_eq!(usable.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let problems = ipsec.problems();
        assert!(["c", "d", "e"].iter().all(|name| {
            problems.iter().filter(|problem| problem.starts_with(&format!("node {name}: "))).count() == 1
        }));
        assert_eq!(ipsec.states(&ring, &usable).len(), 4);
        // Both want the same net.
        let out = |policy: &&XfrmPolicy| policy.way == XfrmWay::Out;
        assert_eq!(ipsec.policies(&ring, &usable).iter().filter(out).count(), 1);
        Ok(())
    }

    #[test]
    fn a_key_whose_state_was_lost_is_made_anew() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let mut ring = KeyRing::open(directory.path(), Use::Ipsec)?;
        let peer = node("a", "10.0.0.2", PrivateKey::of(&directory.path().join("a"))?.public())?;
        let (sent, _) = Sent::open(directory.path())?;
        let memory = Mutex::new(Memory { sent, hides: BTreeMap::new(), problems: Vec::new() });
        let ipsec = Ipsec { mtu: 1440, ifindex: 1, own: vec!["10.0.0.1".parse()?], memory };
        let memory = &mut *lock(&ipsec.memory);
        let nobody = BTreeMap::new();
        // Never sent: the key stays.
        assert!(!ipsec.renew_used(memory, &mut ring, &[&peer], &nobody)?);
        let first = ring.key(0).context("it has a key")?.public();
        let states = ipsec.states(&ring, &[&peer]);
        let pairs = states.iter().filter(|(_, it)| it.sends).map(|(state, _)| (first, state.reqid));
        memory.sent.note(&[first], pairs)?;
        let there = states.keys().map(|state| (number(state), *state)).collect();
        assert!(!ipsec.renew_used(memory, &mut ring, &[&peer], &there)?);
        // Sent, and gone: never again by this key, also after a restart.
        assert!(ipsec.renew_used(memory, &mut ring, &[&peer], &nobody)?);
        let second = ring.key(0).context("it has a key")?.public();
        assert_ne!(first, second);
        assert_eq!(KeyRing::open(directory.path(), Use::Ipsec)?.key(0).map(PrivateKey::public), Some(second));
        assert!(!ipsec.renew_used(memory, &mut ring, &[&peer], &nobody)?);
        Ok(())
    }
}
