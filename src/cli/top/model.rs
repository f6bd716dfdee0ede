//! What the newest flows come to: talkers, pairs, drops by reason; pure and bounded.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use clap::ValueEnum;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::flow::reserved_name;
use crate::hubble::proto::flow::{Flow, TrafficDirection, Verdict, WeirEvent};
use crate::hubble::proto::observer::GetFlowsResponse;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;
use crate::hubble::proto::relay::NodeState;
use crate::hubble::proto::time;
use crate::hubble::view::{Side, drop_reason, protocol, sides};
use crate::model::IdentityId;

/// Names of one kind in one second; the others are counted together.
const NAMES_MAX: usize = 4096;
/// Connections whose last counters are remembered.
const CONNECTIONS_MAX: usize = 131_072;
/// What stands for names that had no room.
const OTHER: &str = "(other)";

/// Who the two sides are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// Namespace and pod.
    #[default]
    Pod,
    /// Namespace and what made the pod.
    Workload,
    /// The namespace alone.
    Namespace,
}

/// What is the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// Bytes.
    #[default]
    Bytes,
    /// Records of flows.
    Flows,
    /// Dropped packets.
    Drops,
}

/// Counts of somebody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Numbers {
    /// Records.
    pub flows: u64,
    /// Bytes, of both directions.
    pub bytes: u64,
    /// Packets, of both directions.
    pub packets: u64,
    /// Records of dropped packets.
    pub drops: u64,
}

/// Who talked to whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Pair {
    /// Who began.
    pub source: String,
    /// Whom it reached.
    pub destination: String,
    /// Of the destination; 0 where there are none.
    pub port: u16,
    /// TCP, UDP, ...
    pub protocol: String,
}

/// Why something was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Drop {
    /// In words.
    pub reason: String,
    /// Seen from the pod.
    pub direction: String,
    /// Whose packets.
    #[serde(flatten)]
    pub pair: Pair,
}

/// The counts of a second.
#[derive(Default)]
struct Tally {
    all: Numbers,
    lost: u64,
    talkers: HashMap<String, Numbers>,
    pairs: HashMap<Pair, Numbers>,
    drops: HashMap<Drop, u64>,
}

/// A row with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row<T> {
    /// Whose.
    #[serde(flatten)]
    pub of: T,
    /// How much.
    #[serde(flatten)]
    pub numbers: Numbers,
}

/// A talker's name, as a row has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Talker {
    /// Pod, workload, namespace, or what else it is.
    pub name: String,
}

/// The last seconds, summed up.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// So many seconds.
    pub seconds: u64,
    /// Everything.
    pub all: Numbers,
    /// Records that nobody saw.
    pub lost: u64,
    /// Nodes that do not answer.
    pub away: Vec<String>,
    /// The most first.
    pub talkers: Vec<Row<Talker>>,
    /// The most first.
    pub pairs: Vec<Row<Pair>>,
    /// The most first.
    pub drops: Vec<Row<Drop>>,
}

type Connection = (Option<std::net::SocketAddr>, Option<std::net::SocketAddr>, u8);

/// Follows flows.
pub struct Model {
    by: By,
    window: Duration,
    seconds: VecDeque<(i64, Tally)>,
    /// Bytes and packets of each connection, as last told.
    last: HashMap<Connection, [u64; 2]>,
    away: Vec<String>,
}

impl Model {
    /// Sums up the last `window`.
    pub fn new(by: By, window: Duration) -> Self {
        Self { by, window, seconds: VecDeque::new(), last: HashMap::new(), away: Vec::new() }
    }

    /// Who the two sides are from now on.
    pub fn set_by(&mut self, by: By) {
        if self.by != by {
            self.by = by;
            self.seconds.clear();
        }
    }

    /// Who the two sides are.
    pub fn by(&self) -> By {
        self.by
    }

