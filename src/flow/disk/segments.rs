//! Who writes the segments, and reads them when the agent starts.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{BOOT_ID, CHUNK, Event, HEAD, History, MAGIC, Record, Recorder, numbers, path, requests};
use crate::datapath::abi::Plain;

/// The size of all segments is in so many parts.
const SEGMENTS: u64 = 8;
/// Records are written so often.
const EVERY: Duration = Duration::from_secs(1);

/// A directory of segments.
pub struct Segments {
    directory: PathBuf,
    bytes_max: u64,
    head: [u8; HEAD],
    open: Option<Open>,
    next: u64,
    /// When the last record was.
    last_ns: u64,
    written: Arc<AtomicU64>,
}

/// The segment that is written.
struct Open {
    events: File,
    requests: File,
    /// So many of what requests say.
    request_bytes: u64,
    /// Of both files together.
    bytes: u64,
}

impl Segments {
    /// Segments in `directory`, of `bytes_max` together. Removes what is not of this boot.
    pub fn open(directory: &Path, bytes_max: u64) -> Result<Self> {
        let boot = fs::read_to_string(BOOT_ID).context("reading the machine's boot id")?;
        Self::of_boot(directory, bytes_max, boot.trim())
    }

    pub(super) fn of_boot(directory: &Path, bytes_max: u64, boot: &str) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&(size_of::<Event>() as u32).to_le_bytes());
        for (place, byte) in head[12..].iter_mut().zip(boot.bytes()) {
            *place = byte;
        }
        let mut this = Self {
            directory: directory.to_owned(),
            bytes_max,
            head,
            open: None,
            next: 0,
            last_ns: 0,
            written: Arc::new(AtomicU64::new(u64::MAX)),
        };
        for number in this.numbers()? {
            this.next = number + 1;
            if !this.is_ours(number) {
                this.remove(number).context("removing a segment of another boot")?;
            }
        }
        Ok(this)
    }

    fn path(&self, number: u64) -> PathBuf {
        path(&self.directory, number)
    }

    fn remove(&self, number: u64) -> io::Result<()> {
        match fs::remove_file(requests::path(&self.directory, number)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::remove_file(self.path(number)),
        }
    }

    fn numbers(&self) -> Result<Vec<u64>> {
        numbers(&self.directory)
    }

    /// What is on disk, for readers.
    pub fn history(&self) -> History {
        History { directory: self.directory.clone(), head: self.head, written: self.written.clone() }
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
            let records = self.newest_of(number, room).context("reading a segment of flows")?;
            room -= records.len();
            newest.push(records);
        }
        let restored = newest.iter().map(|records| records.len() as u64).sum();
        newest.into_iter().rev().for_each(|records| recorder.restore(records));
        Ok(restored)
    }

    /// The newest records of a segment, `room` at most.
    fn newest_of(&self, number: u64, room: usize) -> io::Result<Vec<Record>> {
        let mut file = File::open(self.path(number))?;
        let size = size_of::<Event>() as u64;
        let count = file.metadata()?.len().saturating_sub(HEAD as u64) / size;
        let wanted = count.min(room as u64);
        file.seek(SeekFrom::Start(HEAD as u64 + (count - wanted) * size))?;
        let mut bytes = Vec::new();
        file.take(wanted * size).read_to_end(&mut bytes)?;
        let texts = File::open(requests::path(&self.directory, number)).ok();
        let events = bytes.chunks_exact(size_of::<Event>()).filter_map(Event::from_bytes);
        Ok(events.map(|event| requests::record(event, texts.as_ref())).collect())
    }

    /// Writes records; a segment that is full is followed by another, and the oldest goes.
    pub(super) fn write(&mut self, records: &[Record]) -> Result<()> {
        let least = HEAD + size_of::<Event>();
        let full = (self.bytes_max / SEGMENTS).max(least as u64);
        let mut part = Part::default();
        for record in records {
            let forgotten = Event { timestamp_ns: self.last_ns, ..Event::default() };
            let (event, mut text) = match record {
                Record::Packet(event) => (event, Vec::new()),
                Record::Request(event, request) => (event, requests::text(request)),
                Record::Forgotten => (&forgotten, Vec::new()),
                Record::Lost(_) => continue,
            };
            self.last_ns = event.timestamp_ns;
            if (least + text.len()) as u64 > full {
                // The record stays, and says that nothing is known of it.
                text.clear();
            }
            let more = (size_of::<Event>() + text.len()) as u64;
            let used = self.open.as_ref().map_or(u64::MAX - full, |open| open.bytes) + part.bytes();
            if used + more > full {
                self.write_part(std::mem::take(&mut part))?;
                self.begin()?;
            }
            let offset = self.open.as_ref().map_or(0, |open| open.request_bytes);
            part.add(record, event, &text, offset);
        }
        self.write_part(part)
    }

    /// What requests say is there before the events that say where.
    fn write_part(&mut self, part: Part) -> Result<()> {
        let Some(open) = self.open.as_mut().filter(|_| part.bytes() > 0) else { return Ok(()) };
        let written = open.requests.write_all(&part.texts).and_then(|()| open.events.write_all(&part.events));
        if let Err(error) = written {
            // Half a record would shift all that follow.
            self.open = None;
            return Err(error).context("writing flows");
        }
        open.request_bytes += part.texts.len() as u64;
        open.bytes += part.bytes();
        Ok(())
    }

    /// Makes room for a segment, and begins it.
    fn begin(&mut self) -> Result<()> {
        self.open = None;
        let numbers = self.numbers()?;
        let many = (numbers.len() + 1).saturating_sub(SEGMENTS as usize);
        for number in &numbers[..many] {
            self.remove(*number).context("removing the oldest segment")?;
        }
        let path = requests::path(&self.directory, self.next);
        let requests = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        let path = self.path(self.next);
        let mut events = File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
        self.next += 1;
        events.write_all(&self.head).context("beginning a segment of flows")?;
        self.open = Some(Open { events, requests, request_bytes: 0, bytes: HEAD as u64 });
        Ok(())
    }
}

/// What is written at once.
#[derive(Default)]
struct Part {
    events: Vec<u8>,
    texts: Vec<u8>,
}

impl Part {
    fn bytes(&self) -> u64 {
        (self.events.len() + self.texts.len()) as u64
    }

    /// `offset`: where the texts of this part begin.
    fn add(&mut self, record: &Record, event: &Event, text: &[u8], offset: u64) {
        let event = match record {
            Record::Request(..) | Record::Forgotten => {
                requests::placed(event, offset + self.texts.len() as u64, text.len())
            }
            _ => *event,
        };
        self.texts.extend_from_slice(text);
        self.events.extend_from_slice(event.as_bytes());
    }
}

/// Writes what is recorded from now on, for ever. What cannot be written is left out.
pub async fn keep(mut segments: Segments, recorder: Arc<Recorder>) {
    let mut news = recorder.subscribe();
    let mut from = recorder.range().end;
    segments.written.store(from, Ordering::Release);
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
                outcome = outcome.and(segments.write(&records));
                segments.written.store(from, Ordering::Release);
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
