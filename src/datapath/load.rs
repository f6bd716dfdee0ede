//! Loads the object once per agent start: pinned maps are taken over with their
//! content, settings go into `.rodata` before the verifier sees the programs.

use std::collections::BTreeMap;
use std::mem::size_of;

use anyhow::{Context, Result, bail};
use libbpf_rs::{Object, ObjectBuilder, OpenMapMut, OpenObject, ProgramAttachType};

use super::OBJECT;
use super::abi::{self, Plain, SETTINGS_OFFSET};
use super::attach::{ENCRYPTED_PROGRAM, TC_PROGRAMS};
use super::carry::Carrier;
use super::messages::{collect_libbpf_messages, with_messages};
use super::pins::Pins;
use super::probe::{self, Features};
use super::quota::Limits;
use super::reuse::{Origin, Reuse};
use super::settings::{AttachMode, MapSizes, Settings};

/// What loading made.
pub(super) struct Loaded {
    pub(super) object: Object,
    pub(super) features: Features,
    pub(super) limits: Limits,
    /// What is to be carried over when the programs are replaced.
    pub(super) carriers: Vec<Carrier>,
}

/// Opens, sizes, fills in and loads the object; takes over and makes pins where there are any.
pub(super) fn load(
    settings: &Settings,
    sizes: &MapSizes,
    attach: AttachMode,
    pins: Option<&Pins>,
) -> Result<Loaded> {
    let mut features = probe::probe(attach)?;
    let mut reuse = pins.map(|pins| Reuse::new(pins, &open()?)).transpose()?;
    let mut settings = settings.clone();
    if let Some(reuse) = &mut reuse {
        settings.nat_known = reuse.known_nat_ports().context("reading the ports of running flows")?;
    }
    let settings = &settings;
    let opened = prepare(settings, sizes, reuse.as_mut(), &features)?;
    let limits = opened.limits;
    let (mut object, origins) = match load_object(opened.object) {
        Ok(object) => (object, opened.origins),
        Err(error) if features.not_loaded.is_empty() => {
            // Perhaps only what is optional does not load.
            let reason = crate::error::chain(&error);
            features.leave_out_optional(&reason);
            let opened = prepare(settings, sizes, reuse.as_mut(), &features)?;
            let object = load_object(opened.object).map_err(|_| explain(error, &features.kernel))?;
            tracing::warn!(%reason, "leaving out the programs that do not load here");
            (object, opened.origins)
        }
        Err(error) => return Err(explain(error, &features.kernel)),
    };
    let carriers = match &mut reuse {
        Some(reuse) => reuse.pin_new_maps(&mut object, origins)?,
        None => Vec::new(),
    };
    Ok(Loaded { object, features, limits, carriers })
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
    /// What becomes of pinned maps, by name.
    origins: Vec<(String, Origin)>,
    limits: Limits,
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
    mut reuse: Option<&mut Reuse<'_>>,
    features: &Features,
) -> Result<Opened> {
    let mut object = open()?;
    if let Some(unknown) = sizes.0.keys().find(|size| object.maps().all(|map| map.name() != size.as_str())) {
        bail!("there is no map {unknown} to set the size of");
    }
    let mut origins = Vec::new();
    let mut rows = BTreeMap::new();
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if is_private(&name) {
            continue;
        }
        if let Some(&entries) = sizes.0.get(&name) {
            map.set_max_entries(entries).with_context(|| format!("setting the size of map {name}"))?;
        }
        if let Some(reuse) = reuse.as_mut() {
            let origin = reuse.take_over(&mut map, &name)?;
            origins.push((name.clone(), origin));
        }
        rows.insert(name, map.max_entries());
    }
    let limits = Limits::new(&settings.quotas, &settings.nat_ports, &rows);
    let section = object.maps_mut().find(|map| map.name().to_string_lossy().ends_with(".rodata"));
    let mut section = section.context("the object has no .rodata")?;
    fill_settings(&mut section, settings.encode(features.jiffies_per_second, &limits))?;
    for mut program in object.progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        let is_useless = name == ENCRYPTED_PROGRAM && settings.encrypt_ifindex.is_none();
        if is_useless || features.not_loaded.iter().any(|(left_out, _)| *left_out == name) {
            program.set_autoload(false);
        }
        if !features.has_tcx && TC_PROGRAMS.contains(&name.as_str()) {
            // Kernels without tcx know no such attach type; 0 is what `SEC("tc")` has.
            program.set_attach_type(ProgramAttachType::CgroupInetIngress);
        }
    }
    Ok(Opened { object, origins, limits })
}

/// Sections of the object (`.rodata`, `.bss`) and the programs' work space belong to one load.
pub(super) fn is_private(map: &str) -> bool {
    let private = [
        "ended",
        "gone_backends",
        "node_served",
        "quota_pending",
        "recounts",
        "routes",
        "scratch",
        "host_flows",
        "shares",
        "waiting",
    ];
    map.contains('.') || private.contains(&map)
}

fn fill_settings(map: &mut OpenMapMut<'_>, settings: abi::Settings) -> Result<()> {
    let section = map.initial_value_mut().context("the object has no .rodata")?;
    let range = SETTINGS_OFFSET..SETTINGS_OFFSET + size_of::<abi::Settings>();
    section.get_mut(range).context("the object's .rodata is too short")?.copy_from_slice(settings.as_bytes());
    Ok(())
}

/// Loads what `prepare` opened.
pub(super) fn load_object(object: OpenObject) -> Result<Object> {
    object.load().map_err(with_messages).context("loading the BPF programs")
}