    /// Takes an answer in.
    pub fn add(&mut self, answer: &GetFlowsResponse) {
        match &answer.response_types {
            Some(ResponseTypes::Flow(flow)) => self.add_flow(flow),
            Some(ResponseTypes::LostEvents(lost)) => {
                let at = answer.time.as_ref().and_then(time).unwrap_or_else(Timestamp::now);
                if let Some(tally) = self.second(at) {
                    tally.lost += lost.num_events_lost;
                }
            }
            Some(ResponseTypes::NodeStatus(status)) => {
                let is_away =
                    matches!(status.state_change(), NodeState::NodeUnavailable | NodeState::NodeError);
                self.away.retain(|name| !status.node_names.contains(name));
                if is_away {
                    self.away.extend(status.node_names.iter().take(NAMES_MAX).cloned());
                }
            }
            None => {}
        }
    }

    fn add_flow(&mut self, flow: &Flow) {
        let at = flow.time.as_ref().and_then(time).unwrap_or_else(Timestamp::now);
        let [from, to] = sides(flow);
        let [bytes, packets] = self.news(flow, &from, &to);
        let is_dropped = flow.verdict() == Verdict::Dropped;
        let numbers = Numbers { flows: 1, bytes, packets, drops: u64::from(is_dropped) };
        let pair = Pair {
            source: name(self.by, &from),
            destination: name(self.by, &to),
            port: to.port,
            protocol: protocol(flow).map(|protocol| protocol.to_string()).unwrap_or_default(),
        };
        let Some(tally) = self.second(at) else { return };
        tally.all.add(numbers);
        for side in [&pair.source, &pair.destination] {
            entry(&mut tally.talkers, side.clone(), || OTHER.to_owned()).add(numbers);
            if pair.source == pair.destination {
                break;
            }
        }
        let other = || Pair {
            source: OTHER.to_owned(),
            destination: OTHER.to_owned(),
            port: 0,
            protocol: String::new(),
        };
        entry(&mut tally.pairs, pair.clone(), other).add(numbers);
        if is_dropped {
            let reason = drop_reason(flow).map_or("no reason given", |reason| reason.text()).to_owned();
            let direction = match flow.traffic_direction() {
                TrafficDirection::Unknown => String::new(),
                direction => direction.as_str_name().to_lowercase(),
            };
            let drop = Drop { reason: reason.clone(), direction: direction.clone(), pair };
            *entry(&mut tally.drops, drop, || Drop { reason, direction, pair: other() }) += 1;
        }
    }

    /// Bytes and packets since the connection was last told of. Of one that is first seen while it runs, that is
    /// not known, and counts nothing. Two nodes that see one connection count it once.
    fn news(&mut self, flow: &Flow, from: &Side<'_>, to: &Side<'_>) -> [u64; 2] {
        let Some(weir) = flow.weir.as_ref() else { return [0; 2] };
        if !matches!(
            weir.event(),
            WeirEvent::ConnectionNew | WeirEvent::ConnectionUpdate | WeirEvent::ConnectionEnd
        ) {
            return [0; 2];
        }
        let number = protocol(flow).map_or(0, |protocol| protocol.number());
        let key = (from.socket(), to.socket(), number);
        let now = [
            weir.bytes_sent.saturating_add(weir.bytes_received),
            weir.packets_sent.saturating_add(weir.packets_received),
        ];
        let before = match self.last.get(&key) {
            // Fewer than before: the port is used again.
            Some(before) if before[0] <= now[0] => *before,
            _ if weir.event() == WeirEvent::ConnectionNew => [0; 2],
            _ => now,
        };
        if self.last.len() >= CONNECTIONS_MAX && !self.last.contains_key(&key) {
            self.last.clear();
        }
        self.last.insert(key, now);
        [now[0].saturating_sub(before[0]), now[1].saturating_sub(before[1])]
    }

