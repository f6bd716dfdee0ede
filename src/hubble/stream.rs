//! The answer to GetFlows on one node: first what is kept, then, for followers, what comes.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;

use super::convert::Converter;
use super::filter::Filters;
use super::mask::Mask;
use super::proto::flow::{LostEvent, LostEventSource};
use super::proto::observer::get_flows_response::ResponseTypes;
use super::proto::observer::{GetFlowsRequest, GetFlowsResponse};
use super::proto::{time, timestamp};
use crate::flow::disk::{History, View};
use crate::flow::{Clock, Cursor, Event, Names, Record, Recorder, monotonic_ns};

/// Flows that a reader gets without asking for a number.
const DEFAULT_LAST: u64 = 20;
/// The newest flows that a reader may ask for by number: they are collected before the first is sent.
const LAST_MAX: u64 = 100_000;
/// Records that are copied at once: 64 KiB.
const CHUNK: usize = 512;
/// Records that are read from disk at once: 512 KiB.
const DISK_CHUNK: usize = 4096;
/// By so much records may stand before others that are older.
const DISORDER: jiff::SignedDuration = jiff::SignedDuration::from_secs(1);
/// A reader hears of lost events at most this often.
const LOSS_INTERVAL: Duration = Duration::from_secs(1);

/// Where a node's flows come from.
#[derive(Clone)]
pub struct Source {
    /// The records.
    pub recorder: Arc<Recorder>,
    /// Their names.
    pub names: Arc<Names>,
    /// Their form.
    pub converter: Arc<Converter>,
    /// What is on disk behind the records; `None`: nothing.
    pub history: Option<History>,
}

/// Why a request is refused, for people.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadRequest(String);

/// A request that is being answered.
pub struct FlowStream {
    source: Source,
    wanted: Wanted,
    clock: Clock,
    news: watch::Receiver<u64>,
    records: Vec<Record>,
    state: State,
    missed: Missed,
    left: u64,
}

/// The request, understood.
struct Wanted {
    filters: Filters,
    mask: Mask,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    number: u64,
    is_first: bool,
    follow: bool,
}

/// What a reader was too slow for, and has not been told.
#[derive(Default)]
struct Missed {
    count: u64,
    first: Option<Timestamp>,
    told: Option<Instant>,
}

/// What memory had when that was asked: from the oldest record to one past the newest.
type Kept = (Cursor, u64);

enum State {
    /// Nothing has been answered yet.
    Start,
    /// What is on disk from a place on; then what was kept in memory when that was asked.
    OnDisk(Arc<View>, u64, Kept),
    /// Everything from the first on, up to the second unless following.
    Forward(Cursor, u64),
    Done,
}

impl Wanted {
    fn new(request: GetFlowsRequest) -> Result<Self, BadRequest> {
        let bad = |error: &dyn std::fmt::Display| BadRequest(error.to_string());
        if request.first && request.follow {
            return Err(BadRequest("first and follow exclude each other".to_owned()));
        }
        let moment = |wire: Option<prost_types::Timestamp>| {
            wire.map(|wire| time(&wire).ok_or_else(|| BadRequest(format!("{wire:?} is no time")))).transpose()
        };
        let (since, mut until) = (moment(request.since)?, moment(request.until)?);
        if since.is_some() && until.is_none() && !request.follow {
            until = Some(Timestamp::now());
        }
        let is_bounded = since.is_some() || until.is_some();
        let number = match request.number {
            _ if is_bounded => u64::MAX,
            0 if !request.follow => DEFAULT_LAST,
            u64::MAX => u64::MAX,
            number if !request.first => number.min(LAST_MAX),
            number => number,
        };
        let paths = request.field_mask.map(|mask| mask.paths).unwrap_or_default();
        Ok(Self {
            filters: Filters::new(&request.whitelist, &request.blacklist).map_err(|error| bad(&error))?,
            mask: Mask::new(&paths).map_err(|error| bad(&error))?,
            since,
            until,
            number,
            is_first: request.first,
            follow: request.follow,
        })
    }

