//! Loads the object once per agent start: pinned maps are taken over with their
//! content, settings go into `.rodata` before the verifier sees the programs.

use std::cell::RefCell;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Once;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::{
    MapCore, MapHandle, Object, ObjectBuilder, OpenMapMut, OpenObject, PrintLevel, ProgramAttachType,
    set_print,
};

use super::OBJECT;
use super::abi::{self, Plain, SETTINGS_OFFSET, addr_of};
use super::attach::{AttachMode, TC_PROGRAMS};
use super::pins::Pins;
use super::probe::{self, Features};

/// How to load the datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// The pin directory, `<bpffs>/weir/v<ABI>`.
    pub pins: PathBuf,
    /// The cgroup v2 hierarchy; found in /proc/self/mountinfo when `None`.
    pub cgroup_root: Option<PathBuf>,
    /// How to attach to devices.
    pub attach: AttachMode,
    /// Rows that maps can hold.
    pub map_sizes: MapSizes,
    /// What the programs are told.
    pub settings: Settings,
}

/// Rows that maps can hold, by name; what is not given is as in `maps.h`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapSizes(pub std::collections::BTreeMap<String, u32>);

impl MapSizes {
    /// Sets the size of one map.
    pub fn with(mut self, map: &str, entries: u32) -> Self {
        self.0.insert(map.to_owned(), entries);
        self
    }
}

/// The settings of a node, which are fixed while the programs run (`bpf/config.h`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Source of tunnels and of masquerading.
    pub node_ipv4: Option<Ipv4Addr>,
    /// Source of tunnels and of masquerading.
    pub node_ipv6: Option<Ipv6Addr>,
    /// Stands for a pod that reaches itself through a service.
    pub loopback_ipv4: Ipv4Addr,
    /// Stands for a pod that reaches itself through a service.
    pub loopback_ipv6: Ipv6Addr,
    /// The VXLAN device; `None`: native routing.
    pub tunnel_ifindex: Option<u32>,
    /// UDP port of the tunnels.
    pub tunnel_port: u16,
    /// A running flow is reported this often.
    pub flow_report: Duration,
    /// Established TCP connections are forgotten after this much silence.
    pub tcp_timeout: Duration,
    /// TCP connections without an answer.
    pub tcp_opening: Duration,
    /// TCP connections that both sides ended.
    pub tcp_closing: Duration,
    /// Everything else.
    pub other_timeout: Duration,
    /// Ports for masquerading.
    pub nat_ports: RangeInclusive<u16>,
    /// Masquerade IPv4.
    pub masquerade_ipv4: bool,
    /// Masquerade IPv6.
    pub masquerade_ipv6: bool,
    /// Report flows.
    pub flow_events: bool,
    /// Translate services at the socket.
    pub socket_lb: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            node_ipv4: None,
            node_ipv6: None,
            loopback_ipv4: Ipv4Addr::new(169, 254, 42, 1),
            loopback_ipv6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x2a, 1),
            tunnel_ifindex: None,
            tunnel_port: 8472,
            flow_report: Duration::from_secs(5),
            tcp_timeout: Duration::from_secs(7440),
            tcp_opening: Duration::from_secs(60),
            tcp_closing: Duration::from_secs(10),
            other_timeout: Duration::from_secs(60),
            nat_ports: 10240..=29999,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
            flow_events: true,
            socket_lb: true,
        }
    }
}

