//! Holds the layout of the contract against `ABI_VERSION`.
//!
//! `bpf/abi.layout` has a line for each struct, enum and pinned map of the contract, and a first
//! line with the version. A layout of a version that was released never changes; until then the
//! file follows the code: `UPDATE=1 cargo test --lib contract`. CONTRIBUTING.md says how that is
//! decided.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::ObjectBuilder;

use super::OBJECT;
use super::btf::{self, Btf, Layout};
use super::load::is_private;
use super::types::abi_version;

const FILE: &str = "bpf/abi.layout";

/// What the file says.
struct Recorded {
    version: u32,
    is_released: bool,
    lines: BTreeSet<String>,
}

fn recorded() -> Result<Recorded> {
    let text = fs::read_to_string(Path::new(FILE)).with_context(|| format!("reading {FILE}"))?;
    let (first, rest) = text.split_once('\n').context("the first line")?;
    let mut words = first.split(' ').skip(1);
    let version = words.next().and_then(|number| number.parse().ok()).context("version NUMBER")?;
    let is_released = words.next() == Some("released");
    Ok(Recorded { version, is_released, lines: rest.lines().map(str::to_owned).collect() })
}

/// The contract as the object has it: one line a struct, enum or map, in the order of the lines.
fn present() -> Result<BTreeSet<String>> {
    let object = ObjectBuilder::default().open_memory(OBJECT)?;
    let types = btf::of_object(&object)?;
    let mut structs = BTreeMap::new();
    let mut lines = BTreeSet::new();
    let exported = types.struct_id("exported_types").context("exported_types")?;
    if let Layout::Struct { fields, .. } = types.layout(exported)? {
        fields.iter().for_each(|field| collect(&field.layout, &mut structs));
    }
    for map in object.maps() {
        let name = map.name().to_string_lossy().into_owned();
        if is_private(&name) {
            continue;
        }
        let (kind, flags) = (map.map_type(), map_flags(&map));
        let rows = btf::row_of_object(&types, &map)?.map(|row| {
            collect(&row.key, &mut structs);
            collect(&row.value, &mut structs);
            format!(": {} -> {}", word(&row.key), word(&row.value))
        });
        lines.insert(format!("map {name} {kind:?} flags={flags}{}", rows.unwrap_or_default()));
    }
    lines.extend(structs.into_values());
    lines.extend(enums(&types)?);
    Ok(lines)
}

fn map_flags(map: &libbpf_rs::OpenMap<'_>) -> u32 {
    use libbpf_rs::AsRawLibbpf;
    // SAFETY: the map is open.
    unsafe { libbpf_rs::libbpf_sys::bpf_map__map_flags(map.as_libbpf_object().as_ptr()) }
}

/// Notes every struct in it by its name.
fn collect(layout: &Layout, structs: &mut BTreeMap<String, String>) {
    match layout {
        Layout::Integer { .. } => {}
        Layout::Array { of, .. } => collect(of, structs),
        Layout::Struct { name, size, fields } => {
            let listed = fields
                .iter()
                .map(|field| format!(" {}@{}:{}", field.name, field.offset, word(&field.layout)));
            structs.insert(name.clone(), format!("struct {name} {size}{}", listed.collect::<String>()));
            fields.iter().for_each(|field| collect(&field.layout, structs));
        }
    }
}

fn word(layout: &Layout) -> String {
    match layout {
        Layout::Integer { size, is_network_order: true } => format!("be{}", size * 8),
        Layout::Integer { size, .. } => format!("u{}", size * 8),
        Layout::Array { of, count } => format!("{}[{count}]", word(of)),
        Layout::Struct { name, .. } => name.clone(),
    }
}

/// The enums of abi.h; not the version, which the first line has.
fn enums(types: &Btf) -> Result<Vec<String>> {
    let ours = names("enum ")?;
    let listed = types.enums()?.into_iter().filter(|(name, _)| ours.contains(name) && name != "abi_version");
    Ok(listed
        .map(|(name, constants)| {
            let constants = constants.into_iter().map(|(name, value)| format!(" {name}={value}"));
            format!("enum {name}{}", constants.collect::<String>())
        })
        .collect())
}

