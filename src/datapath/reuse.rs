//! Takes over the maps of a former process with their content.
//!
//! A pinned map of the same layout and size is used as it is. Of another size: one that writers of
//! ours fill and that is to grow is copied into a new, larger one; one that the programs fill keeps
//! its size, because entries come while it would be copied.
//!
//! Of another layout, or of another ABI version: what our writers fill is copied, so that the old
//! programs keep their own tables until they are replaced. What the programs fill is shared where
//! the layout is the same; else a `Carrier` carries the rows over when the programs are replaced.

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle, MapType, Object, OpenMapMut, OpenObject};

use super::btf::{self, Known, Row};
use super::carry::{Carrier, Conversion, Forgotten};
use super::map::walk;
use super::messages::with_messages;
use super::pins::{Pins, maps, other_versions};
use super::types::connection_kind;

/// Tables that the agent fills: empty or wrong when nobody but the programs has written them.
const TABLES: [&str; 13] = [
    "addresses",
    "backends",
    "egress_pods",
    "egress_rules",
    "endpoints",
    "maglev",
    "node_state",
    "policy_peers",
    "policy_rules",
    "prefixes",
    "services",
    "slots",
    "source_ranges",
];
/// Tables whose capacity the agent may raise.
pub(super) const GROWING: [&str; 11] = [
    "addresses",
    "backends",
    "egress_pods",
    "egress_rules",
    "maglev",
    "policy_peers",
    "policy_rules",
    "prefixes",
    "services",
    "slots",
    "source_ranges",
];
/// Tables that name one another's rows by ids: all are copied, or all are new.
const OF_SERVICES: [&str; 5] = ["backends", "maglev", "services", "slots", "source_ranges"];
/// What the programs fill, and running connections need.
const LIVE: [&str; 3] = ["connections", "l7_flows", "nat"];
/// What another ABI version's programs fill, and may be used together with them.
const SHARED: [&str; 8] =
    ["connections", "fragments", "l7_flows", "metrics", "nat", "nat_searches", "quota_totals", "usage"];
/// The same; the rows name services by their ids.
const SHARED_BY_ID: [&str; 3] = ["affinity", "socket_service", "socket_services"];

/// `DIRECTION_INGRESS`: rows of `nat` for the way back, whose key has the node's port.
const NAT_BACK: u8 = 1;

/// Where a map's content is to come from.
pub(super) enum Origin {
    /// There is no pin: the map starts empty.
    New,
    /// The map that is pinned under this version is used.
    Pinned,
    /// A map of another version is used, which has no pin under this one yet.
    Shared,
    /// Rows of this map are copied into a new one.
    Copied(Box<MapHandle>, Conversion),
}

/// Decides what becomes of pinned maps.
pub(super) struct Reuse<'a> {
    pins: &'a Pins,
    /// Layouts of the maps of the object that is being opened.
    rows: BTreeMap<String, Row>,
    known: Known,
}

impl<'a> Reuse<'a> {
    /// `object` is any instance of ours that is open.
    pub(super) fn new(pins: &'a Pins, object: &OpenObject) -> Result<Self> {
        let types = btf::of_object(object)?;
        let mut rows = BTreeMap::new();
        for map in object.maps() {
            let row = btf::row_of_object(&types, &map)?;
            rows.extend(row.map(|row| (map.name().to_string_lossy().into_owned(), row)));
        }
        Ok(Self { pins, rows, known: Known::default() })
    }

    /// Decides where the map's content comes from, and uses the pinned map if that fits.
    pub(super) fn take_over(&mut self, map: &mut OpenMapMut<'_>, name: &str) -> Result<Origin> {
        if let Some(pinned) = open_pin(&self.pins.map(name))? {
            return self.take_over_own(map, name, pinned);
        }
        for version in other_versions(self.pins.root())? {
            if let Some(pinned) = open_pin(&maps(&version).join(name))? {
                return self.take_over_other(map, name, &version, pinned);
            }
        }
        Ok(Origin::New)
    }

