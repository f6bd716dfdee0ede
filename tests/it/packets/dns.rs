//! Questions of DNS and their answers where the proxy's namespace begins: judged without the proxy, or left to it.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use weir::datapath::abi::{DnsRecord, Plain};
use weir::datapath::{DnsWriter, Settings};
use weir::model::EndpointId;
use weir::model::l7::{DnsRule, RuleSetId};

use super::flows::expect;
use super::frame::{Packet, udp};
use super::world::{
    A, Arrival, B, Cast, EGRESS, INGRESS, PASS, REDIRECT, SHOT, World, in_both_families,
    in_both_families_with, settings,
};
use crate::require::require_lab;

const UNASKED: u8 = 245;
const SET: u16 = 5;
const OTHER_SET: u16 = 6;

/// A message of DNS, piece by piece.
#[derive(Clone, Debug)]
struct Message {
    id: u16,
    flags: u16,
    counts: [u16; 4],
    question: Vec<u8>,
    rest: Vec<u8>,
}

fn wire(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        wire.push(label.len() as u8);
        wire.extend(label.bytes());
    }
    wire.push(0);
    wire
}

/// A query for an address.
fn query(id: u16, name: &str) -> Message {
    let question = [&wire(name)[..], &[0, 1, 0, 1]].concat();
    Message { id, flags: 0x0100, counts: [1, 0, 0, 0], question, rest: Vec::new() }
}

impl Message {
    fn bytes(&self) -> Vec<u8> {
        let head =
            [[self.id, self.flags], [self.counts[0], self.counts[1]], [self.counts[2], self.counts[3]]];
        let head = head.concat().into_iter().flat_map(u16::to_be_bytes).collect::<Vec<_>>();
        [&head[..], &self.question, &self.rest].concat()
    }

    /// With EDNS, and so many bytes that the client takes, and options.
    fn edns(mut self, payload: u16, options: &[u8]) -> Self {
        self.counts[3] = 1;
        self.rest = [&[0, 0, 41][..], &payload.to_be_bytes(), &[0; 4], &(options.len() as u16).to_be_bytes()]
            .concat();
        self.rest.extend(options);
        self
    }

    /// Its answer with these records: name, type, data.
    fn answer(&self, records: &[(&[u8], u16, &[u8])]) -> Self {
        let mut answer = Self { flags: 0x8180, counts: [1, records.len() as u16, 0, 0], ..self.clone() };
        answer.rest.clear();
        for (name, kind, data) in records {
            answer.rest.extend([name, &kind.to_be_bytes()[..], &[0, 1, 0, 0, 0, 30]].concat());
            answer.rest.extend((data.len() as u16).to_be_bytes());
            answer.rest.extend(*data);
        }
        answer
    }
}

fn asks(cast: &Cast, message: &Message) -> Packet {
    udp((cast.a, 40000), (cast.b, 53)).by(1).payload(&message.bytes())
}

fn answers(cast: &Cast, message: &Message) -> Packet {
    udp((cast.b, 53), (cast.a, 40000)).by(2).payload(&message.bytes())
}

fn rules(patterns: &[&str]) -> std::sync::Arc<[DnsRule]> {
    patterns.iter().map(|pattern| DnsRule::MatchPattern((*pattern).to_owned())).collect()
}

fn writer(world: &World) -> Result<DnsWriter> {
    Ok(world.datapath.writers()?.dns)
}

/// Pod A may ask pod B for these names.
fn allow(world: &World, patterns: &[&str]) -> Result<DnsWriter> {
    world.proxy(Some(99))?;
    world.enforce(1, &[EGRESS])?;
    world.leave_to_proxy(1, EGRESS, B, (17, 53), SET)?;
    let mut writer = writer(world)?;
    writer.write_rules(&BTreeMap::from([(RuleSetId(SET), rules(patterns))]))?;
    Ok(writer)
}

/// The flow is there, and the proxy never asked anything.
fn begin(world: &mut World, cast: &Cast) -> Result<()> {
    expect(world, &asks(cast, &query(1, "a.test")), REDIRECT)?;
    Ok(())
}

fn judged(world: &mut World, packet: &Packet) -> Result<u32> {
    Ok(world.send("before_proxy", packet)?.action)
}

