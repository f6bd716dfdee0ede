//! The newest records on disk, in segments of bounded size: a new agent has the history of the one before,
//! and a query reads there what memory has no more ([`History`]).
//!
//! A segment is two files. `N.flows` has an event of 128 bytes for each record, packet or request. `N.requests` has
//! what requests say: the event that stands for one says where. Records carry the kernel's clock: those of before a
//! restart of the machine are of no use, and go.

mod requests;
mod segments;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

use super::recorder::REQUEST;
use super::{Cursor, Event, Record, Recorder};
use crate::datapath::abi::Plain;

pub use segments::{Segments, keep};

/// Records that are written at once.
const CHUNK: usize = 4096;
/// What a segment begins with: these bytes, the size of a record, the machine's boot.
const MAGIC: &[u8; 8] = b"WEIRFLW2";
const HEAD: usize = 48;
/// The kernel's name for this boot of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Records of several processors may stand in another order than their times, by no more than this.
const DISORDER_NS: u64 = 1_000_000_000;

/// What is on disk, for readers.
#[derive(Clone)]
pub struct History {
    directory: PathBuf,
    head: [u8; HEAD],
    /// The sequence number in memory up to which it has been written.
    written: Arc<AtomicU64>,
}

/// The records that were on disk at one moment and that memory did not have, by their place, the oldest first.
/// Segments that go meanwhile stay readable.
pub struct View {
    segments: Vec<Segment>,
    end: u64,
}

/// The files of a segment, and the place of its first record.
struct Segment {
    first: u64,
    events: File,
    /// `None`: nothing is known of its requests.
    requests: Option<File>,
}

impl History {
    /// What is older than what `recorder` knows all of, and where that begins there.
    pub fn before(&self, recorder: &Recorder) -> Result<(View, Cursor)> {
        // Memory first: what leaves it meanwhile is on disk by then, or was never written.
        let cursor = recorder.known(self.written.load(Ordering::Acquire));
        let oldest = first_event(recorder, cursor.place());
        let mut view = View { segments: Vec::new(), end: 0 };
        for number in numbers(&self.directory)? {
            // The oldest may be gone since it was listed.
            let Ok(mut file) = File::open(path(&self.directory, number)) else { continue };
            let mut head = [0; HEAD];
            if file.read_exact(&mut head).is_err() || head != self.head {
                continue;
            }
            let bytes = file.metadata().context("reading the length of a segment of flows")?.len();
            let count = bytes.saturating_sub(HEAD as u64) / size_of::<Event>() as u64;
            let requests = File::open(requests::path(&self.directory, number)).ok();
            view.segments.push(Segment { first: view.end, events: file, requests });
            view.end += count;
        }
        if let Some(oldest) = oldest {
            view.cut_before(&oldest)?;
        }
        Ok((view, cursor))
    }
}

/// The first record from a place in memory on that has an event.
fn first_event(recorder: &Recorder, mut from: u64) -> Option<Event> {
    let (end, mut records) = (recorder.range().end, Vec::new());
    while from < end {
        from = recorder.copy(from, CHUNK, &mut records) + records.len() as u64;
        let event = records.iter().find_map(|record| record.event().copied());
        if event.is_some() || records.is_empty() {
            return event;
        }
    }
    None
}

/// True if both stand for one record: of a request, memory and disk each say in their own way where it is.
fn is_same(one: &Event, other: &Event) -> bool {
    let stripped = |event: &Event| match event.r#type {
        REQUEST => Event { service: Default::default(), ..*event },
        _ => *event,
    };
    stripped(one).as_bytes() == stripped(other).as_bytes()
}

impl View {
    /// How many records there are.
    pub fn len(&self) -> u64 {
        self.end
    }

    /// True if memory has all of it.
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// The records from a place on, `limit` at most; none behind the end.
    pub fn read(&self, from: u64, limit: usize) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        self.each_part(from, limit, |segment, events| {
            records.extend(events.map(|event| requests::record(event, segment.requests.as_ref())));
        })?;
        Ok(records)
    }

    /// The same without what requests say.
    fn events(&self, from: u64, limit: usize) -> Result<Vec<Event>> {
        let mut all = Vec::new();
        self.each_part(from, limit, |_, events| all.extend(events))?;
        Ok(all)
    }

    fn each_part(
        &self,
        from: u64,
        limit: usize,
        mut each: impl FnMut(&Segment, &mut dyn Iterator<Item = Event>),
    ) -> Result<()> {
        let size = size_of::<Event>();
        let until = self.end.min(from.saturating_add(limit as u64));
        for (index, segment) in self.segments.iter().enumerate() {
            let end = self.segments.get(index + 1).map_or(self.end, |next| next.first).min(until);
            let start = from.max(segment.first);
            if start >= end {
                continue;
            }
            let mut bytes = vec![0; (end - start) as usize * size];
            let offset = HEAD as u64 + (start - segment.first) * size as u64;
            segment.events.read_exact_at(&mut bytes, offset).context("reading a segment of flows")?;
            each(segment, &mut bytes.chunks_exact(size).filter_map(Event::from_bytes));
        }
        Ok(())
    }

    /// The place from which on nothing is older than `time_ns`.
    pub fn place_of(&self, time_ns: u64) -> Result<u64> {
        let time_ns = time_ns.saturating_sub(DISORDER_NS);
        let (mut low, mut high) = (0, self.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let is_older = self.events(middle, 1)?.first().is_some_and(|event| event.timestamp_ns < time_ns);
            if is_older { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }

    /// Ends the view before `oldest`, or where its time is over.
    fn cut_before(&mut self, oldest: &Event) -> Result<()> {
        let mut place = self.place_of(oldest.timestamp_ns)?;
        loop {
            let events = self.events(place, CHUNK)?;
            if events.is_empty() {
                return Ok(());
            }
            let is_in_memory = |event: &Event| {
                is_same(event, oldest) || event.timestamp_ns > oldest.timestamp_ns.saturating_add(DISORDER_NS)
            };
            if let Some(at) = events.iter().position(is_in_memory) {
                self.end = place + at as u64;
                return Ok(());
            }
            place += events.len() as u64;
        }
    }
}

fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:020}.flows"))
}

/// The numbers of the segments, the oldest first.
fn numbers(directory: &Path) -> Result<Vec<u64>> {
    let entries = fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    let number = |entry: io::Result<fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.strip_suffix(".flows")?.parse().ok()
    };
    let mut numbers: Vec<u64> = entries.filter_map(number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
