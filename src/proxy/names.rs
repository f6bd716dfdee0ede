//! Addresses of names go to the agent before the client hears of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::model::EndpointId;
use crate::model::l7::Names;

/// How long an answer waits until the maps have its addresses; then it passes without.
const WAIT: Duration = Duration::from_secs(2);
/// How many answers may wait at once.
const WAITING_MAX: usize = 4096;
/// And of one pod: one that asks for much makes nobody else's answers pass unheard.
const WAITING_OF_ONE: usize = 256;

/// Announces addresses, and waits for the agent's word.
#[derive(Debug)]
pub struct Announcer {
    sender: mpsc::Sender<Names>,
    waiting: Mutex<HashMap<u64, Waiting>>,
    next: AtomicU64,
    is_heard: AtomicBool,
}

/// Whose answer waits, and how it hears of the agent's word.
#[derive(Debug)]
struct Waiting {
    endpoint: Option<EndpointId>,
    sender: oneshot::Sender<()>,
}

/// What is to be announced.
pub type Announcements = mpsc::Receiver<Names>;

impl Announcer {
    /// Nobody waits.
    pub fn new() -> (Self, Announcements) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let is_heard = AtomicBool::new(false);
        (Self { sender, waiting: Mutex::default(), next: AtomicU64::new(1), is_heard }, receiver)
    }

    /// An agent hears what is announced, or none does: then nobody waits.
    pub fn set_heard(&self, is_heard: bool) {
        self.is_heard.store(is_heard, Ordering::Relaxed);
        if !is_heard {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// True when the agent has said that the addresses are in the maps. Without an agent this is false at once,
    /// and the next agent hears of them.
    pub async fn announce(&self, mut names: Names) -> bool {
        if !self.is_heard.load(Ordering::Relaxed) {
            // When the queue is full the next agent learns the name with the next question for it.
            let _ = self.sender.try_send(names);
            return false;
        }
        names.seq = self.next.fetch_add(1, Ordering::Relaxed);
        let seq = names.seq;
        let (sender, acknowledged) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let of_one = waiting.values().filter(|one| one.endpoint == names.endpoint).count();
            if waiting.len() >= WAITING_MAX || of_one >= WAITING_OF_ONE {
                return false;
            }
            waiting.insert(seq, Waiting { endpoint: names.endpoint, sender });
        }
        let is_sent = self.sender.try_send(names).is_ok();
        let is_known = is_sent && matches!(tokio::time::timeout(WAIT, acknowledged).await, Ok(Ok(())));
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&seq);
        is_known
    }

    /// The agent has put the addresses of a message into the maps.
    pub fn acknowledge(&self, seq: u64) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&seq);
        if let Some(waiting) = waiting {
            // The answer may have been given up meanwhile.
            let _ = waiting.sender.send(());
        }
    }
}