/// The names that abi.h and its parts define after this word.
fn names(kind: &str) -> Result<BTreeSet<String>> {
    let mut text = fs::read_to_string("bpf/abi.h")?;
    for part in fs::read_dir("bpf/abi")? {
        text.push_str(&fs::read_to_string(part?.path())?);
    }
    let found = text.lines().filter_map(|line| line.strip_prefix(kind)?.strip_suffix(" {"));
    Ok(found.map(str::to_owned).collect())
}

/// The lines of the file that the contract has no more. An enum may have got more constants: a row
/// that was written before has none of them.
fn changed<'a>(recorded: &'a BTreeSet<String>, present: &BTreeSet<String>) -> Vec<&'a String> {
    let is_kept = |line: &String| {
        present.contains(line)
            || line.starts_with("enum ") && present.iter().any(|now| has_all_words(now, line))
    };
    recorded.iter().filter(|line| !is_kept(line)).collect()
}

fn has_all_words(now: &str, before: &str) -> bool {
    let now: BTreeSet<_> = now.split(' ').collect();
    before.split(' ').all(|word| now.contains(word))
}

#[test]
fn a12_a_changed_layout_has_another_abi_version() -> Result<()> {
    let (version, present) = (abi_version::ABI_VERSION.0, present()?);
    let is_updating = std::env::var_os("UPDATE").is_some();
    let before = recorded();
    if is_updating && before.as_ref().is_ok_and(|before| !before.is_released || before.version != version) {
        let lines = present.iter().map(|line| format!("{line}\n")).collect::<String>();
        fs::write(FILE, format!("version {version} unreleased\n{lines}"))?;
    }
    let recorded = recorded()?;
    let changed = changed(&recorded.lines, &present);
    let added = not_listed(&present, &recorded.lines);
    let what_to_do = match recorded.is_released {
        true if recorded.version == version => "raise ABI_VERSION in bpf/abi.h, then run",
        _ => "run",
    };
    assert!(
        recorded.version == version && changed.is_empty() && added.is_empty(),
        "the layout of the contract is not what {FILE} has for version {}: {what_to_do} \
         `UPDATE=1 cargo test --lib contract`, and commit the file\nwas: {changed:#?}\nnew: {added:#?}",
        recorded.version,
    );
    Ok(())
}

/// Structs, enums and maps that the file does not name. New constants of an enum may wait for the next update.
fn not_listed<'a>(present: &'a BTreeSet<String>, recorded: &BTreeSet<String>) -> Vec<&'a String> {
    let name = |line: &str| line.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ");
    let known: BTreeSet<_> = recorded.iter().map(|line| name(line)).collect();
    present.iter().filter(|line| !known.contains(&name(line))).collect()
}

#[test]
fn the_object_knows_every_type_of_the_contract() -> Result<()> {
    let present = present()?;
    for kind in ["struct ", "enum "] {
        for name in names(kind)?.iter().filter(|name| *name != "abi_version") {
            let begin = format!("{kind}{name} ");
            assert!(
                present.iter().any(|line| line.starts_with(&begin)),
                "{kind}{name} of abi.h is in no map: add it to struct exported_types in bpf/config.h"
            );
        }
    }
    Ok(())
}

#[test]
fn a_field_that_moves_is_a_change_and_a_new_constant_is_none() {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<BTreeSet<_>>();
    let before = lines(&["enum route A=1 B=2", "struct nat 8 port@0:be16 addr@4:u32"]);
    let more = lines(&["enum route A=1 B=2 C=3", "struct nat 8 port@0:be16 addr@4:u32"]);
    assert!(changed(&before, &more).is_empty());
    let moved = lines(&["enum route A=1 B=2", "struct nat 8 addr@0:u32 port@4:be16"]);
    assert_eq!(changed(&before, &moved), ["struct nat 8 port@0:be16 addr@4:u32"]);
    let renumbered = lines(&["enum route A=2 B=1", "struct nat 8 port@0:be16 addr@4:u32"]);
    assert_eq!(changed(&before, &renumbered), ["enum route A=1 B=2"]);
}