    fn is_in_time(&self, event: &Event, clock: &Clock) -> bool {
        if self.since.is_none() && self.until.is_none() {
            return true;
        }
        let time = clock.wall(event.timestamp_ns);
        self.since.is_none_or(|since| time >= since) && self.until.is_none_or(|until| time <= until)
    }
}

impl FlowStream {
    /// Begins to answer: what is recorded from now on will not be missed by a follower.
    pub fn new(source: Source, request: GetFlowsRequest) -> Result<Self, BadRequest> {
        let wanted = Wanted::new(request)?;
        Ok(Self {
            news: source.recorder.subscribe(),
            left: if wanted.is_first { wanted.number } else { u64::MAX },
            source,
            wanted,
            clock: Clock::now(),
            records: Vec::new(),
            state: State::Start,
            missed: Missed::default(),
        })
    }

    /// The next answers, oldest first; waits for some when following. `None`: that was all.
    pub async fn next(&mut self) -> Option<Vec<GetFlowsResponse>> {
        self.clock = Clock::now();
        self.source.names.refresh();
        loop {
            let answers = match self.state {
                State::Done => return None,
                State::Start => self.begin().await,
                State::OnDisk(ref view, from, kept) => {
                    let view = view.clone();
                    self.forward_on_disk(view, from, kept).await
                }
                State::Forward(from, until) => self.forward(from, until).await?,
            };
            if !answers.is_empty() {
                return Some(answers);
            }
            tokio::task::yield_now().await;
        }
    }

    async fn begin(&mut self) -> Vec<GetFlowsResponse> {
        let (oldest, newest) = self.source.recorder.kept();
        self.news.mark_unchanged();
        let everything = self.wanted.number == u64::MAX || self.wanted.is_first;
        if everything {
            self.state = match self.on_disk().await {
                Some((view, from, cursor)) => State::OnDisk(view, from, (cursor, newest.place())),
                None => State::Forward(oldest, newest.place()),
            };
            return Vec::new();
        }
        self.state = if self.wanted.follow { State::Forward(newest, newest.place()) } else { State::Done };
        let wanted = self.wanted.number;
        let mut found = self.newest(oldest.place()..newest.place()).await;
        if (found.len() as u64) < wanted
            && let Some((view, _, cursor)) = self.on_disk().await
        {
            if cursor.place() > oldest.place() {
                // Before it memory does not know all, and the disk does.
                found = self.newest(cursor.place().min(newest.place())..newest.place()).await;
            }
            let missing = wanted.saturating_sub(found.len() as u64);
            let mut older = self.newest_on_disk(view, missing).await;
            older.append(&mut found);
            found = older;
        }
        found
    }

    /// What is on disk that memory has no more, the first place of what was asked for, and where memory goes on. A disk that cannot be read
    /// is said in the log: what memory has is still answered.
    async fn on_disk(&self) -> Option<(Arc<View>, u64, Cursor)> {
        let history = self.source.history.clone()?;
        let (recorder, since) = (self.source.recorder.clone(), self.wanted.since);
        let since = since.map(|since| self.clock.monotonic(since));
        let opening = tokio::task::spawn_blocking(move || {
            let (view, cursor) = history.before(&recorder)?;
            let from = since.map_or(Ok(0), |since| view.place_of(since))?;
            anyhow::Ok((view, from, cursor))
        });
        match opening.await.map_err(anyhow::Error::from).flatten() {
            Ok((view, from, cursor)) => (from < view.len()).then(|| (Arc::new(view), from, cursor)),
            Err(error) => {
                tracing::warn!(
                    error = crate::error::chain(&error),
                    "the history of flows on disk is not read"
                );
                None
            }
        }
    }

