//! Readiness: what must be done before the agent counts as ready.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

/// The tasks that are not done yet. Clones share them.
#[derive(Clone)]
pub struct Ready {
    pending: Arc<Mutex<Pending>>,
    is_ready: watch::Sender<bool>,
}

#[derive(Default)]
struct Pending {
    next: u64,
    tasks: BTreeMap<u64, String>,
}

/// A task that is not done; dropping it says that it is.
#[must_use = "dropping the guard says that the task is done"]
pub struct ReadyGuard {
    ready: Ready,
    number: u64,
}

impl Default for Ready {
    fn default() -> Self {
        Self { pending: Arc::default(), is_ready: watch::Sender::new(true) }
    }
}

impl Ready {
    /// Not ready until the guard is dropped; `task` says what is awaited.
    pub fn register(&self, task: impl Into<String>) -> ReadyGuard {
        let mut pending = self.lock();
        let number = pending.next;
        pending.next += 1;
        pending.tasks.insert(number, task.into());
        self.is_ready.send_replace(false);
        ReadyGuard { ready: self.clone(), number }
    }

    /// What is awaited, in the order in which it was registered.
    pub fn pending(&self) -> Vec<String> {
        self.lock().tasks.values().cloned().collect()
    }

    /// True when nothing is awaited.
    pub fn is_ready(&self) -> bool {
        *self.is_ready.borrow()
    }

    /// Returns when nothing is awaited.
    pub async fn wait(&self) {
        // The sender lives as long as `self`.
        let _ = self.is_ready.subscribe().wait_for(|is_ready| *is_ready).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().expect("nobody panics while it holds the tasks")
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        let mut pending = self.ready.lock();
        pending.tasks.remove(&self.number);
        self.ready.is_ready.send_replace(pending.tasks.is_empty());
    }
}
