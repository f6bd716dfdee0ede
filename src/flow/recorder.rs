//! The last N records, raw, in memory of a fixed size.
//!
//! One writer appends, readers copy from any sequence number on. The lock is held for
//! one copy of at most a few hundred records on either side, so that neither waits long;
//! a reader that is overtaken learns from the sequence number how many it missed.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Event;

/// What is recorded, in the order in which it came. Requests that a proxy has seen and events of the agent
/// will be records, too.
#[derive(Clone, Debug)]
pub enum Record {
    /// What the programs report: a connection, or a dropped packet.
    Packet(Event),
    /// So many events of the programs did not fit the kernel's buffer, about here.
    Lost(u64),
}

/// Records that the rate is counted over.
const RATE_RECORDS: u64 = 4096;

/// A bounded ring of records with sequence numbers from 0.
pub struct Recorder {
    ring: Mutex<Ring>,
    capacity: usize,
    next: watch::Sender<u64>,
    lost_in_kernel: AtomicU64,
    suppressed: AtomicU64,
    missed_by_readers: AtomicU64,
}

/// The type of an event that is a loss: `timestamp_ns` has how many. The programs have no such type.
const LOSS: u8 = u8::MAX;

impl Record {
    /// As it is stored: 128 bytes, whatever it is.
    fn stored(self) -> Event {
        match self {
            Self::Packet(event) => event,
            Self::Lost(lost) => Event { r#type: LOSS, timestamp_ns: lost, ..Event::default() },
        }
    }

    fn of(stored: &Event) -> Self {
        match stored.r#type {
            LOSS => Self::Lost(stored.timestamp_ns),
            _ => Self::Packet(*stored),
        }
    }
}

struct Ring {
    /// Grows up to the capacity, then is overwritten; the record with sequence s is at s % capacity.
    records: Vec<Event>,
    /// Sequence number of the next record.
    next: u64,
    /// How many of all records were events.
    events: u64,
}

/// What became of the events so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecorderCounts {
    /// Events that arrived from the kernel.
    pub seen: u64,
    /// Still in memory.
    pub held: u64,
    /// The most that memory holds.
    pub capacity: u64,
    /// Made room for newer ones.
    pub overwritten: u64,
    /// Did not fit the kernel's ring buffer.
    pub lost_in_kernel: u64,
    /// Drops that were only counted, as their pod had its share of records.
    #[serde(default)]
    pub suppressed: u64,
    /// Overwritten before a follower had read them, summed over all followers.
    pub missed_by_readers: u64,
}

impl Recorder {
    /// An empty ring of `capacity` records, 128 bytes each; memory is taken as they arrive.
    pub fn new(capacity: usize) -> Self {
        Self {
            ring: Mutex::new(Ring { records: Vec::with_capacity(capacity.max(1)), next: 0, events: 0 }),
            capacity: capacity.max(1),
            next: watch::Sender::new(0),
            lost_in_kernel: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
            missed_by_readers: AtomicU64::new(0),
        }
    }

    /// Adds events, the oldest first, and wakes the followers.
    pub fn append(&self, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        self.add(events.iter().copied().map(Record::Packet));
    }

    fn add(&self, records: impl Iterator<Item = Record>) {
        let next = {
            let mut ring = self.ring.lock().expect("nobody panics while it holds the ring");
            for record in records {
                ring.push(record, self.capacity);
            }
            ring.next
        };
        self.next.send_replace(next);
    }

    /// Sequence numbers that memory holds: from the oldest to one past the newest.
    pub fn range(&self) -> std::ops::Range<u64> {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        ring.next - ring.records.len() as u64..ring.next
    }

    /// Copies at most `limit` records from sequence number `from` on into `records`, which is
    /// emptied first; returns the number of the first that is still there, at least `from`.
    pub fn copy(&self, from: u64, limit: usize, records: &mut Vec<Record>) -> u64 {
        records.clear();
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        let first = from.max(ring.next - ring.records.len() as u64).min(ring.next.max(from));
        let count = ring.next.saturating_sub(first).min(limit as u64) as usize;
        let start = (first % self.capacity as u64) as usize;
        let until_end = count.min(ring.records.len().saturating_sub(start));
        records.extend(ring.records[start.min(ring.records.len())..][..until_end].iter().map(Record::of));
        records.extend(ring.records[..count - until_end].iter().map(Record::of));
        first
    }

    /// The next sequence number, to await news.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// Says how many events did not fit the kernel's ring buffer so far, and how many were
    /// suppressed; what is new is recorded.
    pub fn set_undelivered(&self, lost: u64, suppressed: u64) {
        let before = self.lost_in_kernel.swap(lost, Ordering::Relaxed)
            + self.suppressed.swap(suppressed, Ordering::Relaxed);
        if lost + suppressed > before {
            self.add(std::iter::once(Record::Lost(lost + suppressed - before)));
        }
    }

