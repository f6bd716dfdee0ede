//! Carries the rows of a map into another one of another layout.
//!
//! Both layouts come from BTF, that of the old map from the map itself, so no old struct stays in
//! the code. Fields are matched by name, in structs and arrays likewise. An integer may get another
//! width. A field that the old rows do not have is zero.

use std::ops::Range;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use super::btf::{Field, Layout, Row};
use super::map::walk;

/// The field that says which of two rows of one key is the newer one.
const LAST_SEEN: &str = "last_seen_jiffies";
/// Fields that had another name in a former version: the name now, and the one before.
const RENAMED: [(&str, &str); 1] = [("last_seen_jiffies", "created_jiffies")];
/// How the names of clocks end.
const CLOCK: &str = "_jiffies";
/// Rows that a pass may still find before it is the last one.
const FEW: usize = 64;
/// So many passes are enough: each finds what came during the one before it.
const MOST_PASSES: usize = 4;

/// How rows of one layout become rows of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Conversion {
    key: Vec<Step>,
    value: Vec<Step>,
    key_size: usize,
    value_size: usize,
    /// Where the old and the new value say when they were last seen.
    last_seen: Option<(Range<usize>, Range<usize>)>,
    /// Fields that the old rows do not have.
    missing: Vec<String>,
    /// What is to be zero in certain rows.
    forgotten: Option<Forgotten>,
}

/// Bytes of the new value that are to be zero in rows whose new key has a certain byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Forgotten {
    /// The byte of the key, and where the key has it.
    pub(super) of: (u8, usize),
    /// The bytes of the value.
    pub(super) bytes: Range<usize>,
}

/// Some bytes of a row to be copied, or a number that gets another width.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    from: Range<usize>,
    to: Range<usize>,
    /// A clock: its low bits are a clock, too.
    may_truncate: bool,
}

impl Conversion {
    /// From one layout to the other.
    pub(super) fn new(old: &Row, new: &Row) -> Self {
        let mut missing = Vec::new();
        let (mut key, mut value) = (Vec::new(), Vec::new());
        match_layouts(&old.key, &new.key, (0, 0), "key", &mut key, &mut missing);
        match_layouts(&old.value, &new.value, (0, 0), "value", &mut value, &mut missing);
        Self {
            key,
            value,
            key_size: new.key.size() as usize,
            value_size: new.value.size() as usize,
            last_seen: last_seen(&old.value).zip(last_seen(&new.value)),
            missing,
            forgotten: None,
        }
    }

    /// The same, but for what is to be forgotten.
    pub(super) fn forget(self, forgotten: Forgotten) -> Self {
        Self { forgotten: Some(forgotten), ..self }
    }

    /// Rows stay as they are.
    pub(super) fn same(key_size: u32, value_size: u32) -> Self {
        let all =
            |size: u32| vec![Step { from: 0..size as usize, to: 0..size as usize, may_truncate: false }];
        Self {
            key: all(key_size),
            value: all(value_size),
            key_size: key_size as usize,
            value_size: value_size as usize,
            last_seen: None,
            missing: Vec::new(),
            forgotten: None,
        }
    }

    /// Fields that will be zero, because the old rows do not have them.
    pub(super) fn missing(&self) -> &[String] {
        &self.missing
    }

    /// The row in the new layout; `None` if a number of it has no room there.
    fn row(&self, key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let key = apply(&self.key, key, self.key_size)?;
        let mut value = apply(&self.value, value, self.value_size)?;
        if let Some(Forgotten { of: (byte, at), bytes }) = &self.forgotten
            && key.get(*at) == Some(byte)
        {
            value.get_mut(bytes.clone())?.fill(0);
        }
        Some((key, value))
    }

    /// True if the old row was seen after the new one.
    fn is_newer(&self, old: &[u8], new: &[u8]) -> bool {
        self.last_seen.as_ref().is_some_and(|(in_old, in_new)| {
            number(old.get(in_old.clone()).unwrap_or_default())
                > number(new.get(in_new.clone()).unwrap_or_default())
        })
    }
}

fn last_seen(value: &Layout) -> Option<Range<usize>> {
    let field = former(value, LAST_SEEN)?;
    let begin = field.offset as usize;
    Some(begin..begin + field.layout.size() as usize)
}

/// Notes how the bytes of `new` come from those of `old`; `at` is where the two begin.
fn match_layouts(
    old: &Layout,
    new: &Layout,
    at: (u32, u32),
    path: &str,
    steps: &mut Vec<Step>,
    missing: &mut Vec<String>,
) {
    match (old, new) {
        (
            Layout::Integer { size, is_network_order },
            Layout::Integer { size: new_size, is_network_order: new_order },
        ) if size == new_size || !is_network_order && !new_order => {
            let range = |begin: u32, size: u32| begin as usize..(begin + size) as usize;
            let may_truncate = path.ends_with(CLOCK);
            push(steps, Step { from: range(at.0, *size), to: range(at.1, *new_size), may_truncate });
        }
        (Layout::Array { of, count }, Layout::Array { of: new_of, count: new_count }) => {
            for element in 0..*count.min(new_count) {
                let at = (at.0 + element * of.size(), at.1 + element * new_of.size());
                match_layouts(of, new_of, at, &format!("{path}[{element}]"), steps, missing);
            }
        }
        (Layout::Struct { .. }, Layout::Struct { fields, .. }) => {
            for field in fields.iter().filter(|field| !is_padding(&field.name)) {
                let path = format!("{path}.{}", field.name);
                match former(old, &field.name) {
                    Some(of) => {
                        let at = (at.0 + of.offset, at.1 + field.offset);
                        match_layouts(&of.layout, &field.layout, at, &path, steps, missing);
                    }
                    None => missing.push(path),
                }
            }
        }
        _ => missing.push(path.to_owned()),
    }
}