    /// The tally of a second; `None`: it is too old.
    fn second(&mut self, at: Timestamp) -> Option<&mut Tally> {
        let second = at.as_second();
        let newest = self.seconds.back().map_or(second, |(newest, _)| *newest);
        let window = i64::try_from(self.window.as_secs().max(1)).unwrap_or(i64::MAX);
        // A clock that is ahead must not push everything else out.
        let second = second.min(newest.max(Timestamp::now().as_second()));
        if second <= newest - window {
            return None;
        }
        let place = match self.seconds.binary_search_by_key(&second, |(second, _)| *second) {
            Ok(place) => place,
            Err(place) => {
                self.seconds.insert(place, (second, Tally::default()));
                place
            }
        };
        self.seconds.get_mut(place).map(|(_, tally)| tally)
    }

    /// The window that ends at `now`.
    pub fn summary(&mut self, now: Timestamp, sort: Sort) -> Summary {
        let window = SignedDuration::try_from(self.window).unwrap_or(SignedDuration::MAX);
        let oldest = now.checked_sub(window).map_or(i64::MIN, Timestamp::as_second);
        while self.seconds.front().is_some_and(|(second, _)| *second < oldest) {
            self.seconds.pop_front();
        }
        let mut talkers: HashMap<Talker, Numbers> = HashMap::new();
        let mut pairs: HashMap<Pair, Numbers> = HashMap::new();
        let mut drops: HashMap<Drop, Numbers> = HashMap::new();
        let mut summary = Summary { seconds: self.window.as_secs().max(1), ..Summary::default() };
        for (_, tally) in &self.seconds {
            summary.all.add(tally.all);
            summary.lost += tally.lost;
            for (name, numbers) in &tally.talkers {
                talkers.entry(Talker { name: name.clone() }).or_default().add(*numbers);
            }
            for (pair, numbers) in &tally.pairs {
                pairs.entry(pair.clone()).or_default().add(*numbers);
            }
            for (drop, count) in &tally.drops {
                let numbers = Numbers { flows: *count, drops: *count, ..Numbers::default() };
                drops.entry(drop.clone()).or_default().add(numbers);
            }
        }
        summary.away.clone_from(&self.away);
        summary.talkers = sorted(talkers, sort);
        summary.pairs = sorted(pairs, sort);
        summary.drops = sorted(drops, Sort::Drops);
        summary
    }
}

impl Numbers {
    fn add(&mut self, more: Self) {
        self.flows += more.flows;
        self.bytes = self.bytes.saturating_add(more.bytes);
        self.packets = self.packets.saturating_add(more.packets);
        self.drops += more.drops;
    }

    fn key(self, sort: Sort) -> [u64; 2] {
        match sort {
            Sort::Bytes => [self.bytes, self.flows],
            Sort::Flows => [self.flows, self.bytes],
            Sort::Drops => [self.drops, self.flows],
        }
    }
}

fn entry<K: Eq + std::hash::Hash, V: Default>(
    map: &mut HashMap<K, V>,
    key: K,
    other: impl FnOnce() -> K,
) -> &mut V {
    let key = if map.len() >= NAMES_MAX && !map.contains_key(&key) { other() } else { key };
    map.entry(key).or_default()
}

fn sorted<T: Serialize>(map: HashMap<T, Numbers>, sort: Sort) -> Vec<Row<T>> {
    let mut rows: Vec<Row<T>> = map.into_iter().map(|(of, numbers)| Row { of, numbers }).collect();
    let text = |row: &Row<T>| serde_json::to_string(&row.of).unwrap_or_default();
    rows.sort_by_cached_key(|row| (std::cmp::Reverse(row.numbers.key(sort)), text(row)));
    rows
}

