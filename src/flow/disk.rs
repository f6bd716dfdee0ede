//! The newest records of packets on disk, in segments of bounded size, so that a new agent has the history of the one
//! before. Records carry the kernel's clock: those of before a restart of the machine are of no use, and go.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
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
        self.directory.join(format!("{number:020}.flows"))
    }

    /// The numbers of the segments, the oldest first.
    fn numbers(&self) -> Result<Vec<u64>> {
        let entries =
            fs::read_dir(&self.directory).with_context(|| format!("listing {}", self.directory.display()))?;
        let number = |entry: io::Result<fs::DirEntry>| {
            entry.ok()?.file_name().to_str()?.strip_suffix(".flows")?.parse().ok()
        };
        let mut numbers: Vec<u64> = entries.filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
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
