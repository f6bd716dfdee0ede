//! Which node has which pod CIDR: the operator's pools.
//!
//! Pure: it knows pools, and who has what. What is in use is told to it (`occupy`), whether
//! it came from a pool or not, and nothing that overlaps it is given. Within a pool it
//! goes round: what was freed is the last to be given again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use thiserror::Error;

/// A range of addresses and the size of what each node gets of it, as `10.128.0.0/14=24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The whole range.
    pub cidr: IpNet,
    /// Prefix length of a node's part.
    pub node_length: u8,
}

impl FromStr for Pool {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "must be CIDR=LENGTH, as 10.128.0.0/14=24 or fd00:10::/48=64";
        let (cidr, length) = text.split_once('=').ok_or(FORM)?;
        let cidr: IpNet = cidr.parse().map_err(|_| FORM)?;
        let node_length: u8 = length.parse().map_err(|_| FORM)?;
        if cidr != cidr.trunc() {
            return Err(format!("{cidr} has bits behind its prefix: it must be {}", cidr.trunc()));
        }
        // Network address, the node's own, one pod, and IPv4's broadcast address.
        let longest = cidr.max_prefix_len() - 2;
        if node_length < cidr.prefix_len() || node_length > longest {
            let shortest = cidr.prefix_len();
            return Err(format!("a node's part of {cidr} must have a length of {shortest} to {longest}"));
        }
        Ok(Self { cidr, node_length })
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.cidr, self.node_length)
    }
}

impl Pool {
    /// How many nodes it is enough for.
    pub fn capacity(&self) -> f64 {
        f64::from(self.node_length - self.cidr.prefix_len()).exp2()
    }

    fn is_ipv4(&self) -> bool {
        self.cidr.addr().is_ipv4()
    }
}

/// The first two pools that overlap.
pub fn overlap(pools: &[Pool]) -> Option<(Pool, Pool)> {
    let pairs =
        pools.iter().enumerate().flat_map(|(n, one)| pools[n + 1..].iter().map(move |two| (*one, *two)));
    pairs.into_iter().find(|(one, two)| overlaps(&one.cidr, &two.cidr))
}

fn overlaps(one: &IpNet, two: &IpNet) -> bool {
    one.contains(two) || two.contains(one)
}

/// Why a node gets nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Exhausted {
    /// There are no pools at all.
    #[error("WEIR_POD_CIDR_POOLS names no pool, and the Node has no spec.podCIDRs")]
    NoPool,
    /// Everything of one family is in use.
    #[error("every pod CIDR of {} is in use: add a pool to WEIR_POD_CIDR_POOLS", Joined(.0))]
    Full(Vec<Pool>),
}

struct Joined<'a>(&'a [Pool]);

impl fmt::Display for Joined<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(|pool| pool.cidr.to_string()).collect();
        f.write_str(&texts.join(", "))
    }
}

/// Who has what.
#[derive(Clone, Debug, Default)]
pub struct Pools {
    pools: Vec<Pool>,
    /// What is tried next in each pool, as the number of the part.
    next: Vec<u128>,
    owners: BTreeMap<IpNet, BTreeSet<Arc<str>>>,
    of_owner: BTreeMap<Arc<str>, BTreeSet<IpNet>>,
}

impl Pools {
    /// Nothing is in use. The pools must not overlap.
    pub fn new(pools: &[Pool]) -> Self {
        Self { pools: pools.to_vec(), next: vec![0; pools.len()], ..Self::default() }
    }

    /// Makes `cidrs` all that `owner` has, wherever they are from. Others may have them, too:
    /// what is, is.
    pub fn occupy(&mut self, owner: &Arc<str>, cidrs: impl IntoIterator<Item = IpNet>) {
        let cidrs: BTreeSet<IpNet> = cidrs.into_iter().map(|cidr| cidr.trunc()).collect();
        if self.of_owner.get(owner) == Some(&cidrs) {
            return;
        }
        self.release(owner);
        for cidr in &cidrs {
            self.owners.entry(*cidr).or_default().insert(owner.clone());
        }
        if !cidrs.is_empty() {
            self.of_owner.insert(owner.clone(), cidrs);
        }
    }

    /// Frees what `owner` has.
    pub fn release(&mut self, owner: &str) {
        for cidr in self.of_owner.remove(owner).into_iter().flatten() {
            if let Some(owners) = self.owners.get_mut(&cidr) {
                owners.remove(owner);
                if owners.is_empty() {
                    self.owners.remove(&cidr);
                }
            }
        }
    }

    /// What `owner` has.
    pub fn of(&self, owner: &str) -> Option<&BTreeSet<IpNet>> {
        self.of_owner.get(owner)
    }

    /// Everybody who has anything.
    pub fn owners(&self) -> impl Iterator<Item = &Arc<str>> {
        self.of_owner.keys()
    }