    /// A follower was overtaken and missed `events`.
    pub fn add_missed(&self, events: u64) {
        self.missed_by_readers.fetch_add(events, Ordering::Relaxed);
    }

    /// Events a second, over the last records.
    pub fn rate(&self) -> f64 {
        let mut records = Vec::new();
        let kept = self.range();
        self.copy(kept.end.saturating_sub(RATE_RECORDS).max(kept.start), RATE_RECORDS as usize, &mut records);
        let oldest = records.iter().find_map(|record| match record {
            Record::Packet(event) => Some(event.timestamp_ns),
            Record::Lost(_) => None,
        });
        let Some(oldest) = oldest else { return 0.0 };
        let seconds = super::monotonic_ns().saturating_sub(oldest) as f64 / 1e9;
        records.len() as f64 / seconds.max(0.001)
    }

    /// What became of the events so far.
    pub fn counts(&self) -> RecorderCounts {
        let held = self.range();
        let seen = self.ring.lock().expect("nobody panics while it holds the ring").events;
        RecorderCounts {
            seen,
            held: held.end - held.start,
            capacity: self.capacity as u64,
            overwritten: held.start,
            lost_in_kernel: self.lost_in_kernel.load(Ordering::Relaxed),
            suppressed: self.suppressed.load(Ordering::Relaxed),
            missed_by_readers: self.missed_by_readers.load(Ordering::Relaxed),
        }
    }
}

impl Ring {
    fn push(&mut self, record: Record, capacity: usize) {
        self.events += u64::from(matches!(record, Record::Packet(_)));
        let place = (self.next % capacity as u64) as usize;
        match self.records.get_mut(place) {
            Some(oldest) => *oldest = record.stored(),
            None => self.records.push(record.stored()),
        }
        self.next += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(numbers: std::ops::Range<u64>) -> Vec<Event> {
        numbers.map(|number| Event { timestamp_ns: number, ..Event::default() }).collect()
    }

    fn copied(recorder: &Recorder, from: u64, limit: usize) -> (u64, Vec<u64>) {
        let mut out = Vec::new();
        let first = recorder.copy(from, limit, &mut out);
        let number = |record: &Record| match record {
            Record::Packet(event) => event.timestamp_ns,
            Record::Lost(lost) => 1000 + lost,
        };
        (first, out.iter().map(number).collect())
    }

    /// Every batch size against every position in the ring: what is held is always the newest.
    #[test]
    fn holds_exactly_the_newest() {
        for batch in 1..=9 {
            let recorder = Recorder::new(4);
            let mut written = 0;
            for _ in 0..7 {
                recorder.append(&events(written..written + batch));
                written += batch;
                let oldest = written.saturating_sub(4);
                assert_eq!(recorder.range(), oldest..written);
                assert_eq!(copied(&recorder, 0, 100), (oldest, (oldest..written).collect()));
            }
        }
    }

    #[test]
    fn copies_from_the_middle_and_no_more_than_asked() {
        let recorder = Recorder::new(8);
        recorder.append(&events(0..11));
        assert_eq!(copied(&recorder, 5, 3), (5, vec![5, 6, 7]));
        assert_eq!(copied(&recorder, 9, 100), (9, vec![9, 10]));
        assert_eq!(copied(&recorder, 11, 100), (11, vec![]));
        assert_eq!(copied(&recorder, 20, 100), (20, vec![]));
    }

    #[test]
    fn every_event_is_accounted_for() {
        let recorder = Recorder::new(4);
        recorder.append(&events(0..10));
        recorder.set_undelivered(3, 5);
        recorder.add_missed(2);
        assert_eq!(
            recorder.counts(),
            RecorderCounts {
                seen: 10,
                held: 4,
                capacity: 4,
                overwritten: 7,
                lost_in_kernel: 3,
                suppressed: 5,
                missed_by_readers: 2
            }
        );
    }

    #[test]
    fn losses_are_records_among_the_events() {
        let recorder = Recorder::new(4);
        recorder.append(&events(0..1));
        recorder.set_undelivered(5, 0);
        recorder.set_undelivered(5, 0);
        recorder.append(&events(1..2));
        recorder.set_undelivered(5, 2);
        assert_eq!(copied(&recorder, 0, 10), (0, vec![0, 1005, 1, 1002]));
    }

    #[test]
    fn readers_are_woken_by_an_append() {
        let recorder = Recorder::new(4);
        let mut news = recorder.subscribe();
        assert!(!news.has_changed().expect("the recorder lives"));
        recorder.append(&events(0..2));
        assert_eq!(*news.borrow_and_update(), 2);
    }
}
