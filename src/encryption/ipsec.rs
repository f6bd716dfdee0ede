//! IPsec between nodes: the states and policies of an xfrm interface, from the nodes' keys.
//!
//! There is no shared secret. The two keys of a pair of nodes come from the Diffie-Hellman secret of their
//! published keys of one generation, so each pair, generation and direction has its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use sha2::{Digest, Sha256};

use super::PrivateKey;
use super::ring::KeyRing;
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
}

/// A state that is wanted, and whose keys it comes from.
struct Wanted<'a> {
    own: &'a PrivateKey,
    peer: PublicKey,
    sends: bool,
}

impl Ipsec {
    /// Makes the device, or finds it; an error says what the kernel lacks.
    pub fn prepare(mtu: u32, own: Vec<IpAddr>) -> Result<Self> {
        let made = netlink::ensure_xfrm_device(IPSEC_DEVICE, mtu, IPSEC_NUMBER)
            .context("making the IPsec device")?;
        let Some(ifindex) = made else {
            bail!("WEIR_ENCRYPTION=ipsec, and this kernel has no IPsec devices (module xfrm_interface)")
        };
        try_state().context(
            "WEIR_ENCRYPTION=ipsec, and this kernel has no ESP with AES-GCM (modules esp4, esp6 and gcm)",
        )?;
        Ok(Self { mtu, ifindex, own })
    }

    /// The device's index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn own_for(&self, peer: IpAddr) -> Option<IpAddr> {
        self.own.iter().copied().find(|own| own.is_ipv4() == peer.is_ipv4())
    }

    /// Makes states and policies these of the nodes: what receives first, what is not wanted any more last.
    pub fn sync(&self, ring: &KeyRing, nodes: &[EncryptingNode]) -> Result<()> {
        let mut xfrm = Xfrm::open(IPSEC_NUMBER)?;
        let states = self.states(ring, nodes)?;
        let policies = self.policies(ring, nodes);
        let there: Vec<XfrmState> = xfrm.states()?.into_iter().map(|(state, _)| state).collect();
        let (known, _) = xfrm.policies()?;
        for (state, wanted) in &states {
            if there.contains(state) {
                continue;
            }
            // Of the same number with other keys: a node that has come anew.
            for former in there.iter().filter(|it| is_same_number(it, state)) {
                xfrm.delete_state(former)?;
            }
            xfrm.add_state(state, &wanted.key()?)?;
        }
        for policy in policies.iter().filter(|policy| !known.contains(policy)) {
            xfrm.put_policy(policy)?;
        }
        let is_gone =
            |it: &&XfrmPolicy| !policies.iter().any(|policy| (policy.way, policy.net) == (it.way, it.net));
        for policy in known.iter().filter(is_gone) {
            xfrm.delete_policy(policy)?;
        }
        let is_gone = |it: &&XfrmState| !states.keys().any(|state| is_same_number(it, state));
        for state in there.iter().filter(is_gone) {
            xfrm.delete_state(state)?;
        }
        Ok(())
    }

    fn states<'a>(
        &self,
        ring: &'a KeyRing,
        nodes: &[EncryptingNode],
    ) -> Result<BTreeMap<XfrmState, Wanted<'a>>> {
        let mut states = BTreeMap::new();
        let mut numbers = BTreeMap::new();
        let generations = ring.generations();
        for node in nodes {
            let Some(own_address) = self.own_for(node.address) else { continue };
            for generation in std::iter::once(generations.active).chain(generations.other) {
                let (Some(key), Some(own)) = (node.key.at(generation), ring.key(generation)) else {
                    continue;
                };
                for sends in [true, false] {
                    let (source, destination) =
                        if sends { (own_address, node.address) } else { (node.address, own_address) };
                    let spi = spi(source, generation);
                    let reqid = reqid(&own.public(), &key.public_key);
                    if let Some(other) = numbers.insert((destination, spi), &node.name)
                        && *other != node.name
                    {
                        bail!("nodes {other} and {} have addresses of one number for IPsec", node.name);
                    }
                    let wanted = Wanted { own, peer: key.public_key, sends };
                    states.insert(XfrmState { source, destination, spi, reqid }, wanted);
                }
            }
        }
        Ok(states)
    }

    /// What has been decrypted may come in; what is for a node leaves by the newest key that it shares.
    fn policies(&self, ring: &KeyRing, nodes: &[EncryptingNode]) -> Vec<XfrmPolicy> {
        let everything = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        // Of the family that the nodes speak: others' addresses are none of a tunnel's.
        let outer = if self.own.iter().any(IpAddr::is_ipv4) { everything[0] } else { everything[1] };
        let of = |way| everything.map(|any| (way, IpNet::new_assert(any, 0)));
        let both = [of(XfrmWay::In), of(XfrmWay::Forward)];
        let mut policies: Vec<XfrmPolicy> = both
            .into_iter()
            .flatten()
            .map(|(way, net)| XfrmPolicy { way, net, tunnel: (outer, outer), reqid: 0 })
            .collect();
        for node in nodes {
            let Some(own_address) = self.own_for(node.address) else { continue };
            let Some((own, key)) = shared_key(ring, node) else { continue };
            let (tunnel, reqid) = ((own_address, node.address), reqid(&own.public(), &key));
            policies.extend(node.allowed.iter().map(|net| XfrmPolicy {
                way: XfrmWay::Out,
                net: *net,
                tunnel,
                reqid,
            }));
        }
        policies
    }

    /// How the peers are.
    pub fn peers(&self, ring: &KeyRing, nodes: &[EncryptingNode]) -> Result<Vec<PeerState>> {
        let there = Xfrm::open(IPSEC_NUMBER)?.states()?;
        let sum = |of: &dyn Fn(&XfrmState) -> bool| {
            let found = there.iter().filter(|(state, _)| of(state)).map(|(_, counts)| *counts);
            found.fold(XfrmCounts::default(), |sum, counts| XfrmCounts {
                bytes: sum.bytes + counts.bytes,
                errors: sum.errors + counts.errors,
            })
        };
        let peer = |node: &EncryptingNode| {
            let (_, public_key) = shared_key(ring, node)?;
            let sent = sum(&|state| state.destination == node.address);
            let received = sum(&|state| state.source == node.address);
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
        let there: Vec<XfrmState> = xfrm.states()?.into_iter().map(|(state, _)| state).collect();
        let (known, _) = xfrm.policies()?;
        let has_states = self.states(ring, nodes)?.keys().all(|state| there.contains(state));
        Ok(has_states && self.policies(ring, nodes).iter().all(|policy| known.contains(policy)))
    }

    /// Makes the device as it was. False: it has another index now.
    pub fn mend(&self) -> Result<bool> {
        Ok(netlink::ensure_xfrm_device(IPSEC_DEVICE, self.mtu, IPSEC_NUMBER)? == Some(self.ifindex))
    }
}

