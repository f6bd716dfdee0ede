//! The whole way of a record: programs, ring buffer, the agent's reader, memory, metrics and a subscriber. All of it is on
//! one processor, with whoever makes the load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use tokio::sync::watch;
use weir::flow::Recorder;
use weir::flow::reader::{KernelEvents, start};
use weir::hubble::metrics::{Context as Labels, FlowMetrics};
use weir::hubble::proto::flow::FlowFilter;
use weir::hubble::proto::observer::GetFlowsRequest;
use weir::hubble::proto::observer::get_flows_response::ResponseTypes;
use weir::hubble::stream::{FlowStream, Source};

use crate::flow::source;
use crate::frame::{RST, SYN, tcp};
use crate::row::Row;
use crate::world::{Cast, World, casts, settings, within};

/// How long each load lasts.
const LASTS: Duration = Duration::from_secs(4);
/// Between two bursts: none is as large as what the ring buffer has room for.
const BURST: Duration = Duration::from_millis(5);
/// Records in memory, as the agent has by default.
const RECORDS: usize = 32_768;
/// Records that each run of the program makes: a new flow, and the end of the one before.
const RECORDS_PER_RUN: u64 = 2;

/// Who looks at the flows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subscriber {
    Nobody,
    /// With a filter that nothing matches.
    Narrow,
    All,
}

/// What became of a load.
struct Outcome {
    /// Records that the programs made.
    offered: u64,
    /// Of these, not read: there was no room, or the pod had its share.
    lost: u64,
    suppressed: u64,
    /// Records that memory got.
    seen: u64,
    /// Flows that the subscriber got, and those that it was told it had missed.
    delivered: u64,
    missed: u64,
    /// Processor time without that of the load, by the time that passed.
    cores: f64,
    /// Records in a second.
    rate: f64,
}

impl Outcome {
    /// What nobody accounts for, in the kernel and behind memory.
    fn unaccounted(&self, subscriber: Subscriber) -> f64 {
        let kernel = self.offered.abs_diff(self.lost + self.suppressed + self.seen);
        let memory = match subscriber {
            // What it was not told yet of the kernel's losses is not its own.
            Subscriber::All => self.seen.abs_diff(self.delivered + self.missed),
            Subscriber::Nobody | Subscriber::Narrow => 0,
        };
        (kernel + memory) as f64
    }
}

/// The rows of the section.
pub fn rows() -> Result<Vec<Row>> {
    let [cast, _] = casts();
    let (sender, receiver) = std::sync::mpsc::channel();
    within(settings(), move |world| {
        for row in measure_all(world, &cast)? {
            sender.send(row)?;
        }
        Ok(())
    })?;
    Ok(receiver.into_iter().collect())
}

fn measure_all(world: &mut World, cast: &Cast) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for per_second in [1_000, 10_000, 50_000, 100_000, 200_000, 2_000_000] {
        let outcome = run(world, cast, per_second, Subscriber::All)?;
        let name = |what: &str| format!("flow/conservation/{per_second}_per_s/{what}");
        rows.push(
            Row::new(name("not_accounted_for"), "records", outcome.unaccounted(Subscriber::All)).at_most(0.0),
        );
        let lost = (outcome.lost + outcome.suppressed + outcome.missed) as f64;
        let lost = Row::new(name("lost"), "records", lost).against(outcome.offered as f64, None);
        // The aim is in records, not in parts of what was offered.
        rows.push(match per_second {
            ..=50_000 => Row { aim: Some(0.0), met: Some(lost.value == Some(0.0)), ..lost },
            _ => lost,
        });
        rows.push(Row::new(name("offered"), "records/s", outcome.rate));
    }
    let quiet = run(world, cast, 20_000, Subscriber::Nobody)?;
    rows.push(Row::new("flow/no_subscriber/10000_new_flows_per_s", "cores", quiet.cores).at_most(0.1));
    let without = run(world, cast, 50_000, Subscriber::Nobody)?;
    let with = run(world, cast, 50_000, Subscriber::Narrow)?;
    rows.push(Row::new("flow/no_subscriber/50000_records_per_s", "cores", without.cores));
    let narrow = (with.cores - without.cores).max(0.0);
    rows.push(Row::new("flow/narrow_subscriber/50000_records_per_s", "cores", narrow).at_most(0.2));
    Ok(rows)
}

