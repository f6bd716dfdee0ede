//! What DNS costs under a rule of names: in the program that judges it, and from a pod's socket to a server's.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libbpf_rs::ProgramInput;
use weir::datapath::{Quotas, Settings};
use weir::model::l7::{DnsRule, RuleSetId};

use crate::frame::{Packet, udp};
use crate::lab::{Lab, Setup, Space, wait_for};
use crate::load::pin;
use crate::row::Row;
use crate::world::{B, Cast, EGRESS, World, casts, settings, within};

/// A query and its answer in the programs, nanoseconds.
const QUERY_AND_ANSWER_NS: f64 = 1500.0;
/// Queries a second with a rule, against without.
const VS_NO_RULE: f64 = 0.95;
/// Runs of a program; the middle one counts.
const RUNS: usize = 4000;
/// Rounds of both clients in turn.
const ROUNDS: usize = 15;
/// One client's part of a round.
const TURN: Duration = Duration::from_millis(300);

const SECTIONS: [crate::Section; 3] = [
    ("dns_program", "dns/query_and_answer", query_and_answer),
    ("dns_queries", "dns/queries/vs_no_rule", || queries("vs_no_rule", &[])),
    ("dns_unseen", "dns/queries/unseen_vs_no_rule", || {
        queries("unseen_vs_no_rule", &["--flow-events=false"])
    }),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    pin()?;
    crate::measure_sections("dns", &SECTIONS)
}

fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend(
        b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x05bench\x04test\x00\x00\x01\x00\x01",
    );
    query
}

fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[7] = 1;
    answer.extend(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc0\x00\x02\x01");
    answer
}

/// By BPF_PROG_TEST_RUN, one run at a time: each answer needs its question. What an empty program takes, which is the
/// clock's, is `against` and not part of the value.
fn query_and_answer() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cast in casts() {
        let family = if cast.a.is_ipv4() { "ipv4" } else { "ipv6" };
        let (sender, receiver) = std::sync::mpsc::channel();
        within(recording(), move |world| Ok(sender.send(measure(world, &cast)?)?))?;
        let (value, floor) = receiver.recv().context("the figures of the program")?;
        let row = Row::new(format!("dns/query_and_answer/{family}"), "ns", value - floor)
            .at_most(QUERY_AND_ANSWER_NS);
        rows.push(Row { against: Some(floor), ..row });
    }
    Ok(rows)
}

/// Every message has its record.
fn recording() -> Settings {
    Settings { quotas: Quotas { drop_records_per_second: 0, ..Quotas::default() }, ..settings() }
}

fn measure(world: &mut World, cast: &Cast) -> Result<(f64, f64)> {
    world.proxy(Some(99))?;
    world.enforce(1, &[EGRESS])?;
    world.leave_to_proxy(1, EGRESS, B, (17, 53), 5)?;
    let rules: Vec<DnsRule> = ["*.example.bench.test", "api.other.test", "**.deep.test"]
        .map(|pattern| DnsRule::MatchPattern(pattern.to_owned()))
        .into();
    let mut writer = world.datapath.writers()?.dns;
    writer.write_rules(&BTreeMap::from([(RuleSetId(5), rules.into())]))?;
    let asks = udp((cast.a, 40000), (cast.b, 53)).by(1).payload(&query(7));
    let answers = udp((cast.b, 53), (cast.a, 40000)).by(2).payload(&answer(&query(7)));
    world.send("from_pod", &asks)?;
    let mut records = world.datapath.dns_records()?;
    let run = |program: &str, packet: &Packet| -> Result<f64> {
        let bytes = packet.bytes();
        let input = ProgramInput { data_in: Some(&bytes), repeat: 1, ..ProgramInput::default() };
        let program = match program {
            "empty" => world.helper("empty")?,
            program => world.datapath.program(program)?,
        };
        let output = program.test_run(input)?;
        ensure!(output.return_value != 2, "the packet was dropped");
        Ok(output.duration.as_nanos() as f64)
    };
    let (mut values, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        values.push(run("before_proxy", &asks)? + run("before_proxy", &answers)?);
        floors.push(run("empty", &asks)? + run("empty", &answers)?);
        records.consume_bytes(|_| true)?;
    }
    Ok((median(&mut values), median(&mut floors)))
}

