//! What encrypts, as the agent has it: two devices in turn, the keys, and the other nodes.

use std::fmt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::args::DeviceChoice;
use super::lock;
use super::ring::{KeyRing, slot_of};
use super::rotation::{self, Generations, Neighbour, Step};
use super::slot::{Slot, sockets};
use crate::model::{EncryptingNode, EncryptionPeer, KeyAt, NodeKey, PeerState};

/// A peer has a keepalive: one whose last handshake is older than this is not reached.
const HANDSHAKE_WITHIN_SECONDS: u64 = 200;

/// What the devices shall be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who encrypts.
    pub choice: DeviceChoice,
    /// Their MTU.
    pub mtu: u32,
    /// UDP port of the first one; the second one has the next.
    pub port: u16,
    /// Where the keys are.
    pub state_directory: PathBuf,
    /// The agent's socket: those of the processes are beside it.
    pub socket: PathBuf,
    /// Keys that are older are changed.
    pub key_age: Option<Duration>,
}

/// Who encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The kernel's WireGuard.
    Kernel,
    /// `weir wireguard`.
    User,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel's WireGuard",
            Self::User => "weir wireguard, as the kernel has no WireGuard or is not asked for it",
        })
    }
}

/// The devices, and who works behind them.
#[derive(Debug)]
pub struct Device {
    plan: Plan,
    kind: DeviceKind,
    slots: [Slot; 2],
    keys: Mutex<Keys>,
}

/// The keys, and what is known of the others'.
#[derive(Debug)]
struct Keys {
    ring: KeyRing,
    /// None: the agent does not know yet.
    nodes: Option<Vec<EncryptingNode>>,
    /// The generation by which the programs send.
    in_force: Option<u32>,
    /// Somebody asks for new keys.
    wants: bool,
}

impl Device {
    /// Makes the devices, or finds them, and starts who works behind them.
    pub fn prepare(plan: Plan) -> Result<Self> {
        let ring = KeyRing::open(&plan.state_directory)?;
        let (kind, slots) = match plan.choice {
            DeviceChoice::User => (DeviceKind::User, slots(&plan, DeviceKind::User, &ring)?),
            _ => match slots(&plan, DeviceKind::Kernel, &ring)? {
                None if plan.choice == DeviceChoice::Kernel => {
                    bail!("WEIR_WIREGUARD_DEVICE=kernel, and this kernel has no WireGuard (module wireguard)")
                }
                None => (DeviceKind::User, slots(&plan, DeviceKind::User, &ring)?),
                there => (DeviceKind::Kernel, there),
            },
        };
        let slots = slots.context("making the devices that encrypt")?;
        let keys = Mutex::new(Keys { ring, nodes: None, in_force: None, wants: false });
        Ok(Self { plan, kind, slots, keys })
    }

    /// The indices of both devices.
    pub fn ifindices(&self) -> [u32; 2] {
        [self.slots[0].ifindex(), self.slots[1].ifindex()]
    }