    /// The ports that rows of the pinned `nat` have given to flows, from the lowest to the highest.
    pub(super) fn known_nat_ports(&mut self) -> Result<Option<RangeInclusive<u16>>> {
        let mut paths = vec![self.pins.map("nat")];
        paths.extend(other_versions(self.pins.root())?.iter().map(|version| maps(version).join("nat")));
        let mut known: Option<RangeInclusive<u16>> = None;
        for path in paths {
            let Some(pinned) = open_pin(&path)? else { continue };
            let Some(row) = btf::row_of_kernel(&pinned, &mut self.known)? else { continue };
            let at = |name: &str| row.key.field(name).map(|field| field.offset as usize);
            let (Some(port), Some(direction)) = (at("local_port"), at("direction")) else { continue };
            walk(&pinned, pinned.value_size() as usize, |key, _| {
                if let (Some([high, low]), Some(&NAT_BACK)) = (key.get(port..port + 2), key.get(direction)) {
                    let port = u16::from_be_bytes([*high, *low]);
                    let range = known.take().unwrap_or(port..=port);
                    known = Some(port.min(*range.start())..=port.max(*range.end()));
                }
            })?;
        }
        Ok(known)
    }

    fn take_over_own(&mut self, map: &mut OpenMapMut<'_>, name: &str, pinned: MapHandle) -> Result<Origin> {
        if !self.fits(map, name, &pinned)? {
            let root = self.pins.root();
            let is_wanted = !OF_SERVICES.contains(&name) || self.keeps_services(root)?;
            let rows = if is_wanted { self.conversion(map.map_type(), name, &pinned)? } else { None };
            return match rows {
                Some(rows) => Ok(Origin::Copied(Box::new(pinned), rows)),
                None => {
                    tracing::warn!(map = name, "the pinned map has another shape: starting with a new one");
                    let path = self.pins.map(name);
                    fs::remove_file(&path).with_context(|| format!("removing the pin {}", path.display()))?;
                    Ok(Origin::New)
                }
            };
        }
        let (size, wanted) = (pinned.max_entries(), map.max_entries());
        if wanted > size && GROWING.contains(&name) {
            tracing::info!(map = name, from = size, to = wanted, "growing a map");
            let rows = Conversion::same(pinned.key_size(), pinned.value_size());
            return Ok(Origin::Copied(Box::new(pinned), rows));
        }
        share(map, name, &pinned)?;
        Ok(Origin::Pinned)
    }

    /// `version` is the other version's directory.
    fn take_over_other(
        &mut self,
        map: &mut OpenMapMut<'_>,
        name: &str,
        version: &Path,
        pinned: MapHandle,
    ) -> Result<Origin> {
        let names_services = SHARED_BY_ID.contains(&name);
        let needs_services = names_services || OF_SERVICES.contains(&name);
        if needs_services && !self.keeps_services(version)? {
            return Ok(Origin::New);
        }
        let forgotten = if name == "connections" { self.forgotten(version)? } else { None };
        let may_share = names_services || SHARED.contains(&name);
        if may_share && forgotten.is_none() && self.fits(map, name, &pinned)? {
            share(map, name, &pinned)?;
            return Ok(Origin::Shared);
        }
        let rows = self.conversion(map.map_type(), name, &pinned)?;
        let rows = rows.map(|rows| forgotten.into_iter().fold(rows, Conversion::forget));
        Ok(rows.map_or(Origin::New, |rows| Origin::Copied(Box::new(pinned), rows)))
    }

    /// What rows of `connections` say of services whose ids nobody knows any more.
    fn forgotten(&mut self, version: &Path) -> Result<Option<Forgotten>> {
        if self.keeps_services(version)? {
            return Ok(None);
        }
        let Some(row) = self.rows.get("connections") else { return Ok(None) };
        let (kind, identities) = (row.key.field("kind"), row.value.field("identity"));
        let (Some(kind), Some(identities)) = (kind, identities) else { return Ok(None) };
        // identity[1]: see service_recall.
        let end = (identities.offset + identities.layout.size()) as usize;
        Ok(Some(Forgotten {
            of: (connection_kind::CONNECTION_SERVICE.0 as u8, kind.offset as usize),
            bytes: end - size_of::<u32>()..end,
        }))
    }

