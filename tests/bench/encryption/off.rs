//! What the code of encryption costs where nothing is encrypted: this build against one that has none of it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::{Pair, ROUNDS, row, setup};
use crate::lab::{Lab, Setup};
use crate::load::{Load, LoadServer, measure_rounds, pin};
use crate::row::Row;

pub fn rows() -> Result<Vec<Row>> {
    pin()?;
    let Some(before) = std::env::var_os("BEFORE") else {
        bail!(
            "BEFORE names no directory with a weir and weir-cni without encryption: build the parent of the commit \
             'encryption: pods of different nodes speak by WireGuard' with --release"
        );
    };
    let before = PathBuf::from(before);
    let before = before.canonicalize().with_context(|| format!("looking for {}", before.display()))?;
    let mut rows = Vec::new();
    for routing in ["tunnel", "native"] {
        let old = || -> Result<Pair> {
            let lab = Lab::start(Setup { starts_agents: false, ..setup(routing, &[]) })?;
            lab.nodes().iter().for_each(|node| node.use_programs(Some(&before)));
            lab.start_agents()?;
            Pair::of(lab)
        };
        let (old, again, weir) = (old()?, old()?, Pair::of(Lab::start(setup(routing, &[]))?)?);
        let paths = [old.path("old"), again.path("again"), weir.path("weir")];
        let _servers: Vec<LoadServer> = paths.iter().map(LoadServer::start).collect::<Result<_>>()?;
        for load in Load::ALL {
            let samples = measure_rounds(load, &paths, ROUNDS)?;
            let name = match load {
                Load::Transactions => "rr",
                Load::Connections => "crr",
                Load::Stream => "stream",
            };
            rows.push(row(format!("off/{name}/{routing}/vs_before"), load, &samples, "old").at_least(0.98));
        }
    }
    Ok(rows)
}
