//! Addresses of names go to the agent before the client hears of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::model::l7::Names;

/// How long an answer waits until the maps have its addresses.
const WAIT: Duration = Duration::from_secs(2);
/// How many answers may wait at once.
const WAITING_MAX: usize = 4096;

/// Announces addresses, and waits for the agent's word.
#[derive(Debug)]
pub struct Announcer {
    sender: mpsc::Sender<Names>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<()>>>,
    next: AtomicU64,
}

/// What is to be announced.
pub type Announcements = mpsc::Receiver<Names>;

impl Announcer {
    /// Nobody waits.
    pub fn new() -> (Self, Announcements) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        (Self { sender, waiting: Mutex::default(), next: AtomicU64::new(1) }, receiver)
    }

    /// True when the agent has said that the addresses are in the maps. Without an agent this is false.
    pub async fn announce(&self, mut names: Names) -> bool {
        names.seq = self.next.fetch_add(1, Ordering::Relaxed);
        let seq = names.seq;
        let (sender, acknowledged) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() >= WAITING_MAX {
                return false;
            }
            waiting.insert(seq, sender);
        }
        let is_sent = self.sender.try_send(names).is_ok();
        let is_known = is_sent && matches!(tokio::time::timeout(WAIT, acknowledged).await, Ok(Ok(())));
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&seq);
        is_known
    }

    /// The agent has put the addresses of a message into the maps.
    pub fn acknowledge(&self, seq: u64) {
        let sender = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&seq);
        if let Some(sender) = sender {
            // The answer may have been given up meanwhile.
            let _ = sender.send(());
        }
    }
}
