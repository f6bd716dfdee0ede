//! What this node tells the others: identity numbers it claims, its pods.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::kube::Publisher;
use crate::model::{IdentityLabels, NodeEndpoints};

/// Changes of pods within this time are one write.
const BATCH: Duration = Duration::from_millis(20);
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
    while newest.changed().await.is_ok() {
        tokio::time::sleep(BATCH).await;
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
