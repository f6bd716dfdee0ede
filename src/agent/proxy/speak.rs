//! One connection with a proxy: listeners and rules go there, records and names come from there.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

use super::handle::{Proxy, Wanted};
use crate::datapath::RuleSets;
use crate::model::l7::{
    Descriptor, FromProxy, Hello, MESSAGE_MAX, Names, ProxyState, Record, RuleSet, RuleSetId, ToProxy,
};
use crate::netlink;

/// Rules that nobody asks for stay so long: a connection may be judged by them yet.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// How often it is asked which rules can go.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// Messages that wait to be written.
const WAITING: usize = 64;

/// Who hears what the proxy tells.
pub trait Hears: Send + Sync {
    /// Requests and answers that it saw, and how many more were lost.
    fn records(&self, records: Vec<Record>, lost: u64);
    /// What an answer of DNS said. The answer goes to the client only when this is done.
    fn names(&self, names: Names) -> Heard;
    /// What answers said that went to their clients without the proxy, and how long ago; of how many addresses
    /// nothing is said, since there were too many at once.
    fn names_passed(&self, names: Vec<(Names, Duration)>, left_out: u64);
    /// How the proxy is.
    fn state(&self, state: &ProxyState);
}

/// Done when what was heard is in force.
pub type Heard = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What is said to a proxy, and to whom its answers go.
pub struct Said<'a> {
    pub sets: &'a RuleSets,
    pub hears: &'a Arc<dyn Hears>,
    pub proxy: &'a Proxy,
    pub wanted: &'a mut watch::Receiver<Wanted>,
    pub deny_with_nxdomain: bool,
}

/// What this proxy was given.
#[derive(Default)]
struct Given {
    /// Since when nobody asks for a rule set; `None`: somebody does.
    sets: BTreeMap<RuleSetId, Option<Instant>>,
    /// Rule sets of messages that are not acknowledged.
    unanswered: BTreeMap<u64, Vec<RuleSetId>>,
    next: u64,
}

impl Said<'_> {
    /// Hands everything over, and goes on until the proxy ends.
    pub async fn speak(self, stream: UnixStream, descriptors: Vec<(Descriptor, OwnedFd)>) -> Result<()> {
        let stream =
            tokio::task::spawn_blocking(move || hand_over(stream, descriptors, self.deny_with_nxdomain))
                .await
                .context("handing listeners over to the proxy")??;
        let (reads, mut writes) = stream.into_split();
        let (answers, mut answering) = mpsc::channel(WAITING);
        let mut given = Given::default();
        let first = self.wanted.borrow_and_update().clone();
        // What nobody wants any more, and another proxy may have had, is kept and forgotten like the rest.
        let gone = self.proxy.take_unwanted(&first);
        given
            .send(&mut writes, (self.sets, self.proxy), &first.union(&gone).copied().collect(), false)
            .await?;
        given.unwanted(gone.iter().copied());
        let settled = tokio::time::sleep(KEPT_FOR);
        tokio::pin!(settled);
        let mut is_settled = false;
        let (heard, mut hearing) = mpsc::channel(WAITING);
        let hears = self.hears.clone();
        // Ends with the connection.
        let hearer = tokio::spawn(hear(reads, hears, answers, heard));
        let mut forget = tokio::time::interval(FORGET_EVERY);
        let outcome = loop {
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() { break Ok(()) }
                    let wanted = self.wanted.borrow_and_update().clone();
                    given.send(&mut writes, (self.sets, self.proxy), &wanted, false).await?;
                }
                Some(answer) = answering.recv() => write(&mut writes, &answer).await?,
                acknowledged = hearing.recv() => match acknowledged {
                    Some(number) => self.proxy.has(given.unanswered.remove(&number).unwrap_or_default()),
                    None => break Ok(()),
                },
                // Connections may be judged by what a former agent has sent, but not for ever.
                () = &mut settled, if !is_settled => {
                    is_settled = true;
                    let wanted = self.wanted.borrow().clone();
                    let before = std::mem::take(&mut given.sets);
                    let all = wanted.iter().chain(before.keys()).copied().collect();
                    given.send(&mut writes, (self.sets, self.proxy), &all, true).await?;
                    given.sets.extend(before);
                }
                _ = forget.tick() => {
                    let wanted = self.wanted.borrow().clone();
                    let old = given.forget(&mut writes, &wanted).await?;
                    self.proxy.has_no_more(&old);
                    self.sets.forget(&old);
                }
            }
        };
        hearer.abort();
        match hearer.await {
            Ok(heard) => outcome.and(heard),
            Err(_) => outcome,
        }
    }
}