/// The field of this name, or of the name that it had before.
fn former<'a>(old: &'a Layout, name: &str) -> Option<&'a Field> {
    let names = RENAMED.iter().filter(|(now, _)| *now == name).map(|(_, before)| *before);
    [name].into_iter().chain(names).find_map(|name| old.field(name))
}

fn is_padding(name: &str) -> bool {
    name.starts_with("pad") || name.starts_with("reserved")
}

/// Neighbours that stay neighbours are one step.
fn push(steps: &mut Vec<Step>, step: Step) {
    match steps.last_mut() {
        Some(last)
            if last.from.len() == last.to.len()
                && step.from.len() == step.to.len()
                && last.from.end == step.from.start
                && last.to.end == step.to.start =>
        {
            last.from.end = step.from.end;
            last.to.end = step.to.end;
        }
        _ => steps.push(step),
    }
}

fn apply(steps: &[Step], from: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut to = vec![0; size];
    for step in steps {
        let (source, target) = (from.get(step.from.clone())?, to.get_mut(step.to.clone())?);
        if source.len() == target.len() {
            target.copy_from_slice(source);
        } else {
            let value = number(source);
            let bytes = value.to_le_bytes();
            target.copy_from_slice(bytes.get(..target.len())?);
            (step.may_truncate || number(target) == value).then_some(())?;
        }
    }
    Some(to)
}

/// An integer of at most eight bytes. BPF maps are little-endian wherever Weir runs.
fn number(bytes: &[u8]) -> u64 {
    let mut wide = [0; 8];
    let length = bytes.len().min(wide.len());
    wide[..length].copy_from_slice(&bytes[..length]);
    u64::from_le_bytes(wide)
}

/// A map whose rows are to be carried into another one.
#[derive(Debug)]
pub(super) struct Carrier {
    name: String,
    old: MapHandle,
    new: MapHandle,
    rows: Conversion,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pass {
    /// Rows written.
    written: usize,
    /// Rows that have no place in the new map.
    left_out: usize,
}

impl Carrier {
    /// Rows of `old` become rows of `new`.
    pub(super) fn new(name: &str, old: MapHandle, new: MapHandle, rows: Conversion) -> Self {
        Self { name: name.to_owned(), old, new, rows }
    }

    /// Copies what the new map does not have, or has from before, until little is left.
    pub(super) fn carry(&self) -> Result<()> {
        for number in 1..=MOST_PASSES {
            let pass = self.pass().with_context(|| format!("carrying the rows of map {} over", self.name))?;
            let Pass { written, left_out } = pass;
            tracing::info!(map = self.name, pass = number, written, left_out, missing = ?self.rows.missing(), "carried rows over");
            if written < FEW {
                break;
            }
        }
        Ok(())
    }

    fn pass(&self) -> Result<Pass> {
        let mut pass = Pass::default();
        let mut result = Ok(());
        let mut put = |key: &[u8], value: &[u8]| {
            if result.is_ok() {
                match self.put(key, value) {
                    Ok(Some(true)) => pass.written += 1,
                    Ok(Some(false)) => {}
                    Ok(None) => pass.left_out += 1,
                    Err(error) => result = Err(error),
                }
            }
        };
        if self.old.map_type() == MapType::LpmTrie {
            for key in self.old.keys() {
                if let Some(value) = self.old.lookup(&key, MapFlags::ANY)? {
                    put(&key, &value);
                }
            }
        } else {
            walk(&self.old, self.old.value_size() as usize, put)?;
        }
        result.map(|()| pass)
    }

    /// True if the row was written, `None` if it has no place.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<Option<bool>> {
        let Some((new_key, new_value)) = self.rows.row(key, value) else { return Ok(None) };
        // The rows of an array are always there.
        if self.new.map_type() != MapType::Array {
            match self.new.update(&new_key, &new_value, MapFlags::NO_EXIST) {
                Ok(()) => return Ok(Some(true)),
                Err(error) if error.kind() == libbpf_rs::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error.into()),
            }
        }
        let there = self.new.lookup(&new_key, MapFlags::ANY)?;
        let is_stale = there.is_none_or(|there| match self.new.map_type() {
            MapType::Array => there != new_value,
            _ => self.rows.is_newer(value, &there),
        });
        if is_stale {
            self.new.update(&new_key, &new_value, MapFlags::ANY)?;
        }
        Ok(Some(is_stale))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn integer(size: u32) -> Layout {
        Layout::Integer { size, is_network_order: false }
    }

