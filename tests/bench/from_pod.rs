//! What a packet costs in `from_pod`, by BPF_PROG_TEST_RUN: nanoseconds in all,
//! against those of a program that does nothing.

use anyhow::{Result, ensure};
use libbpf_rs::{ProgramInput, ProgramMut};

use crate::frame::{ACK, Packet, RST, SYN, tcp, udp};
use crate::row::Row;
use crate::world::{A, B, Cast, EGRESS, INGRESS, R, World, casts, settings, within};

/// A running flow must cost less.
const ESTABLISHED_NANOSECONDS: f64 = 250.0;

/// Runs of the program in one system call.
const REPEAT: u32 = 500_000;

/// As many as the ring buffer has room for.
const REPEAT_NEW: u32 = 20_000;

/// Of the runs, the middle one counts.
const ROUNDS: usize = 7;

/// What is sent, and what came before it.
struct Case {
    name: &'static str,
    packets: fn(&Cast) -> Vec<Packet>,
    has_policy: bool,
    repeat: u32,
    aim: Option<f64>,
}

const CASES: [Case; 7] = [
    Case {
        name: "established",
        packets: established,
        has_policy: true,
        repeat: REPEAT,
        aim: Some(ESTABLISHED_NANOSECONDS),
    },
    Case {
        name: "established_reply",
        packets: established_reply,
        has_policy: true,
        repeat: REPEAT,
        aim: Some(ESTABLISHED_NANOSECONDS),
    },
    Case {
        name: "established_no_policy",
        packets: established,
        has_policy: false,
        repeat: REPEAT,
        aim: Some(ESTABLISHED_NANOSECONDS),
    },
    Case {
        name: "established_other_node",
        packets: |cast| vec![udp((cast.a, 5000), (cast.remote, 53)).by(1)],
        has_policy: true,
        repeat: REPEAT,
        aim: None,
    },
    Case { name: "new", packets: new, has_policy: true, repeat: REPEAT_NEW, aim: None },
    Case { name: "new_no_policy", packets: new, has_policy: false, repeat: REPEAT_NEW, aim: None },
    Case {
        name: "denied",
        packets: |cast| vec![tcp((cast.a, 40000), (cast.b, 81), SYN).by(1)],
        has_policy: true,
        repeat: REPEAT_NEW,
        aim: None,
    },
];

/// A running connection, and a segment of it.
pub fn established(cast: &Cast) -> Vec<Packet> {
    let segment = |flags| tcp((cast.a, 40000), (cast.b, 80), flags).by(1).payload(&[0; 64]);
    vec![segment(SYN), tcp((cast.b, 80), (cast.a, 40000), SYN | ACK).by(2), segment(ACK)]
}

fn established_reply(cast: &Cast) -> Vec<Packet> {
    let mut packets = established(cast);
    packets.push(tcp((cast.b, 80), (cast.a, 40000), ACK).by(2).payload(&[0; 64]));
    packets
}

/// A SYN that ends its own flow, so that the next one begins another.
pub fn new(cast: &Cast) -> Vec<Packet> {
    vec![tcp((cast.a, 40000), (cast.b, 80), SYN | RST).by(1)]
}

/// Every case in both families.
pub fn run() -> Vec<Row> {
    let mut rows = Vec::new();
    for cast in casts() {
        let family = if cast.a.is_ipv4() { "ipv4" } else { "ipv6" };
        let (sender, receiver) = std::sync::mpsc::channel();
        let result = within(settings(), move |world| {
            for case in &CASES {
                let name = format!("from_pod/{}/{family}", case.name);
                let row = measure(world, &cast, case).map(|(value, floor)| {
                    let row = Row::new(&name, "ns", value).against(floor, None);
                    // The aim is in nanoseconds, not in times of nothing.
                    match case.aim {
                        Some(aim) => Row { aim: Some(aim), met: Some(value <= aim), ..row },
                        None => row,
                    }
                });
                sender.send(row.unwrap_or_else(|error| Row::skipped(name, "ns", format!("{error:#}"))))?;
            }
            Ok(())
        });
        rows.extend(receiver);
        if let Err(error) = result {
            rows.push(Row::skipped(format!("from_pod/{family}"), "ns", format!("{error:#}")));
        }
    }
    rows
}

/// Nanoseconds of the case, and of an empty program in the same minute.
fn measure(world: &mut World, cast: &Cast, case: &Case) -> Result<(f64, f64)> {
    world.reset()?;
    for (id, peer) in [(1, B), (2, A)] {
        world.enforce(id, if case.has_policy { &[EGRESS, INGRESS] } else { &[] })?;
        for port in [80, 8080] {
            world.allow(id, EGRESS, peer, (6, port))?;
            world.allow(id, INGRESS, peer, (6, port))?;
        }
        world.allow(id, EGRESS, peer, (17, 0))?;
        world.allow(id, INGRESS, peer, (17, 0))?;
        world.allow(id, EGRESS, R, (17, 0))?;
    }
    let bytes = send_all(world, &(case.packets)(cast))?;
    let (mut values, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        values.push(nanoseconds(&world.datapath.program("from_pod")?, &bytes, case.repeat)?);
        floors.push(nanoseconds(&world.helper("empty")?, &bytes, case.repeat)?);
        world.forget_events()?;
    }
    Ok((median(values), median(floors)))
}

/// Sends every packet once: the bytes of the last one.
fn send_all(world: &mut World, packets: &[Packet]) -> Result<Vec<u8>> {
    for packet in packets {
        let outcome = world.send("from_pod", packet)?;
        ensure!(outcome.counted.len() == 1, "the packet was counted {:?}", outcome.counted);
    }
    Ok(packets[packets.len() - 1].bytes())
}

/// Nanoseconds of the last packet, behind the others.
pub fn measure_packets(world: &mut World, packets: &[Packet]) -> Result<f64> {
    let bytes = send_all(world, packets)?;
    let mut values = Vec::new();
    for _ in 0..ROUNDS {
        values.push(nanoseconds(&world.datapath.program("from_pod")?, &bytes, REPEAT_NEW)?);
        world.forget_events()?;
    }
    Ok(median(values))
}

fn nanoseconds(program: &ProgramMut<'_>, bytes: &[u8], repeat: u32) -> Result<f64> {
    let input = ProgramInput { data_in: Some(bytes), repeat, ..ProgramInput::default() };
    Ok(program.test_run(input)?.duration.as_secs_f64() * 1e9)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
