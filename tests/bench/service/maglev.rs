//! How evenly Maglev's tables serve the backends, and who moves when one goes.

use std::net::SocketAddr;

use weir::datapath::maglev::{self, TABLE_SIZE};

use crate::row::Row;

/// Places in a table for each backend.
const SHARE: usize = 100;
/// Sets of backends that are looked at.
const SETS: usize = 32;

/// The worst of some sets: the fullest backend to the mean, and the share that moves when one goes, less 1/N.
pub fn rows() -> Vec<Row> {
    let count = TABLE_SIZE as usize / SHARE;
    let (mut imbalance, mut disruption): (f64, f64) = (0.0, 0.0);
    for set in 0..SETS {
        let backends: Vec<(SocketAddr, u16)> = (0..count).map(|number| (backend(set, number), 1)).collect();
        let table = maglev::table(&backends, TABLE_SIZE);
        let mut shares = vec![0_u32; count];
        table.iter().for_each(|index| shares[*index as usize] += 1);
        let fullest = shares.iter().max().copied().unwrap_or(0);
        imbalance = imbalance.max(f64::from(fullest) * count as f64 / f64::from(TABLE_SIZE));
        let gone = set * 5 % count;
        let mut left = backends.clone();
        left.remove(gone);
        let after = maglev::table(&left, TABLE_SIZE);
        let moved = table
            .iter()
            .zip(&after)
            .filter(|(before, after)| backends[**before as usize].0 != left[**after as usize].0);
        disruption = disruption.max(moved.count() as f64 / f64::from(TABLE_SIZE) - 1.0 / count as f64);
    }
    vec![
        Row::new("maglev/imbalance", "max/mean", imbalance).at_most(1.02),
        Row::new("maglev/disruption", "moved - 1/N", disruption).at_most(0.02),
    ]
}

fn backend(set: usize, number: usize) -> SocketAddr {
    SocketAddr::from(([10, set as u8, (number / 250) as u8, (number % 250) as u8], 8080))
}
