//! Rows: what a packet must have to be allowed, as the LPM of `policy_rules` holds it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{NamedPort, ObjectKey, Protocol};

/// Protocol and port of a row. The fields stand in the order in which the kernel matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Match {
    /// `None`: any protocol, ICMP and unknown ones included.
    pub protocol: Option<u8>,
    /// The port, of which `port_prefix_length` bits count; the others are 0.
    pub port: u16,
    /// 0 (any port) to 16 (exactly one).
    pub port_prefix_length: u8,
}

/// What a class allows, and the policy that says so.
pub type Rows = BTreeMap<Match, Arc<ObjectKey>>;

impl Match {
    /// Every packet.
    pub const ANY: Self = Self { protocol: None, port: 0, port_prefix_length: 0 };

    /// Every port of a protocol.
    pub fn protocol(protocol: Protocol) -> Self {
        Self { protocol: Some(protocol.number()), port: 0, port_prefix_length: 0 }
    }

    /// One port.
    pub fn port(port: NamedPort) -> Self {
        Self { protocol: Some(port.protocol.number()), port: port.port, port_prefix_length: 16 }
    }

    /// The ports `from` to `to`, both included, in as few prefixes as there can be.
    pub fn range(protocol: Protocol, from: u16, to: u16) -> impl Iterator<Item = Self> {
        let (mut next, to) = (u32::from(from), u32::from(to));
        std::iter::from_fn(move || {
            if next > to {
                return None;
            }
            let mut bits = next.trailing_zeros().min(16);
            while next + (1 << bits) - 1 > to {
                bits -= 1;
            }
            let port = u16::try_from(next).expect("ports end at 65535");
            next += 1 << bits;
            Some(Self {
                protocol: Some(protocol.number()),
                port,
                port_prefix_length: u8::try_from(16 - bits).expect("at most 16"),
            })
        })
    }

    /// The rows other than this that match all that this one matches.
    fn wider(self) -> impl Iterator<Item = Self> {
        let shorter = (0..self.port_prefix_length).map(move |length| Self {
            port: if length == 0 { 0 } else { self.port & (u16::MAX << (16 - length)) },
            port_prefix_length: length,
            ..self
        });
        (self != Self::ANY).then_some(Self::ANY).into_iter().chain(shorter)
    }
}

/// Adds a row; of two policies with the same row the first by key is named.
pub fn add(rows: &mut Rows, matched: Match, origin: &Arc<ObjectKey>) {
    rows.entry(matched)
        .and_modify(|known| {
            if *origin < *known {
                *known = origin.clone();
            }
        })
        .or_insert_with(|| origin.clone());
}

/// Drops the rows that a wider one contains: all rows allow, so they decide nothing.
pub fn without_contained(mut rows: Rows) -> Rows {
    let contained: Vec<Match> = rows
        .keys()
        .copied()
        .filter(|matched| matched.wider().any(|wider| rows.contains_key(&wider)))
        .collect();
    for matched in contained {
        rows.remove(&matched);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(from: u16, to: u16) -> Vec<(u16, u8)> {
        Match::range(Protocol::Tcp, from, to).map(|row| (row.port, row.port_prefix_length)).collect()
    }

    #[test]
    fn ranges_are_split_into_the_fewest_prefixes() {
        assert_eq!(range(80, 80), [(80, 16)]);
        assert_eq!(range(80, 81), [(80, 15)]);
        assert_eq!(range(81, 82), [(81, 16), (82, 16)]);
        assert_eq!(range(0, 65535), [(0, 0)]);
        assert_eq!(range(1, 65535).len(), 16);
        assert_eq!(range(8000, 8100), [(8000, 10), (8064, 11), (8096, 14), (8100, 16)]);
        assert_eq!(range(65535, 65535), [(65535, 16)]);
        assert_eq!(range(81, 80), []);
    }

    #[test]
    fn ranges_cover_exactly_their_ports() {
        for (from, to) in [(1, 65534), (1023, 1025), (30000, 32767), (5, 5), (32768, 65535)] {
            let rows: Vec<Match> = Match::range(Protocol::Udp, from, to).collect();
            for port in 0..=u16::MAX {
                let count = rows
                    .iter()
                    .filter(|row| u32::from(row.port ^ port) >> (16 - row.port_prefix_length) == 0)
                    .count();
                assert_eq!(count, usize::from((from..=to).contains(&port)), "{from}-{to}, {port}");
            }
        }
    }

    #[test]
    fn contained_rows_go_and_the_first_policy_is_named() {
        let one = Arc::new(ObjectKey::new("shop", "one"));
        let two = Arc::new(ObjectKey::new("shop", "two"));
        let mut rows = Rows::new();
        add(&mut rows, Match::protocol(Protocol::Tcp), &two);
        add(&mut rows, Match::protocol(Protocol::Tcp), &one);
        add(&mut rows, Match::port(NamedPort { protocol: Protocol::Tcp, port: 80 }), &one);
        add(&mut rows, Match::port(NamedPort { protocol: Protocol::Udp, port: 53 }), &two);
        let expected = Rows::from([
            (Match::protocol(Protocol::Tcp), one.clone()),
            (Match::port(NamedPort { protocol: Protocol::Udp, port: 53 }), two.clone()),
        ]);
        assert_eq!(without_contained(rows.clone()), expected);
        add(&mut rows, Match::ANY, &two);
        assert_eq!(without_contained(rows), Rows::from([(Match::ANY, two)]));
    }
}