/// Makes `per_second` records for a while, and waits until everything has come that will.
fn run(world: &mut World, cast: &Cast, per_second: u64, subscriber: Subscriber) -> Result<Outcome> {
    world.reset()?;
    world.forget_events()?;
    let recorder = Arc::new(Recorder::new(RECORDS));
    let source = source(recorder.clone());
    let (stop, stopping) = watch::channel(false);
    let before = world.datapath.event_counts()?;
    start(KernelEvents::open(world.datapath.clone())?, recorder.clone(), source.names.clone(), stopping)
        .context("starting the reader")?;
    let ending = Arc::new(AtomicBool::new(false));
    let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let serving = serve(source, subscriber, ending.clone(), counts.clone());
    let (began, used_before) =
        (Instant::now(), (used(UsageWho::RUSAGE_SELF)?, used(UsageWho::RUSAGE_THREAD)?));
    load(world, cast, per_second)?;
    let lasted = began.elapsed().as_secs_f64();
    let own = used(UsageWho::RUSAGE_THREAD)? - used_before.1;
    let cores = (used(UsageWho::RUSAGE_SELF)? - used_before.0 - own) / lasted;
    // Until the reader has read all, and the subscriber has been told of all: it hears of losses once a second.
    let came = |world: &World| -> Result<(u64, u64, u64)> {
        let now = world.datapath.event_counts()?;
        Ok((now.offered - before.offered, now.lost - before.lost, now.suppressed - before.suppressed))
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let (offered, lost, suppressed, seen) = loop {
        std::thread::sleep(Duration::from_millis(100));
        let (offered, lost, suppressed) = came(world)?;
        let seen = recorder.counts().seen;
        let told = counts[0].load(Ordering::Acquire) + counts[1].load(Ordering::Acquire);
        let is_told = subscriber != Subscriber::All || told >= seen;
        if (offered <= lost + suppressed + seen && is_told) || Instant::now() > deadline {
            break (offered, lost, suppressed, seen);
        }
    };
    ending.store(true, Ordering::Release);
    stop.send_replace(true);
    serving.join().ok().context("the subscriber panicked")??;
    let [delivered, missed] = [0, 1].map(|index: usize| counts[index].load(Ordering::Acquire));
    let rate = offered as f64 / lasted;
    Ok(Outcome { offered, lost, suppressed, seen, delivered, missed, cores, rate })
}

/// Bursts of new flows.
fn load(world: &World, cast: &Cast, per_second: u64) -> Result<()> {
    let bytes = tcp((cast.a, 40000), (cast.b, 80), SYN | RST).by(1).bytes();
    let began = Instant::now();
    let mut made = 0;
    while began.elapsed() < LASTS {
        let due = (began.elapsed().as_secs_f64() * per_second as f64) as u64 / RECORDS_PER_RUN;
        let runs = u32::try_from((due - made).min(100_000))?;
        if runs > 0 {
            world.repeat("from_pod", &bytes, runs)?;
            made += u64::from(runs);
        }
        // What is more than the processor does is as much as it does.
        made = made.max(due.saturating_sub(100_000));
        std::thread::sleep(BURST);
    }
    ensure!(made > 0, "no load was made");
    Ok(())
}

/// What the agent does with flows: its metrics, and a subscriber.
fn serve(
    source: Source,
    subscriber: Subscriber,
    ending: Arc<AtomicBool>,
    counts: Arc<[AtomicU64; 2]>,
) -> std::thread::JoinHandle<Result<()>> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            let metrics = FlowMetrics::new(Labels::None);
            tokio::spawn(metrics.follow(source.recorder.clone(), source.names.clone()));
            if subscriber != Subscriber::Nobody {
                tokio::spawn(subscribe(source, subscriber, counts));
            }
            while !ending.load(Ordering::Acquire) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        })
    })
}

async fn subscribe(source: Source, subscriber: Subscriber, counts: Arc<[AtomicU64; 2]>) -> Result<()> {
    let filter = FlowFilter { source_port: vec!["7".to_owned()], ..FlowFilter::default() };
    let whitelist = if subscriber == Subscriber::Narrow { vec![filter] } else { Vec::new() };
    let request = GetFlowsRequest { follow: true, whitelist, ..GetFlowsRequest::default() };
    let mut stream = FlowStream::new(source, request)?;
    while let Some(answers) = stream.next().await {
        for answer in answers {
            match answer.response_types {
                Some(ResponseTypes::Flow(_)) => counts[0].fetch_add(1, Ordering::AcqRel),
                // The kernel's losses are counted there.
                Some(ResponseTypes::LostEvents(lost)) if lost.source == 3 => {
                    counts[1].fetch_add(lost.num_events_lost, Ordering::AcqRel)
                }
                _ => 0,
            };
        }
    }
    Ok(())
}

/// Processor time so far, in seconds.
fn used(who: UsageWho) -> Result<f64> {
    let usage = getrusage(who).context("asking for the processor time used")?;
    Ok((usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6)
}
