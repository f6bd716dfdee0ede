//! Questions of DNS that the kernel judged, and their answers: as records, as the proxy would tell them, and as names.
//! No verdict depends on what is read here.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

use super::proxy::{Hears, Proxy};
use crate::datapath::abi::{DnsRecord, Plain, ip_of};
use crate::datapath::{Datapath, EventReader};
use crate::model::l7::dns_message::{self, Answer};
use crate::model::l7::{DnsMessage, L7Message, L7Verdict, Names, Record, RecordKind, RuleSetId};
use crate::model::{EndpointId, IdentityId, Protocol};

/// Between two looks: the ring buffer has room for 1,700 records.
const EVERY: Duration = Duration::from_millis(10);
/// Records that are handed over at once.
const BATCH: usize = 256;
/// A record has so many of an answer's addresses and names; a server chooses how many there are.
const SHOWN_MAX: usize = 16;

/// Reads for ever, from the first rule set on.
pub async fn read(datapath: Arc<Datapath>, proxy: Proxy, hears: Arc<dyn Hears>, denied: u8) {
    if proxy.wanted().wait_for(|sets| !sets.is_empty()).await.is_err() {
        return;
    }
    let reader = match datapath.dns_records() {
        Ok(reader) => reader,
        Err(error) => {
            tracing::error!(error = crate::error::chain(&error), "questions of DNS are not shown");
            return;
        }
    };
    // What was lost before this agent is another one's.
    let lost = datapath.dns_counts().map(|counts| counts.lost + counts.suppressed).unwrap_or(0);
    let mut questions = Questions { reader, hears, denied, lost };
    let mut looks = tokio::time::interval(EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        if let Err(error) = questions.look(&datapath) {
            tracing::warn!(error = crate::error::chain(&error), "reading questions of DNS");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

struct Questions {
    reader: EventReader,
    hears: Arc<dyn Hears>,
    /// The response code of those that no rule allows.
    denied: u8,
    lost: u64,
}

impl Questions {
    fn look(&mut self, datapath: &Datapath) -> anyhow::Result<()> {
        let clock = Clock::now();
        let (hears, denied) = (&self.hears, self.denied);
        let (mut batch, mut passed) = (Vec::new(), Passed::default());
        let read = self.reader.consume_bytes(|bytes| {
            let Some((record, names, at_ns)) = understand(bytes, denied, &clock) else { return false };
            batch.push(record);
            if batch.len() == BATCH {
                hears.records(std::mem::take(&mut batch), 0);
            }
            if let Some(names) = names {
                passed.add(names, clock.since(at_ns));
            }
            true
        });
        // What was read is handed over, whatever fails.
        let has_records = !batch.is_empty() || !matches!(read, Ok(0));
        let counts = has_records.then(|| datapath.dns_counts()).transpose();
        let lost = counts
            .as_ref()
            .ok()
            .and_then(|counts| *counts)
            .map_or(self.lost, |counts| counts.lost + counts.suppressed + self.reader.malformed());
        let new = lost.saturating_sub(std::mem::replace(&mut self.lost, lost));
        if has_records {
            self.hears.records(batch, new);
            self.hears.names_passed(passed.of.into_values().collect(), passed.left_out);
        }
        read?;
        counts?;
        Ok(())
    }
}

/// Names of one pod that are noted of one look, and of all pods: each costs some microseconds, and may cost a round.
const PASSED_OF_ONE: usize = 32;
const PASSED_MAX: usize = 256;
/// Addresses of such a name.
const ADDRESSES_MAX: usize = 64;

/// The names of a look, each once.
#[derive(Default)]
struct Passed {
    of: BTreeMap<(EndpointId, String), (Names, Duration)>,
    of_endpoint: BTreeMap<EndpointId, usize>,
    /// Addresses that had no room.
    left_out: u64,
}

impl Passed {
    fn add(&mut self, names: Names, ago: Duration) {
        let Some(endpoint) = names.endpoint else { return };
        let key = (endpoint, names.name.clone());
        if let Some((known, since)) = self.of.get_mut(&key) {
            let is_new = |address: &IpAddr| !known.addresses.contains(address);
            let new: Vec<IpAddr> = names.addresses.into_iter().filter(is_new).collect();
            let room = ADDRESSES_MAX.saturating_sub(known.addresses.len());
            self.left_out += new.len().saturating_sub(room) as u64;
            known.addresses.extend(new.into_iter().take(room));
            known.ttl_s = known.ttl_s.min(names.ttl_s);
            *since = ago.max(*since);
            return;
        }
        let of_endpoint = self.of_endpoint.entry(endpoint).or_default();
        if *of_endpoint >= PASSED_OF_ONE || self.of.len() >= PASSED_MAX {
            self.left_out += names.addresses.len() as u64;
            return;
        }
        *of_endpoint += 1;
        self.of.insert(key, (names, ago));
    }
}

/// The kernel's time since the machine started, as wall time.
struct Clock {
    wall: SystemTime,
    monotonic_ns: u64,
}

impl Clock {
    fn now() -> Self {
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        let monotonic_ns = u64::try_from(monotonic.as_nanos()).unwrap_or(u64::MAX);
        Self { wall: SystemTime::now(), monotonic_ns }
    }

    /// How long ago that was.
    fn since(&self, timestamp_ns: u64) -> Duration {
        Duration::from_nanos(self.monotonic_ns.saturating_sub(timestamp_ns))
    }

    fn at(&self, timestamp_ns: u64) -> Timestamp {
        let ago = self.since(timestamp_ns);
        self.wall
            .checked_sub(ago)
            .and_then(|time| Timestamp::try_from(time).ok())
            .unwrap_or_else(Timestamp::now)
    }
}

/// A record of the ring buffer: what people see, what an answer tells of names, and when that was.
fn understand(bytes: &[u8], denied: u8, clock: &Clock) -> Option<(Record, Option<Names>, u64)> {
    let (head, message) = bytes.split_at_checked(size_of::<DnsRecord>())?;
    let head = DnsRecord::from_bytes(head)?;
    let message = message.get(..message.len().min(head.length as usize))?;
    let is_answer = head.asked_ns != 0;
    let (question, answer) = match is_answer {
        true => dns_message::answer(message)?,
        false => (dns_message::query(message)?, Answer::default()),
    };
    let query = question.name.text();
    let mut record = record_of(&head, clock);
    let denies = head.denied_by != 0;
    record.message = L7Message::Dns(DnsMessage {
        query: query.clone(),
        types: vec![question.kind_text()],
        code: match (is_answer, denies) {
            (true, _) => Some(answer.code.into()),
            (false, true) => Some(denied.into()),
            (false, false) => None,
        },
        addresses: answer.addresses.iter().copied().take(SHOWN_MAX).collect(),
        cnames: answer.cnames.iter().take(SHOWN_MAX).cloned().collect(),
        ttl_s: answer.ttl_s,
    });
    // The client's own rules let the question pass: only these say whom to believe.
    let names = record.egress.filter(|_| is_answer && !answer.addresses.is_empty()).map(|set| Names {
        set,
        endpoint: record.source_endpoint,
        name: query,
        addresses: answer.addresses,
        ttl_s: answer.ttl_s.unwrap_or(0),
        seq: 0,
    });
    Some((record, names.filter(|names| names.endpoint.is_some()), head.timestamp_ns))
}

fn record_of(head: &DnsRecord, clock: &Clock) -> Record {
    let set = |id: u16| (id != 0).then_some(RuleSetId(id));
    let endpoint = |id: u16| (id != 0).then_some(EndpointId(id));
    let (key, flow) = (&head.key, &head.flow);
    let is_answer = head.asked_ns != 0;
    Record {
        time: clock.at(head.timestamp_ns),
        protocol: Protocol::Udp,
        client: SocketAddr::new(ip_of(key.client), u16::from_be(key.client_port)),
        server: SocketAddr::new(ip_of(key.server), u16::from_be(key.server_port)),
        source: IdentityId(flow.client_identity),
        destination: IdentityId(flow.server_identity),
        source_endpoint: endpoint(flow.client_endpoint),
        destination_endpoint: endpoint(flow.server_endpoint),
        egress: set(flow.egress_set),
        ingress: set(flow.ingress_set),
        denied_by: set(head.denied_by),
        kind: if is_answer { RecordKind::Response } else { RecordKind::Request },
        verdict: if head.denied_by == 0 { L7Verdict::Forwarded } else { L7Verdict::Denied },
        note: String::new(),
        latency_us: is_answer.then(|| head.timestamp_ns.saturating_sub(head.asked_ns) / 1000),
        message: L7Message::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(head: &DnsRecord, message: &[u8]) -> Vec<u8> {
        let mut bytes = [head.as_bytes(), message].concat();
        bytes.resize(size_of::<DnsRecord>() + 512, 0xee);
        bytes
    }

    const QUERY: &[u8] = b"\x01\x02\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x01B\x00\x00\x01\x00\x01";
    const ANSWER: &[u8] = b"\x01\x02\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\x01a\x01b\x00\x00\x01\x00\x01\
                            \xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x1e\x00\x04\xc0\x00\x02\x01";

    #[test]
    fn records_say_what_was_asked_and_answered_and_only_own_rules_vouch() {
        let clock = Clock { wall: SystemTime::now(), monotonic_ns: 5_000_000 };
        let mut head =
            DnsRecord { timestamp_ns: 4_000_000, length: QUERY.len() as u32, ..DnsRecord::default() };
        head.flow.client_endpoint = 7;
        head.flow.egress_set = 3;
        head.denied_by = 3;
        let (record, names, _) = understand(&bytes(&head, QUERY), 3, &clock).expect("a query");
        let L7Message::Dns(said) = &record.message else { panic!("{record:?}") };
        assert_eq!((said.query.as_str(), said.code, names), ("a.b", Some(3), None));
        assert_eq!((record.verdict, record.denied_by), (L7Verdict::Denied, Some(RuleSetId(3))));

        (head.denied_by, head.asked_ns, head.length) = (0, 1_000_000, ANSWER.len() as u32);
        let (record, names, _) = understand(&bytes(&head, ANSWER), 3, &clock).expect("an answer");
        assert_eq!((record.kind, record.latency_us), (RecordKind::Response, Some(3000)));
        let names = names.expect("the pod is told an address");
        assert_eq!((names.name.as_str(), names.ttl_s, names.endpoint), ("a.b", 30, Some(EndpointId(7))));
        head.flow.egress_set = 0;
        head.flow.ingress_set = 4;
        assert_eq!(understand(&bytes(&head, ANSWER), 3, &clock).map(|(_, names, _)| names), Some(None));
        assert!(understand(&[1, 2, 3], 3, &clock).is_none());
        assert_eq!(clock.since(4_000_000), Duration::from_millis(1));
    }

    #[test]
    fn one_pod_tells_no_more_than_its_share_and_a_name_once() {
        let mut passed = Passed::default();
        let told = |pod: u16, name: &str, number: u32, ttl_s| Names {
            set: RuleSetId(1),
            endpoint: Some(EndpointId(pod)),
            name: name.to_owned(),
            addresses: vec![IpAddr::from(number.to_be_bytes())],
            ttl_s,
            seq: 0,
        };
        for number in 0..1000 {
            passed.add(told(1, "a.test", number % 100, 30 + number), Duration::from_millis(number.into()));
        }
        let (names, ago) = &passed.of[&(EndpointId(1), "a.test".to_owned())];
        assert_eq!((names.addresses.len(), names.ttl_s, ago.as_millis()), (ADDRESSES_MAX, 30, 999));
        assert_eq!(passed.left_out, 10 * (100 - ADDRESSES_MAX as u64));
        for number in 0..1000 {
            passed.add(told(1, &format!("n{number}.test"), 1, 30), Duration::ZERO);
        }
        assert_eq!(passed.of.len(), PASSED_OF_ONE);
        passed.add(told(2, "a.test", 1, 30), Duration::ZERO);
        assert_eq!(passed.of.len(), PASSED_OF_ONE + 1, "another pod has its own share");
        for pod in 3..1000 {
            passed.add(told(pod, "a.test", 1, 30), Duration::ZERO);
        }
        assert_eq!(passed.of.len(), PASSED_MAX);
    }
}
