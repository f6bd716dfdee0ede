//! Who encrypts, behind one face: two WireGuard devices in turn, or the IPsec device.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::PrivateKey;
use super::args::{DeviceChoice, Mode};
use super::device::{DeviceKind, Plan};
use super::ipsec::{IPSEC_DEVICE, Ipsec, remove_ipsec};
use super::ring::{KeyRing, Use, slot_of};
use super::sent::Sent;
use super::slot::{By, DEVICES, Slot, remove_wireguard, sockets};
use crate::model::{EncryptingNode, EncryptionPeer, KeyProtocol, PeerState};

/// What encrypts.
#[derive(Debug)]
pub enum Works {
    /// One device for even generations, one for odd ones.
    Wireguard(By, [Slot; 2]),
    /// One device, whose states are those of all generations.
    Ipsec(Ipsec),
}

impl Works {
    /// Makes what the plan wants, or finds it; what it does not want goes.
    pub fn prepare(plan: &Plan) -> Result<(Self, KeyRing)> {
        if plan.mode == Mode::Ipsec {
            remove_wireguard(&plan.socket)?;
            let (sent, is_known) = Sent::open(&plan.state_directory)?;
            let mut ring = KeyRing::open(&plan.state_directory, Use::Ipsec)?;
            if !is_known {
                ring = ring.renew_all()?;
            }
            let ipsec = Ipsec::prepare(plan.mtu, plan.addresses.clone(), sent)?;
            return Ok((Self::Ipsec(ipsec), ring));
        }
        remove_ipsec()?;
        let ring = KeyRing::open(&plan.state_directory, Use::Wireguard)?;
        let (kind, slots) = match plan.choice {
            DeviceChoice::User => (By::User, slots(plan, By::User, &ring)?),
            _ => match slots(plan, By::Kernel, &ring)? {
                None if plan.choice == DeviceChoice::Kernel => {
                    bail!("WEIR_WIREGUARD_DEVICE=kernel, and this kernel has no WireGuard (module wireguard)")
                }
                None => (By::User, slots(plan, By::User, &ring)?),
                there => (By::Kernel, there),
            },
        };
        Ok((Self::Wireguard(kind, slots.context("making the devices that encrypt")?), ring))
    }

    /// Who.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Wireguard(By::Kernel, _) => DeviceKind::Kernel,
            Self::Wireguard(By::User, _) => DeviceKind::User,
            Self::Ipsec(_) => DeviceKind::Ipsec,
        }
    }

    /// What the others must speak.
    pub fn protocol(&self) -> KeyProtocol {
        match self {
            Self::Wireguard(..) => KeyProtocol::Wireguard,
            Self::Ipsec(_) => KeyProtocol::Ipsec,
        }
    }

    /// The devices' indices, of even generations and of odd ones.
    pub fn ifindices(&self) -> [u32; 2] {
        match self {
            Self::Wireguard(_, slots) => [slots[0].ifindex(), slots[1].ifindex()],
            Self::Ipsec(ipsec) => [ipsec.ifindex(); 2],
        }
    }

    /// The device of a generation.
    pub fn name(&self, generation: u32) -> &'static str {
        match self {
            Self::Wireguard(_, slots) => slots[slot_of(generation)].name(),
            Self::Ipsec(_) => IPSEC_DEVICE,
        }
    }

    /// The UDP port of a generation; 0: there is none.
    pub fn port(&self, generation: u32) -> u16 {
        match self {
            Self::Wireguard(_, slots) => slots[slot_of(generation)].port(),
            Self::Ipsec(_) => 0,
        }
    }

    /// The process that encrypts with a generation.
    pub fn pid(&self, generation: u32) -> Option<u32> {
        match self {
            Self::Wireguard(_, slots) => slots[slot_of(generation)].pid(),
            Self::Ipsec(_) => None,
        }
    }

    /// Begins to receive by every key of the ring, where that has not been done.
    pub fn open(&self, ring: &KeyRing) -> Result<()> {
        let Self::Wireguard(_, slots) = self else { return Ok(()) };
        let generations = ring.generations();
        for generation in std::iter::once(generations.active).chain(generations.other) {
            let Some(key) = ring.key(generation) else { continue };
            slots[slot_of(generation)].open(key)?;
        }
        Ok(())
    }

    /// Ends what has no key any more.
    pub fn close(&self, ring: &KeyRing) -> Result<()> {
        // IPsec's states go with the key, in `tell`.
        let Self::Wireguard(_, slots) = self else { return Ok(()) };
        let generations = ring.generations();
        let has_key = |slot: usize| {
            let mut held = std::iter::once(generations.active).chain(generations.other);
            held.any(|generation| slot_of(generation) == slot)
        };
        let is_left = |slot: &usize| slots[*slot].is_open() && !has_key(*slot);
        (0..2).filter(is_left).try_for_each(|slot| slots[slot].close())
    }

    /// Makes these all peers. True: the node has made a new key for that.
    pub fn tell(&self, ring: &mut KeyRing, nodes: &[EncryptingNode]) -> Result<bool> {
        let slots = match self {
            Self::Wireguard(_, slots) => slots,
            Self::Ipsec(ipsec) => return ipsec.sync(ring, nodes),
        };
        let generations = ring.generations();
        for generation in std::iter::once(generations.active).chain(generations.other) {
            let peers: Vec<EncryptionPeer> = nodes.iter().filter_map(|node| node.peer(generation)).collect();
            slots[slot_of(generation)].set_peers(&peers)?;
        }
        Ok(false)
    }

    /// Nodes that nothing goes to, and why.
    pub fn problems(&self) -> Vec<String> {
        match self {
            Self::Wireguard(..) => Vec::new(),
            Self::Ipsec(ipsec) => ipsec.problems(),
        }
    }

    /// How the peers are: of the active key first.
    pub fn peers(&self, ring: &KeyRing, nodes: &[EncryptingNode]) -> Result<Vec<PeerState>> {
        match self {
            Self::Wireguard(_, slots) => {
                let first = slot_of(ring.generations().active);
                let mut states = slots[first].peers()?;
                states.extend(slots[1 - first].peers()?);
                Ok(states)
            }
            Self::Ipsec(ipsec) => ipsec.peers(ring, nodes),
        }
    }

    /// What is wrong with it.
    pub fn look(&self, ring: &KeyRing, nodes: Option<&[EncryptingNode]>) -> Result<Option<String>> {
        match self {
            Self::Wireguard(_, slots) => Ok(slots[0].look()?.or(slots[1].look()?)),
            Self::Ipsec(ipsec) => match (ipsec.look()?, nodes) {
                (None, Some(nodes)) if !ipsec.is_whole(ring, nodes)? => {
                    Ok(Some("IPsec states or policies".to_owned()))
                }
                (wrong, _) => Ok(wrong),
            },
        }
    }

    /// Makes the devices as they were. False: one has another index now.
    pub fn mend(&self) -> Result<bool> {
        match self {
            Self::Wireguard(_, slots) => Ok([slots[0].mend()?, slots[1].mend()?] == [true; 2]),
            Self::Ipsec(ipsec) => ipsec.mend(),
        }
    }
}

