//! The queue of records to the agent. It is bounded: when nobody reads, records are lost and counted.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use crate::model::l7::Record;

/// How many records wait at most.
const QUEUE: usize = 8192;
/// The most records of one message.
const BATCH: usize = 256;

/// Takes records from connections.
#[derive(Debug)]
pub struct Recorder {
    sender: mpsc::Sender<Record>,
    lost: AtomicU64,
}

/// The other end of the queue.
#[derive(Debug)]
pub struct Records(mpsc::Receiver<Record>);

impl Recorder {
    /// An empty queue.
    pub fn new() -> (Self, Records) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self { sender, lost: AtomicU64::new(0) }, Records(receiver))
    }

    /// Never waits.
    pub fn record(&self, record: Record) {
        if self.sender.try_send(record).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many were lost since the last call.
    pub fn take_lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }
}

impl Records {
    /// The next ones, as many as there are up to a bound; waits for the first. `None`: the recorder is gone.
    pub async fn next(&mut self) -> Option<Vec<Record>> {
        let mut batch = Vec::new();
        (self.0.recv_many(&mut batch, BATCH).await > 0).then_some(batch)
    }
}