fn name(by: By, side: &Side<'_>) -> String {
    let Some(endpoint) = side.endpoint.filter(|endpoint| !endpoint.namespace.is_empty()) else {
        let identity = side.endpoint.map_or(0, |endpoint| endpoint.identity);
        let reserved = reserved_name(IdentityId(identity)).filter(|name| *name != "unknown");
        return match (reserved, side.ip) {
            (Some("world") | None, Some(ip)) if by == By::Pod => ip.to_string(),
            (Some(name), _) => name.to_owned(),
            (None, _) => "world".to_owned(),
        };
    };
    let namespace = &endpoint.namespace;
    match (by, endpoint.workloads.first()) {
        (By::Namespace, _) => namespace.clone(),
        (By::Workload, Some(workload)) => format!("{namespace}/{}", workload.name),
        _ if endpoint.pod_name.is_empty() => namespace.clone(),
        _ => format!("{namespace}/{}", endpoint.pod_name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Event;
    use crate::flow::tests::{dropped, forwarded};
    use crate::hubble::tests::flow;

    fn answer(event: &Event) -> GetFlowsResponse {
        let flow = flow(event);
        GetFlowsResponse {
            time: flow.time,
            response_types: Some(ResponseTypes::Flow(flow)),
            ..Default::default()
        }
    }

    fn at() -> Timestamp {
        "2026-11-22T19:20:14Z".parse().expect("a timestamp")
    }

    #[test]
    fn counters_that_grow_are_counted_once() {
        let mut model = Model::new(By::Pod, Duration::from_secs(60));
        // 2300 bytes when it began, 5000 later, told by two nodes.
        model.add(&answer(&forwarded()));
        for _ in 0..2 {
            model.add(&answer(&Event { r#type: 2, bytes: [1000, 4000], packets: [9, 9], ..forwarded() }));
        }
        // One that ran before: its growth is not known.
        model.add(&answer(&Event { r#type: 2, source_port: 9, bytes: [7000, 0], ..forwarded() }));
        model.add(&answer(&dropped()));
        let summary = model.summary(at(), Sort::Bytes);
        assert_eq!(summary.all, Numbers { flows: 5, bytes: 5000, packets: 18, drops: 1 });
        let names: Vec<&str> = summary.talkers.iter().map(|row| row.of.name.as_str()).collect();
        assert_eq!(names, ["shop/backend-1", "shop/frontend-1", "192.0.2.1"]);
        assert_eq!(summary.pairs[0].of.port, 8080);
        let drop = &summary.drops[0];
        assert_eq!((drop.of.reason.as_str(), drop.of.direction.as_str()), ("Policy denied", "ingress"));
        assert_eq!(drop.numbers.drops, 1);
        let later = at() + SignedDuration::from_secs(120);
        assert_eq!(model.summary(later, Sort::Bytes).all, Numbers::default());
    }

    #[test]
    fn sides_are_pods_workloads_or_namespaces() {
        for (by, expected) in [
            (By::Pod, ["shop/frontend-1", "shop/backend-1"]),
            (By::Workload, ["shop/frontend-1", "shop/backend"]),
            (By::Namespace, ["shop", "shop"]),
        ] {
            let mut model = Model::new(by, Duration::from_secs(60));
            model.add(&answer(&forwarded()));
            let pair = model.summary(at(), Sort::Flows).pairs[0].of.clone();
            assert_eq!([pair.source.as_str(), pair.destination.as_str()], expected);
        }
    }

    #[test]
    fn whoever_makes_names_fills_no_memory() {
        let mut model = Model::new(By::Pod, Duration::from_secs(60));
        for number in 0..10_000_u32 {
            let source = crate::datapath::abi::addr_of(std::net::IpAddr::from(
                0x0b00_0000_u32.wrapping_add(number).to_be_bytes(),
            ));
            model.add(&answer(&Event { source, ..dropped() }));
        }
        let summary = model.summary(at(), Sort::Drops);
        assert!(summary.talkers.len() <= NAMES_MAX + 1, "{}", summary.talkers.len());
        assert_eq!(summary.drops.iter().map(|row| row.numbers.drops).sum::<u64>(), 10_000);
    }
}