impl Settings {
    /// As the programs read it.
    pub(super) fn encode(&self, jiffies_per_second: u32) -> abi::Settings {
        let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        let address = |ip: Option<IpAddr>| ip.map(addr_of).unwrap_or_default();
        abi::Settings {
            node_ipv4: address(self.node_ipv4.map(IpAddr::V4)),
            node_ipv6: address(self.node_ipv6.map(IpAddr::V6)),
            loopback_ipv4: addr_of(self.loopback_ipv4.into()),
            loopback_ipv6: addr_of(self.loopback_ipv6.into()),
            jiffies_per_second,
            tunnel_ifindex: self.tunnel_ifindex.unwrap_or(0),
            flow_report_seconds: seconds(self.flow_report),
            tcp_timeout_seconds: seconds(self.tcp_timeout),
            tcp_opening_seconds: seconds(self.tcp_opening),
            tcp_closing_seconds: seconds(self.tcp_closing),
            other_timeout_seconds: seconds(self.other_timeout),
            nat_port_min: *self.nat_ports.start(),
            nat_port_max: *self.nat_ports.end(),
            tunnel_port: self.tunnel_port,
            masquerade_ipv4: self.masquerade_ipv4.into(),
            masquerade_ipv6: self.masquerade_ipv6.into(),
            flow_events: self.flow_events.into(),
            socket_lb: self.socket_lb.into(),
            pad: [0; 2],
        }
    }
}

/// What loading made.
pub(super) struct Loaded {
    pub(super) object: Object,
    pub(super) features: Features,
}

/// Opens, sizes, fills in and loads the object; takes over and makes pins where there are any.
pub(super) fn load(
    settings: &Settings,
    sizes: &MapSizes,
    attach: AttachMode,
    pins: Option<&Pins>,
) -> Result<Loaded> {
    collect_libbpf_messages();
    probe::check_requirements()?;
    let mut features = probe::probe(attach)?;
    let opened = prepare(settings, sizes, pins, &features)?;
    let (mut object, reused) = match load_object(opened.object) {
        Ok(object) => (object, opened.reused),
        Err(error) if features.not_loaded.is_empty() => {
            // Perhaps only what is optional does not load.
            let reason = format!("{error:#}");
            features.leave_out_optional(&reason);
            let opened = prepare(settings, sizes, pins, &features)?;
            let object = load_object(opened.object).map_err(|_| explain(error, &features.kernel))?;
            tracing::warn!(%reason, "leaving out the programs that do not load here");
            (object, opened.reused)
        }
        Err(error) => return Err(explain(error, &features.kernel)),
    };
    if let Some(pins) = pins {
        pin_new_maps(&mut object, pins, &reused)?;
    }
    Ok(Loaded { object, features })
}

fn explain(error: anyhow::Error, kernel: &str) -> anyhow::Error {
    if probe::is_too_old(kernel) {
        error.context(format!("the kernel is {kernel}, Weir needs 6.1 or later"))
    } else {
        error
    }
}

/// An object that is ready to be loaded.
pub(super) struct Opened {
    pub(super) object: OpenObject,
    /// Maps that are pinned already.
    reused: Vec<String>,
}

/// Opens the object, without touching the kernel.
fn open() -> Result<OpenObject> {
    collect_libbpf_messages();
    ObjectBuilder::default()
        .name("weir")?
        .open_memory(OBJECT)
        .map_err(with_messages)
        .context("opening the BPF object")
}

/// Opens the object with sizes, settings and pinned maps.
pub(super) fn prepare(
    settings: &Settings,
    sizes: &MapSizes,
    pins: Option<&Pins>,
    features: &Features,
) -> Result<Opened> {
    let mut object = open()?;
    if let Some(unknown) = sizes.0.keys().find(|size| object.maps().all(|map| map.name() != size.as_str())) {
        bail!("there is no map {unknown} to set the size of");
    }
    let mut reused = Vec::new();
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if name.ends_with(".rodata") {
            fill_settings(&mut map, settings.encode(features.jiffies_per_second))?;
        }
        if is_private(&name) {
            continue;
        }
        if let Some(&entries) = sizes.0.get(&name) {
            map.set_max_entries(entries).with_context(|| format!("setting the size of map {name}"))?;
        }
        if let Some(pins) = pins
            && take_over(&mut map, &name, pins)?
        {
            reused.push(name);
        }
    }
    for mut program in object.progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        if features.not_loaded.iter().any(|(left_out, _)| *left_out == name) {
            program.set_autoload(false);
        }
        if !features.has_tcx && TC_PROGRAMS.contains(&name.as_str()) {
            // Kernels without tcx know no such attach type; 0 is what `SEC("tc")` has.
            program.set_attach_type(ProgramAttachType::CgroupInetIngress);
        }
    }
    Ok(Opened { object, reused })
}