/// Two pods in turn, one of them under a rule of names, against one server of the same node; all of it, with the
/// agent, on one processor.
fn queries(what: &str, agent_arguments: &[&str]) -> Result<Vec<Row>> {
    let agent_arguments = agent_arguments.iter().map(ToString::to_string).collect();
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    let policy = |name: &str, rules: &str| {
        lab.manifests().apply(&format!(
            "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: bench}}
spec:
  endpointSelector: {{matchLabels: {{role: {name}}}}}
  egress: [{{toEntities: [all], toPorts: [{{ports: [{{port: '53', protocol: UDP}}]{rules}}}]}}]
"
        ))
    };
    policy("judged", ", rules: {dns: [{matchPattern: '*.example.bench.test'}]}")?;
    policy("plain", "")?;
    let [judged, plain] =
        ["judged", "plain"].map(|role| lab.pod(1, &format!("bench/{role}")).label("role", role).create());
    let (judged, plain) = (judged?, plain?);
    let server = lab.pod(1, "bench/server").create()?;
    serve(server.space())?;
    let mut rows = Vec::new();
    for is_ipv4 in [true, false] {
        let target = server.address(is_ipv4);
        for client in [&judged, &plain] {
            wait_for("a server to answer", || Ok(rate(client.space(), target, TURN / 10)? > 0.0))?;
        }
        let (mut with, mut without, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let pair = (rate(judged.space(), target, TURN)?, rate(plain.space(), target, TURN)?);
            with.push(pair.0);
            without.push(pair.1);
            ratios.push(pair.0 / pair.1);
        }
        let family = if is_ipv4 { "ipv4" } else { "ipv6" };
        let row = Row::new(format!("dns/queries/{what}/{family}"), "queries/s", median(&mut with));
        rows.push(row.against(median(&mut without), Some(median(&mut ratios))).at_least(VS_NO_RULE));
    }
    let flows = lab.node(1).map("l7_flows")?;
    // What came before the rules were in the kernel went by the proxy.
    let by_proxy = flows.iter().filter(|flow| flow["dns_by_proxy"] == true).count();
    let by_kernel = flows.len() - by_proxy;
    ensure!(by_kernel > 10 * by_proxy, "{by_proxy} flows went by the proxy, {by_kernel} did not");
    Ok(rows)
}

/// Answers every query with one address, as fast as one thread can.
fn serve(space: &Space) -> Result<()> {
    let socket = space.run(|| UdpSocket::bind("[::]:53"))?;
    space.start(move || {
        let mut bytes = [0; 512];
        while let Ok((length, client)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&answer(&bytes[..length]), client);
        }
    });
    Ok(())
}

/// Queries a second, one at a time.
fn rate(space: &Space, server: IpAddr, time: Duration) -> Result<f64> {
    space.run(move || {
        let socket = UdpSocket::bind((if server.is_ipv4() { "0.0.0.0" } else { "::" }, 0))?;
        socket.connect((server, 53))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let (began, mut count, mut bytes) = (Instant::now(), 0_u16, [0; 512]);
        let mut all = 0_u32;
        while began.elapsed() < time {
            count = count.wrapping_add(1);
            let query = query(count);
            socket.send(&query)?;
            // One that is lost costs its second.
            if let Ok(length) = socket.recv(&mut bytes)
                && bytes[..length].starts_with(&query[..2])
                && bytes[3] & 15 == 0
            {
                all += 1;
            }
        }
        Ok(f64::from(all) / began.elapsed().as_secs_f64())
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