    /// True if the other version's tables of services say all that ours say. Else a set of backends could
    /// look as desired although a field of its rows is missing.
    fn keeps_services(&mut self, version: &Path) -> Result<bool> {
        for name in OF_SERVICES {
            let Some(pinned) = open_pin(&maps(version).join(name))? else { return Ok(false) };
            let rows = self.conversion(pinned.map_type(), name, &pinned)?;
            if !rows.is_some_and(|rows| rows.missing().is_empty()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// True if the pinned map can be used in the place of the other.
    fn fits(&mut self, map: &OpenMapMut<'_>, name: &str, pinned: &MapHandle) -> Result<bool> {
        let has_sizes = pinned.map_type() == map.map_type()
            && pinned.key_size() == map.key_size()
            && pinned.value_size() == map.value_size();
        let old = btf::row_of_kernel(pinned, &mut self.known)?;
        Ok(has_sizes && old.zip(self.rows.get(name)).is_none_or(|(old, new)| old == *new))
    }

    /// How the rows of the pinned map become rows of the other, if they should and can.
    fn conversion(
        &mut self,
        new_type: MapType,
        name: &str,
        pinned: &MapHandle,
    ) -> Result<Option<Conversion>> {
        let is_wanted = TABLES.contains(&name) || LIVE.contains(&name);
        if !is_wanted || pinned.map_type() != new_type {
            return Ok(None);
        }
        let old = btf::row_of_kernel(pinned, &mut self.known)?;
        Ok(old.zip(self.rows.get(name)).map(|(old, new)| Conversion::new(&old, new)))
    }

    /// Fills the tables that are copied, and pins all maps that are new. A pin is replaced by
    /// renaming: at every moment it leads to a map with the whole content. Returns what is to be
    /// carried over when the programs are replaced.
    pub(super) fn pin_new_maps(
        &mut self,
        object: &mut Object,
        origins: Vec<(String, Origin)>,
    ) -> Result<Vec<Carrier>> {
        let mut carriers = Vec::new();
        for (name, origin) in origins {
            let map = object.maps_mut().find(|map| map.name() == name.as_str());
            let mut map = map.with_context(|| format!("the BPF object has no map {name}"))?;
            let handle = MapHandle::try_from(&map).with_context(|| format!("opening map {name}"))?;
            let own = self.pins.map(&name);
            let pin = if own.exists() { self.pins.map(&format!("{name}_new")) } else { own.clone() };
            match origin {
                Origin::Pinned => {
                    carriers.extend(self.unfinished(&name, &handle)?);
                    continue;
                }
                Origin::New | Origin::Shared => {}
                Origin::Copied(old, rows) => {
                    let carrier = Carrier::new(&name, *old, handle, rows);
                    carrier.carry()?;
                    carriers.extend(LIVE.contains(&name.as_str()).then_some(carrier));
                }
            }
            if pin != own && pin.exists() {
                fs::remove_file(&pin).with_context(|| format!("removing the pin {}", pin.display()))?;
            }
            map.pin(&pin).map_err(with_messages).with_context(|| format!("pinning map {name}"))?;
            if pin != own {
                fs::rename(&pin, &own).with_context(|| format!("replacing the pin of map {name}"))?;
            }
        }
        Ok(carriers)
    }

    /// The work that a process left which ended before it had replaced all programs.
    fn unfinished(&mut self, name: &str, new: &MapHandle) -> Result<Option<Carrier>> {
        let Some(row) = self.rows.get(name).cloned().filter(|_| LIVE.contains(&name)) else {
            return Ok(None);
        };
        for version in other_versions(self.pins.root())? {
            let Some(old) = open_pin(&maps(&version).join(name))? else { continue };
            let is_other = btf::map_id(&old)? != btf::map_id(new)? && old.map_type() == new.map_type();
            if let Some(of_old) = btf::row_of_kernel(&old, &mut self.known)?.filter(|_| is_other) {
                let new = MapHandle::try_from(new).context("duplicating a map's descriptor")?;
                let rows = Conversion::new(&of_old, &row);
                let forgotten = if name == "connections" { self.forgotten(&version)? } else { None };
                let rows = forgotten.into_iter().fold(rows, Conversion::forget);
                return Ok(Some(Carrier::new(name, old, new, rows)));
            }
        }
        Ok(None)
    }
}

/// Uses the pinned map, with its size.
fn share(map: &mut OpenMapMut<'_>, name: &str, pinned: &MapHandle) -> Result<()> {
    let (size, wanted) = (pinned.max_entries(), map.max_entries());
    if wanted != size {
        tracing::warn!(map = name, size, wanted, "the pinned map keeps its size until its pin is removed");
        map.set_max_entries(size)?;
    }
    map.reuse_fd(pinned.as_fd()).with_context(|| format!("taking over map {name}"))
}

fn open_pin(path: &Path) -> Result<Option<MapHandle>> {
    if !path.exists() {
        return Ok(None);
    }
    let pinned = MapHandle::from_pinned_path(path);
    Ok(Some(pinned.with_context(|| format!("opening the pin {}", path.display()))?))
}
