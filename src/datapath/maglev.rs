//! Consistent hashing (Eisenbud et al.: Maglev, 2016): a table of backends that every node computes alike,
//! and the hash by which the programs look a flow up in it.
//!
//! A backend's places depend on its address and port alone, so a set that changes by one backend changes
//! few places, and clients keep the backends that they have wherever their packets arrive.

use std::net::{IpAddr, SocketAddr};

/// Places in a table by default: at most 1 % of the clients move for nothing with up to 163 backends.
pub const TABLE_SIZE: u32 = 16381;

/// Where a backend would like to be in the table: one place after the other until one is free.
struct Preference {
    next: u64,
    step: u64,
    weight: u64,
    credit: u64,
}

impl Preference {
    fn new((address, weight): (SocketAddr, u16), size: u64) -> Self {
        let [offset, step] = [1, 2].map(|number| {
            let mut hash = SipHash::default();
            hash.add_ip(address.ip());
            hash.add(u64::from(address.port()) << 8 | number);
            hash.end()
        });
        Self { next: offset % size, step: step % (size - 1) + 1, weight: weight.into(), credit: 0 }
    }

    /// The best place that is free.
    fn take(&mut self, table: &[Option<u32>]) -> usize {
        loop {
            let place = usize::try_from(self.next).unwrap_or_default();
            self.next = (self.next + self.step) % table.len() as u64;
            if table.get(place).is_none_or(Option::is_none) {
                return place;
            }
        }
    }
}

/// The table of these backends: at each place the index of one of them. In turns, each according to its
/// weight, they take the best place that is left to them. `size` is prime. Empty if no backend has a weight.
pub fn table(backends: &[(SocketAddr, u16)], size: u32) -> Vec<u32> {
    let heaviest = backends.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(0);
    if heaviest == 0 || size < 2 {
        return Vec::new();
    }
    let mut preferences: Vec<_> =
        backends.iter().map(|backend| Preference::new(*backend, size.into())).collect();
    let mut places: Vec<Option<u32>> = vec![None; size as usize];
    let mut left = places.len();
    while left > 0 {
        for (index, preference) in (0..).zip(&mut preferences) {
            preference.credit += preference.weight;
            if preference.credit < heaviest || left == 0 {
                continue;
            }
            preference.credit -= heaviest;
            let place = preference.take(&places);
            if let Some(free) = places.get_mut(place) {
                *free = Some(index);
            }
            left -= 1;
        }
    }
    places.into_iter().flatten().collect()
}

/// The backend of a flow, as the programs choose it: an entry of `table`. `client` has no port where the
/// service has affinity: all flows of a client have one backend then.
pub fn choose(
    table: &[u32],
    client: (IpAddr, Option<u16>),
    frontend: SocketAddr,
    protocol: u8,
) -> Option<u32> {
    let port = |port: u16| u64::from(port.to_be());
    let mut hash = SipHash::default();
    hash.add_ip(client.0);
    hash.add_ip(frontend.ip());
    hash.add(client.1.map_or(0, port) << 32 | port(frontend.port()) << 8 | u64::from(protocol));
    let place = (((hash.end() | 1) >> 32) * table.len() as u64) >> 32;
    table.get(usize::try_from(place).ok()?).copied()
}

/// SipHash-1-3 over words, without a key, as in `bpf/lib/hash.h`.
struct SipHash([u64; 4]);

impl Default for SipHash {
    fn default() -> Self {
        Self([0x736f_6d65_7073_6575, 0x646f_7261_6e64_6f6d, 0x6c79_6765_6e65_7261, 0x7465_6462_7974_6573])
    }
}

impl SipHash {
    fn round(&mut self) {
        let [v0, v1, v2, v3] = &mut self.0;
        *v0 = v0.wrapping_add(*v1);
        *v1 = v1.rotate_left(13) ^ *v0;
        *v0 = v0.rotate_left(32);
        *v2 = v2.wrapping_add(*v3);
        *v3 = v3.rotate_left(16) ^ *v2;
        *v0 = v0.wrapping_add(*v3);
        *v3 = v3.rotate_left(21) ^ *v0;
        *v2 = v2.wrapping_add(*v1);
        *v1 = v1.rotate_left(17) ^ *v2;
        *v2 = v2.rotate_left(32);
    }

