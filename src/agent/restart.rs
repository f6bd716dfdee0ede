//! The agent starts itself anew when something has changed that is fixed while its programs run.
//!
//! A start is invisible to pods: the links and maps stay, and the new process takes them over. So one way
//! serves for a start and for every change of what a start reads: the node's addresses, its pod CIDRs,
//! its devices. The process keeps its number; a supervisor sees nothing.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::watch;

/// Between two starts, at least: what changes all the time must not keep the agent from working.
const RUNS_AT_LEAST: Duration = Duration::from_secs(5);

/// Asks for a new start. Clones ask the same agent.
#[derive(Clone, Debug)]
pub struct Restart {
    asked: Arc<watch::Sender<Option<String>>>,
    began: Instant,
}

impl Default for Restart {
    fn default() -> Self {
        Self { asked: Arc::new(watch::Sender::new(None)), began: Instant::now() }
    }
}

impl Restart {
    /// Asks for a new start; the first cause is the one that is said.
    pub fn request(&self, cause: &str) {
        self.asked.send_if_modified(|asked| {
            let is_first = asked.is_none();
            if is_first {
                tracing::warn!(cause, "the agent will start anew");
                *asked = Some(cause.to_owned());
            }
            is_first
        });
    }

    /// Waits until somebody asks, and then starts anew; returns only if that is not possible.
    pub async fn serve(&self) -> anyhow::Error {
        // The sender lives as long as `self`.
        let _ = self.asked.subscribe().wait_for(Option::is_some).await;
        tokio::time::sleep(RUNS_AT_LEAST.saturating_sub(self.began.elapsed())).await;
        let error = Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec();
        Err::<(), _>(error).context("starting the agent anew").expect_err("exec returns only with an error")
    }
}
