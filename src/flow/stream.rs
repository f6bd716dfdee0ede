//! The answer to a query: first what is kept, then, for followers, what comes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{Clock, Event, Flow, Names, Query, Record, Recorder, monotonic_ns};

/// Flows that a reader gets without asking for a number.
const DEFAULT_LAST: u64 = 20;
/// Events that are copied at once: 64 KiB.
const CHUNK: usize = 512;
/// A reader hears of lost events at most this often.
const LOSS_INTERVAL: Duration = Duration::from_secs(1);

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// A flow that matches.
    Flow(Box<Flow>),
    /// Some are missing here.
    LostEvents(Lost),
}

/// Events that nobody will see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Where.
    pub source: LostSource,
    /// How many, whether they would have matched or not.
    pub num_events_lost: u64,
}

/// Where events got lost; the names are Hubble's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum LostSource {
    /// The kernel's buffer was full: the agent did not keep up.
    PerfEventRingBuffer,
    /// The reader did not keep up.
    HubbleRingBuffer,
}

/// A query that is being answered.
pub struct Stream {
    recorder: Arc<Recorder>,
    names: Arc<Names>,
    query: Query,
    clock: Clock,
    news: watch::Receiver<u64>,
    records: Vec<Record>,
    state: State,
    missed: u64,
    loss_told: Option<Instant>,
}

enum State {
    /// Nothing has been answered yet.
    Start,
    /// Everything from the first on, up to the second unless following.
    Forward(u64, u64),
    Done,
}

impl Stream {
    /// Begins to answer `query`: what is recorded from now on will not be missed by a follower.
    pub fn new(recorder: Arc<Recorder>, names: Arc<Names>, query: Query) -> Self {
        Self {
            news: recorder.subscribe(),
            recorder,
            names,
            query,
            clock: Clock::now(),
            records: Vec::new(),
            state: State::Start,
            missed: 0,
            loss_told: None,
        }
    }

    /// The next flows, oldest first; waits for some when following. `None`: that was all.
    pub async fn next(&mut self) -> Option<Vec<Item>> {
        self.clock = Clock::now();
        self.names.refresh();
        loop {
            let items = match self.state {
                State::Done => return None,
                State::Start => self.begin().await,
                State::Forward(from, until) => self.forward(from, until).await?,
            };
            if !items.is_empty() {
                return Some(items);
            }
        }
    }

    async fn begin(&mut self) -> Vec<Item> {
        let kept = self.recorder.range();
        self.news.mark_unchanged();
        let is_bounded = self.query.since.is_some() || self.query.until.is_some();
        let last = match self.query.last {
            Some(last) => last,
            None if self.query.all || is_bounded => u64::MAX,
            None if self.query.follow => 0,
            None => DEFAULT_LAST,
        };
        let everything = self.query.all || last == u64::MAX;
        let after = if self.query.follow { State::Forward(kept.end, kept.end) } else { State::Done };
        if everything {
            self.state = State::Forward(kept.start, kept.end);
            return Vec::new();
        }
        self.state = after;
        self.newest(kept, last).await
    }

    /// The newest `last` that match, found from the end backwards. Others get their turn between chunks: a ring
    /// may hold millions.
    async fn newest(&mut self, kept: std::ops::Range<u64>, last: u64) -> Vec<Item> {
        let mut found = Vec::new();
        let mut end = kept.end;
        while end > kept.start && (found.len() as u64) < last {
            let start = end.saturating_sub(CHUNK as u64).max(kept.start);
            let first = self.recorder.copy(start, (end - start) as usize, &mut self.records);
            let records = std::mem::take(&mut self.records);
            // What was overwritten meanwhile is the oldest: there is nothing further back.
            let still_there = records.iter().take(end.saturating_sub(first) as usize);
            // So many flows are asked for: losses do not count.
            let flow = |record: &Record| match record {
                Record::Packet(event) => self.item(event),
                Record::Lost(_) => None,
            };
            found.extend(still_there.rev().filter_map(flow).take((last - found.len() as u64) as usize));
            self.records = records;
            end = if first > start { kept.start } else { start };
            tokio::task::yield_now().await;
        }
        found.reverse();
        found
    }

    /// The next chunk from `from` on. `None`: that was all.
    async fn forward(&mut self, from: u64, until: u64) -> Option<Vec<Item>> {
        if from >= until && !self.query.follow {
            self.state = State::Done;
            return None;
        }
        let limit = if self.query.follow { CHUNK } else { CHUNK.min((until - from) as usize) };
        let first = self.recorder.copy(from, limit, &mut self.records);
        self.missed += first - from;
        self.recorder.add_missed(first - from);
        if self.records.is_empty() && self.query.follow {
            return self.wait().await;
        }
        let records = std::mem::take(&mut self.records);
        self.state = State::Forward(first + records.len() as u64, until);
        let mut items = self.losses();
        items.extend(records.iter().filter_map(|record| match record {
            Record::Packet(event) => self.item(event),
            Record::Lost(lost) => Some(lost_item(LostSource::PerfEventRingBuffer, *lost)),
        }));
        self.records = records;
        Some(items)
    }

    /// Waits until there is something new. `None`: there will never be.
    async fn wait(&mut self) -> Option<Vec<Item>> {
        let losses = self.losses();
        if !losses.is_empty() {
            return Some(losses);
        }
        let is_over = |until: jiff::Timestamp| self.clock.monotonic(until) < monotonic_ns();
        if self.query.until.is_some_and(is_over) {
            return None;
        }
        // Losses must be told even when nothing else comes.
        if let Ok(Err(_)) = tokio::time::timeout(LOSS_INTERVAL, self.news.changed()).await {
            return None;
        }
        self.clock = Clock::now();
        self.names.refresh();
        Some(Vec::new())
    }

    fn item(&self, event: &Event) -> Option<Item> {
        if !self.query.may_match(event) || !self.is_in_time(event) {
            return None;
        }
        let flow = self.names.flow(event, &self.clock);
        self.query.matches(event, &flow).then(|| Item::Flow(Box::new(flow)))
    }

    fn is_in_time(&self, event: &Event) -> bool {
        let time = || self.clock.wall(event.timestamp_ns);
        self.query.since.is_none_or(|since| time() >= since)
            && self.query.until.is_none_or(|until| time() <= until)
    }

    /// What this reader missed since it was last told.
    fn losses(&mut self) -> Vec<Item> {
        let is_soon = self.loss_told.is_some_and(|told| told.elapsed() < LOSS_INTERVAL);
        if self.missed == 0 || is_soon {
            return Vec::new();
        }
        self.loss_told = Some(Instant::now());
        vec![lost_item(LostSource::HubbleRingBuffer, std::mem::take(&mut self.missed))]
    }
}

fn lost_item(source: LostSource, num_events_lost: u64) -> Item {
    Item::LostEvents(Lost { source, num_events_lost })
}