fn records(world: &World) -> Result<Vec<(DnsRecord, Vec<u8>)>> {
    let mut records = Vec::new();
    world.datapath.dns_records()?.consume_bytes(|bytes| {
        let (head, message) = bytes.split_at(size_of::<DnsRecord>());
        let head = DnsRecord::from_bytes(head).expect("a record");
        records.push((head, message[..head.length.min(512) as usize].to_vec()));
        true
    })?;
    Ok(records)
}

#[test]
fn what_is_allowed_goes_on_without_the_proxy_and_so_does_its_answer() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        allow(world, &["*.test", "**.deep.example"])?;
        begin(world, &cast)?;
        for (id, name) in [(7, "a.test"), (8, "A.TeSt"), (9, "x.y.z.deep.example"), (10, "a-_9.test")] {
            let question = query(id, name);
            let sent = asks(&cast, &question);
            let outcome = world.send("before_proxy", &sent)?;
            ensure!(outcome.action == REDIRECT && outcome.frame == sent.bytes(), "{name}: {outcome:?}");
            // Past the proxy it goes on as what the proxy sends.
            ensure!(world.send("from_proxy", &sent)?.action == REDIRECT, "{name}");
            // Names in answers may be in another case.
            let mut answer = question.answer(&[(&[0xc0, 12], 1, &[192, 0, 2, 1])]);
            answer.question.make_ascii_lowercase();
            ensure!(judged(world, &answers(&cast, &answer))? == REDIRECT, "the answer about {name}");
            ensure!(world.send("from_proxy", &answers(&cast, &answer))?.action == REDIRECT, "{name}");
            let again = world.send("before_proxy", &answers(&cast, &answer))?;
            ensure!(
                again.action == SHOT && again.counted.iter().any(|(reason, _)| *reason == UNASKED),
                "{again:?}"
            );
        }
        let records = records(world)?;
        ensure!(records.len() == 8, "{} records", records.len());
        let (head, message) = &records[0];
        ensure!(head.asked_ns == 0 && head.denied_by == 0 && *message == query(7, "a.test").bytes());
        ensure!((head.flow.client_identity, head.flow.egress_set) == (A, SET));
        let (head, message) = &records[1];
        ensure!(head.asked_ns > 0 && head.timestamp_ns > head.asked_ns && message.ends_with(&[192, 0, 2, 1]));
        Ok(())
    })
}

#[test]
fn what_is_denied_is_its_own_answer() -> Result<()> {
    require_lab!();
    let deny = |settings: Settings, code: u8| {
        in_both_families_with(settings, move |world, cast| {
            allow(world, &["*.test"])?;
            begin(world, &cast)?;
            let options = [0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8];
            for name in ["a.b.test", "test", "a.testx", "a.tes", "", "a b.test", "other.example"] {
                for question in [query(7, name), query(7, name).edns(1232, &options)] {
                    let outcome = world.send("before_proxy", &asks(&cast, &question))?;
                    let mut denied = question.clone();
                    denied.flags = 0x8180 | u16::from(code);
                    let mut expected = answers(&cast, &denied);
                    expected.macs = asks(&cast, &question).macs;
                    ensure!(outcome.action == REDIRECT, "{name}: {outcome:?}");
                    ensure!(outcome.frame == expected.bytes(), "{name}: {:x?}", outcome.frame);
                    // It goes back to the client, in the server's name.
                    ensure!(
                        world.send_bytes("from_proxy", &outcome.frame, Arrival::default())?.action
                            == REDIRECT
                    );
                }
            }
            let records = records(world)?;
            ensure!(records.iter().all(|(head, _)| head.denied_by == SET));
            ensure!(records.iter().all(|(_, message)| message[2..4] == [1, 0]), "records have the question");
            Ok(())
        })
    };
    deny(settings(), 5)?;
    deny(Settings { dns_denied: 3, ..settings() }, 3)
}