    /// Another owner of something that overlaps what `owner` has.
    pub fn rival(&self, owner: &str) -> Option<(IpNet, Arc<str>)> {
        let own = self.of_owner.get(owner)?;
        own.iter().find_map(|cidr| {
            let rival =
                self.overlapping(cidr).flat_map(|(_, owners)| owners).find(|other| ***other != *owner)?;
            Some((*cidr, rival.clone()))
        })
    }

    /// One part of each family that there is a pool of, for `owner`, who has nothing.
    pub fn allocate(&mut self, owner: &Arc<str>) -> Result<Vec<IpNet>, Exhausted> {
        let mut given = Vec::new();
        for is_ipv4 in [true, false] {
            let of_family: Vec<usize> =
                (0..self.pools.len()).filter(|n| self.pools[*n].is_ipv4() == is_ipv4).collect();
            if of_family.is_empty() {
                continue;
            }
            match of_family.iter().find_map(|n| self.find_free(*n)) {
                Some(cidr) => given.push(cidr),
                None => return Err(Exhausted::Full(of_family.iter().map(|n| self.pools[*n]).collect())),
            }
        }
        if given.is_empty() {
            return Err(Exhausted::NoPool);
        }
        self.occupy(owner, given.iter().copied());
        Ok(given)
    }

    /// Each pool with the number of its parts that are in use.
    pub fn usage(&self) -> Vec<(Pool, f64)> {
        let used = |pool: &Pool| {
            let inside = self.overlapping(&pool.cidr).map(|(cidr, _)| {
                let parts =
                    f64::from(pool.node_length) - f64::from(cidr.prefix_len().max(pool.cidr.prefix_len()));
                parts.max(0.0).exp2()
            });
            inside.sum::<f64>().min(pool.capacity())
        };
        self.pools.iter().map(|pool| (*pool, used(pool))).collect()
    }

    /// The next free part of a pool, beginning where it was given last.
    fn find_free(&mut self, number: usize) -> Option<IpNet> {
        let pool = self.pools[number];
        let bits = pool.node_length - pool.cidr.prefix_len();
        // Where a pool has 2^128 parts and more there is no counting them, nor need to.
        let count = 1_u128.checked_shl(bits.into()).unwrap_or(u128::MAX);
        let start = self.next[number];
        let free = self.first_free(&pool, start, count).or_else(|| self.first_free(&pool, 0, start))?;
        self.next[number] = (free + 1) % count;
        Some(part(&pool, free))
    }

    fn first_free(&self, pool: &Pool, from: u128, to: u128) -> Option<u128> {
        let mut index = from;
        while index < to {
            let candidate = part(pool, index);
            match self.overlapping(&candidate).map(|(cidr, _)| *cidr).next() {
                None => return Some(index),
                // Of a large one all parts are in use: go on behind it.
                Some(used) if used.prefix_len() < pool.node_length => {
                    let width = u32::from(pool.node_length - used.prefix_len().max(pool.cidr.prefix_len()));
                    index = index.checked_shr(width).unwrap_or(0).saturating_add(1).checked_shl(width)?;
                }
                Some(_) => index += 1,
            }
        }
        None
    }

    /// What is in use and overlaps `cidr`: those around it, and those in it.
    fn overlapping(&self, cidr: &IpNet) -> impl Iterator<Item = (&IpNet, &BTreeSet<Arc<str>>)> {
        let around = (0..cidr.prefix_len()).filter_map(|length| {
            let around = IpNet::new(cidr.addr(), length).ok()?.trunc();
            self.owners.get_key_value(&around)
        });
        let (cidr, last) = (*cidr, cidr.broadcast());
        let first = IpNet::new(cidr.network(), cidr.prefix_len()).unwrap_or(cidr);
        let inside = self.owners.range(first..).take_while(move |(used, _)| used.addr() <= last);
        around.chain(inside.filter(move |(used, _)| cidr.contains(*used)))
    }
}

