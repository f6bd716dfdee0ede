//! The last N events, raw, in memory of a fixed size.
//!
//! One writer appends, readers copy from any sequence number on. The lock is held for
//! one copy of at most a few hundred records on either side, so that neither waits long;
//! a reader that is overtaken learns from the sequence number how many it missed.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Event;

/// A bounded ring of events with sequence numbers from 0.
pub struct Recorder {
    ring: Mutex<Ring>,
    capacity: usize,
    next: watch::Sender<u64>,
    lost_in_kernel: AtomicU64,
    missed_by_readers: AtomicU64,
}

struct Ring {
    /// Grows up to the capacity, then is overwritten; the event with sequence s is at s % capacity.
    events: Vec<Event>,
    /// Sequence number of the next event.
    next: u64,
}

/// What became of the events so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecorderCounts {
    /// Arrived from the kernel.
    pub seen: u64,
    /// Still in memory.
    pub held: u64,
    /// The most that memory holds.
    pub capacity: u64,
    /// Made room for newer ones.
    pub overwritten: u64,
    /// Did not fit the kernel's ring buffer.
    pub lost_in_kernel: u64,
    /// Overwritten before a follower had read them, summed over all followers.
    pub missed_by_readers: u64,
}

impl Recorder {
    /// An empty ring of `capacity` events, 128 bytes each; memory is taken as they arrive.
    pub fn new(capacity: usize) -> Self {
        Self {
            ring: Mutex::new(Ring { events: Vec::with_capacity(capacity.max(1)), next: 0 }),
            capacity: capacity.max(1),
            next: watch::Sender::new(0),
            lost_in_kernel: AtomicU64::new(0),
            missed_by_readers: AtomicU64::new(0),
        }
    }

    /// Adds events, the oldest first, and wakes the followers.
    pub fn append(&self, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let next = {
            let mut ring = self.ring.lock().expect("nobody panics while it holds the ring");
            for chunk in events.chunks(self.capacity) {
                ring.extend(chunk, self.capacity);
            }
            ring.next
        };
        self.next.send_replace(next);
    }

    /// Sequence numbers that memory holds: from the oldest to one past the newest.
    pub fn range(&self) -> std::ops::Range<u64> {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        ring.next - ring.events.len() as u64..ring.next
    }

    /// Copies at most `limit` events from sequence number `from` on into `events`, which is
    /// emptied first; returns the number of the first that is still there, at least `from`.
    pub fn copy(&self, from: u64, limit: usize, events: &mut Vec<Event>) -> u64 {
        events.clear();
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        let first = from.max(ring.next - ring.events.len() as u64).min(ring.next.max(from));
        let count = ring.next.saturating_sub(first).min(limit as u64) as usize;
        let start = (first % self.capacity as u64) as usize;
        let until_end = count.min(ring.events.len().saturating_sub(start));
        events.extend_from_slice(&ring.events[start.min(ring.events.len())..][..until_end]);
        events.extend_from_slice(&ring.events[..count - until_end]);
        first
    }

    /// The next sequence number, to await news.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// Says how many events the kernel has dropped so far.
    pub fn set_lost_in_kernel(&self, lost: u64) {
        self.lost_in_kernel.store(lost, Ordering::Relaxed);
    }

    /// How many events the kernel has dropped so far.
    pub fn lost_in_kernel(&self) -> u64 {
        self.lost_in_kernel.load(Ordering::Relaxed)
    }

    /// A follower was overtaken and missed `events`.
    pub fn add_missed(&self, events: u64) {
        self.missed_by_readers.fetch_add(events, Ordering::Relaxed);
    }

    /// What became of the events so far.
    pub fn counts(&self) -> RecorderCounts {
        let held = self.range();
        RecorderCounts {
            seen: held.end,
            held: held.end - held.start,
            capacity: self.capacity as u64,
            overwritten: held.start,
            lost_in_kernel: self.lost_in_kernel(),
            missed_by_readers: self.missed_by_readers.load(Ordering::Relaxed),
        }
    }
}

impl Ring {
    /// Adds at most `capacity` events.
    fn extend(&mut self, events: &[Event], capacity: usize) {
        let (fresh, over) = events.split_at(events.len().min(capacity - self.events.len()));
        self.events.extend_from_slice(fresh);
        self.next += fresh.len() as u64;
        let start = (self.next % capacity as u64) as usize;
        let (to_end, wrapped) = over.split_at(over.len().min(capacity - start));
        self.events[start..start + to_end.len()].copy_from_slice(to_end);
        self.events[..wrapped.len()].copy_from_slice(wrapped);
        self.next += over.len() as u64;
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
        (first, out.iter().map(|event| event.timestamp_ns).collect())
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
        recorder.set_lost_in_kernel(3);
        recorder.add_missed(2);
        assert_eq!(
            recorder.counts(),
            RecorderCounts {
                seen: 10,
                held: 4,
                capacity: 4,
                overwritten: 6,
                lost_in_kernel: 3,
                missed_by_readers: 2
            }
        );
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