#[test]
fn an_answer_needs_its_question() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        allow(world, &["*.test"])?;
        begin(world, &cast)?;
        let question = query(7, "a.test");
        let unasked = |world: &mut World, packet: &Packet, what: &str| {
            let outcome = world.send("before_proxy", packet)?;
            ensure!(outcome.action == SHOT, "{what}: {outcome:?}");
            ensure!(outcome.counted.iter().any(|(reason, _)| *reason == UNASKED), "{what}: {outcome:?}");
            let event = outcome.events.first().expect("a drop is reported");
            ensure!((event.source_identity, event.destination_identity) == (A, B), "{what}: {event:?}");
            Ok(())
        };
        unasked(world, &answers(&cast, &question.answer(&[])), "nobody has asked")?;
        for (what, forged) in [
            ("another id", Message { id: 8, ..question.answer(&[]) }),
            ("another name", Message { question: query(7, "b.test").question, ..question.answer(&[]) }),
            ("another type", {
                let mut answer = question.answer(&[]);
                let kind = answer.question.len() - 3;
                answer.question[kind] = 28;
                answer
            }),
            ("two questions", Message { counts: [2, 0, 0, 0], ..question.answer(&[]) }),
            (
                "a pointer as the name",
                Message { question: vec![0xc0, 12, 0, 1, 0, 1], ..question.answer(&[]) },
            ),
            ("cut off", Message { question: question.question[..5].to_vec(), ..question.answer(&[]) }),
            ("no answer", question.clone()),
        ] {
            ensure!(judged(world, &asks(&cast, &question))? == REDIRECT, "{what}");
            unasked(world, &answers(&cast, &forged), what)?;
        }
        // The right one still passes: another id was another slot, other questions leave theirs.
        ensure!(judged(world, &answers(&cast, &question.answer(&[])))? == REDIRECT);
        // From another port, or to one, it is no flow of the proxy.
        let stray = udp((cast.b, 54), (cast.a, 40000)).by(2).payload(&question.answer(&[]).bytes());
        ensure!(judged(world, &stray)? == PASS);
        Ok(())
    })
}

#[test]
fn whatever_an_answer_holds_its_question_decides() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        allow(world, &["*.test"])?;
        begin(world, &cast)?;
        let pointer: &[u8] = &[0xc0, 12];
        let many: Vec<(&[u8], u16, &[u8])> = (0..60).map(|_| (pointer, 1, &[192, 0, 2, 1][..])).collect();
        let question = query(7, "a.test").edns(1232, &[]);
        for (what, answer) in [
            (
                "aliases",
                question.answer(&[(pointer, 5, &wire("b.test")), (&wire("b.test"), 1, &[192, 0, 2, 1])]),
            ),
            ("a loop of pointers", question.answer(&[(&[0xc0, 24], 1, &[192, 0, 2, 1])])),
            ("sixty addresses", question.answer(&many)),
            ("truncated", Message { flags: 0x8380, ..question.answer(&[]) }),
            ("no such name", Message { flags: 0x8183, ..question.answer(&[]) }),
        ] {
            ensure!(judged(world, &asks(&cast, &question))? == REDIRECT, "{what}");
            ensure!(judged(world, &answers(&cast, &answer))? == REDIRECT, "{what}");
        }
        Ok(())
    })
}

