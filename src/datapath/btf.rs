//! Reads BTF, the kernel's own description of types: which fields a row of a map has, and where.
//!
//! A pinned map carries the BTF of the program that made it. So an agent can read rows of a map
//! whose layout none of its own structs has.

use std::collections::HashMap;
use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{AsRawLibbpf, MapCore, MapHandle, OpenMap, OpenObject, libbpf_sys};

/// How the bytes of a type are to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// An integer or an enum, of 1 to 16 bytes.
    Integer { size: u32, is_network_order: bool },
    /// `count` elements, one behind the other.
    Array { of: Box<Layout>, count: u32 },
    /// A struct or a union. Members without a name are replaced by their own fields.
    Struct { name: String, size: u32, fields: Vec<Field> },
}

/// A field of a struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// Its name in C.
    pub(super) name: String,
    /// The first of its bytes.
    pub(super) offset: u32,
    /// Of its bytes.
    pub(super) layout: Layout,
}

/// The layout of a map's rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// Of the key.
    pub(super) key: Layout,
    /// Of the value.
    pub(super) value: Layout,
}

impl Layout {
    /// Bytes of a value.
    pub(super) fn size(&self) -> u32 {
        match self {
            Self::Integer { size, .. } | Self::Struct { size, .. } => *size,
            Self::Array { of, count } => of.size() * count,
        }
    }

    /// The field of this name; of a struct only.
    pub(super) fn field(&self, name: &str) -> Option<&Field> {
        match self {
            Self::Struct { fields, .. } => fields.iter().find(|field| field.name == name),
            Self::Integer { .. } | Self::Array { .. } => None,
        }
    }
}

/// The kinds of types that are looked at, with their numbers in BTF.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const POINTER: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Words of a type's head: name, kind and count, size or type.
const HEAD_WORDS: usize = 3;
/// The magic number of BTF in the byte order of this machine.
const MAGIC: u32 = 0xeb9f;
/// No type of ours is nested so deep: the BTF is damaged.
const DEEPEST: u32 = 16;

/// A type as it stands in the BTF.
struct Type<'a> {
    name: u32,
    kind: u32,
    /// Size in bytes, or the number of the type that it refers to.
    size_or_type: u32,
    has_bit_fields: bool,
    /// What follows the head.
    rest: &'a [u32],
}

/// Constants of an enum, by name.
#[cfg(test)]
pub(super) type Constants = Vec<(String, u32)>;

/// All types of one BTF.
pub(super) struct Btf {
    words: Vec<u32>,
    /// Where each type begins, in words; number 0 is `void`.
    begins: Vec<usize>,
    strings: Vec<u8>,
}

impl Btf {
    /// Parses raw BTF in the byte order of this machine.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let word = |at: usize| -> Result<u32> {
            let four = bytes.get(at..at + 4).context("the BTF is cut off")?;
            Ok(u32::from_ne_bytes(four.try_into()?))
        };
        ensure!(word(0)? & 0xffff == MAGIC, "this is no BTF of this machine's byte order");
        let header = word(4)? as usize;
        let section = |offset: usize| -> Result<&[u8]> {
            let begin = header + word(offset)? as usize;
            bytes.get(begin..begin + word(offset + 4)? as usize).context("the BTF is cut off")
        };
        let words: Vec<u32> =
            section(8)?.as_chunks::<4>().0.iter().map(|four| u32::from_ne_bytes(*four)).collect();
        let strings = section(16)?.to_vec();
        let mut begins = vec![0];
        let mut at = 0;
        while at < words.len() {
            begins.push(at);
            let info = words.get(at + 1).context("the BTF is cut off")?;
            at += HEAD_WORDS + words_of(info >> 24 & 0x1f, (info & 0xffff) as usize);
        }
        Ok(Self { words, begins, strings })
    }

    /// The layout of a type, by its number.
    pub(super) fn layout(&self, id: u32) -> Result<Layout> {
        self.layout_below(id, DEEPEST)
    }

    /// Every named enum: its size and its constants.
    #[cfg(test)]
    pub(super) fn enums(&self) -> Result<Vec<(String, Constants)>> {
        let mut enums = Vec::new();
        for id in 1..self.begins.len() {
            let of = self.of(id as u32)?;
            if of.kind == kind::ENUM && of.name != 0 {
                let constants = of.rest.chunks_exact(2).map(|pair| (self.name(pair[0]), pair[1]));
                enums.push((self.name(of.name), constants.collect()));
            }
        }
        Ok(enums)
    }

    /// The number of the struct of this name.
    #[cfg(test)]
    pub(super) fn struct_id(&self, name: &str) -> Option<u32> {
        let is_it =
            |id: &u32| self.of(*id).is_ok_and(|of| of.kind == kind::STRUCT && self.name(of.name) == name);
        (1..self.begins.len() as u32).find(is_it)
    }

    fn layout_below(&self, id: u32, depth: u32) -> Result<Layout> {
        ensure!(depth > 0, "types are nested too deep");
        let of = self.of(id)?;
        match of.kind {
            kind::INT | kind::ENUM | kind::ENUM64 => {
                Ok(Layout::Integer { size: of.size_or_type, is_network_order: false })
            }
            kind::POINTER => Ok(Layout::Integer { size: 8, is_network_order: false }),
            kind::TYPEDEF => {
                let layout = self.layout_below(of.size_or_type, depth - 1)?;
                let is_big_endian = self.name(of.name).starts_with("__be");
                Ok(match layout {
                    Layout::Integer { size, .. } if is_big_endian => {
                        Layout::Integer { size, is_network_order: true }
                    }
                    layout => layout,
                })
            }
            kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                self.layout_below(of.size_or_type, depth - 1)
            }
            kind::ARRAY => {
                let [element, _, count] = *of.rest else { bail!("an array without its element") };
                Ok(Layout::Array { of: Box::new(self.layout_below(element, depth - 1)?), count })
            }
            kind::STRUCT | kind::UNION => Ok(Layout::Struct {
                name: self.name(of.name),
                size: of.size_or_type,
                fields: self.fields(&of, depth)?,
            }),
            other => bail!("a row has a type of kind {other}"),
        }
    }

    fn fields(&self, of: &Type<'_>, depth: u32) -> Result<Vec<Field>> {
        let mut fields = Vec::new();
        for member in of.rest.chunks_exact(3) {
            ensure!(!of.has_bit_fields && member[2].is_multiple_of(8), "a row has a bit field");
            let (name, offset) = (self.name(member[0]), member[2] / 8);
            match self.layout_below(member[1], depth - 1)? {
                Layout::Struct { fields: inner, .. } if name.is_empty() => fields
                    .extend(inner.into_iter().map(|field| Field { offset: offset + field.offset, ..field })),
                layout => fields.push(Field { name, offset, layout }),
            }
        }
        Ok(fields)
    }

    fn of(&self, id: u32) -> Result<Type<'_>> {
        let begin = self.begins.get(id as usize).filter(|_| id != 0);
        let begin = *begin.with_context(|| format!("the BTF has no type {id}"))?;
        let head = self.words.get(begin..begin + HEAD_WORDS).context("the BTF is cut off")?;
        let kind = head[1] >> 24 & 0x1f;
        let rest = begin + HEAD_WORDS..begin + HEAD_WORDS + words_of(kind, (head[1] & 0xffff) as usize);
        Ok(Type {
            name: head[0],
            kind,
            size_or_type: head[2],
            has_bit_fields: matches!(kind, kind::STRUCT | kind::UNION) && head[1] >> 31 != 0,
            rest: self.words.get(rest).context("the BTF is cut off")?,
        })
    }

    fn name(&self, offset: u32) -> String {
        let from = self.strings.get(offset as usize..).unwrap_or_default();
        let name = from.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// Words behind a type's head, of `count` members.
fn words_of(kind: u32, count: usize) -> usize {
    match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 1,
        kind::ARRAY => 3,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 3 * count,
        kind::ENUM | kind::FUNC_PROTO => 2 * count,
        _ => 0,
    }
}

