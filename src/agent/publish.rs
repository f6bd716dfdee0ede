//! What this node tells the others: identity numbers it claims, its pods.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::kube::Publisher;
use crate::model::{IdentityLabels, NodeEndpoints};

/// Changes of pods within this time are one write.
const BATCH: Duration = Duration::from_millis(20);
/// While changes go on, each write waits this many times as long after the last one as that did.
const GROWTH: u32 = 3;
/// And no longer than this. A hundred pods that start at once are a handful of writes then; other nodes
/// judge their packets meanwhile by the identity in the tunnel header. Native routing has none: there a
/// pod of such a burst is a stranger to the others for as long, and a policy that names it denies.
const LAST_BATCH: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// Claims numbers in the background, one task for each set of labels.
#[derive(Clone)]
pub struct Claims {
    publisher: Arc<Publisher>,
    under_way: Arc<Mutex<HashSet<Arc<IdentityLabels>>>>,
}

impl Claims {
    /// No claim is under way.
    pub fn new(publisher: Arc<Publisher>) -> Self {
        Self { publisher, under_way: Arc::default() }
    }

    /// Starts the claims that are not under way. A number that was claimed shows
    /// up in the table of identities, which starts the next round.
    pub fn start(&self, unclaimed: &[Arc<IdentityLabels>]) {
        for labels in unclaimed {
            if self.lock().insert(labels.clone()) {
                tokio::spawn(self.clone().claim(labels.clone()));
            }
        }
    }

    async fn claim(self, labels: Arc<IdentityLabels>) {
        let mut pause = FIRST_RETRY;
        loop {
            match self.publisher.claim_identity(&labels).await {
                Ok(number) => {
                    tracing::debug!(%number, namespace = labels.namespace, "claimed an identity");
                    break;
                }
                Err(error) => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        namespace = labels.namespace,
                        "claiming an identity"
                    );
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_RETRY);
                }
            }
        }
        self.lock().remove(&labels);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<Arc<IdentityLabels>>> {
        self.under_way.lock().expect("no claim panics while it holds the lock")
    }
}

/// Publishes the newest set of pods, batched, again and again until it is out.
pub async fn publish_endpoints(
    publisher: Arc<Publisher>,
    mut newest: watch::Receiver<Option<NodeEndpoints>>,
) {
    let mut pause = FIRST_RETRY;
    let mut spacing = Spacing::default();
    while newest.changed().await.is_ok() {
        tokio::time::sleep(spacing.wait(Instant::now())).await;
        loop {
            let Some(endpoints) = newest.borrow_and_update().clone() else { break };
            match publisher.publish_endpoints(&endpoints).await {
                Ok(()) => {
                    pause = FIRST_RETRY;
                    break;
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "publishing this node's endpoints");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_RETRY);
                }
            }
        }
    }
}

/// When the next write may be: soon after a lone change, ever later while changes follow one another.
#[derive(Default)]
struct Spacing {
    /// When the last write was to begin, and how long after it the next one may.
    last: Option<(Instant, Duration)>,
}

impl Spacing {
    /// How long to wait with the write of a change that comes now.
    fn wait(&mut self, now: Instant) -> Duration {
        let (at, next) = match self.last {
            Some((last, gap)) if now < last + gap => (last + gap, (gap * GROWTH).min(LAST_BATCH)),
            _ => (now + BATCH, BATCH * GROWTH),
        };
        self.last = Some((at, next));
        at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When changes that come every `apart` until `end` are written, from the first of them on.
    fn writes(apart: Duration, end: Duration) -> Vec<Duration> {
        let start = Instant::now();
        let mut spacing = Spacing::default();
        let (mut now, mut written) = (Duration::ZERO, Vec::new());
        while now < end {
            now += spacing.wait(start + now);
            written.push(now);
            // The next change that comes after the write.
            now = apart * (now.as_nanos() / apart.as_nanos() + 1) as u32;
        }
        written
    }

    #[test]
    fn a_lone_change_is_written_soon() {
        let apart = Duration::from_secs(3);
        assert_eq!(writes(apart, 2 * apart), [BATCH, apart + BATCH]);
    }

    #[test]
    fn many_changes_are_few_writes() {
        let written = writes(Duration::from_millis(10), Duration::from_secs(5));
        assert!(written.len() <= 10, "{written:?}");
        assert!(written.windows(2).all(|pair| pair[1] - pair[0] <= LAST_BATCH), "{written:?}");
    }
}