#[test]
fn what_is_no_plain_query_is_the_proxys_and_so_is_its_answer() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        allow(world, &["*.test"])?;
        let plain = query(7, "a.test");
        let long = "a".repeat(63);
        let too_long = format!("{long}.{long}.{long}.{long}.test");
        let cases = [
            ("an answer", Message { flags: 0x8100, ..plain.clone() }),
            ("an update", Message { flags: 0x2800, ..plain.clone() }),
            ("no question", Message { counts: [0; 4], question: Vec::new(), ..plain.clone() }),
            ("two questions", Message { counts: [2, 0, 0, 0], ..plain.clone() }),
            ("records of an answer", Message { counts: [1, 1, 0, 0], ..plain.clone() }),
            ("records of an authority", Message { counts: [1, 0, 1, 0], ..plain.clone() }),
            ("a pointer", Message { question: vec![0xc0, 12, 0, 1, 0, 1], ..plain.clone() }),
            ("a label of another kind", Message { question: vec![0x41, 0, 0, 1, 0, 1], ..plain.clone() }),
            ("a name without end", Message { question: vec![3, b'a'], ..plain.clone() }),
            ("a name of 261 bytes", query(7, &too_long)),
            ("bytes behind it", Message { rest: vec![0], ..plain.clone() }),
            ("EDNS of 1,233 bytes", plain.clone().edns(1233, &[])),
            ("EDNS that is cut", {
                let mut cut = plain.clone().edns(1232, &[1, 2, 3, 4]);
                cut.rest.pop();
                cut
            }),
            ("something else than EDNS", {
                let mut other = plain.clone().edns(1232, &[]);
                other.rest[2] = 250;
                other
            }),
        ];
        for (what, odd) in cases {
            world.forget_flows()?;
            begin(world, &cast)?;
            ensure!(judged(world, &asks(&cast, &odd))? == PASS, "{what}");
            // The proxy knows what it has asked.
            ensure!(judged(world, &answers(&cast, &plain.answer(&[])))? == PASS, "the answer to {what}");
        }
        world.forget_flows()?;
        begin(world, &cast)?;
        // Several datagrams in one: who judges the first one has not seen the others.
        let merged = Arrival { gso_size: 24, ..Arrival::default() };
        ensure!(world.send_as("before_proxy", &asks(&cast, &plain), merged)?.action == PASS);
        world.forget_flows()?;
        begin(world, &cast)?;
        let mut piece = asks(&cast, &plain);
        piece.fragment = Some((9, 0, true));
        ensure!(judged(world, &piece)? == PASS, "a fragment");
        let mut connection = super::frame::tcp((cast.a, 40000), (cast.b, 53), super::frame::SYN).by(1);
        connection.payload = plain.bytes();
        ensure!(judged(world, &connection)? == PASS, "TCP");
        Ok(())
    })
}

#[test]
fn every_rule_set_counts_and_one_that_is_not_there_is_the_proxys() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let mut writer = allow(world, &["*.test", "a.example"])?;
        world.enforce(2, &[INGRESS])?;
        world.leave_to_proxy(2, INGRESS, A, (17, 53), OTHER_SET)?;
        begin(world, &cast)?;
        let ask = |world: &mut World, name: &str| judged(world, &asks(&cast, &query(7, name)));
        ensure!(ask(world, "a.test")? == PASS, "the server's rules are the proxy's yet");
        let both = BTreeMap::from([
            (RuleSetId(SET), rules(&["*.test", "a.example"])),
            (RuleSetId(OTHER_SET), rules(&["a.*"])),
        ]);
        writer.write_rules(&both)?;
        let denied_by = |world: &mut World, name: &str| -> Result<Option<u16>> {
            records(world)?;
            ensure!(ask(world, name)? == REDIRECT, "{name}");
            Ok(records(world)?.last().map(|(head, _)| head.denied_by))
        };
        ensure!(denied_by(world, "a.test")? == Some(0));
        ensure!(denied_by(world, "b.test")? == Some(OTHER_SET));
        ensure!(denied_by(world, "a.other")? == Some(SET));
        // A set that is taken back is the proxy's again; no rule at all allows any name.
        writer.write_rules(&BTreeMap::from([(RuleSetId(OTHER_SET), rules(&[]))]))?;
        ensure!(denied_by(world, "b.test")? == Some(0));
        writer.prune(&BTreeMap::from([(RuleSetId(SET), rules(&["*.test"]))]))?;
        ensure!(ask(world, "a.test")? == PASS);
        Ok(())
    })
}

#[test]
fn names_whose_addresses_rules_ask_for_are_the_proxys() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let mut writer = allow(world, &["**.test"])?;
        begin(world, &cast)?;
        let ask = |world: &mut World, name: &str| judged(world, &asks(&cast, &query(7, name)));
        writer.write_names(&BTreeMap::from([(EndpointId(1), rules(&["*.named.test"]))]))?;
        ensure!((ask(world, "a.named.test")?, ask(world, "a.test")?) == (PASS, REDIRECT));
        ensure!(ask(world, "denied.example")? == REDIRECT, "denied without the proxy");
        // What is too wide for an automaton: all of them.
        let wide: Vec<String> = (b'a'..b'r')
            .map(|letter| format!("*{0}*{1}*.**", letter as char, (letter + 1) as char))
            .collect();
        let wide: Vec<&str> = wide.iter().map(|wide| wide.trim_end_matches(".**")).collect();
        writer.write_names(&BTreeMap::from([(EndpointId(1), rules(&wide))]))?;
        ensure!(ask(world, "a.test")? == PASS);
        writer.write_names(&BTreeMap::new())?;
        ensure!(ask(world, "a.named.test")? == REDIRECT);
        Ok(())
    })
}

