//! What this node tells the others: identity numbers it claims, its pods.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout_at;

use crate::backoff::Backoff;
use crate::kube::{Publisher, Tables};
use crate::model::{IdentityLabels, NodeEndpoints};
use crate::telemetry::Parts;

/// Changes of pods within this time are one write.
const BATCH: Duration = Duration::from_millis(20);
/// While changes go on, each write waits this many times as long after the last one as that did.
const GROWTH: u32 = 3;
/// And no longer than this.
const LAST_BATCH: Duration = Duration::from_secs(1);
/// Of pods that start at once, a write has this part at least: a hundred are a handful of writes, soon
/// after one another where pods start fast, and farther apart where they start slowly.
const PART: usize = 6;
/// No write waits longer for its part than this after the one before. It costs the pods nothing: where a
/// hundred take 14 s, containers start seconds after their pods have addresses. Other nodes
/// judge packets meanwhile by the identity in the tunnel header. Native routing has none: there a
/// pod that is not published yet is a stranger to the others, and a policy that names it denies.
const LAST_PART: Duration = Duration::from_secs(2);
/// What was published is shown by the source within this time. Whoever deletes it again and again is
/// answered this often.
const SHOWN_WITHIN: Duration = Duration::from_secs(2);
/// The part of the agent that tells the other nodes of its pods.
const PUBLISHING: &str = "publishing";
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// Claims numbers in the background, one task for each set of labels.
#[derive(Clone)]
pub struct Claims {
    publisher: Arc<Publisher>,
    state: Arc<Mutex<ClaimState>>,
}

#[derive(Default)]
struct ClaimState {
    under_way: HashSet<Arc<IdentityLabels>>,
    /// By the last round.
    wanted: HashSet<Arc<IdentityLabels>>,
}

impl Claims {
    /// No claim is under way.
    pub fn new(publisher: Arc<Publisher>) -> Self {
        Self { publisher, state: Arc::default() }
    }

    /// Starts the claims that are not under way; one that is not among these is not tried again. A number
    /// that was claimed shows up in the table of identities, which starts the next round.
    pub fn start(&self, unclaimed: &[Arc<IdentityLabels>]) {
        self.lock().wanted = unclaimed.iter().cloned().collect();
        for labels in unclaimed {
            if self.lock().under_way.insert(labels.clone()) {
                tokio::spawn(self.clone().claim(labels.clone()));
            }
        }
    }

    async fn claim(self, labels: Arc<IdentityLabels>) {
        let mut pause = Backoff::new(FIRST_RETRY, LAST_RETRY);
        loop {
            match self.publisher.claim_identity(&labels).await {
                Ok(number) => {
                    tracing::debug!(%number, namespace = labels.namespace, "claimed an identity");
                    break;
                }
                Err(error) => {
                    tracing::warn!(
                        error = crate::error::chain(&error),
                        namespace = labels.namespace,
                        "claiming an identity"
                    );
                    tokio::time::sleep(pause.wait()).await;
                }
            }
            // The pods may have gone, or have other labels.
            if !self.lock().wanted.contains(&labels) {
                break;
            }
        }
        self.lock().under_way.remove(&labels);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ClaimState> {
        self.state.lock().expect("no claim panics while it holds the lock")
    }
}

/// What the others should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// This node's pods.
    pub endpoints: NodeEndpoints,
    /// How many pods of this node are still to be connected.
    pub coming: usize,
}

