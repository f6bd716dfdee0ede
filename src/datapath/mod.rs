//! The kernel side's other half: loads the programs, attaches them, and owns every map.
//!
//! ```text
//! model::desired ─> endpoints addresses policies services ─> maps ─┐
//!                   (one writer per map)                           ├─> programs of bpf/
//!                   load, pins ────────────────────────────────────┤
//!                   attach ─────────────────────────────> links ───┘
//! flow <── events (ring buffer)      weir status <── counters      weir map dump <── dump
//! ```
//!
//! Everything is pinned (`pins`), so that a restart of the agent is invisible:
//! the next process takes the maps over and replaces the programs in place.
#![allow(unsafe_code)]

pub mod abi;
mod addresses;
mod announced;
mod args;
mod attach;
mod backends;
mod batch;
mod btf;
mod carry;
#[cfg(test)]
mod contract;
mod counters;
mod devices;
mod dns;
mod dump;
mod egress;
mod endpoints;
mod events;
mod gc;
mod load;
mod loaded_program;
pub mod maglev;
mod map;
mod memory;
mod messages;
mod mirror;
mod pins;
mod policies;
mod probe;
mod proxy;
mod quota;
mod refused;
mod reuse;
mod rule_origins;
mod rule_sets;
mod service_rows;
mod services;
mod settings;
mod settle;
mod settled;
pub mod skeleton;
mod spoken;
mod succeed;
mod verify;
mod wire;

use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapHandle, Object, ProgramMut};

pub use abi::{addr_of, ip_of};
pub use addresses::{AddressWriter, Encrypted, StackWriter};
pub use announced::{AnnounceWriter, Place};
pub use args::{KernelArgs, MapArgs, MapSize, MarkMask, QuotaArgs};
pub use attach::{attach_tcx, detach_all};
pub use counters::{EventCounts, MapFill, MetricRow, NatSearches};
pub use devices::DeviceWriter;
pub use dns::DnsWriter;
pub use dump::{MAP_NAMES, dump};
pub use egress::{EgressTables, EgressWriter};
pub use endpoints::EndpointWriter;
pub use events::EventReader;
pub use gc::GarbageReport;
pub use map::{Bytes, Changes, MapError, Rows, TypedMap};
pub use memory::give_back_memory;
pub use pins::{mount_bpffs, pin_directory};
pub use policies::PolicyWriter;
pub use probe::{Features, cgroup_root_below, find_cgroup_root, mount_cgroup};
pub use proxy::{FlowsMap, Listener};
pub use quota::{Limits, Quotas, Usage, UsageKind};
pub use rule_origins::RuleOrigins;
pub use rule_sets::RuleSets;
pub use services::ServiceWriter;
pub use settings::{AttachMode, MARK_MASK, MapSizes, Options, Settings};
pub use skeleton::types;
pub use succeed::Devices as AttachedDevices;
pub use verify::{STACK_LIMIT_BYTES, Verification, verify};
pub use wire::XdpMode;

use backends::Backends;
use counters::Fills;
use mirror::{Fill, Mirror};
use pins::Pins;
use services::ServiceMaps;
use settle::Unsettled;
use succeed::Succession;

use crate::model::IdentityId;

/// The linked BPF object, to be opened with `libbpf_rs::ObjectBuilder::open_memory`.
pub static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/datapath.bpf.o"));

/// The loaded programs and their maps.
pub struct Datapath {
    object: Object,
    features: Features,
    limits: Limits,
    fills: Fills,
    cgroup_root: Option<PathBuf>,
    unsettled: Unsettled,
    maglev_size: u32,
    wires: wire::Wires,
    /// Rows of `l7_flows` that the last collection saw without a connection.
    l7_flows_alone: Mutex<Vec<map::Bytes<abi::L7FlowKey>>>,
    succession: Succession,
    /// `None`: the maps are private to this value and go with it.
    pins: Option<Pins>,
}

/// The writers of the maps; each map has exactly one.
pub struct Writers {
    /// Of `endpoints`.
    pub endpoints: EndpointWriter,
    /// Of `addresses`, `prefixes` and `node_state`.
    pub addresses: AddressWriter,
    /// Of `egress_rules`.
    pub egress: EgressWriter,
    /// Of `policy_rules` and `policy_peers`.
    pub policies: PolicyWriter,
    /// Of `dns_states`, `dns_rules` and `dns_names`.
    pub dns: DnsWriter,
    /// Of `services`, `slots`, `backends`, `maglev` and `source_ranges`.
    pub services: ServiceWriter,
    /// Of the flags in `node_state`.
    pub stack: StackWriter,
    /// Of `devices` and `this_node`.
    pub devices: DeviceWriter,
    /// Of `announced` and `announcing`, for whoever takes it first.
    pub announced: Option<AnnounceWriter>,
}

impl Writers {
    /// A node-local identity that was not in the maps at start, with the most free ones above it.
    pub fn next_free_local_identity(&self) -> IdentityId {
        let rows = self.addresses.local_identities().chain(self.policies.inherited_local_identities());
        let in_use = rows.map(|id| id.0).collect();
        IdentityId(map::first_free(&in_use, IdentityId::FIRST_LOCAL.0, IdentityId::FIRST_LOCAL.0 * 2))
    }
}