    fn add(&mut self, word: u64) {
        self.0[3] ^= word;
        self.round();
        self.0[0] ^= word;
    }

    /// The two words of an address as the programs have it in memory; IPv4 is v4-mapped.
    fn add_ip(&mut self, address: IpAddr) {
        let octets = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        for word in octets.as_chunks::<8>().0 {
            self.add(u64::from_ne_bytes(*word));
        }
    }

    fn end(mut self) -> u64 {
        self.0[2] ^= 0xff;
        (0..3).for_each(|_| self.round());
        self.0.into_iter().fold(0, |sum, word| sum ^ word)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn backends(count: u16, first: u32) -> Vec<(SocketAddr, u16)> {
        let address = |number: u32| SocketAddr::new(IpAddr::from((first + number).to_be_bytes()), 8080);
        (0..u32::from(count)).map(|number| (address(number), 1)).collect()
    }

    fn shares(table: &[u32]) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        table.iter().for_each(|index| *shares.entry(*index).or_default() += 1);
        shares
    }

    #[test]
    fn it_is_as_even_as_the_paper_says() {
        for count in [1, 2, 3, 10, 100, 163] {
            let shares = shares(&table(&backends(count, 0x0a01_0001), TABLE_SIZE));
            assert_eq!(shares.len(), usize::from(count));
            let mean = f64::from(TABLE_SIZE) / f64::from(count);
            let most = shares.values().max().copied().unwrap_or(0) as f64;
            assert!(most / mean <= 1.02, "{count} backends: the largest share is {}", most / mean);
        }
    }

    #[test]
    fn weights_are_shares() {
        let mut three = backends(3, 0x0a01_0001);
        three[0].1 = 0;
        three[2].1 = 3;
        let shares = shares(&table(&three, TABLE_SIZE));
        assert_eq!(shares.get(&0), None, "a weight of 0 is no place");
        let ratio = shares[&2] as f64 / shares[&1] as f64;
        assert!((2.9..3.1).contains(&ratio), "{ratio}");
        assert!(table(&[], TABLE_SIZE).is_empty() && table(&three[..1], TABLE_SIZE).is_empty());
    }

    /// The part of the table that moves though its backend stays, for one backend less of `count`.
    fn moved_for_nothing(count: u16, set: u32) -> f64 {
        let all = backends(count, 0x0a00_0001 + set * 1_037_389);
        let mut rest = all.clone();
        let gone = rest.remove(set as usize * 37 % all.len());
        let (before, after) = (table(&all, TABLE_SIZE), table(&rest, TABLE_SIZE));
        let moved = before.iter().zip(&after).filter(|(was, is)| {
            let was = all[**was as usize];
            was != gone && was != rest[**is as usize]
        });
        moved.count() as f64 / f64::from(TABLE_SIZE)
    }

    /// As the paper has it: some sets of backends are less lucky than most.
    #[test]
    fn one_backend_less_moves_few_others() {
        for count in [2, 10, 50, 100, 163] {
            let mut parts: Vec<f64> = (0..20).map(|set| moved_for_nothing(count, set)).collect();
            parts.sort_by(f64::total_cmp);
            assert!(parts[18] <= 0.02, "{count} backends: nine of ten sets move {} at most", parts[18]);
            assert!(parts[19] <= 0.05, "{count} backends: a set moves {}", parts[19]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_place_has_a_backend_of_the_set(count in 1_u16..40, size in prop::sample::select(vec![251_u32, 509, 1021])) {
            let table = table(&backends(count, 0x0a01_0001), size);
            prop_assert_eq!(table.len(), size as usize);
            prop_assert!(table.iter().all(|index| *index < count.into()));
        }
    }
}
