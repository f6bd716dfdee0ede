//! The newest records of packets on disk, in segments of bounded size: a new agent has the history of the one before,
//! and a query reads there what memory has no more ([`History`]). Records carry the kernel's clock: those of before a restart of the machine are of no use, and go.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Event, Record, Recorder};
use crate::datapath::abi::Plain;

/// The size of all segments is in so many parts.
const SEGMENTS: u64 = 8;
/// Records are written so often.
const EVERY: Duration = Duration::from_secs(1);
/// Records that are written at once.
const CHUNK: usize = 4096;
/// What a segment begins with: these bytes, the size of a record, the machine's boot.
const MAGIC: &[u8; 8] = b"WEIRFLW1";
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
}

/// The records that were on disk at one moment and that memory did not have, by their place, the oldest first.
/// Segments that go meanwhile stay readable.
pub struct View {
    /// Each with the place of its first record.
    files: Vec<(u64, File)>,
    end: u64,
}

impl History {
    /// What is older than the ring of `recorder`.
    pub fn before(&self, recorder: &Recorder) -> Result<View> {
        // Memory first: what leaves it meanwhile is on disk by then, or was never written.
        let oldest = oldest_packet(recorder);
        let mut view = View { files: Vec::new(), end: 0 };
        for number in numbers(&self.directory)? {
            // The oldest may be gone since it was listed.
            let Ok(mut file) = File::open(path(&self.directory, number)) else { continue };
            let mut head = [0; HEAD];
            if file.read_exact(&mut head).is_err() || head != self.head {
                continue;
            }
            let bytes = file.metadata().context("reading the length of a segment of flows")?.len();
            let count = bytes.saturating_sub(HEAD as u64) / size_of::<Event>() as u64;
            view.files.push((view.end, file));
            view.end += count;
        }
        if let Some(oldest) = oldest {
            view.cut_before(&oldest)?;
        }
        Ok(view)
    }
}