    fn network(size: u32) -> Layout {
        Layout::Integer { size, is_network_order: true }
    }

    fn array(of: Layout, count: u32) -> Layout {
        Layout::Array { of: Box::new(of), count }
    }

    fn fields(size: u32, fields: &[(&str, u32, Layout)]) -> Layout {
        let field = |(name, offset, layout): &(&str, u32, Layout)| Field {
            name: (*name).to_owned(),
            offset: *offset,
            layout: layout.clone(),
        };
        Layout::Struct { name: "s".to_owned(), size, fields: fields.iter().map(field).collect() }
    }

    fn row(value: Layout) -> Row {
        Row { key: integer(4), value }
    }

    fn converted(old: Layout, new: Layout, value: &[u8]) -> (Option<Vec<u8>>, Vec<String>) {
        let rows = Conversion::new(&row(old), &row(new));
        (rows.row(&[0; 4], value).map(|(_, value)| value), rows.missing().to_vec())
    }

    #[test]
    fn fields_go_where_their_names_are() {
        let old =
            fields(8, &[("port", 0, network(2)), ("pad", 2, array(integer(1), 2)), ("id", 4, integer(4))]);
        let new = fields(
            12,
            &[
                ("id", 0, integer(4)),
                ("seen", 4, integer(4)),
                ("port", 8, network(2)),
                ("pad", 10, integer(2)),
            ],
        );
        assert_eq!(
            converted(old, new, &[1, 2, 9, 9, 3, 4, 5, 6]),
            (Some(vec![3, 4, 5, 6, 0, 0, 0, 0, 1, 2, 0, 0]), vec!["value.seen".to_owned()])
        );
    }

    #[test]
    fn integers_get_wider_and_narrower_but_lose_nothing() {
        let (narrow, wide) = (fields(2, &[("n", 0, integer(2))]), fields(4, &[("n", 0, integer(4))]));
        assert_eq!(converted(narrow.clone(), wide.clone(), &[1, 2]).0, Some(vec![1, 2, 0, 0]));
        assert_eq!(converted(wide.clone(), narrow.clone(), &[1, 2, 0, 0]).0, Some(vec![1, 2]));
        assert_eq!(converted(wide, narrow, &[1, 2, 3, 0]).0, None);
        let clock = |size: u32| fields(size, &[("last_report_jiffies", 0, integer(size))]);
        assert_eq!(converted(clock(4), clock(2), &[1, 2, 3, 0]).0, Some(vec![1, 2]), "its low bits");
        // Of two widths in network order the bytes would mean other things.
        let (narrow, wide) = (fields(2, &[("n", 0, network(2))]), fields(4, &[("n", 0, network(4))]));
        assert_eq!(converted(narrow, wide, &[1, 2]), (Some(vec![0; 4]), vec!["value.n".to_owned()]));
    }

    #[test]
    fn structs_in_arrays_are_matched_likewise() {
        let end = |at: (u32, u32)| fields(4, &[("a", at.0, integer(2)), ("b", at.1, integer(2))]);
        let old = fields(8, &[("end", 0, array(end((0, 2)), 2))]);
        let new = fields(12, &[("end", 0, array(end((2, 0)), 3))]);
        assert_eq!(
            converted(old, new, &[1, 1, 2, 2, 3, 3, 4, 4]).0,
            Some(vec![2, 2, 1, 1, 4, 4, 3, 3, 0, 0, 0, 0])
        );
    }

    #[test]
    fn the_row_that_was_seen_last_is_the_newer_one() {
        let old = fields(8, &[("last_seen_jiffies", 0, integer(8))]);
        let new = fields(16, &[("a", 0, integer(8)), ("last_seen_jiffies", 8, integer(8))]);
        let rows = Conversion::new(&row(old), &row(new));
        let (one, two) = (1_u64.to_ne_bytes(), 2_u64.to_ne_bytes());
        let wide = |last: [u8; 8]| [[0; 8], last].concat();
        assert!(rows.is_newer(&two, &wide(one)) && !rows.is_newer(&one, &wide(one)));
        assert!(!rows.is_newer(&one, &wide(two)));
    }

    #[test]
    fn certain_rows_forget() {
        let layout = || row(fields(4, &[("a", 0, integer(2)), ("b", 2, integer(2))]));
        let rows = Conversion::new(&layout(), &layout()).forget(Forgotten { of: (1, 0), bytes: 2..4 });
        let value = |key: &[u8]| rows.row(key, &[1, 2, 3, 4]).map(|(_, value)| value);
        assert_eq!(value(&[1, 0, 0, 0]), Some(vec![1, 2, 0, 0]));
        assert_eq!(value(&[2, 0, 0, 0]), Some(vec![1, 2, 3, 4]));
    }

    #[test]
    fn neighbours_are_copied_at_once() {
        let old = fields(4, &[("a", 0, integer(2)), ("b", 2, integer(2))]);
        assert_eq!(
            Conversion::new(&row(old.clone()), &row(old)).value,
            [Step { from: 0..4, to: 0..4, may_truncate: false }]
        );
    }
}
