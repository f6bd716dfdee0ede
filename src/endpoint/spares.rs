//! Links that lie ready for the next pods.
//!
//! Attaching a program to a device waits until every processor has let go of what
//! was there before: an RCU grace period (tcx_entry_sync in kernel/bpf/tcx.c), 8 to
//! 11 ms at 250 Hz, and a pod needs two. So a few pairs lie ready, down and with
//! their programs attached. They are made while nobody is being connected; when
//! there is none, ADD makes its own. They outlive the agent, and the next takes
//! them over.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tracing::{debug, warn};

use crate::netlink::{self, SparePair};

/// Attaches a pod's programs to a device; false if that is quick, so that nothing is to be kept ready.
pub type AttachSpare = dyn Fn(u32) -> Result<bool> + Send + Sync;

/// A pod that comes so soon after the last one must not wait for the making of a spare pair:
/// both need the kernel's lock of devices.
const QUIET: Duration = Duration::from_millis(30);
/// Numbers in the names of pairs.
const NUMBERS: usize = 10_000;
const RETRY: Duration = Duration::from_secs(30);

/// The pairs that are ready.
pub struct Spares {
    wanted: usize,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    ready: Vec<SparePair>,
    last_use: Option<Instant>,
    last_number: usize,
}

impl Spares {
    /// Keeps `wanted` pairs ready, once `keep_ready` runs.
    pub fn new(wanted: usize) -> Self {
        Self { wanted, state: Mutex::default(), changed: Notify::new() }
    }

    /// A pair for a pod, if there is one.
    pub(super) fn take(&self) -> Option<SparePair> {
        let mut state = self.lock();
        state.last_use = Some(Instant::now());
        self.changed.notify_one();
        state.ready.pop()
    }

    /// Makes pairs whenever some are missing, until `shutdown` turns true.
    pub async fn keep_ready(self: Arc<Self>, attach: Arc<AttachSpare>, mut shutdown: watch::Receiver<bool>) {
        let mut taken_over = false;
        loop {
            let (spares, attach) = (self.clone(), attach.clone());
            let done = spawn_blocking(move || spares.make_one(&*attach, taken_over)).await;
            let pause = match done.unwrap_or_else(|panic| Err(panic.into())) {
                Ok(Made::One) => Duration::ZERO,
                Ok(Made::Enough) => Duration::MAX,
                Ok(Made::Later(pause)) => pause,
                Err(error) => {
                    warn!(
                        error = format!("{error:#}"),
                        "making a spare link: pods' links are made when they come"
                    );
                    RETRY
                }
            };
            taken_over = true;
            tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => return,
                () = self.changed.notified(), if pause > QUIET => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn make_one(&self, attach: &AttachSpare, taken_over: bool) -> Result<Made> {
        if !taken_over {
            self.take_over(attach)?;
        }
        let number = {
            let mut state = self.lock();
            if let Some(busy) = state.last_use.and_then(|last| QUIET.checked_sub(last.elapsed())) {
                return Ok(Made::Later(busy));
            }
            if state.ready.len() >= self.wanted {
                return Ok(Made::Enough);
            }
            // Goes round: a pair that was just taken may still have its name.
            state.last_number = (state.last_number + 1) % NUMBERS;
            state.last_number
        };
        let pair = netlink::create_spare_pair(number)?;
        if !attach(pair.host_ifindex)? {
            netlink::delete_spare_pair(&pair)?;
            return Ok(Made::Enough);
        }
        debug!(number, "a link lies ready");
        self.lock().ready.push(pair);
        Ok(Made::One)
    }

    /// The pairs of the agent before us, now under this agent's programs.
    fn take_over(&self, attach: &AttachSpare) -> Result<()> {
        for pair in netlink::spare_pairs().context("looking for spare links")? {
            let is_missing = self.lock().ready.len() < self.wanted;
            if is_missing && attach(pair.host_ifindex)? {
                let mut state = self.lock();
                state.last_number = state.last_number.max(pair.number);
                state.ready.push(pair);
            } else {
                netlink::delete_spare_pair(&pair)?;
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the lock")
    }
}

/// What a look at the pairs came to.
enum Made {
    /// There is one more.
    One,
    /// None is missing.
    Enough,
    /// Pods are being connected: look again after this.
    Later(Duration),
}
