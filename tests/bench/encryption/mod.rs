//! The suite `encryption`: user-space WireGuard beside wireguard-go, what limited pods get of their limits, and what
//! encryption costs where it is off. Two minutes and a half.

mod bandwidth;
mod off;
mod wireguard;

use anyhow::Result;

use crate::lab::{Lab, Pod, Setup};
use crate::load::{self, Load, Path, Samples};
use crate::row::Row;

/// A process carries the packets: its samples differ more than those of the kernel alone, and take longer.
const ROUNDS: usize = 25;

const SECTIONS: [crate::Section; 3] = [
    ("wireguard", "wireguard/stream/vs_wireguard_go", wireguard::rows),
    ("bandwidth", "bandwidth/1", bandwidth::rows),
    ("off", "off/tcp_rr/vs_before", off::rows),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::measure_sections("encryption", &SECTIONS)
}

/// Two pods of two nodes.
struct Pair {
    client: Pod,
    server: Pod,
    lab: Lab,
}

impl Pair {
    fn of(lab: Lab) -> Result<Self> {
        let (client, server) = (lab.pod(1, "bench/client").create()?, lab.pod(2, "bench/server").create()?);
        Ok(Self { client, server, lab })
    }

    fn path(&self, name: &'static str) -> Path<'_> {
        let (client, server) = (self.client.space(), self.server.space());
        Path { name, client, server, target: self.server.address(true), port: load::ECHO_PORT }
    }
}

fn setup(routing: &str, arguments: &[&str]) -> Setup {
    Setup {
        nodes: 2,
        routing: routing.to_owned(),
        agent_arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        ..Setup::default()
    }
}

/// A row of `weir` against `other` and `again`, which are alike.
fn row(name: String, load: Load, samples: &Samples, other: &str) -> Row {
    Row::new(name, load.unit(), samples.median("weir"))
        .against(samples.median(other), Some(samples.ratio("weir", &[other, "again"])))
        .noise((samples.ratio("again", &[other]) - 1.0).abs())
}
