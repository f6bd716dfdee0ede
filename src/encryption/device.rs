//! What encrypts, as the agent has it: two devices in turn, the keys, and the other nodes.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::args::{DeviceChoice, Mode};
use super::heard::{Heard, Reach};
use super::ipsec::digest_of;
use super::lock;
use super::ring::{KeyRing, slot_of};
use super::rotation::{self, Generations, Neighbour, Step};
use super::works::Works;
use crate::model::{EncryptingNode, KeyAt, KeyProtocol, NodeKey, PeerState};

/// What the devices shall be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How it is encrypted.
    pub mode: Mode,
    /// Who encrypts with WireGuard.
    pub choice: DeviceChoice,
    /// Their MTU.
    pub mtu: u32,
    /// UDP port of the first one; the second one has the next.
    pub port: u16,
    /// The node's own addresses between the nodes.
    pub addresses: Vec<IpAddr>,
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
    /// The kernel's IPsec.
    Ipsec,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel's WireGuard",
            Self::User => "weir wireguard, as the kernel has no WireGuard or is not asked for it",
            Self::Ipsec => "the kernel's IPsec (ESP, AES-256-GCM)",
        })
    }
}

/// The devices, and who works behind them.
#[derive(Debug)]
pub struct Device {
    plan: Plan,
    works: Works,
    keys: Mutex<Keys>,
}

/// The keys, and what is known of the others'.
#[derive(Debug)]
struct Keys {
    ring: KeyRing,
    /// None: the agent does not know yet.
    nodes: Option<Vec<EncryptingNode>>,
    /// Who encrypts knows the keys and the nodes.
    is_told: bool,
    /// The generation by which the programs send.
    in_force: Option<u32>,
    /// Somebody asks for new keys.
    wants: bool,
    heard: Heard,
    /// A key was made anew, and is to be published.
    has_news: bool,
}

impl Keys {
    fn nodes(&self) -> &[EncryptingNode] {
        self.nodes.as_deref().unwrap_or_default()
    }

    /// Stands for the keys of a generation that this node receives by.
    fn received_by(&self, generation: u32) -> u64 {
        let keys = self.nodes().iter().filter_map(|node| node.key.at(generation));
        keys.fold(0, |sum, key| sum ^ digest_of(&key.public_key))
    }
}

fn generations_of(node: &EncryptingNode) -> Generations {
    let other = node.key.other.map(|key| key.generation);
    Generations { active: node.key.active.generation, other }
}

impl Device {
    /// Makes the devices, or finds them, and starts who works behind them.
    pub fn prepare(plan: Plan) -> Result<Self> {
        let (works, ring) = Works::prepare(&plan)?;
        let keys = Mutex::new(Keys {
            ring,
            nodes: None,
            is_told: false,
            in_force: None,
            wants: false,
            heard: Heard::default(),
            has_news: false,
        });
        Ok(Self { plan, works, keys })
    }

    /// The devices' indices, of even generations and of odd ones: one device may be both.
    pub fn ifindices(&self) -> [u32; 2] {
        self.works.ifindices()
    }