    /// The next chunk of what is on disk; behind its end memory begins.
    async fn forward_on_disk(&mut self, view: Arc<View>, from: u64, kept: Kept) -> Vec<GetFlowsResponse> {
        let records = read(&view, from, DISK_CHUNK).await;
        let is_later = |record: &Record| {
            let Some(event) = record.event() else { return false };
            let time = self.clock.wall(event.timestamp_ns);
            self.wanted.until.is_some_and(|until| time > until.saturating_add(DISORDER).unwrap_or(until))
        };
        // What memory has is later still.
        let is_over = records.is_empty() || records.first().is_some_and(is_later);
        self.state = match is_over || self.left == 0 {
            true => State::Forward(kept.0, kept.1),
            false => State::OnDisk(view, from + records.len() as u64, kept),
        };
        let mut answers = Vec::new();
        for record in records {
            if self.left == 0 {
                break;
            }
            if matches!(record, Record::Forgotten) {
                self.missed.add(1);
            }
            if let Some(answer) = self.answer(&record) {
                self.left -= u64::from(self.left != u64::MAX);
                answers.push(answer);
            }
        }
        answers
    }

    /// The newest so many of what is on disk, the oldest of them first.
    async fn newest_on_disk(&mut self, view: Arc<View>, wanted: u64) -> Vec<GetFlowsResponse> {
        let mut found = Vec::new();
        let mut end = view.len();
        while end > 0 && (found.len() as u64) < wanted {
            let start = end.saturating_sub(DISK_CHUNK as u64);
            let records = read(&view, start, (end - start) as usize).await;
            let newest = records.iter().rev().filter_map(|record| self.answer(record));
            found.extend(newest.take((wanted - found.len() as u64) as usize));
            end = start;
        }
        found.reverse();
        found
    }

    /// The newest so many that match, found from the end backwards. Others get their turn between chunks: a ring
    /// may hold millions.
    async fn newest(&mut self, kept: Range<u64>) -> Vec<GetFlowsResponse> {
        let wanted = self.wanted.number;
        let mut found = Vec::new();
        let mut end = kept.end;
        while end > kept.start && (found.len() as u64) < wanted {
            let start = end.saturating_sub(CHUNK as u64).max(kept.start);
            let first = self.source.recorder.copy(start, (end - start) as usize, &mut self.records);
            let records = std::mem::take(&mut self.records);
            // What was overwritten meanwhile is the oldest: there is nothing further back.
            let still_there = records.iter().take(end.saturating_sub(first) as usize);
            found.extend(
                still_there
                    .rev()
                    .filter_map(|record| self.answer(record))
                    .take((wanted - found.len() as u64) as usize),
            );
            self.records = records;
            end = if first > start { kept.start } else { start };
            tokio::task::yield_now().await;
        }
        found.reverse();
        found
    }

    /// The next chunk from `from` on. `None`: that was all.
    async fn forward(&mut self, mut cursor: Cursor, until: u64) -> Option<Vec<GetFlowsResponse>> {
        let from = cursor.place();
        if (from >= until && !self.wanted.follow) || self.left == 0 {
            self.state = State::Done;
            return None;
        }
        let limit = if self.wanted.follow { CHUNK } else { CHUNK.min((until - from) as usize) };
        let skipped = self.source.recorder.follow(&mut cursor, limit, &mut self.records);
        self.missed.add(skipped.events);
        self.state = State::Forward(cursor, until);
        if skipped.lost == 0 && self.records.is_empty() && self.wanted.follow {
            return self.wait().await;
        }
        let records = std::mem::take(&mut self.records);
        let mut answers = self.losses();
        if skipped.lost > 0 {
            answers.push(self.loss(LostEventSource::PerfEventRingBuffer, skipped.lost, None));
        }
        for record in &records {
            let is_flow = record.event().is_some();
            let answer = match record {
                Record::Lost(lost) => Some(self.loss(LostEventSource::PerfEventRingBuffer, *lost, None)),
                _ => self.answer(record),
            };
            if matches!(record, Record::Forgotten) {
                self.missed.add(1);
            }
            if let Some(answer) = answer.filter(|_| !is_flow || self.left > 0) {
                self.left -= u64::from(is_flow && self.left != u64::MAX);
                answers.push(answer);
            }
        }
        self.records = records;
        Some(answers)
    }

