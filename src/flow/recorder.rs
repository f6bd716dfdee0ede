//! The last N records, raw, in memory of a fixed size.
//!
//! One writer appends, readers copy from any sequence number on. The lock is held for
//! one copy of at most a few hundred records on either side, so that neither waits long;
//! a reader that is overtaken learns from the sequence number how many it missed.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::request::{Redact, bytes_of, event_of};
use super::{Clock, Event};
use crate::datapath::types::addr;
use crate::model::l7;

/// What is recorded, in the order in which it came.
#[derive(Clone, Debug)]
pub enum Record {
    /// What the programs report: a connection, or a dropped packet.
    Packet(Event),
    /// What the proxy saw of a request or an answer, with the event that stands for it.
    Request(Event, Arc<l7::Record>),
    /// A request of which only that much is known: newer ones needed its room.
    Forgotten,
    /// So many events of the programs did not fit the kernel's buffer, about here.
    Lost(u64),
}

/// Records that the rate is counted over.
const RATE_RECORDS: u64 = 4096;

/// The part of the ring's size that requests may take beside it: one in so many.
const REQUESTS_SHARE: usize = 4;

/// A bounded ring of records with sequence numbers from 0.
pub struct Recorder {
    ring: Mutex<Ring>,
    capacity: usize,
    redact: Redact,
    next: watch::Sender<u64>,
    lost_in_kernel: AtomicU64,
    suppressed: AtomicU64,
    missed_by_readers: AtomicU64,
}

/// The type of an event that is a loss: `timestamp_ns` has how many. The programs have no such type.
const LOSS: u8 = u8::MAX;
/// The type of an event that stands for a request: `service` has its number.
pub(super) const REQUEST: u8 = u8::MAX - 1;

impl Record {
    /// The event of a packet, or the one that stands for a request.
    pub fn event(&self) -> Option<&Event> {
        match self {
            Self::Packet(event) | Self::Request(event, _) => Some(event),
            Self::Forgotten | Self::Lost(_) => None,
        }
    }
}

/// What of the records was no event: how many records, and how many events they say were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Losses {
    records: u64,
    events: u64,
}

/// How far a follower has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    place: u64,
    /// Of all records before the place.
    losses: Losses,
}

impl Cursor {
    /// The sequence number of the next record.
    pub fn place(&self) -> u64 {
        self.place
    }
}

/// What a follower was too slow for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Events, packets or requests, that were overwritten.
    pub events: u64,
    /// Events that were lost before they came here: records that say so were overwritten.
    pub lost: u64,
}