    /// The device by which the node sends.
    pub fn name(&self) -> &'static str {
        self.slots[slot_of(self.generations().active)].name()
    }

    /// Their MTU.
    pub fn mtu(&self) -> u32 {
        self.plan.mtu
    }

    /// Who encrypts.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// What this node publishes: that it sends by a key not before it does.
    pub fn published(&self) -> Option<NodeKey> {
        let keys = lock(&self.keys);
        let generations = keys.ring.generations();
        let at = |generation: u32| {
            let public_key = keys.ring.key(generation)?.public();
            Some(KeyAt { public_key, port: self.slots[slot_of(generation)].port(), generation })
        };
        let (mut active, mut other) = (Some(generations.active), generations.other);
        if other.is_some() && keys.in_force == other {
            std::mem::swap(&mut active, &mut other);
        }
        Some(NodeKey { active: at(active?)?, other: other.and_then(at) })
    }

    /// The generations of this node's keys.
    pub fn generations(&self) -> Generations {
        lock(&self.keys).ring.generations()
    }

    /// The generation by which the programs are to send, and whether that is the second device's.
    pub fn wanted(&self) -> (u32, bool) {
        let active = self.generations().active;
        (active, slot_of(active) == 1)
    }

    /// The programs send by this generation.
    pub fn set_in_force(&self, generation: u32) {
        lock(&self.keys).in_force = Some(generation);
    }

    /// Makes these all peers.
    pub fn set_nodes(&self, nodes: &[EncryptingNode]) -> Result<()> {
        let mut keys = lock(&self.keys);
        keys.nodes = Some(nodes.to_vec());
        self.tell(&keys)
    }

    fn tell(&self, keys: &Keys) -> Result<()> {
        let Some(nodes) = &keys.nodes else { return Ok(()) };
        let generations = keys.ring.generations();
        for generation in std::iter::once(generations.active).chain(generations.other) {
            let peers: Vec<EncryptionPeer> = nodes.iter().filter_map(|node| node.peer(generation)).collect();
            self.slots[slot_of(generation)].set_peers(&peers)?;
        }
        Ok(())
    }

    /// How the peers are: of the active key first.
    pub fn peers(&self) -> Result<Vec<PeerState>> {
        let first = slot_of(self.generations().active);
        let mut states = self.slots[first].peers()?;
        states.extend(self.slots[1 - first].peers()?);
        Ok(states)
    }

    /// The process that encrypts.
    pub fn pid(&self) -> Option<u32> {
        self.slots[slot_of(self.generations().active)].pid()
    }

    /// What is wrong with the devices; it is mended where that is possible without another index.
    pub fn look(&self) -> Result<Option<String>> {
        Ok(self.slots[0].look()?.or(self.slots[1].look()?))
    }

    /// Makes the devices as they were. False: one has another index now.
    pub fn mend(&self) -> Result<bool> {
        let mended = [self.slots[0].mend()?, self.slots[1].mend()?];
        Ok(mended == [true; 2])
    }

    /// Asks for new keys; says what becomes of that.
    pub fn ask_for_new_keys(&self) -> String {
        let mut keys = lock(&self.keys);
        match keys.ring.generations().next() {
            Some(next) => format!("keys change already: to generation {next}"),
            None => {
                keys.wants = true;
                format!("keys will change, on every node: from generation {}", keys.ring.generations().active)
            }
        }
    }

    /// What a change of keys waits for; none: there is none.
    pub fn change(&self) -> Option<String> {
        let keys = lock(&self.keys);
        let generations = keys.ring.generations();
        let other = generations.other?;
        let others = self.neighbours(&keys);
        Some(match (generations.next(), others.as_deref()) {
            (Some(next), Ok(others)) => match rotation::waits_for(generations, others) {
                Some(node) => format!("to generation {next}: waiting until {} is reached by it", node.node),
                None => format!("to generation {next}"),
            },
            (Some(next), Err(error)) => format!("to generation {next}: {error:#}"),
            (None, _) => format!("generation {other} is received by until no node sends by it"),
        })
    }

    fn neighbours(&self, keys: &Keys) -> Result<Vec<Neighbour>> {
        let generations = keys.ring.generations();
        let active = self.slots[slot_of(generations.active)].peers()?;
        let next = match generations.next() {
            Some(next) => self.slots[slot_of(next)].peers()?,
            None => Vec::new(),
        };
        let is_reached = |states: &[PeerState], key: Option<&KeyAt>| {
            let state = key.and_then(|key| states.iter().find(|state| state.public_key == key.public_key));
            let since = state.and_then(|state| state.last_handshake_seconds);
            since.is_some_and(|since| since < HANDSHAKE_WITHIN_SECONDS)
        };
        let neighbour = |node: &EncryptingNode| Neighbour {
            node: node.name.clone(),
            generations: Generations {
                active: node.key.active.generation,
                other: node.key.other.map(|key| key.generation),
            },
            is_alive: is_reached(&active, node.key.at(generations.active)),
            is_reached: generations.next().is_some_and(|at| is_reached(&next, node.key.at(at))),
        };
        Ok(keys.nodes.iter().flatten().map(neighbour).collect())
    }

    /// Takes the next step in a change of keys; true if there was one. The programs follow with `wanted`.
    pub fn step(&self) -> Result<bool> {
        let mut keys = lock(&self.keys);
        let own = keys.ring.generations();
        let is_settled = keys.nodes.is_some() && keys.in_force == Some(own.active);
        if !is_settled {
            return Ok(false);
        }
        let wants = keys.wants || self.is_old(&keys.ring);
        let step = rotation::next_step(own, &self.neighbours(&keys)?, wants);
        match step {
            Step::Stay => return Ok(false),
            Step::Begin(next) => {
                self.begin(&mut keys, next)?;
                keys.wants = false;
            }
            Step::Move => keys.ring.turn()?,
            Step::Drop => self.forget_other(&mut keys)?,
            Step::Jump(generation) => self.jump(&mut keys, generation)?,
        }
        let now = keys.ring.generations();
        tracing::info!(active = now.active, other = ?now.other, "the node's keys are of these generations now");
        self.tell(&keys)?;
        Ok(true)
    }

    fn begin(&self, keys: &mut Keys, generation: u32) -> Result<()> {
        keys.ring.begin(generation)?;
        match keys.ring.key(generation) {
            Some(key) => self.slots[slot_of(generation)].open(key),
            None => Ok(()),
        }
    }

    fn forget_other(&self, keys: &mut Keys) -> Result<()> {
        self.slots[1 - slot_of(keys.ring.generations().active)].close()?;
        keys.ring.forget_other()
    }

    /// Nobody has a key of this node's generation, so nothing is lost with it.
    fn jump(&self, keys: &mut Keys, generation: u32) -> Result<()> {
        if keys.ring.generations().other.is_some() {
            self.forget_other(keys)?;
        }
        if slot_of(generation) == slot_of(keys.ring.generations().active) {
            keys.ring.rename(generation)?;
            keys.in_force = Some(generation);
            return Ok(());
        }
        self.begin(keys, generation)?;
        keys.ring.turn()
    }

    /// A tenth more or less than the setting, by the key: not all nodes begin at once.
    fn is_old(&self, ring: &KeyRing) -> bool {
        let Some(age) = self.plan.key_age else { return false };
        let Some(key) = ring.key(ring.generations().active) else { return false };
        let share = 0.9 + f64::from(key.public().0[0]) / 255.0 * 0.2;
        ring.age() >= age.mul_f64(share)
    }
}

/// Both devices; `None` on a kernel that has none of this kind.
fn slots(plan: &Plan, kind: DeviceKind, ring: &KeyRing) -> Result<Option<[Slot; 2]>> {
    let generations = ring.generations();
    let key = |slot: usize| {
        let of_slot = |generation: &u32| slot_of(*generation) == slot;
        let mut held = std::iter::once(generations.active).chain(generations.other);
        held.find(of_slot).and_then(|generation| ring.key(generation))
    };
    let [first, second] = sockets(&plan.socket);
    let one = Slot::prepare(kind, 0, plan.mtu, plan.port, first, key(0))?;
    let Some(one) = one else { return Ok(None) };
    let other = Slot::prepare(kind, 1, plan.mtu, plan.port + 1, second, key(1))?;
    Ok(other.map(|other| [one, other]))
}