    /// The device by which the node sends.
    pub fn name(&self) -> &'static str {
        self.works.name(self.generations().active)
    }

    /// What the others must speak.
    pub fn protocol(&self) -> KeyProtocol {
        self.works.protocol()
    }

    /// Their MTU.
    pub fn mtu(&self) -> u32 {
        self.plan.mtu
    }

    /// Who encrypts.
    pub fn kind(&self) -> DeviceKind {
        self.works.kind()
    }

    /// What this node publishes: that it sends by a key not before it does. A new node looks at the others first.
    pub fn published(&self) -> Option<NodeKey> {
        let keys = lock(&self.keys);
        if keys.ring.is_new() && keys.nodes.is_none() {
            return None;
        }
        let generations = keys.ring.generations();
        let at = |generation: u32| {
            let public_key = keys.ring.key(generation)?.public();
            // While keys change alone: a node that comes or goes is no news of every other one.
            let changes = generations.other.is_some();
            let is_known = self.protocol() == KeyProtocol::Ipsec && changes && keys.is_told;
            let receives = is_known.then(|| keys.received_by(generation));
            Some(KeyAt { public_key, port: self.works.port(generation), generation, receives })
        };
        let (mut active, mut other) = (Some(generations.active), generations.other);
        if other.is_some() && keys.in_force == other {
            std::mem::swap(&mut active, &mut other);
        }
        Some(NodeKey { protocol: self.protocol(), active: at(active?)?, other: other.and_then(at) })
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

    /// The programs send by this generation: so does the node, once who encrypts knows of it.
    pub fn set_in_force(&self, generation: u32) {
        let mut keys = lock(&self.keys);
        if keys.is_told {
            keys.in_force = Some(generation);
        }
    }

    /// Makes these all peers.
    pub fn set_nodes(&self, nodes: &[EncryptingNode]) -> Result<()> {
        let mut keys = lock(&self.keys);
        if keys.nodes.is_none() && keys.ring.is_new() {
            // Nobody knows a key of this node: it begins where the others are.
            let generations = nodes.iter().map(generations_of);
            if let Some(generation) = rotation::better(keys.ring.generations(), generations) {
                self.jump(&mut keys, generation)?;
            }
        }
        keys.nodes = Some(nodes.to_vec());
        self.tell(&mut keys)
    }

    fn tell(&self, keys: &mut Keys) -> Result<()> {
        keys.is_told = false;
        if let Some(nodes) = &keys.nodes {
            keys.has_news |= self.works.tell(&mut keys.ring, nodes)?;
            let own = keys.ring.generations();
            let of_node = |node: &EncryptingNode| {
                let held = std::iter::once(own.active).chain(own.other);
                held.filter_map(|generation| Some(node.key.at(generation)?.public_key)).collect::<Vec<_>>()
            };
            keys.heard.told(nodes.iter().flat_map(of_node), Instant::now());
            keys.is_told = true;
        }
        Ok(())
    }

    /// How the peers are: of the active key first.
    pub fn peers(&self) -> Result<Vec<PeerState>> {
        let keys = lock(&self.keys);
        self.works.peers(&keys.ring, keys.nodes())
    }

    /// Nodes that nothing goes to, and why.
    pub fn problems(&self) -> Vec<String> {
        self.works.problems()
    }

    /// The process that encrypts.
    pub fn pid(&self) -> Option<u32> {
        self.works.pid(self.generations().active)
    }

    /// What is wrong with the devices; it is mended where that is possible without another index.
    pub fn look(&self) -> Result<Option<String>> {
        let keys = lock(&self.keys);
        self.works.look(&keys.ring, keys.nodes.as_deref())
    }

    /// Makes the devices as they were. False: one has another index now.
    pub fn mend(&self) -> Result<bool> {
        self.works.mend()
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
        let mut keys = lock(&self.keys);
        let generations = keys.ring.generations();
        let other = generations.other?;
        let others = self.neighbours(&mut keys);
        Some(match (generations.next(), others.as_deref()) {
            (Some(next), Ok(others)) => match rotation::waits_for(generations, others) {
                Some(node) => format!("to generation {next}: waiting until {} is reached by it", node.node),
                None => format!("to generation {next}"),
            },
            (None, Ok(others)) => match rotation::uses(generations, others) {
                Some(node) => format!("generation {other} is received by, as {} sends by it", node.node),
                None => format!("generation {other} is about to be forgotten"),
            },
            (_, Err(error)) => format!("from generation {}: {error:#}", generations.active),
        })
    }

    fn neighbours(&self, keys: &mut Keys) -> Result<Vec<Neighbour>> {
        let own = keys.ring.generations();
        let now = Instant::now();
        let is_ipsec = self.protocol() == KeyProtocol::Ipsec;
        if !is_ipsec {
            let states = self.works.peers(&keys.ring, keys.nodes())?;
            keys.heard.saw(&states, now);
        }
        // Of each generation that this node has: the keys of all nodes. One receives by all but its own.
        let held = std::iter::once(own.active).chain(own.other);
        let all = held.map(|generation| {
            let own = keys.ring.key(generation).map_or(0, |key| digest_of(&key.public()));
            (generation, keys.received_by(generation) ^ own)
        });
        let all: BTreeMap<u32, u64> = all.collect();
        let reach = |node: &EncryptingNode, generation: u32| {
            let Some(key) = node.key.at(generation) else { return Reach::Unknown };
            match self.protocol() {
                // There is no handshake that would tell of one that is away.
                KeyProtocol::Ipsec
                    if key.receives.is_some()
                        && key.receives
                            == all.get(&generation).map(|all| all ^ digest_of(&key.public_key)) =>
                {
                    Reach::Reached
                }
                KeyProtocol::Ipsec => Reach::Unknown,
                KeyProtocol::Wireguard => keys.heard.reach(&key.public_key, now),
            }
        };
        let neighbour = |node: &EncryptingNode| Neighbour {
            node: node.name.clone(),
            generations: generations_of(node),
            by_active: reach(node, own.active),
            by_other: own.other.map_or(Reach::Unknown, |other| reach(node, other)),
        };
        Ok(keys.nodes().iter().map(neighbour).collect())
    }

    /// Takes the next step in a change of keys; true if there was one. The programs follow with `wanted`.
    pub fn step(&self) -> Result<bool> {
        let mut keys = lock(&self.keys);
        let own = keys.ring.generations();
        if keys.nodes.is_none() {
            return Ok(false);
        }
        if std::mem::take(&mut keys.has_news) {
            return Ok(true);
        }
        // What could not be done before; and the programs follow before the next step.
        keys.ring.remove_stray()?;
        self.works.close(&keys.ring)?;
        self.works.open(&keys.ring)?;
        if !keys.is_told {
            return self.tell(&mut keys).map(|()| true);
        }
        if keys.in_force != Some(own.active) {
            return Ok(false);
        }
        let wants = keys.wants || self.is_old(&keys.ring);
        let step = rotation::next_step(own, &self.neighbours(&mut keys)?, wants);
        match step {
            Step::Stay => return Ok(false),
            Step::Begin(next) => {
                keys.ring.begin(next)?;
                keys.wants = false;
            }
            Step::Move => keys.ring.turn()?,
            Step::Drop => keys.ring.forget_other()?,
            Step::Jump(generation) => self.jump(&mut keys, generation)?,
        }
        let now = keys.ring.generations();
        tracing::info!(active = now.active, other = ?now.other, "the node's keys are of these generations now");
        keys.is_told = false;
        self.works.close(&keys.ring)?;
        self.works.open(&keys.ring)?;
        self.tell(&mut keys)?;
        Ok(true)
    }

    /// Hardly anybody has a key of this node's generations, so hardly anything is lost with them.
    fn jump(&self, keys: &mut Keys, generation: u32) -> Result<()> {
        let former = keys.ring.generations().active;
        keys.ring.jump(generation)?;
        keys.heard = Heard::default();
        keys.is_told = false;
        if slot_of(former) == slot_of(generation) && keys.in_force == Some(former) {
            // The programs send to the same device.
            keys.in_force = Some(generation);
        }
        self.works.close(&keys.ring)?;
        self.works.open(&keys.ring)
    }

    /// A tenth more or less than the setting, by the key: not all nodes begin at once.
    fn is_old(&self, ring: &KeyRing) -> bool {
        let Some(age) = self.plan.key_age else { return false };
        let Some(key) = ring.key(ring.generations().active) else { return false };
        let share = 0.9 + f64::from(key.public().0[0]) / 255.0 * 0.2;
        ring.age() >= age.mul_f64(share)
    }
}