#[derive(Default)]
struct Ring {
    /// Grows up to the capacity, then is overwritten; the record with sequence s is at s % capacity.
    records: Vec<Event>,
    /// Sequence number of the next record.
    next: u64,
    /// How many of all records were events.
    events: u64,
    /// What the newest requests say, the oldest first: an event of the ring, of this sequence number, stands for each.
    requests: VecDeque<(u64, Arc<l7::Record>)>,
    /// The number of the oldest of them.
    first_request: u64,
    /// From this sequence number on, what every request says is known.
    known_from: u64,
    request_bytes: usize,
    /// The losses among the records, by their sequence numbers, each with the sum of all up to it.
    losses: VecDeque<(u64, Losses)>,
    /// The sum of those that have been overwritten.
    losses_gone: Losses,
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
            ring: Mutex::new(Ring { records: Vec::with_capacity(capacity.max(1)), ..Ring::default() }),
            capacity: capacity.max(1),
            redact: Redact::default(),
            next: watch::Sender::new(0),
            lost_in_kernel: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
            missed_by_readers: AtomicU64::new(0),
        }
    }

    /// Keeps nothing of requests that `redact` names.
    pub fn redacting(self, redact: Redact) -> Self {
        Self { redact, ..self }
    }

    /// Adds what the proxy saw, the oldest first, and wakes the followers.
    pub fn append_requests(&self, requests: Vec<l7::Record>) {
        if requests.is_empty() {
            return;
        }
        let clock = Clock::now();
        let requests: Vec<_> = requests
            .into_iter()
            .map(|mut request| {
                self.redact.apply(&mut request);
                (event_of(&request, &clock), Arc::new(request))
            })
            .collect();
        let next = {
            let mut ring = self.ring.lock().expect("nobody panics while it holds the ring");
            for (event, request) in requests {
                ring.push_request(event, request, self.capacity);
            }
            ring.next
        };
        self.next.send_replace(next);
    }

    /// Adds what another recorder had, the oldest first.
    pub(super) fn restore(&self, records: Vec<Record>) {
        let next = {
            let mut ring = self.ring.lock().expect("nobody panics while it holds the ring");
            for record in records {
                match record {
                    Record::Packet(event) => ring.push(event, self.capacity),
                    Record::Request(event, request) => ring.push_request(event, request, self.capacity),
                    Record::Forgotten | Record::Lost(_) => {}
                }
            }
            ring.next
        };
        self.next.send_replace(next);
    }

    /// Adds events, the oldest first, and wakes the followers.
    pub fn append(&self, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        self.add(events.iter().copied());
    }

    fn add(&self, records: impl Iterator<Item = Event>) {
        let next = {
            let mut ring = self.ring.lock().expect("nobody panics while it holds the ring");
            for event in records {
                ring.push(event, self.capacity);
            }
            ring.next
        };
        self.next.send_replace(next);
    }

    /// Sequence numbers that memory holds: from the oldest to one past the newest.
    pub fn range(&self) -> std::ops::Range<u64> {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        ring.first()..ring.next
    }

    /// Copies at most `limit` records from sequence number `from` on into `records`, which is
    /// emptied first; returns the number of the first that is still there, at least `from`.
    pub fn copy(&self, from: u64, limit: usize, records: &mut Vec<Record>) -> u64 {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        ring.copy(from, limit, self.capacity, records)
    }

    /// Where the oldest record is, and where the next one will be.
    pub fn kept(&self) -> (Cursor, Cursor) {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        (ring.cursor(ring.first()), ring.cursor(ring.next))
    }

    /// Where everything is known behind, or `written` if that is before.
    pub(super) fn known(&self, written: u64) -> Cursor {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        ring.cursor(ring.known_from.min(written).max(ring.first()))
    }

    /// Copies at most `limit` records behind `cursor` into `records`, which is emptied first, and moves
    /// the cursor behind them. What was overwritten before is counted exactly.
    pub fn follow(&self, cursor: &mut Cursor, limit: usize, records: &mut Vec<Record>) -> Skipped {
        let ring = self.ring.lock().expect("nobody panics while it holds the ring");
        let first = ring.copy(cursor.place, limit, self.capacity, records);
        let before = ring.losses_before(first);
        let overwritten = (first - cursor.place).saturating_sub(before.records - cursor.losses.records);
        let skipped = Skipped { events: overwritten, lost: before.events - cursor.losses.events };
        *cursor = ring.cursor(first + records.len() as u64);
        self.add_missed(skipped.events);
        skipped
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
            let lost = lost + suppressed - before;
            self.add(std::iter::once(Event { r#type: LOSS, timestamp_ns: lost, ..Event::default() }));
        }
    }

    /// Requests that the proxy saw and could not tell; they are recorded as a loss.
    pub fn requests_lost(&self, lost: u64) {
        if lost > 0 {
            self.add(std::iter::once(Event { r#type: LOSS, timestamp_ns: lost, ..Event::default() }));
        }
    }

    /// How many records it keeps.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// A follower was overtaken and missed `events`.
    fn add_missed(&self, events: u64) {
        self.missed_by_readers.fetch_add(events, Ordering::Relaxed);
    }

    /// Events a second, over the last records.
    pub fn rate(&self) -> f64 {
        let mut records = Vec::new();
        let kept = self.range();
        self.copy(kept.end.saturating_sub(RATE_RECORDS).max(kept.start), RATE_RECORDS as usize, &mut records);
        let oldest = records.iter().find_map(|record| Some(record.event()?.timestamp_ns));
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
    /// The sequence number of the oldest record.
    fn first(&self) -> u64 {
        self.next - self.records.len() as u64
    }

    fn cursor(&self, place: u64) -> Cursor {
        Cursor { place, losses: self.losses_before(place) }
    }

    /// Of the records before `place`, which is not overwritten yet.
    fn losses_before(&self, place: u64) -> Losses {
        let count = self.losses.partition_point(|(loss, _)| *loss < place);
        count.checked_sub(1).map_or(self.losses_gone, |last| self.losses[last].1)
    }

    fn copy(&self, from: u64, limit: usize, capacity: usize, records: &mut Vec<Record>) -> u64 {
        records.clear();
        let first = from.max(self.first()).min(self.next.max(from));
        let count = self.next.saturating_sub(first).min(limit as u64) as usize;
        let start = (first % capacity as u64) as usize;
        let until_end = count.min(self.records.len().saturating_sub(start));
        let of = |stored: &Event| self.record(stored);
        records.extend(self.records[start.min(self.records.len())..][..until_end].iter().map(of));
        records.extend(self.records[..count - until_end].iter().map(of));
        first
    }

    fn push(&mut self, event: Event, capacity: usize) {
        if event.r#type == LOSS {
            let Losses { records, events } = self.losses_before(self.next);
            let sum = Losses { records: records + 1, events: events + event.timestamp_ns };
            self.losses.push_back((self.next, sum));
        } else {
            self.events += 1;
        }
        let place = (self.next % capacity as u64) as usize;
        match self.records.get_mut(place) {
            Some(oldest) => {
                let before = std::mem::replace(oldest, event);
                match before.r#type {
                    REQUEST => self.forget_requests(number_of(&before) + 1),
                    LOSS => {
                        if let Some((_, sum)) = self.losses.pop_front() {
                            self.losses_gone = sum;
                        }
                    }
                    _ => {}
                }
            }
            None => self.records.push(event),
        }
        self.next += 1;
    }

    fn push_request(&mut self, event: Event, request: Arc<l7::Record>, capacity: usize) {
        let number = self.first_request + self.requests.len() as u64;
        let service = addr { w: [number as u32, (number >> 32) as u32, 0, 0] };
        self.request_bytes += bytes_of(&request);
        self.requests.push_back((self.next, request));
        self.push(Event { r#type: REQUEST, service, ..event }, capacity);
        let room = capacity * size_of::<Event>() / REQUESTS_SHARE;
        while self.request_bytes > room && self.requests.len() > 1 {
            self.forget_requests(self.first_request + 1);
        }
    }

    /// Forgets what requests before this number say.
    fn forget_requests(&mut self, before: u64) {
        while self.first_request < before
            && let Some((place, request)) = self.requests.pop_front()
        {
            self.request_bytes -= bytes_of(&request);
            self.first_request += 1;
            self.known_from = place + 1;
        }
    }

    fn record(&self, stored: &Event) -> Record {
        match stored.r#type {
            LOSS => Record::Lost(stored.timestamp_ns),
            REQUEST => {
                let place = number_of(stored).checked_sub(self.first_request);
                let request = place.and_then(|place| self.requests.get(usize::try_from(place).ok()?));
                request.map_or(Record::Forgotten, |(_, request)| Record::Request(*stored, request.clone()))
            }
            _ => Record::Packet(*stored),
        }
    }
}

/// The number of the request that an event stands for.
fn number_of(event: &Event) -> u64 {
    let [low, high, ..] = event.service.w;
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tests::request;

    /// Requests share the ring's order with packets, and have a bound of their own in bytes.
    #[test]
    fn requests_are_kept_in_order_and_bounded() {
        let recorder = Recorder::new(64);
        recorder.append(&events(0..1));
        recorder.append_requests(vec![request("/one")]);
        recorder.append(&events(1..2));
        let mut out = Vec::new();
        recorder.copy(0, 10, &mut out);
        let kinds: Vec<_> = out.iter().map(|record| matches!(record, Record::Request(..))).collect();
        assert_eq!(kinds, [false, true, false]);
        assert_eq!(recorder.counts().seen, 3);
        recorder.append_requests(vec![request(&"x".repeat(1000)); 40]);
        recorder.copy(0, 100, &mut out);
        let kept = out.iter().filter(|record| matches!(record, Record::Request(..))).count();
        let gone = out.iter().filter(|record| matches!(record, Record::Forgotten)).count();
        assert_eq!((out.len(), kept + gone), (43, 41));
        assert!((1..3).contains(&kept), "a quarter of the ring's 8 KiB: {kept}");
        // Overwritten events take their requests along.
        recorder.append(&events(0..64));
        assert_eq!(recorder.ring.lock().expect("the test's own").requests.len(), 0);
        assert_eq!(recorder.ring.lock().expect("the test's own").request_bytes, 0);
        recorder.append_requests(vec![request("/two")]);
        recorder.copy(recorder.range().end - 1, 1, &mut out);
        assert!(matches!(&out[..], [Record::Request(..)]), "{out:?}");
    }

    #[test]
    fn what_is_redacted_is_never_kept() {
        let redact = Redact { url_query: true, headers: vec!["traceparent".to_owned()], ..Redact::default() };
        let recorder = Recorder::new(4).redacting(redact);
        recorder.append_requests(vec![request("http://me:secret@shop/pay?card=1")]);
        let mut out = Vec::new();
        recorder.copy(0, 1, &mut out);
        let Record::Request(_, kept) = &out[0] else { panic!("{out:?}") };
        let l7::L7Message::Http(http) = &kept.message else { panic!("{kept:?}") };
        assert_eq!((http.path.as_str(), http.trace_parent.as_ref()), ("http://shop/pay", None));
    }

    fn events(numbers: std::ops::Range<u64>) -> Vec<Event> {
        numbers.map(|number| Event { timestamp_ns: number, ..Event::default() }).collect()
    }

    fn copied(recorder: &Recorder, from: u64, limit: usize) -> (u64, Vec<u64>) {
        let mut out = Vec::new();
        let first = recorder.copy(from, limit, &mut out);
        let number = |record: &Record| match record {
            Record::Packet(event) => event.timestamp_ns,
            Record::Lost(lost) => 1000 + lost,
            other => panic!("{other:?}"),
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
        let (mut cursor, _) = recorder.kept();
        recorder.append(&events(0..5));
        recorder.set_undelivered(3, 5);
        recorder.append(&events(5..10));
        let mut out = Vec::new();
        // Ten events and a record of eight that were lost: the newest four are there.
        let skipped = recorder.follow(&mut cursor, 3, &mut out);
        assert_eq!((skipped, out.len()), (Skipped { events: 6, lost: 8 }, 3));
        let skipped = recorder.follow(&mut cursor, 3, &mut out);
        assert_eq!((skipped, out.len()), (Skipped::default(), 1));
        assert_eq!(
            recorder.counts(),
            RecorderCounts {
                seen: 10,
                held: 4,
                capacity: 4,
                overwritten: 7,
                lost_in_kernel: 3,
                suppressed: 5,
                missed_by_readers: 6
            }
        );
    }

    /// Whatever is read when, what a follower got and what it is told it missed is what came; so are losses.
    #[test]
    fn conservation_is_exact_with_losses_between() {
        for (capacity, batch, limit) in [(1, 1, 1), (4, 3, 2), (4, 9, 100), (7, 5, 3), (64, 7, 1), (5, 1, 2)]
        {
            let recorder = Recorder::new(capacity);
            let (mut cursor, _) = recorder.kept();
            let (mut got, mut missed, mut lost, mut told) = (0, 0, 0, 0);
            let mut out = Vec::new();
            for round in 0..100 {
                recorder.append(&events(0..batch));
                if round % 3 == 0 {
                    lost += round;
                    recorder.set_undelivered(lost, 0);
                }
                let reads = if round == 99 { usize::MAX } else { round as usize % 4 };
                for _ in 0..reads {
                    let skipped = recorder.follow(&mut cursor, limit, &mut out);
                    missed += skipped.events;
                    told += skipped.lost;
                    for record in &out {
                        match record {
                            Record::Lost(lost) => told += lost,
                            _ => got += 1,
                        }
                    }
                    if out.is_empty() {
                        break;
                    }
                }
            }
            assert_eq!((got + missed, told), (100 * batch, lost), "{capacity} {batch} {limit}");
            assert_eq!(recorder.counts().missed_by_readers, missed);
        }
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
