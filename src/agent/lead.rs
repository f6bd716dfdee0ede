//! Answering on the link for the addresses of the Services that this node leads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use regex::Regex;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::election::{Election, Groups, Step};
use super::local::Local;
use crate::datapath::{AnnounceWriter, Place};
use crate::kube::{Board, Postings, Tables};
use crate::model::{Announcement, MacAddress, ObjectKey};
use crate::netlink::{self, Listening};
use crate::service::announced::{Group, Wishes};
use crate::telemetry::Parts;

/// The part of the agent that does it.
const PART: &str = "announcing";
/// News within this time are one round.
const BATCH: Duration = Duration::from_millis(100);
/// Without news there is a round all the same.
const LOOK_MAX: Duration = Duration::from_secs(1);
/// A new address is said so many times: what is sent once may be lost.
const REPEATS: u8 = 3;
/// An agent that stops waits so long for the API server to take its Leases back.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(3);
/// Leases that are given back at a time.
const HAND_OVER_AT_ONCE: usize = 16;

/// Who answers for a Service's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// The node; empty: none yet.
    pub node: String,
    /// The devices by which it answers, if it is this one.
    pub devices: BTreeSet<String>,
    /// The addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// By Service.
pub type Leaders = BTreeMap<ObjectKey, Leader>;

/// What it takes.
pub struct Lead {
    node: Arc<str>,
    duration: Duration,
    tables: Arc<Tables>,
    local: Arc<Local>,
    board: Arc<Board>,
    writer: AnnounceWriter,
    leaders: Arc<ArcSwap<Leaders>>,
    parts: Parts,
    election: Election,
    wishes: Wishes,
    groups: Groups,
    /// What the wishes say of devices, compiled.
    patterns: BTreeMap<String, Regex>,
    /// The groups that are answered for.
    led: BTreeSet<ObjectKey>,
    rows: BTreeMap<Place, MacAddress>,
    repeats: BTreeMap<Place, u8>,
    listening: BTreeMap<Place, Listening>,
}

/// A device that answers.
struct Device {
    index: u32,
    name: String,
    mac: MacAddress,
}

impl Lead {
    /// Nothing is led yet; what the programs answer for goes on for as long as the agent before has said.
    pub fn new(
        (node, duration): (&str, Duration),
        (tables, local): (Arc<Tables>, Arc<Local>),
        board: Board,
        writer: AnnounceWriter,
        leaders: Arc<ArcSwap<Leaders>>,
        parts: Parts,
    ) -> Self {
        parts.add(PART);
        Self {
            node: node.into(),
            duration,
            tables,
            local,
            board: Arc::new(board),
            writer,
            leaders,
            parts,
            election: Election::new(node, duration),
            wishes: Wishes::default(),
            groups: Groups::new(),
            patterns: BTreeMap::new(),
            led: BTreeSet::new(),
            rows: BTreeMap::new(),
            repeats: BTreeMap::new(),
            listening: BTreeMap::new(),
        }
    }