/// Sections of the object (`.rodata`, `.bss`) belong to one load.
fn is_private(map: &str) -> bool {
    map.contains('.')
}

fn fill_settings(map: &mut OpenMapMut<'_>, settings: abi::Settings) -> Result<()> {
    let section = map.initial_value_mut().context("the object has no .rodata")?;
    let range = SETTINGS_OFFSET..SETTINGS_OFFSET + size_of::<abi::Settings>();
    section.get_mut(range).context("the object's .rodata is too short")?.copy_from_slice(settings.as_bytes());
    Ok(())
}

/// Takes over a pinned map if it has the same shape; true if so.
fn take_over(map: &mut OpenMapMut<'_>, name: &str, pins: &Pins) -> Result<bool> {
    let path = pins.map(name);
    if !path.exists() {
        return Ok(false);
    }
    let pinned =
        MapHandle::from_pinned_path(&path).with_context(|| format!("opening the pin {}", path.display()))?;
    let is_compatible = pinned.map_type() == map.map_type()
        && pinned.key_size() == map.key_size()
        && pinned.value_size() == map.value_size();
    if !is_compatible {
        tracing::warn!(map = name, "the pinned map has another shape: starting with a new one");
        std::fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
        return Ok(false);
    }
    if pinned.max_entries() != map.max_entries() {
        tracing::warn!(
            map = name,
            pinned = pinned.max_entries(),
            wanted = map.max_entries(),
            "keeping the size of the pinned map; the new one holds after a reboot or `weir uninstall`"
        );
        map.set_max_entries(pinned.max_entries())?;
    }
    map.reuse_fd(std::os::fd::AsFd::as_fd(&pinned)).with_context(|| format!("taking over map {name}"))?;
    Ok(true)
}

/// Loads what `prepare` opened.
pub(super) fn load_object(object: OpenObject) -> Result<Object> {
    object.load().map_err(with_messages).context("loading the BPF programs")
}

fn pin_new_maps(object: &mut Object, pins: &Pins, reused: &[String]) -> Result<()> {
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if !is_private(&name) && !reused.contains(&name) {
            map.pin(pins.map(&name)).map_err(with_messages).with_context(|| format!("pinning map {name}"))?;
        }
    }
    Ok(())
}

thread_local! {
    /// libbpf's warnings of this thread since they were last taken.
    static MESSAGES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Warnings that are kept: a verifier's log ends with what matters.
const MESSAGES_KEPT: usize = 24;

/// libbpf prints to stderr by default; here its warnings become part of errors.
pub(super) fn collect_libbpf_messages() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        set_print(Some((PrintLevel::Info, |level, message| {
            tracing::debug!(target: "libbpf", message = message.trim_end());
            if matches!(level, PrintLevel::Warn) {
                MESSAGES.with_borrow_mut(|messages| {
                    messages.extend(message.lines().map(str::to_owned));
                    let surplus = messages.len().saturating_sub(MESSAGES_KEPT);
                    messages.drain(..surplus);
                });
            }
        })));
    });
    MESSAGES.with_borrow_mut(Vec::clear);
}

/// Puts what libbpf said before it failed into the error.
pub(super) fn with_messages(error: libbpf_rs::Error) -> anyhow::Error {
    let messages = MESSAGES.with_borrow_mut(std::mem::take);
    if messages.is_empty() { error.into() } else { anyhow!("{error}; libbpf said:\n{}", messages.join("\n")) }
}