/// Publishes the newest set of pods, batched, again and again until it is out; and again when somebody
/// else has changed or deleted what was published.
pub async fn publish_endpoints(
    publisher: Arc<Publisher>,
    mut newest: watch::Receiver<Option<News>>,
    tables: Arc<Tables>,
    parts: Parts,
) {
    parts.add(PUBLISHING);
    let mut pause = Backoff::new(FIRST_RETRY, LAST_RETRY);
    let mut pace = Pace::default();
    let mut written = None;
    loop {
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = lost(&publisher, &tables, written.as_ref()) => {
                tracing::warn!("this node's endpoints are not shown as they were published: publishing them again");
                parts.repaired(PUBLISHING, [("NodeEndpoints of this node".to_owned(), 1)]);
                publisher.forget_sent().await;
                written = None;
            }
        }
        pace.wait(&mut newest, written.as_ref()).await;
        loop {
            let Some(News { endpoints, .. }) = newest.borrow_and_update().clone() else { break };
            if written.as_ref() == Some(&endpoints) {
                break;
            }
            match publisher.publish_endpoints(&endpoints).await {
                Ok(()) => {
                    pause.reset();
                    written = Some(endpoints);
                    parts.works(PUBLISHING);
                    break;
                }
                Err(error) => {
                    let cause = crate::error::chain(&error);
                    if parts.fails(PUBLISHING, vec![cause.clone()], false, true) {
                        tracing::warn!(error = cause, "publishing this node's endpoints");
                    }
                    tokio::time::sleep(pause.wait()).await;
                }
            }
        }
    }
}