/// Part `index` of a pool.
fn part(pool: &Pool, index: u128) -> IpNet {
    let width = u32::from(pool.cidr.max_prefix_len() - pool.node_length);
    let offset = index.checked_shl(width).unwrap_or(0);
    let address = match pool.cidr.network() {
        IpAddr::V4(network) => IpAddr::V4(Ipv4Addr::from(u32::from(network) + offset as u32)),
        IpAddr::V6(network) => IpAddr::V6(Ipv6Addr::from(u128::from(network) + offset)),
    };
    IpNet::new(address, pool.node_length).unwrap_or(pool.cidr)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pools(texts: &[&str]) -> Pools {
        let pools: Vec<Pool> = texts.iter().map(|text| text.parse().expect("a pool")).collect();
        Pools::new(&pools)
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a CIDR")
    }

    fn texts(given: Result<Vec<IpNet>, Exhausted>) -> Vec<String> {
        given.expect("there is room").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nonsense_is_refused() {
        for (text, reason) in [
            ("10.0.0.0/8", "must be CIDR=LENGTH"),
            ("10.0.0.0=24", "must be CIDR=LENGTH"),
            ("10.0.0.1/8=24", "it must be 10.0.0.0/8"),
            ("10.0.0.0/24=16", "must have a length of 24 to 30"),
            ("10.0.0.0/24=31", "must have a length of 24 to 30"),
            ("fd00::/48=127", "must have a length of 48 to 126"),
            ("fd00::/48=300", "must be CIDR=LENGTH"),
        ] {
            let error = text.parse::<Pool>().expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
        let all: Vec<Pool> = ["10.0.0.0/16=24", "fd00::/48=64", "10.0.128.0/20=24"]
            .map(|text| text.parse().expect(text))
            .into();
        assert_eq!(overlap(&all), Some((all[0], all[2])));
        assert_eq!(overlap(&all[..2]), None);
    }

    #[test]
    fn one_of_each_family_then_the_next_pool_then_nothing() {
        let mut pools = pools(&["10.0.0.0/23=24", "fd00::/48=64", "10.9.0.0/24=24"]);
        assert_eq!(texts(pools.allocate(&"a".into())), ["10.0.0.0/24", "fd00::/64"]);
        assert_eq!(texts(pools.allocate(&"b".into())), ["10.0.1.0/24", "fd00:0:0:1::/64"]);
        assert_eq!(texts(pools.allocate(&"c".into())), ["10.9.0.0/24", "fd00:0:0:2::/64"]);
        let full = pools.allocate(&"d".into()).expect_err("everything is in use");
        assert_eq!(
            full.to_string(),
            "every pod CIDR of 10.0.0.0/23, 10.9.0.0/24 is in use: add a pool to WEIR_POD_CIDR_POOLS"
        );
        assert_eq!(pools.usage().iter().map(|(_, used)| *used).collect::<Vec<_>>(), [2.0, 3.0, 1.0]);
        pools.release("b");
        assert_eq!(texts(pools.allocate(&"d".into())), ["10.0.1.0/24", "fd00:0:0:3::/64"]);
        assert_eq!(Pools::new(&[]).allocate(&"a".into()), Err(Exhausted::NoPool));
    }

    #[test]
    fn what_others_gave_is_left_alone() {
        let mut pools = pools(&["10.0.0.0/22=24"]);
        // Around the first two parts, and inside the third.
        pools.occupy(&"x".into(), [net("10.0.0.0/23")]);
        pools.occupy(&"y".into(), [net("10.0.2.128/25")]);
        assert_eq!(texts(pools.allocate(&"a".into())), ["10.0.3.0/24"]);
        assert!(pools.allocate(&"b".into()).is_err());
        pools.occupy(&"z".into(), [net("0.0.0.0/0")]);
        pools.release("x");
        assert!(pools.allocate(&"b".into()).is_err());
        assert_eq!(pools.rival("a"), Some((net("10.0.3.0/24"), "z".into())));
        pools.release("z");
        assert_eq!(pools.rival("a"), None);
    }

    #[test]
    fn the_largest_pools_and_the_end_of_the_address_space() {
        assert_eq!(texts(pools(&["::/0=126"]).allocate(&"a".into())), ["::/126"]);
        let mut end = pools(&["255.255.255.0/24=25"]);
        assert_eq!(texts(end.allocate(&"a".into())), ["255.255.255.0/25"]);
        assert_eq!(texts(end.allocate(&"b".into())), ["255.255.255.128/25"]);
        assert!(end.allocate(&"c".into()).is_err());
        let mut whole = pools(&["10.0.0.0/24=24"]);
        assert_eq!(texts(whole.allocate(&"a".into())), ["10.0.0.0/24"]);
    }

    proptest! {
        /// Random owners come, go and bring their own; the operator starts anew in between.
        #[test]
        fn nothing_is_given_twice_and_what_is_freed_is_given_again(
            steps in prop::collection::vec((0_usize..40, 0_u8..10), 1..300)
        ) {
            let texts = ["10.0.0.0/27=30", "10.0.1.0/28=30", "fd00::/60=64"];
            let mut pools = pools(&texts);
            let mut has: BTreeMap<Arc<str>, Vec<IpNet>> = BTreeMap::new();
            for (number, step) in steps {
                let owner: Arc<str> = format!("node-{number}").into();
                match step {
                    0..=5 if !has.contains_key(&owner) => match pools.allocate(&owner) {
                        Ok(given) => drop(has.insert(owner, given)),
                        // Eight and four parts of IPv4, sixteen of IPv6.
                        Err(_) => prop_assert_eq!(has.len(), 12),
                    },
                    6..=8 => {
                        pools.release(&owner);
                        has.remove(&owner);
                    }
                    9 => {
                        pools = self::pools(&texts);
                        has.iter().for_each(|(owner, cidrs)| pools.occupy(owner, cidrs.clone()));
                    }
                    _ => {}
                }
                let all: Vec<&IpNet> = has.values().flatten().collect();
                for (n, one) in all.iter().enumerate() {
                    prop_assert!(all[n + 1..].iter().all(|two| !overlaps(one, two)), "{} twice", one);
                }
            }
        }
    }
}