impl Given {
    /// Sends the rule sets that are wanted and were not sent yet.
    async fn send(
        &mut self,
        writes: &mut OwnedWriteHalf,
        (sets, proxy): (&RuleSets, &Proxy),
        wanted: &BTreeSet<RuleSetId>,
        replace: bool,
    ) -> Result<()> {
        let now = Instant::now();
        for (id, unwanted) in &mut self.sets {
            match wanted.contains(id) {
                true => *unwanted = None,
                false => *unwanted = unwanted.or(Some(now)),
            }
        }
        let marked = |set: RuleSet| RuleSet { by_envoy: proxy.is_by_envoy(&set), ..set };
        let new = wanted.iter().filter(|id| !self.sets.contains_key(id)).filter_map(|id| sets.get(*id));
        let new: Vec<RuleSet> = new.map(marked).collect();
        if new.is_empty() && !replace {
            return Ok(());
        }
        let ids: Vec<RuleSetId> = new.iter().map(|set| set.id).collect();
        self.sets.extend(ids.iter().map(|id| (*id, None)));
        self.next += 1;
        self.unanswered.insert(self.next, ids);
        write(writes, &ToProxy::RuleSets { set: new, remove: Vec::new(), replace, seq: self.next }).await
    }

    /// Nobody wants these from now on.
    fn unwanted(&mut self, ids: impl Iterator<Item = RuleSetId>) {
        let now = Instant::now();
        self.sets.extend(ids.map(|id| (id, Some(now))));
    }

    /// Takes back the rule sets that nobody has asked for in a long time.
    async fn forget(
        &mut self,
        writes: &mut OwnedWriteHalf,
        wanted: &BTreeSet<RuleSetId>,
    ) -> Result<BTreeSet<RuleSetId>> {
        let is_old = |unwanted: &Option<Instant>| unwanted.is_some_and(|since| since.elapsed() > KEPT_FOR);
        let old: BTreeSet<RuleSetId> = self
            .sets
            .iter()
            .filter(|(id, unwanted)| is_old(unwanted) && !wanted.contains(id))
            .map(|(id, _)| *id)
            .collect();
        if !old.is_empty() {
            self.sets.retain(|id, _| !old.contains(id));
            self.next += 1;
            let remove = old.iter().copied().collect();
            write(writes, &ToProxy::RuleSets { set: Vec::new(), remove, replace: false, seq: self.next })
                .await?;
        }
        Ok(old)
    }
}

/// Sends the descriptors with the first message.
fn hand_over(
    stream: UnixStream,
    descriptors: Vec<(Descriptor, OwnedFd)>,
    deny_with_nxdomain: bool,
) -> Result<UnixStream> {
    let stream = stream.into_std().context("taking the proxy's connection")?;
    stream.set_nonblocking(false).context("taking the proxy's connection")?;
    let hello =
        Hello { descriptors: descriptors.iter().map(|(kind, _)| *kind).collect(), deny_with_nxdomain };
    let mut line = serde_json::to_vec(&hello).context("writing the first message to the proxy")?;
    line.push(b'\n');
    let borrowed: Vec<_> = descriptors.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    netlink::send_with_descriptors(&stream, &line, &borrowed).context("sending listeners to the proxy")?;
    stream.set_nonblocking(true).context("taking the proxy's connection")?;
    UnixStream::from_std(stream).context("taking the proxy's connection")
}

async fn write(writes: &mut OwnedWriteHalf, message: &ToProxy) -> Result<()> {
    let mut line = serde_json::to_vec(message).context("writing a message to the proxy")?;
    ensure!(line.len() < MESSAGE_MAX, "{} bytes of rules are too many for one message", line.len());
    line.push(b'\n');
    writes.write_all(&line).await.context("writing to the proxy")
}

/// Takes what the proxy says, and answers names; `heard` gets the numbers that it acknowledges.
async fn hear(
    reads: OwnedReadHalf,
    hears: Arc<dyn Hears>,
    answers: mpsc::Sender<ToProxy>,
    heard: mpsc::Sender<u64>,
) -> Result<()> {
    let mut reads = BufReader::new(reads);
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = (&mut reads).take(MESSAGE_MAX as u64).read_until(b'\n', &mut line).await;
        if count.context("reading from the proxy")? == 0 {
            return Ok(());
        }
        if !line.ends_with(b"\n") {
            bail!("a message of the proxy has no end within {MESSAGE_MAX} bytes");
        }
        match serde_json::from_slice(&line).context("reading a message of the proxy")? {
            FromProxy::Ack(number) => heard.send(number).await.context("noting an answer of the proxy")?,
            FromProxy::Refused { id, why } => {
                tracing::warn!(set = id.0, why, "the proxy cannot enforce rules, so they allow nothing");
            }
            FromProxy::Records { records, lost } => hears.records(records, lost),
            FromProxy::State(state) => hears.state(&state),
            FromProxy::Names(names) => {
                let (seq, heard, answers) = (names.seq, hears.names(names), answers.clone());
                // One answer waits for its round beside the others; the proxy bounds how many.
                tokio::spawn(async move {
                    heard.await;
                    // The proxy may have gone meanwhile.
                    let _ = answers.send(ToProxy::NamesAck(seq)).await;
                });
            }
        }
    }
}