/// Removes the device, its states and its policies; false if there was none.
pub fn remove_ipsec() -> Result<bool> {
    if !netlink::delete_link(IPSEC_DEVICE).context("removing the IPsec device")? {
        return Ok(false);
    }
    let mut xfrm = Xfrm::open(IPSEC_NUMBER)?;
    for policy in xfrm.policies()?.0 {
        xfrm.delete_policy(&policy)?;
    }
    for (state, _) in xfrm.states()? {
        xfrm.delete_state(&state)?;
    }
    Ok(true)
}

/// The key by which a node is spoken to: of the active generation if it has one, else of the other one.
fn shared_key<'a>(ring: &'a KeyRing, node: &EncryptingNode) -> Option<(&'a PrivateKey, PublicKey)> {
    let generations = ring.generations();
    let mut held = std::iter::once(generations.active).chain(generations.other);
    held.find_map(|generation| Some((ring.key(generation)?, node.key.at(generation)?.public_key)))
}

/// Whether the kernel can: a state between nobody and nobody, for a moment.
fn try_state() -> Result<()> {
    let nobody = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    let state = XfrmState { source: nobody, destination: nobody, spi: u32::MAX, reqid: 1 };
    let mut key = [0; XFRM_KEY_BYTES];
    fastrand::Rng::new().fill(&mut key);
    let mut xfrm = Xfrm::open(IPSEC_NUMBER)?;
    xfrm.add_state(&state, &key)?;
    Ok(xfrm.delete_state(&state)?)
}

fn is_same_number(one: &XfrmState, other: &XfrmState) -> bool {
    (one.destination, one.spi) == (other.destination, other.spi)
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

/// Stands for a set of keys: of two nodes that know the same keys it is the same.
pub fn sum_of<'a>(keys: impl Iterator<Item = &'a PublicKey>) -> u64 {
    let one = |key: &PublicKey| {
        Sha256::digest(key.0).iter().take(8).fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
    };
    keys.map(one).fold(0, |sum, one| sum ^ one)
}

impl Wanted<'_> {
    /// The key of AES and the salt.
    fn key(&self) -> Result<[u8; XFRM_KEY_BYTES]> {
        let own = self.own.public();
        let (sender, receiver) = if self.sends { (&own, &self.peer) } else { (&self.peer, &own) };
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

    #[test]
    fn both_ends_have_the_same_keys_and_each_direction_another() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let [a, b] = ["a", "b"].map(|name| PrivateKey::of(&directory.path().join(name)));
        let (a, b) = (a?, b?);
        let key =
            |own: &PrivateKey, peer: &PrivateKey, sends| Wanted { own, peer: peer.public(), sends }.key();
        assert_eq!(key(&a, &b, true)?, key(&b, &a, false)?);
        assert_ne!(key(&a, &b, true)?, key(&a, &b, false)?);
        assert!(Wanted { own: &a, peer: PublicKey([0; 32]), sends: true }.key().is_err());
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

    #[test]
    fn a_set_of_keys_has_one_sum_in_any_order() {
        let [a, b, c] = [1, 2, 3].map(|byte| PublicKey([byte; 32]));
        assert_eq!(sum_of([&a, &b].into_iter()), sum_of([&b, &a].into_iter()));
        assert_ne!(sum_of([&a, &b].into_iter()), sum_of([&a, &c].into_iter()));
    }
}