/// Both devices; `None` on a kernel that has none of this kind.
fn slots(plan: &Plan, kind: By, ring: &KeyRing) -> Result<Option<[Slot; 2]>> {
    let generations = ring.generations();
    let sockets = sockets(&plan.socket);
    let prepare = |number: usize, key: Option<&PrivateKey>| {
        let port = plan.port + u16::from(number == 1);
        Slot::prepare(kind, number, plan.mtu, port, sockets[number].clone(), key)
    };
    let (first, second) = (slot_of(generations.active), 1 - slot_of(generations.active));
    let key = ring.key(generations.active);
    let other_key = generations.other.and_then(|generation| ring.key(generation));
    // While both have keys, the active one's packets go on all the while.
    let active = other_key.and_then(|_| prepare(first, key).transpose()).and_then(Result::ok);
    let (active, other) = match active {
        Some(active) => (Some(active), Some(prepare_other(&prepare, second, other_key)?)),
        // A device without a key gives up its UDP port, which may be the active one's by new settings.
        None => {
            let other = prepare(second, None)?;
            (if other.is_some() { prepare(first, key)? } else { None }, other)
        }
    };
    let Some(both) = active.zip(other) else { return Ok(None) };
    Ok(Some(if first == 0 { [both.0, both.1] } else { [both.1, both.0] }))
}

/// Makes the device of a number with a key, or without one; `None`: the kernel has no such devices.
type Prepare<'a> = dyn Fn(usize, Option<&PrivateKey>) -> Result<Option<Slot>> + 'a;

/// A device that cannot have its key is without one for now, which is no reason not to start: `Device::step` tries
/// again.
fn prepare_other(prepare: &Prepare, number: usize, key: Option<&PrivateKey>) -> Result<Slot> {
    let prepared = match prepare(number, key) {
        Err(error) => {
            let error = crate::error::chain(&error);
            tracing::warn!(error, device = DEVICES[number], "keys do not change until this works");
            prepare(number, None)?
        }
        Ok(prepared) => prepared,
    };
    prepared.context("making the second device that encrypts")
}

/// The names of all devices that may encrypt.
pub const ALL_DEVICES: [&str; 3] = [DEVICES[0], DEVICES[1], IPSEC_DEVICE];

/// Ends and removes whatever encrypts; false if there was nothing.
pub fn remove_devices(socket_of_agent: &Path) -> Result<bool> {
    let (wireguard, ipsec) = (remove_wireguard(socket_of_agent)?, remove_ipsec()?);
    Ok(wireguard || ipsec)
}