impl Datapath {
    /// Loads the programs over the pinned maps, making and pinning those that are
    /// missing. Nothing that runs is changed before something is attached.
    pub fn load(options: &Options) -> Result<Self> {
        probe::check_requirements()?;
        let pins = Pins::open(&options.pins)?;
        let mut loaded = load::load(&options.settings, &options.map_sizes, options.attach, Some(&pins))?;
        loaded.features.pods_are_limited = options.settings.limit_ifindex.is_some();
        loaded.features.fragments_wait = options.settings.wait_ifindex.is_some();
        Ok(Self {
            object: loaded.object,
            features: loaded.features,
            limits: loaded.limits,
            fills: Fills::default(),
            cgroup_root: options.cgroup_root.clone(),
            unsettled: Unsettled::default(),
            maglev_size: options.settings.maglev_size,
            wires: wire::Wires::default(),
            l7_flows_alone: Mutex::default(),
            succession: Succession::new(&pins, loaded.carriers)?,
            pins: Some(pins),
        })
    }

    /// Loads the programs over maps of their own, for BPF_PROG_TEST_RUN: nothing
    /// is pinned and nothing can be attached.
    pub fn open_private(settings: &Settings, map_sizes: &MapSizes) -> Result<Self> {
        probe::check_requirements()?;
        let loaded = load::load(settings, map_sizes, AttachMode::Auto, None)?;
        Ok(Self {
            object: loaded.object,
            features: loaded.features,
            limits: loaded.limits,
            fills: Fills::default(),
            cgroup_root: None,
            unsettled: Unsettled::default(),
            maglev_size: settings.maglev_size,
            wires: wire::Wires::default(),
            l7_flows_alone: Mutex::default(),
            succession: Succession::default(),
            pins: None,
        })
    }

    /// What was found about the kernel.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// The writers, with what the maps hold read back. To be called once: two
    /// writers of one map would not know of each other.
    pub fn writers(&self) -> Result<Writers> {
        let endpoints = EndpointWriter::new(
            Mirror::read(self.typed("endpoints")?, Fill::default())?,
            self.fills.of("endpoints"),
        );
        let addresses = AddressWriter::new(
            self.mirror("addresses")?,
            self.mirror("prefixes")?,
            self.typed("node_state")?,
            self.is_succeeding(),
        )?;
        let policies = PolicyWriter::new(
            (self.typed("policy_rules")?, self.fills.of("policy_rules")),
            (self.typed("policy_peers")?, self.fills.of("policy_peers")),
            &endpoints.policies_in_force(),
        )?;
        let maps = ServiceMaps {
            services: self.mirror("services")?,
            slots: self.mirror("slots")?,
            backends: Backends::read(self.typed("backends")?, self.fills.of("backends"))?,
            maglev: self.mirror("maglev")?,
            source_ranges: self.mirror("source_ranges")?,
        };
        let services = ServiceWriter::new(maps, self.maglev_size, self.is_succeeding())?;
        let stack = StackWriter::new(self.typed("node_state")?);
        let devices = DeviceWriter::new(self.mirror("devices")?, self.typed("this_node")?);
        let announced = AnnounceWriter::new(self.typed("announced")?, self.typed("announcing")?);
        let announced = Some(announced);
        let egress = EgressWriter::new(self.mirror("egress_pods")?, self.mirror("egress_rules")?);
        let dns =
            DnsWriter::new(self.typed("dns_states")?, self.mirror("dns_rules")?, self.typed("dns_names")?)?;
        Ok(Writers { endpoints, addresses, egress, policies, dns, services, stack, devices, announced })
    }

    /// The reader of the ring buffer. One at a time: a second one would take
    /// records from the first.
    pub fn events(&self) -> Result<EventReader> {
        EventReader::new(&self.map("events")?)
    }

    /// The reader of records of DNS. One at a time.
    pub fn dns_records(&self) -> Result<EventReader> {
        EventReader::new(&self.map("dns_records")?)
    }

    /// A program, to attach it or to test-run it.
    pub fn program(&self, name: &str) -> Result<ProgramMut<'_>> {
        if let Some((_, reason)) = self.features.not_loaded.iter().find(|(left_out, _)| left_out == name) {
            bail!("the program {name} is not loaded: {reason}");
        }
        self.object.progs_mut().find(|program| program.name() == name).with_context(|| {
            let names: Vec<_> =
                self.object.progs().map(|program| program.name().to_string_lossy().into_owned()).collect();
            format!("the BPF object has no program {name}, only {}", names.join(", "))
        })
    }

    /// Whether packets may go past the node's stack now: it has no IPsec policies.
    pub fn allows_past_stack(&self) -> Result<bool> {
        let state = self.typed::<u32, abi::NodeState>("node_state")?.get(&0)?.unwrap_or_default();
        Ok(state.flags & types::node_flags::NODE_PAST_STACK.0 != 0)
    }

    /// A map with its types, for tests and tools; the agent writes through `writers`.
    pub fn typed<K: abi::Plain, V: abi::Plain>(&self, name: &str) -> Result<TypedMap<K, V>> {
        Ok(TypedMap::new(self.map(name)?)?)
    }

    fn map(&self, name: &str) -> Result<MapHandle> {
        let map = self.object.maps().find(|map| map.name() == name);
        let map = map.with_context(|| format!("the BPF object has no map {name}"))?;
        MapHandle::try_from(&map).with_context(|| format!("opening map {name}"))
    }

    fn mirror<K: abi::Plain, V: abi::Plain>(&self, name: &str) -> Result<Mirror<K, V>> {
        Ok(Mirror::read(self.typed(name)?, self.fills.of(name))?)
    }

    fn is_left_out(&self, program: &str) -> bool {
        self.features.not_loaded.iter().any(|(name, _)| name == program)
    }
}

/// Returns when every program that was running has ended: what was unlinked from
/// a map before is then seen by nobody.
fn await_programs() {
    // SAFETY: the call takes no pointers. MEMBARRIER_CMD_GLOBAL waits for an RCU
    // grace period, and BPF programs are RCU readers.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_membarrier, 1, 0, 0) };
    if result != 0 {
        // Not there with nohz_full: a pause that no program outlasts.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