/// The oldest record of a packet that memory has.
fn oldest_packet(recorder: &Recorder) -> Option<Event> {
    let range = recorder.range();
    let (mut from, mut records) = (range.start, Vec::new());
    while from < range.end {
        from = recorder.copy(from, CHUNK, &mut records) + records.len() as u64;
        let packet = records.iter().find_map(|record| match record {
            Record::Packet(event) => Some(*event),
            _ => None,
        });
        if packet.is_some() || records.is_empty() {
            return packet;
        }
    }
    None
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
    pub fn read(&self, from: u64, limit: usize) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        let size = size_of::<Event>();
        let until = self.end.min(from.saturating_add(limit as u64));
        for (index, (first, file)) in self.files.iter().enumerate() {
            let end = self.files.get(index + 1).map_or(self.end, |(next, _)| *next).min(until);
            let start = from.max(*first);
            if start >= end {
                continue;
            }
            let mut bytes = vec![0; (end - start) as usize * size];
            file.read_exact_at(&mut bytes, HEAD as u64 + (start - first) * size as u64)
                .context("reading a segment of flows")?;
            events.extend(bytes.chunks_exact(size).filter_map(Event::from_bytes));
        }
        Ok(events)
    }

    /// The place from which on nothing is older than `time_ns`.
    pub fn place_of(&self, time_ns: u64) -> Result<u64> {
        let time_ns = time_ns.saturating_sub(DISORDER_NS);
        let (mut low, mut high) = (0, self.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let is_older = self.read(middle, 1)?.first().is_some_and(|event| event.timestamp_ns < time_ns);
            if is_older { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }

    /// Ends the view before `oldest`, or where its time is over.
    fn cut_before(&mut self, oldest: &Event) -> Result<()> {
        let mut place = self.place_of(oldest.timestamp_ns)?;
        loop {
            let events = self.read(place, CHUNK)?;
            if events.is_empty() {
                return Ok(());
            }
            let is_in_memory = |event: &Event| {
                event.as_bytes() == oldest.as_bytes()
                    || event.timestamp_ns > oldest.timestamp_ns.saturating_add(DISORDER_NS)
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

/// A directory of segments.
pub struct Segments {
    directory: PathBuf,
    bytes_max: u64,
    head: [u8; HEAD],
    open: Option<(File, u64)>,
    next: u64,
}

impl Segments {
    /// Segments in `directory`, of `bytes_max` together. Removes what is not of this boot.
    pub fn open(directory: &Path, bytes_max: u64) -> Result<Self> {
        let boot = fs::read_to_string(BOOT_ID).context("reading the machine's boot id")?;
        Self::of_boot(directory, bytes_max, boot.trim())
    }

    fn of_boot(directory: &Path, bytes_max: u64, boot: &str) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&(size_of::<Event>() as u32).to_le_bytes());
        for (place, byte) in head[12..].iter_mut().zip(boot.bytes()) {
            *place = byte;
        }
        let mut this = Self { directory: directory.to_owned(), bytes_max, head, open: None, next: 0 };
        for number in this.numbers()? {
            this.next = number + 1;
            if !this.is_ours(number) {
                fs::remove_file(this.path(number)).context("removing a segment of another boot")?;
            }
        }
        Ok(this)
    }

    fn path(&self, number: u64) -> PathBuf {
        path(&self.directory, number)
    }

    fn numbers(&self) -> Result<Vec<u64>> {
        numbers(&self.directory)
    }

    /// What is on disk, for readers.
    pub fn history(&self) -> History {
        History { directory: self.directory.clone(), head: self.head }
    }

    fn is_ours(&self, number: u64) -> bool {
        let mut head = [0; HEAD];
        File::open(self.path(number)).and_then(|mut file| file.read_exact(&mut head)).is_ok()
            && head == self.head
    }

    /// Adds the newest records of the segments to `recorder`, as many as it has room for, the oldest of them first;
    /// says how many. A record that was cut off is left out.
    pub fn restore(&self, recorder: &Recorder) -> Result<u64> {
        let (mut room, mut newest) = (recorder.capacity(), Vec::new());
        for number in self.numbers()?.into_iter().rev() {
            if room == 0 {
                break;
            }
            let events = self.newest_of(number, room).context("reading a segment of flows")?;
            room -= events.len();
            newest.push(events);
        }
        newest.iter().rev().for_each(|events| recorder.append(events));
        Ok(newest.iter().map(|events| events.len() as u64).sum())
    }

    /// The newest records of a segment, `room` at most.
    fn newest_of(&self, number: u64, room: usize) -> io::Result<Vec<Event>> {
        let mut file = File::open(self.path(number))?;
        let size = size_of::<Event>() as u64;
        let count = file.metadata()?.len().saturating_sub(HEAD as u64) / size;
        let wanted = count.min(room as u64);
        file.seek(SeekFrom::Start(HEAD as u64 + (count - wanted) * size))?;
        let mut bytes = Vec::new();
        file.take(wanted * size).read_to_end(&mut bytes)?;
        Ok(bytes.chunks_exact(size_of::<Event>()).filter_map(Event::from_bytes).collect())
    }

    /// Writes records; a segment that is full is followed by another, and the oldest goes.
    fn write(&mut self, events: &[u8]) -> Result<()> {
        let full = (self.bytes_max / SEGMENTS).max((HEAD + size_of::<Event>()) as u64);
        let records = (full as usize - HEAD) / size_of::<Event>();
        events.chunks(records * size_of::<Event>()).try_for_each(|part| self.write_part(part, full))
    }

    fn write_part(&mut self, events: &[u8], full: u64) -> Result<()> {
        if self.open.as_ref().is_none_or(|(_, bytes)| *bytes + events.len() as u64 > full) {
            self.begin()?;
        }
        let Some((file, bytes)) = &mut self.open else { return Ok(()) };
        if let Err(error) = file.write_all(events) {
            // Half a record would shift all that follow.
            self.open = None;
            return Err(error).context("writing flows");
        }
        *bytes += events.len() as u64;
        Ok(())
    }

    /// Makes room for a segment, and begins it.
    fn begin(&mut self) -> Result<()> {
        let numbers = self.numbers()?;
        let many = (numbers.len() + 1).saturating_sub(SEGMENTS as usize);
        for number in &numbers[..many] {
            fs::remove_file(self.path(*number)).context("removing the oldest segment")?;
        }
        let path = self.path(self.next);
        let mut file = File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
        self.next += 1;
        file.write_all(&self.head).context("beginning a segment of flows")?;
        self.open = Some((file, HEAD as u64));
        Ok(())
    }
}

/// Writes what is recorded from now on, for ever. What cannot be written is left out.
pub async fn keep(mut segments: Segments, recorder: Arc<Recorder>) {
    let mut news = recorder.subscribe();
    let mut from = recorder.range().end;
    let mut was_failing = false;
    while news.changed().await.is_ok() {
        tokio::time::sleep(EVERY).await;
        news.mark_unchanged();
        let recorder = recorder.clone();
        let writing = move || {
            let mut records = Vec::new();
            let mut outcome = Ok(());
            loop {
                from = recorder.copy(from, CHUNK, &mut records) + records.len() as u64;
                if records.is_empty() {
                    return (segments, from, outcome);
                }
                let packets = records.iter().filter_map(|record| match record {
                    Record::Packet(event) => Some(event),
                    _ => None,
                });
                let bytes: Vec<u8> = packets.flat_map(|event| event.as_bytes().iter().copied()).collect();
                outcome = outcome.and(segments.write(&bytes));
            }
        };
        let Ok((back, next, outcome)) = tokio::task::spawn_blocking(writing).await else { return };
        (segments, from) = (back, next);
        match outcome {
            Err(error) if !std::mem::replace(&mut was_failing, true) => {
                tracing::warn!(error = crate::error::chain(&error), "flows are not kept on disk");
            }
            Ok(()) if std::mem::replace(&mut was_failing, false) => {
                tracing::info!("flows are kept on disk again");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tests::{record, recorded};

    fn ports(recorder: &Recorder) -> Vec<u16> {
        let mut records = Vec::new();
        recorder.copy(0, usize::MAX, &mut records);
        let port = |record: &Record| record.event().map(|event| u16::from_be(event.source_port));
        records.iter().filter_map(port).collect()
    }

    fn restored(directory: &Path, boot: &str) -> Vec<u16> {
        let recorder = Recorder::new(65_536);
        let segments = Segments::of_boot(directory, 1 << 20, boot).expect("segments");
        segments.restore(&recorder).expect("readable");
        ports(&recorder)
    }

    #[test]
    fn segments_are_bounded_and_read_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let size = |path: &Path| -> u64 {
            let files = fs::read_dir(path).expect("the test's own");
            files.map(|file| file.expect("an entry").metadata().expect("there").len()).sum()
        };
        let bytes = |ports: std::ops::Range<u16>| -> Vec<u8> {
            let recorder = recorded(1024, ports);
            let mut records = Vec::new();
            recorder.copy(0, 1024, &mut records);
            let events = records.iter().filter_map(Record::event);
            events.flat_map(|event| event.as_bytes().iter().copied()).collect()
        };
        // Of 16 KiB each: one write of 100 records fits, a second one does not.
        let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
        for round in 0..20_u16 {
            segments.write(&bytes(round * 100..(round + 1) * 100)).expect("room");
        }
        assert!(size(directory.path()) <= 128 * 1024, "{}", size(directory.path()));
        let back = restored(directory.path(), "one");
        assert_eq!(back.last(), Some(&1999));
        assert!(back.len() == 800 && back.windows(2).all(|two| two[0] + 1 == two[1]), "{}", back.len());
        // A smaller memory gets the newest.
        let small = Recorder::new(150);
        segments.restore(&small).expect("readable");
        assert_eq!(ports(&small), (1850..2000).collect::<Vec<_>>());
        // One write that is larger than a segment keeps the bound, too.
        segments.write(&bytes(2000..3000)).expect("room");
        assert!(size(directory.path()) <= 128 * 1024, "{}", size(directory.path()));
        assert_eq!(restored(directory.path(), "one").last(), Some(&2999));
        // The next agent goes on behind; a record that was cut off is left out.
        let newest = segments.path(segments.next - 1);
        drop(segments);
        let mut cut = fs::OpenOptions::new().append(true).open(newest).expect("there");
        cut.write_all(&[7; 50]).expect("room");
        let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
        segments.write(&bytes(3000..3001)).expect("room");
        assert_eq!(restored(directory.path(), "one").last(), Some(&3000));
        // After the machine has started again its clock is another.
        assert!(restored(directory.path(), "two").is_empty());
        assert_eq!(size(directory.path()), 0);
    }

    /// A view has what memory has no more, exactly: with gaps on either side, after a restart, while segments go.
    #[test]
    fn a_view_ends_where_memory_begins() {
        let directory = tempfile::tempdir().expect("a directory");
        let recorder = recorded(150, 0..0);
        let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
        let history = segments.history();
        assert!(history.before(&recorder).expect("readable").is_empty());
        for round in 0..12_u16 {
            record(&recorder, round * 50..(round + 1) * 50);
            let mut records = Vec::new();
            recorder.copy(recorder.range().end - 50, 50, &mut records);
            let events = records.iter().filter_map(Record::event);
            let bytes: Vec<u8> = events.flat_map(|event| event.as_bytes().iter().copied()).collect();
            segments.write(&bytes).expect("room");
        }
        let ports_of =
            |events: &[Event]| events.iter().map(|event| u16::from_be(event.source_port)).collect::<Vec<_>>();
        let view = history.before(&recorder).expect("readable");
        assert_eq!(ports_of(&view.read(0, 1000).expect("readable")), (0..450).collect::<Vec<_>>());
        assert_eq!(ports_of(&view.read(120, 10).expect("readable")), (120..130).collect::<Vec<_>>());
        assert!(view.read(450, 10).expect("readable").is_empty());
        // What is removed meanwhile can still be read.
        for number in segments.numbers().expect("listed") {
            fs::remove_file(segments.path(number)).expect("there");
        }
        assert_eq!(view.read(0, 1000).expect("readable").len(), 450);
        assert!(history.before(&recorder).expect("readable").is_empty());
    }

    #[test]
    fn a_place_is_found_by_its_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
        let second = |number: u64| Event { timestamp_ns: number * 2_000_000_000, ..Event::default() };
        let bytes: Vec<u8> = (0..300).flat_map(|number| second(number).as_bytes().to_vec()).collect();
        segments.write(&bytes).expect("room");
        let view = segments.history().before(&Recorder::new(16)).expect("readable");
        for (time, place) in [(0, 0), (1, 0), (100 * 2_000_000_000, 100), (u64::MAX, 300)] {
            assert_eq!(view.place_of(time).expect("readable"), place, "{time}");
        }
    }

    #[tokio::test]
    async fn what_is_recorded_is_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let recorder = recorded(1024, 0..10);
        let segments = Segments::of_boot(directory.path(), 1 << 20, "one").expect("segments");
        let keeping = tokio::spawn(keep(segments, recorder.clone()));
        tokio::task::yield_now().await;
        record(&recorder, 10..15);
        while restored(directory.path(), "one").len() < 5 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        keeping.abort();
        assert_eq!(restored(directory.path(), "one"), (10..15).collect::<Vec<_>>());
    }
}