/// Returns when the source shows something else than what was published, for longer than it takes to show
/// what is new. A source that is away shows what it last said.
async fn lost(publisher: &Publisher, tables: &Tables, written: Option<&NodeEndpoints>) {
    let Some(written) = written else { return std::future::pending().await };
    let mut changes = tables.node_endpoints.subscribe();
    loop {
        let is_synced = changes.borrow_and_update().is_synced;
        if is_synced && !publisher.is_shown(written) {
            tokio::time::sleep(SHOWN_WITHIN).await;
            if !publisher.is_shown(written) {
                return;
            }
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// When the next write may be: soon after a lone change, later while changes follow one another.
#[derive(Default)]
struct Pace {
    /// When the last write began, and how long after it the next one may.
    last: Option<(Instant, Duration)>,
    /// So many pods were changed or coming at a time, since writes follow one another.
    at_once: usize,
}

impl Pace {
    /// Waits until the write of a change that has just come is due; returns at once if nothing is to be written.
    async fn wait(&mut self, newest: &mut watch::Receiver<Option<News>>, written: Option<&NodeEndpoints>) {
        let began = Instant::now();
        loop {
            let due = match &*newest.borrow_and_update() {
                Some(news) if Some(&news.endpoints) != written => {
                    self.due(began, changes(&news.endpoints, written), news.coming)
                }
                _ => return,
            };
            if due <= Instant::now() {
                return self.wrote(began, Instant::now());
            }
            // Pods that come meanwhile may make it sooner.
            let _ = timeout_at(due.into(), newest.changed()).await;
        }
    }

    /// When to write `changed` pods, the first of which changed at `began`, while others are `coming`.
    fn due(&mut self, began: Instant, changed: usize, coming: usize) -> Instant {
        let soon = began + BATCH;
        let Some((at, gap)) = self.last else { return soon };
        if began > at + LAST_PART {
            self.at_once = 0;
        }
        self.at_once = self.at_once.max(changed + coming);
        let is_part = coming == 0 || changed * PART >= self.at_once;
        soon.max(at + if is_part { gap } else { LAST_PART })
    }

    fn wrote(&mut self, began: Instant, now: Instant) {
        let gap = match self.last {
            Some((at, gap)) if began < at + gap => (gap * GROWTH).min(LAST_BATCH),
            _ => BATCH * GROWTH,
        };
        self.last = Some((now, gap));
    }
}

/// How many pods are not as they were written.
fn changes(newest: &NodeEndpoints, written: Option<&NodeEndpoints>) -> usize {
    let endpoints = written.map(|written| &*written.endpoints).unwrap_or_default();
    let mut before: BTreeMap<_, _> = endpoints.iter().map(|endpoint| (&endpoint.pod, endpoint)).collect();
    let other = newest.endpoints.iter().filter(|endpoint| before.remove(&endpoint.pod) != Some(endpoint));
    other.count() + before.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IdentityId, ObjectKey, PublishedEndpoint};

    const COUNT: u32 = 100;

    /// When `count` pods that are connected every `apart` are written; those that are not
    /// connected yet are known to come if they are `at_once`.
    fn writes(apart: Duration, count: u32, at_once: bool) -> Vec<Duration> {
        let start = Instant::now();
        let (mut pace, mut began, mut written, mut times) = (Pace::default(), None, 0, Vec::new());
        let mut now = Duration::ZERO;
        while written < count {
            let connected = count.min((now.as_nanos() / apart.as_nanos()) as u32 + 1);
            if connected > written {
                let since = start + *began.get_or_insert(now);
                let coming = if at_once { count - connected } else { 0 };
                if pace.due(since, (connected - written) as usize, coming as usize) <= start + now {
                    pace.wrote(since, start + now);
                    (began, written) = (None, connected);
                    times.push(now);
                }
            }
            now += Duration::from_millis(1);
        }
        times
    }

    #[tokio::test]
    async fn a15_a_claim_that_nobody_wants_any_more_is_given_up() {
        let nowhere = std::path::PathBuf::from("/nonexistent/weir");
        let tables = Arc::new(crate::kube::Tables::new());
        let publisher =
            Publisher::new(&crate::kube::Source::Manifests(nowhere), "a", tables).expect("a name");
        let claims = Claims::new(Arc::new(publisher));
        let labels = Arc::new(IdentityLabels { namespace: "shop".to_owned(), ..IdentityLabels::default() });
        claims.start(std::slice::from_ref(&labels));
        tokio::time::sleep(2 * FIRST_RETRY).await;
        assert!(claims.lock().under_way.contains(&labels), "it is tried again");
        claims.start(&[]);
        let ended = async {
            while claims.lock().under_way.contains(&labels) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), ended).await.expect("it ends");
    }

    #[test]
    fn a_lone_change_is_written_soon() {
        let apart = Duration::from_secs(3);
        assert_eq!(writes(apart, 2, false), [BATCH, apart + BATCH]);
    }

    #[test]
    fn a_few_pods_are_written_as_they_come() {
        let apart = Duration::from_millis(200);
        let soon: Vec<_> = (0..5).map(|number| number * apart + BATCH).collect();
        assert_eq!(writes(apart, 5, true), soon);
    }

    #[test]
    fn a_hundred_at_once_are_few_writes_and_none_waits_for_long() {
        for milliseconds in [1, 10, 30, 100, 150] {
            let apart = Duration::from_millis(milliseconds);
            let written = writes(apart, COUNT, true);
            assert!(written.len() <= 10, "{apart:?}: {written:?}");
            // The last ones wait for nobody.
            let end = (COUNT - 1) * apart + LAST_BATCH;
            assert!(written.last().is_some_and(|last| *last <= end), "{apart:?}: {written:?}");
            assert!(written.windows(2).all(|pair| pair[1] - pair[0] <= LAST_PART), "{apart:?}: {written:?}");
        }
    }

    #[test]
    fn changes_without_end_are_a_write_a_second() {
        let written = writes(Duration::from_millis(10), 500, false);
        assert!(written.len() <= 10, "{written:?}");
        assert!(written.windows(2).all(|pair| pair[1] - pair[0] <= LAST_BATCH), "{written:?}");
    }

    #[test]
    fn changes_are_counted_by_pod() {
        let endpoint = |name: &str, identity| PublishedEndpoint {
            pod: ObjectKey::new("shop", name),
            addresses: Vec::new(),
            identity: IdentityId(identity),
            workload: None,
            host_ports: Vec::new(),
        };
        let node = |endpoints| NodeEndpoints { node: "a".into(), internal_addresses: Vec::new(), endpoints };
        let before = node(vec![endpoint("same", 300), endpoint("other", 300), endpoint("gone", 300)]);
        let now = node(vec![endpoint("new", 300), endpoint("same", 300), endpoint("other", 301)]);
        assert_eq!((changes(&now, Some(&before)), changes(&now, None)), (3, 3));
        assert_eq!(changes(&now, Some(&now)), 0);
    }
}