#[test]
fn a_pod_without_room_for_its_questions_asks_by_the_proxy() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        allow(world, &["*.test"])?;
        begin(world, &cast)?;
        let mut by_proxy = 0;
        for id in 0..1000 {
            by_proxy += u32::from(judged(world, &asks(&cast, &query(id, "a.test")))? == PASS);
        }
        ensure!((968..1000).contains(&by_proxy), "{by_proxy} of 1000 found no room in 32 slots");
        // No other pod loses room by that, whatever its number is.
        let slots = world.datapath.typed::<u32, weir::datapath::abi::DnsPending>("dns_pending")?.rows()?;
        let taken = slots.iter().filter(|(_, slot)| slot.asked_ns > 0);
        ensure!(taken.map(|(slot, _)| slot.0 / 32).all(|endpoint| endpoint == 1));
        Ok(())
    })
}

#[test]
fn automata_move_into_room_that_others_have_left() -> Result<()> {
    require_lab!();
    super::world::within(settings(), |world| {
        let mut writer = writer(world)?;
        let names = |number: u16| -> std::sync::Arc<[DnsRule]> {
            (0..60)
                .map(|name| DnsRule::MatchName(format!("{name}.in-the-middle-{number}.{name}.test")))
                .collect()
        };
        // Each has about a thousand states: sixteen fit, and the seventeenth is the proxy's.
        let sets: BTreeMap<RuleSetId, _> = (1..40).map(|id| (RuleSetId(id), names(id))).collect();
        writer.write_rules(&sets)?;
        let fit = writer.judged().count();
        ensure!((8..39).contains(&fit), "{fit} fit");
        let last = BTreeMap::from([(RuleSetId(39), names(39))]);
        writer.prune(&last)?;
        ensure!(writer.judged().count() == 0);
        // Not before whoever reads them has ended.
        writer.write_rules(&last)?;
        ensure!(writer.judged().count() == 0);
        crate::lab::wait_for("the room to be given again", || {
            writer.prune(&last)?;
            writer.write_rules(&last)?;
            Ok(writer.judged().count() == 1)
        })?;
        // A writer that comes after it leaves what rows point at.
        drop(writer);
        let mut next = world.datapath.writers()?.dns;
        ensure!(next.judged().eq([RuleSetId(39)]));
        next.write_rules(&BTreeMap::from([(RuleSetId(40), names(40))]))?;
        let rows = world.datapath.typed::<u32, weir::datapath::abi::DnsAutomaton>("dns_rules")?.rows()?;
        let rows: Vec<_> = rows.values().map(|row| (row.first, row.count)).collect();
        ensure!(rows[0].0 + rows[0].1 <= rows[1].0 || rows[1].0 + rows[1].1 <= rows[0].0, "{rows:?}");
        Ok(())
    })
}

#[test]
fn rules_without_a_row_are_the_proxys() -> Result<()> {
    require_lab!();
    super::world::within(settings(), |world| {
        use weir::datapath::abi::DnsAutomaton;
        let few = rules(&["a.test"]);
        // A former agent has left no room: its rows go before the new ones need theirs.
        let rows = world.datapath.typed::<u32, DnsAutomaton>("dns_rules")?;
        for id in 20_000..20_000 + 8192 {
            rows.insert(&id, &DnsAutomaton { first: 8, count: 4 })?;
        }
        let mut writer = writer(world)?;
        writer.write_rules(&BTreeMap::from([(RuleSetId(SET), few.clone())]))?;
        ensure!(writer.judged().eq([RuleSetId(SET)]));
        // What that pointed at is not given to others at once.
        let at = world.datapath.typed::<u32, DnsAutomaton>("dns_rules")?.rows()?;
        ensure!(at.values().all(|row| row.first >= 12), "{at:?}");
        // More than there is room for: the rest is the proxy's, and the round goes on.
        let many: BTreeMap<RuleSetId, _> = (1..9000).map(|id| (RuleSetId(id), few.clone())).collect();
        writer.write_rules(&many)?;
        ensure!(writer.judged().count() == 8192);
        writer.prune(&BTreeMap::new())?;
        Ok(())
    })
}