    /// Waits until there is something new. `None`: there will never be.
    async fn wait(&mut self) -> Option<Vec<GetFlowsResponse>> {
        let losses = self.losses();
        if !losses.is_empty() {
            return Some(losses);
        }
        let is_over = |until: Timestamp| self.clock.monotonic(until) < monotonic_ns();
        if self.wanted.until.is_some_and(is_over) {
            return None;
        }
        // Losses must be told even when nothing else comes.
        if let Ok(Err(_)) = tokio::time::timeout(LOSS_INTERVAL, self.news.changed()).await {
            return None;
        }
        self.clock = Clock::now();
        self.source.names.refresh();
        Some(Vec::new())
    }

    /// `None`: it is not asked for, or no flow.
    fn answer(&self, record: &Record) -> Option<GetFlowsResponse> {
        let wanted = &self.wanted;
        let event = record.event()?;
        let may_match = match record {
            Record::Request(..) => wanted.filters.may_match_request(event),
            _ => wanted.filters.may_match(event),
        };
        if !may_match || !wanted.is_in_time(event, &self.clock) {
            return None;
        }
        let Source { converter, names, .. } = &self.source;
        let flow = match record {
            Record::Request(event, request) => converter.request(event, request, names, &self.clock),
            _ => converter.flow(event, names, &self.clock),
        };
        if !wanted.filters.matches(&flow) {
            return None;
        }
        let time = flow.time;
        let flow = wanted.mask.apply(flow);
        Some(self.response(ResponseTypes::Flow(flow), time))
    }

    /// What this reader missed since it was last told.
    fn losses(&mut self) -> Vec<GetFlowsResponse> {
        match self.missed.take() {
            Some((count, first)) => vec![self.loss(LostEventSource::HubbleRingBuffer, count, first)],
            None => Vec::new(),
        }
    }

    fn loss(&self, source: LostEventSource, count: u64, first: Option<Timestamp>) -> GetFlowsResponse {
        let now = Timestamp::now();
        let lost = LostEvent {
            source: source.into(),
            num_events_lost: count,
            first: Some(timestamp(first.unwrap_or(now))),
            last: Some(timestamp(now)),
            ..LostEvent::default()
        };
        self.response(ResponseTypes::LostEvents(lost), Some(timestamp(now)))
    }

    fn response(&self, what: ResponseTypes, time: Option<prost_types::Timestamp>) -> GetFlowsResponse {
        let node_name = self.source.converter.node.clone();
        GetFlowsResponse { response_types: Some(what), node_name, time }
    }
}

/// Records of a view; none where the disk cannot be read.
async fn read(view: &Arc<View>, from: u64, limit: usize) -> Vec<Record> {
    let view = view.clone();
    let reading = tokio::task::spawn_blocking(move || view.read(from, limit)).await;
    reading.map_err(anyhow::Error::from).flatten().unwrap_or_else(|error| {
        tracing::warn!(
            error = crate::error::chain(&error),
            "the history of flows on disk is not read further"
        );
        Vec::new()
    })
}

impl Missed {
    fn add(&mut self, count: u64) {
        if count > 0 {
            self.count += count;
            self.first.get_or_insert_with(Timestamp::now);
        }
    }

    /// How many, and since when; at most once in a while.
    fn take(&mut self) -> Option<(u64, Option<Timestamp>)> {
        if self.count == 0 || self.told.is_some_and(|told| told.elapsed() < LOSS_INTERVAL) {
            return None;
        }
        self.told = Some(Instant::now());
        Some((std::mem::take(&mut self.count), self.first.take()))
    }
}