    /// Leads until the agent is to stop; then, if it `hands_over`, another node may lead at once.
    pub async fn run(mut self, mut stopping: watch::Receiver<bool>, hands_over: bool) {
        tokio::select! {
            () = self.lead() => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
        if !hands_over {
            return;
        }
        let handed = timeout(HAND_OVER_WITHIN, self.hand_over()).await;
        if let Err(error) = handed.context("no answer").flatten() {
            tracing::warn!(error = crate::error::chain(&error), "handing announced Services over");
        }
    }

    /// Gives back what another node may lead. Without one, the kernel answers on for a while.
    async fn hand_over(&mut self) -> Result<()> {
        let Some(postings) = self.board.read().await.context("reading who leads")? else { return Ok(()) };
        let others = self.groups.iter().filter(|(_, group)| group.candidates.len() > 1);
        let given: Vec<ObjectKey> = others
            .map(|(name, _)| name)
            .filter(|name| self.election.is_holder(name, &postings))
            .cloned()
            .collect();
        if given.is_empty() {
            return Ok(());
        }
        let devices = self.devices()?;
        // What is not given in time is answered for as after a death.
        for batch in given.chunks(HAND_OVER_AT_ONCE) {
            // Before another may.
            self.led.retain(|name| !batch.contains(name));
            let rows = self.rows_of(&self.led, &devices);
            self.writer.write(&rows).context("writing what this node answers for")?;
            let posts = batch.iter().map(|name| self.board.post(name, postings.services.get(name), ""));
            for (name, posted) in batch.iter().zip(futures::future::join_all(posts).await) {
                if let Err(error) = posted {
                    tracing::warn!(
                        service = %name,
                        error = crate::error::chain(&error),
                        "handing the Lease over: it ends by itself"
                    );
                }
            }
        }
        tracing::info!(services = given.len(), "another node may answer for the addresses of Services");
        Ok(())
    }

    /// Never returns.
    async fn lead(&mut self) {
        self.tables.wait_synced().await;
        let board = self.board.clone();
        let look = LOOK_MAX.min(self.duration / 10);
        let mut is_following = false;
        loop {
            let changed = self.tables.changed();
            self.learn();
            if self.groups.is_empty() && self.led.is_empty() && !is_following {
                // Whoever announces nothing asks nobody.
                if let Err(error) = self.writer.write(&BTreeMap::new()) {
                    self.fails(&error);
                }
                changed.await;
                sleep(BATCH).await;
                continue;
            }
            if !std::mem::replace(&mut is_following, true) {
                let board = board.clone();
                tokio::spawn(async move { board.follow().await });
            }
            match self.round().await {
                Ok(()) => self.parts.works(PART),
                Err(error) => self.fails(&error),
            }
            tokio::select! {
                () = changed => sleep(BATCH.min(look)).await,
                () = board.changed() => sleep(BATCH.min(look)).await,
                () = sleep(look) => {}
            }
        }
    }

    fn fails(&self, error: &anyhow::Error) {
        let cause = crate::error::chain(error);
        if self.parts.fails(PART, vec![cause.clone()], false, true) {
            tracing::warn!(error = cause, "answering for Services' addresses");
        }
    }

    /// What the cluster wishes now.
    fn learn(&mut self) {
        let wishes = Wishes {
            services: self.tables.services.snapshot(),
            slices: self.tables.slices.snapshot(),
            nodes: self.tables.nodes.snapshot(),
            announcements: self.tables.announcements(),
        };
        if !wishes.is_same(&self.wishes) {
            self.groups = wishes.groups();
            self.patterns = patterns(&wishes);
            self.wishes = wishes;
        }
    }

    async fn round(&mut self) -> Result<()> {
        let Some(postings) = self.board.read().await.context("reading who leads")? else { return Ok(()) };
        let now = Instant::now();
        self.election.observe(&postings, now);
        let renewed = match self.election.is_due(&self.groups, &postings, now) {
            true => self.renew(now).await,
            false => Ok(()),
        };
        let steps = self.election.steps(&self.groups, &postings, Instant::now());
        if steps.iter().any(|step| !matches!(step, Step::Take(_))) {
            // Before another may.
            self.answer(&postings)?;
        }
        let written = self.write(&steps, &postings).await;
        let postings = self.board.read().await.context("reading who leads")?.unwrap_or_default();
        self.answer(&postings)?;
        self.show(&postings);
        renewed.and(written)
    }

    async fn renew(&mut self, now: Instant) -> Result<()> {
        let renewed = timeout(self.duration / 3, self.board.renew()).await;
        renewed.context("renewing this node's Lease: no answer")??;
        self.election.renew(now);
        Ok(())
    }

    async fn write(&mut self, steps: &[Step], postings: &Postings) -> Result<()> {
        let began = Instant::now();
        for step in steps {
            // The rest in the next round: this node's own Lease is to be renewed meanwhile.
            if began.elapsed() > self.duration / 5 {
                break;
            }
            let (Step::Take(name) | Step::GiveBack(name) | Step::Remove(name)) = step;
            let old = postings.services.get(name);
            let holder = if let Step::Take(_) = step { &*self.node } else { "" };
            let writing = async {
                match (step, old) {
                    (Step::Remove(_), Some(old)) => self.board.remove(name, old).await,
                    _ => self.board.post(name, old, holder).await,
                }
            };
            let is_first = timeout(self.duration / 3, writing)
                .await
                .with_context(|| format!("the Lease of Service {name}: no answer"))??;
            if is_first && let Step::Take(_) = step {
                let after = old.map_or("", |old| &old.holder);
                tracing::info!(service = %name, after, "this node answers for the addresses of a Service");
                self.election.take(name);
            }
        }
        Ok(())
    }

    /// Makes the programs answer for what is led. While the API server does not answer, nobody else can
    /// take over by it: what was led goes on, until another node is heard.
    fn answer(&mut self, postings: &Postings) -> Result<()> {
        let left = self.election.left(Instant::now());
        let is_cut_off = left.is_zero();
        let may = |name: &ObjectKey, group: &Group| {
            group.candidates.contains(&self.node)
                && match is_cut_off {
                    true => self.led.contains(name) && self.election.is_holder(name, postings),
                    false => self.election.leads(name, postings),
                }
        };
        let led = self.groups.iter().filter(|(name, group)| may(name, group));
        let led: BTreeSet<ObjectKey> = led.map(|(name, _)| name.clone()).collect();
        let devices = if led.is_empty() { Vec::new() } else { self.devices()? };
        let rows = self.rows_of(&led, &devices);
        if is_cut_off {
            self.writer.keep(&rows).context("writing what this node answers for")?;
        } else {
            let new = self.writer.write(&rows).context("writing what this node answers for")?;
            self.repeats.extend(new.into_iter().map(|place| (place, REPEATS)));
        }
        let lives = if is_cut_off && !led.is_empty() { self.duration * 2 / 3 } else { left };
        self.writer.extend(lives, left).context("writing how long this node answers")?;
        (self.led, self.rows) = (led, rows);
        self.listen();
        self.announce()
    }

    fn devices(&self) -> Result<Vec<Device>> {
        let known = self.local.devices.snapshot();
        let links = tokio::task::block_in_place(netlink::links).context("listing the devices")?;
        let known = links.into_iter().filter(|link| known.contains_key(&link.index));
        Ok(known.map(|link| Device { index: link.index, name: link.name, mac: link.mac }).collect())
    }

    fn rows_of(&self, led: &BTreeSet<ObjectKey>, devices: &[Device]) -> BTreeMap<Place, MacAddress> {
        let labels = self.wishes.nodes.get(&self.node).map(|node| node.labels.clone()).unwrap_or_default();
        let mut rows = BTreeMap::new();
        for (address, wishes) in
            led.iter().filter_map(|name| self.groups.get(name)).flat_map(|of| &of.addresses)
        {
            let wishes: Vec<_> = wishes.iter().filter(|wish| wish.nodes.matches(&labels)).collect();
            for device in
                devices.iter().filter(|device| wishes.iter().any(|wish| self.names(wish, &device.name)))
            {
                rows.insert((*address, device.index), device.mac);
            }
        }
        rows
    }

    /// The wish is for this device.
    fn names(&self, wish: &Announcement, device: &str) -> bool {
        let is_it =
            |pattern: &String| self.patterns.get(pattern).is_some_and(|pattern| pattern.is_match(device));
        wish.interfaces.is_empty() || wish.interfaces.iter().any(is_it)
    }

    /// Joins the groups that IPv6 addresses are asked for by.
    fn listen(&mut self) {
        self.listening.retain(|place, _| self.rows.contains_key(place));
        for (address, ifindex) in self.rows.keys().copied() {
            let IpAddr::V6(address) = address else { continue };
            let place = (IpAddr::V6(address), ifindex);
            if self.listening.contains_key(&place) {
                continue;
            }
            match join(ifindex, address) {
                Ok(listening) => drop(self.listening.insert(place, listening)),
                Err(error) => tracing::debug!(%error, %address, "listening to questions for an address"),
            }
        }
    }

    /// Says on the link which addresses are new here.
    fn announce(&mut self) -> Result<()> {
        let mut result = Ok(());
        self.repeats.retain(|place, _| self.rows.contains_key(place));
        for ((address, ifindex), left) in &mut self.repeats {
            *left -= 1;
            let mac = self.rows[&(*address, *ifindex)];
            let sent = tokio::task::block_in_place(|| netlink::announce(*ifindex, mac, *address));
            result = result.and(sent.with_context(|| format!("by the device {ifindex}")));
        }
        self.repeats.retain(|_, left| *left > 0);
        result
    }

    fn show(&self, postings: &Postings) {
        let known = self.local.devices.snapshot();
        let mut leaders = Leaders::new();
        for (name, group) in &self.groups {
            let node = postings.services.get(name).map(|posted| posted.holder.clone()).unwrap_or_default();
            let of_group = self.rows.keys().filter(|(address, _)| group.addresses.contains_key(address));
            let devices =
                of_group.filter_map(|(_, ifindex)| Some(known.get(ifindex)?.name.clone())).collect();
            let addresses = group.addresses.keys().copied().collect();
            let leader = Leader { node, devices, addresses };
            leaders.extend(group.services.iter().map(|service| (service.clone(), leader.clone())));
        }
        self.leaders.store(Arc::new(leaders));
    }
}

fn join(ifindex: u32, address: Ipv6Addr) -> netlink::Result<Listening> {
    tokio::task::block_in_place(|| Listening::to(ifindex, address))
}

/// Every regular expression of the wishes, compiled; one that is none names no device.
fn patterns(wishes: &Wishes) -> BTreeMap<String, Regex> {
    let all = wishes.announcements.iter().flat_map(|all| all.values()).flat_map(|wish| &wish.interfaces);
    all.filter_map(|pattern| Some((pattern.clone(), Regex::new(pattern).ok()?))).collect()
}