/// What a map of the object that is being opened will hold; `None` where it has no BTF (a ring buffer).
pub(super) fn row_of_object(btf: &Btf, map: &OpenMap<'_>) -> Result<Option<Row>> {
    let map = map.as_libbpf_object().as_ptr();
    // SAFETY: the map is open.
    let ids =
        unsafe { (libbpf_sys::bpf_map__btf_key_type_id(map), libbpf_sys::bpf_map__btf_value_type_id(map)) };
    row(btf, ids)
}

/// What a map of the kernel holds; `None` where nobody has said so.
pub(super) fn row_of_kernel(map: &MapHandle, known: &mut Known) -> Result<Option<Row>> {
    let info = map.info().context("reading a map's description")?.info;
    if info.btf_id == 0 {
        return Ok(None);
    }
    let btf = match known.0.entry(info.btf_id) {
        std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
        std::collections::hash_map::Entry::Vacant(place) => place.insert(of_kernel(info.btf_id)?),
    };
    row(btf, (info.btf_key_type_id, info.btf_value_type_id))
}

/// BTF of the kernel that was read already, by its number: most maps share one.
#[derive(Default)]
pub(super) struct Known(HashMap<u32, Btf>);

/// The types of an object that is open.
pub(super) fn of_object(object: &OpenObject) -> Result<Btf> {
    // SAFETY: the object is open, and owns its BTF.
    let btf = NonNull::new(unsafe { libbpf_sys::bpf_object__btf(object.as_libbpf_object().as_ptr()) });
    parse_raw(btf.context("the BPF object has no BTF")?)
}

fn of_kernel(id: u32) -> Result<Btf> {
    // SAFETY: takes a number only; the result is ours to free.
    let btf = NonNull::new(unsafe { libbpf_sys::btf__load_from_kernel_by_id(id) });
    let btf = btf.with_context(|| format!("reading BTF {id}: {}", io::Error::last_os_error()))?;
    let parsed = parse_raw(btf);
    // SAFETY: it is ours, and nobody else has it.
    unsafe { libbpf_sys::btf__free(btf.as_ptr()) };
    parsed
}

fn parse_raw(btf: NonNull<libbpf_sys::btf>) -> Result<Btf> {
    let mut size = 0;
    // SAFETY: the BTF is there while its owner is.
    let raw = NonNull::new(unsafe { libbpf_sys::btf__raw_data(btf.as_ptr(), &mut size) }.cast_mut());
    let raw: NonNull<c_void> = raw.context("libbpf has no raw BTF")?;
    // SAFETY: libbpf says that there are so many bytes, and nothing changes them meanwhile.
    Btf::parse(unsafe { std::slice::from_raw_parts(raw.as_ptr().cast::<u8>(), size as usize) })
}

fn row(btf: &Btf, (key, value): (u32, u32)) -> Result<Option<Row>> {
    if key == 0 || value == 0 {
        return Ok(None);
    }
    Ok(Some(Row { key: btf.layout(key)?, value: btf.layout(value)? }))
}

/// The number that the kernel has for a map.
pub(super) fn map_id(map: &MapHandle) -> Result<u32> {
    Ok(map.info().context("reading a map's description")?.info.id)
}
