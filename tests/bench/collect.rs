//! What the collector of connections costs for each that it looks at: those that stay, and
//! those that have expired.

use anyhow::{Result, ensure};
use weir::datapath::abi::{Connection, ConnectionKey};
use weir::datapath::{Datapath, MapSizes, Settings, addr_of};

use crate::row::Row;

/// Rows in a map that has room for 262,144.
const CONNECTIONS: u32 = 200_000;

/// Of the walks, the middle one counts.
const ROUNDS: usize = 5;

/// Both rows.
pub fn run() -> Result<Vec<Row>> {
    let datapath = Datapath::open_private(&Settings::default(), &MapSizes::default())?;
    let nanoseconds = |last_seen_jiffies, expired| -> Result<f64> {
        fill(&datapath, last_seen_jiffies)?;
        let report = datapath.collect_garbage()?;
        ensure!(report.connections == expired, "{report:?}, not {expired} connections");
        Ok(report.duration.as_secs_f64() * 1e9 / f64::from(CONNECTIONS))
    };
    let measure = |name: &str, last_seen_jiffies, expired| -> Result<Row> {
        let rounds = (0..ROUNDS).map(|_| nanoseconds(last_seen_jiffies, expired)).collect::<Result<_>>()?;
        Ok(Row::new(name, "ns", crate::load::median(rounds)))
    };
    Ok(vec![
        // The machine started at 0; what will be seen in 500 million years stays.
        measure("collect/connection/expired", 0, u64::from(CONNECTIONS))?,
        measure("collect/connection/live", u64::MAX / 2, 0)?,
    ])
}

fn fill(datapath: &Datapath, last_seen_jiffies: u64) -> Result<()> {
    let connections = datapath.typed::<ConnectionKey, Connection>("connections")?;
    for number in 0..CONNECTIONS {
        let [_, network, high, low] = number.to_be_bytes();
        let key = ConnectionKey {
            addr: [addr_of([10, 0, 0, 1].into()), addr_of([10, 1, 0, network].into())],
            port: [u16::from_be_bytes([high, low]), 80_u16.to_be()],
            protocol: 6,
            ..ConnectionKey::default()
        };
        connections.insert(&key, &Connection { last_seen_jiffies, ..Connection::default() })?;
    }
    Ok(())
}
