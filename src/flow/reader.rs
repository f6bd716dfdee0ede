//! The one thread that empties the kernel's ring buffer.
//!
//! The programs never wake anybody (a wake-up costs more than the record); this thread
//! looks every few milliseconds, less often while nothing happens. It is a thread of its
//! own because one look is next to nothing beside a turn of a runtime's timer and workers.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tracing::warn;

use super::{Event, Names, Recorder};
use crate::datapath::{Datapath, EventReader};

/// Between two looks while so many events arrive that the ring buffer might fill up.
const HURRY: Duration = Duration::from_millis(1);
/// Events of one look from which on that is so: a tenth of the ring buffer.
const MANY: usize = 3000;
/// Between two looks while events arrive.
const BUSY: Duration = Duration::from_millis(10);
/// Between two looks while none do.
const IDLE: Duration = Duration::from_millis(20);
/// Between two looks at what changes slowly, and between two attempts after an error.
const SLOW: Duration = Duration::from_secs(1);
/// Events that are handed over at once: 32 KiB.
const BATCH: usize = 256;

/// The kernel's ring buffer.
pub trait EventSource: Send {
    /// Calls `each` for every event that is there, and returns how many; never blocks.
    fn consume(&mut self, each: &mut dyn FnMut(&Event)) -> Result<usize>;
    /// How many events did not fit so far, and how many were only counted as their pod had its share.
    fn undelivered(&self) -> Result<(u64, u64)>;
}

/// The ring buffer of a loaded datapath.
pub struct KernelEvents {
    reader: EventReader,
    datapath: Arc<Datapath>,
}

impl KernelEvents {
    /// Takes the one reader of the ring buffer.
    pub fn open(datapath: Arc<Datapath>) -> Result<Self> {
        Ok(Self { reader: datapath.events()?, datapath })
    }
}

impl EventSource for KernelEvents {
    fn consume(&mut self, each: &mut dyn FnMut(&Event)) -> Result<usize> {
        self.reader.consume(each)
    }

    fn undelivered(&self) -> Result<(u64, u64)> {
        let counts = self.datapath.event_counts()?;
        Ok((counts.lost, counts.suppressed))
    }
}

/// Moves events from `source` to `recorder` until `shutdown` is true or nobody can say so any
/// more, and keeps `names` current, so that a name that is gone when somebody reads is still
/// known for the time it was valid.
pub fn start(
    source: impl EventSource + 'static,
    recorder: Arc<Recorder>,
    names: Arc<Names>,
    shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    let work = move || run(source, &recorder, &names, &shutdown);
    thread::Builder::new().name("flows".to_owned()).spawn(work).map(drop)
}

fn run(mut source: impl EventSource, recorder: &Recorder, names: &Names, shutdown: &watch::Receiver<bool>) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut slow_at = Instant::now();
    let mut failing = false;
    while !*shutdown.borrow() && shutdown.has_changed().is_ok() {
        let pause = match drain(&mut source, recorder, &mut batch) {
            Ok(count) => {
                failing = false;
                match count {
                    0 => IDLE,
                    1..MANY => BUSY,
                    _ => HURRY,
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(
                        error = crate::error::chain(&error),
                        "reading flow events does not work; trying again"
                    );
                }
                SLOW
            }
        };
        if slow_at.elapsed() >= SLOW {
            slow_at = Instant::now();
            names.refresh();
            match source.undelivered() {
                Ok((lost, suppressed)) => recorder.set_undelivered(lost, suppressed),
                Err(error) => warn!(error = crate::error::chain(&error), "reading the count of lost events"),
            }
        }
        thread::sleep(pause);
    }
}

fn drain(source: &mut impl EventSource, recorder: &Recorder, batch: &mut Vec<Event>) -> Result<usize> {
    batch.clear();
    let result = source.consume(&mut |event| {
        batch.push(*event);
        if batch.len() == BATCH {
            recorder.append(batch);
            batch.clear();
        }
    });
    recorder.append(batch);
    result
}
