//! Takes over the maps of a former process with their content.
//!
//! A pinned map of the same shape and size is used as it is. One that writers of
//! ours fill and that is to grow is copied into a new, larger one; one that the
//! programs fill keeps its size, because entries come while it would be copied.

use std::fs;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, Object, OpenMapMut};

use super::map::walk;
use super::messages::with_messages;
use super::pins::Pins;

/// Maps that are empty or wrong when nobody but the programs has written them.
pub(super) const GROWING: [&str; 9] = [
    "addresses",
    "backends",
    "maglev",
    "policy_peers",
    "policy_rules",
    "prefixes",
    "services",
    "slots",
    "source_ranges",
];

/// Where a map's content is to come from.
pub(super) enum Origin {
    /// There is no pin: the map starts empty.
    New,
    /// The pinned map itself is used.
    Pinned,
    /// The pinned map is copied into a larger one.
    Copied(MapHandle),
}

/// Decides what becomes of a pinned map, and uses it if it fits.
pub(super) fn take_over(map: &mut OpenMapMut<'_>, name: &str, pins: &Pins) -> Result<Origin> {
    let path = pins.map(name);
    if !path.exists() {
        return Ok(Origin::New);
    }
    let pinned =
        MapHandle::from_pinned_path(&path).with_context(|| format!("opening the pin {}", path.display()))?;
    let is_compatible = pinned.map_type() == map.map_type()
        && pinned.key_size() == map.key_size()
        && pinned.value_size() == map.value_size();
    if !is_compatible {
        tracing::warn!(map = name, "the pinned map has another shape: starting with a new one");
        fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
        return Ok(Origin::New);
    }
    let (size, wanted) = (pinned.max_entries(), map.max_entries());
    if wanted > size && GROWING.contains(&name) {
        tracing::info!(map = name, from = size, to = wanted, "growing a map");
        return Ok(Origin::Copied(pinned));
    }
    if wanted != size {
        tracing::warn!(map = name, size, wanted, "the pinned map keeps its size until its pin is removed");
        map.set_max_entries(size)?;
    }
    map.reuse_fd(pinned.as_fd()).with_context(|| format!("taking over map {name}"))?;
    Ok(Origin::Pinned)
}

/// Fills the maps that grow, and pins all that are new. A pin is replaced by
/// renaming: at every moment it leads to a map with the whole content.
pub(super) fn pin_new_maps(object: &mut Object, pins: &Pins, origins: &[(String, Origin)]) -> Result<()> {
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        let Some((_, origin)) = origins.iter().find(|(known, _)| *known == name) else { continue };
        let pin = match origin {
            Origin::Pinned => continue,
            Origin::New => pins.map(&name),
            Origin::Copied(old) => {
                copy_rows(old, &map).with_context(|| format!("copying map {name}"))?;
                let new = pins.map(&format!("{name}_new"));
                if new.exists() {
                    fs::remove_file(&new).with_context(|| format!("removing the pin {}", new.display()))?;
                }
                new
            }
        };
        map.pin(&pin).map_err(with_messages).with_context(|| format!("pinning map {name}"))?;
        if pin != pins.map(&name) {
            fs::rename(&pin, pins.map(&name)).with_context(|| format!("replacing the pin of map {name}"))?;
        }
    }
    Ok(())
}

fn copy_rows(from: &MapHandle, to: &impl MapCore) -> Result<()> {
    if from.map_type() == MapType::LpmTrie {
        for key in from.keys() {
            if let Some(value) = from.lookup(&key, MapFlags::ANY)? {
                to.update(&key, &value, MapFlags::ANY)?;
            }
        }
        return Ok(());
    }
    let mut copied = Ok(());
    walk(from, from.value_size() as usize, |key, value| {
        if copied.is_ok() {
            copied = to.update(key, value, MapFlags::ANY);
        }
    })?;
    Ok(copied?)
}
