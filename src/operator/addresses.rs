//! Which load-balancer address a Service gets: pools, wishes, sharing. Pure: objects in, addresses and reasons out.
//!
//! A Service keeps what it has as long as a pool that is for it has the address. Who has an address goes before
//! who asks for it, and older Services before younger ones, so the outcome does not depend on the order of news.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// One or more ranges of addresses for Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// The object's name.
    pub name: String,
    /// Its ranges.
    pub ranges: Vec<Range>,
    /// Nothing new is given of it.
    pub is_disabled: bool,
}

/// Addresses from one to another, both among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// The lowest.
    pub first: IpAddr,
    /// The highest, of the same family.
    pub last: IpAddr,
}

impl Pool {
    /// One of its ranges has the address.
    pub fn has(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }
}

impl Range {
    /// From `first` to `last`.
    pub fn new(first: IpAddr, last: IpAddr) -> Result<Self, String> {
        match first.is_ipv4() == last.is_ipv4() && first <= last {
            true => Ok(Self { first, last }),
            false => Err(format!("{first} to {last} is no range of addresses")),
        }
    }

    /// A CIDR, without its first and last address where they are kept free.
    pub fn of(cidr: IpNet, keeps_ends_free: bool) -> Self {
        let (first, last) = (cidr.network(), cidr.broadcast());
        match keeps_ends_free && cidr.max_prefix_len() - cidr.prefix_len() > 1 {
            true => Self { first: moved(first, 1), last: moved(last, -1) },
            false => Self { first, last },
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.first.is_ipv4() == address.is_ipv4() && (self.first..=self.last).contains(&address)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }

    fn addresses(self) -> impl Iterator<Item = IpAddr> {
        let (first, last) = (number(self.first), number(self.last));
        (first..=last).map(move |number| address(number, self.first.is_ipv4()))
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn address(number: u128, is_ipv4: bool) -> IpAddr {
    match is_ipv4 {
        true => Ipv4Addr::from(number as u32).into(),
        false => Ipv6Addr::from(number).into(),
    }
}

fn moved(from: IpAddr, by: i128) -> IpAddr {
    address(number(from).wrapping_add_signed(by), from.is_ipv4())
}

/// The first pool that each of these overlaps; a pool that overlaps an earlier one gives nothing new.
pub fn overlapping(pools: &[Pool]) -> BTreeMap<String, String> {
    let overlaps = |one: &Pool, two: &Pool| {
        one.ranges.iter().any(|range| two.ranges.iter().any(|other| range.overlaps(other)))
    };
    let rival = |(n, pool): (usize, &Pool)| {
        let rival = pools[..n].iter().find(|other| overlaps(pool, other))?;
        Some((pool.name.clone(), rival.name.clone()))
    };
    pools.iter().enumerate().filter_map(rival).collect()
}

/// A Service that wants an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its namespace and name.
    pub service: (String, String),
    /// It wants an IPv4, an IPv6 address.
    pub families: [bool; 2],
    /// The addresses that it has.
    pub has: Vec<IpAddr>,
    /// Those that it asks for; none: any.
    pub asks: Vec<IpAddr>,
    /// What it asks for and is no address.
    pub nonsense: Option<String>,
    /// The pools that are for it, by name.
    pub pools: BTreeSet<String>,
    /// Services of one key share an address where their ports differ.
    pub sharing_key: Option<String>,
    /// The other namespaces whose Services may share; `*`: all.
    pub shares_with: BTreeSet<String>,
    /// Protocol and port.
    pub ports: BTreeSet<(String, u16)>,
    /// Only nodes with its pods serve it: whoever shares its address must have the same pods.
    pub local_selector: Option<BTreeMap<String, String>>,
}

/// Why a Service gets no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No pool is for it that has an address of the family.
    NoPool(&'static str),
    /// All addresses of its pools are in use.
    Exhausted(&'static str, Vec<String>),
    /// What it asks for is no address.
    NoAddress(String),
    /// The address that it asks for is in none of its pools.
    NotInPool(IpAddr),
    /// The address that it asks for is another's, with whom it cannot share.
    Taken(IpAddr, (String, String), &'static str),
}

impl Refusal {
    /// One word for a condition.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoPool(_) => "NoPool",
            Self::Exhausted(..) => "PoolExhausted",
            Self::NotInPool(_) => "NotInPool",
            Self::NoAddress(_) => "NoAddress",
            Self::Taken(..) => "AddressInUse",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPool(family) => {
                write!(f, "no load-balancer pool with {family} addresses is for this Service")
            }
            Self::Exhausted(family, pools) => {
                write!(f, "every {family} address of the pools {} is in use", pools.join(", "))
            }
            Self::NoAddress(text) => write!(f, "{text:?} is not an address"),
            Self::NotInPool(address) => {
                write!(f, "{address} is in no load-balancer pool that is for this Service")
            }
            Self::Taken(address, (namespace, name), why) => {
                write!(f, "{address} is Service {namespace}/{name}'s, and cannot be shared: {why}")
            }
        }
    }
}

/// What became of a wish: the addresses, and why there are not more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// In the order IPv4, IPv6, or as asked for.
    pub addresses: Vec<IpAddr>,
    /// What could not be had.
    pub refusals: Vec<Refusal>,
}

/// Why two Services cannot have one address.
fn obstacle(one: &Wish, two: &Wish) -> Option<&'static str> {
    let lets = |one: &Wish, two: &Wish| {
        one.service.0 == two.service.0
            || one.shares_with.contains("*")
            || one.shares_with.contains(&two.service.0)
    };
    match (&one.sharing_key, &two.sharing_key) {
        (None, _) | (_, None) => Some("one of the two has no sharing key"),
        (Some(one), Some(two)) if one != two => Some("the sharing keys differ"),
        _ if !lets(one, two) || !lets(two, one) => Some("the namespaces do not share"),
        _ if !one.ports.is_disjoint(&two.ports) => Some("both have the same port"),
        _ if one.local_selector != two.local_selector => {
            Some("with externalTrafficPolicy Local both must select the same pods")
        }
        _ => None,
    }
}

/// Gives addresses to Services, the first ones first.
struct Giving<'a> {
    pools: &'a [Pool],
    /// Pools that overlap an earlier one.
    overlapping: BTreeMap<String, String>,
    owners: BTreeMap<IpAddr, Vec<&'a Wish>>,
    reserved: &'a BTreeSet<IpAddr>,
}

/// What each Service gets, in the order of `wishes`, older ones first. Nobody gets a `reserved` address.
pub fn give(pools: &[Pool], wishes: &[Wish], reserved: &BTreeSet<IpAddr>) -> Vec<Outcome> {
    let mut giving = Giving { pools, overlapping: overlapping(pools), owners: BTreeMap::new(), reserved };
    let mut outcomes: Vec<Outcome> = wishes.iter().map(|wish| giving.keep(wish)).collect();
    let asking = |wish: &Wish| !wish.asks.is_empty() || wish.nonsense.is_some();
    for is_asking in [true, false] {
        for (wish, outcome) in wishes.iter().zip(&mut outcomes).filter(|(wish, _)| asking(wish) == is_asking)
        {
            match is_asking {
                true => giving.as_asked(wish, outcome),
                false => giving.any(wish, outcome),
            }
        }
    }
    outcomes
}

impl<'a> Giving<'a> {
    fn pools_with(&self, wish: &Wish, address: IpAddr) -> bool {
        let own = self.pools.iter().filter(|pool| wish.pools.contains(&pool.name));
        own.into_iter().any(|pool| pool.has(address))
    }

    /// With whom `wish` cannot share the address; the first by name, whoever came first.
    fn rival(&self, wish: &Wish, address: IpAddr) -> Option<(&'a Wish, &'static str)> {
        let owners = self.owners.get(&address)?;
        let obstacles = owners.iter().filter_map(|owner| Some((*owner, obstacle(wish, owner)?)));
        obstacles.min_by_key(|(owner, _)| &owner.service)
    }

    fn take(&mut self, wish: &'a Wish, outcome: &mut Outcome, address: IpAddr) {
        self.owners.entry(address).or_default().push(wish);
        outcome.addresses.push(address);
    }

    /// What the Service has and may keep: what it asks for, one of each family otherwise.
    fn keep(&mut self, wish: &'a Wish) -> Outcome {
        let mut outcome = Outcome::default();
        for address in &wish.has {
            let is_asked = match wish.asks.is_empty() && wish.nonsense.is_none() {
                true => {
                    wish.families[usize::from(address.is_ipv6())]
                        && outcome.addresses.iter().all(|other| other.is_ipv4() != address.is_ipv4())
                }
                false => wish.asks.contains(address),
            };
            if is_asked && self.pools_with(wish, *address) && self.rival(wish, *address).is_none() {
                self.take(wish, &mut outcome, *address);
            }
        }
        outcome
    }

    fn as_asked(&mut self, wish: &'a Wish, outcome: &mut Outcome) {
        outcome.refusals.extend(wish.nonsense.iter().cloned().map(Refusal::NoAddress));
        for address in &wish.asks {
            if outcome.addresses.contains(address) {
                continue;
            }
            if !self.pools_with(wish, *address) {
                outcome.refusals.push(Refusal::NotInPool(*address));
            } else if let Some((owner, why)) = self.rival(wish, *address) {
                outcome.refusals.push(Refusal::Taken(*address, owner.service.clone(), why));
            } else {
                self.take(wish, outcome, *address);
            }
        }
    }

    fn any(&mut self, wish: &'a Wish, outcome: &mut Outcome) {
        for (is_ipv4, family) in [(true, "IPv4"), (false, "IPv6")] {
            let has = outcome.addresses.iter().any(|address| address.is_ipv4() == is_ipv4);
            if has || !wish.families[usize::from(!is_ipv4)] {
                continue;
            }
            match self.free(wish, is_ipv4, family) {
                Ok(address) => self.take(wish, outcome, address),
                Err(refusal) => outcome.refusals.push(refusal),
            }
        }
        outcome.addresses.sort();
    }

    /// An address that can be shared first, then one of nobody.
    fn free(&self, wish: &Wish, is_ipv4: bool, family: &'static str) -> Result<IpAddr, Refusal> {
        let is_open = |pool: &&Pool| {
            !pool.is_disabled && !self.overlapping.contains_key(&pool.name) && wish.pools.contains(&pool.name)
        };
        let pools: Vec<&Pool> = self.pools.iter().filter(is_open).collect();
        let ranges =
            || pools.iter().flat_map(|pool| &pool.ranges).filter(|range| range.first.is_ipv4() == is_ipv4);
        if ranges().next().is_none() {
            return Err(Refusal::NoPool(family));
        }
        if wish.sharing_key.is_some() {
            let shared = self.owners.keys().find(|address| {
                ranges().any(|range| range.contains(**address)) && self.rival(wish, **address).is_none()
            });
            if let Some(address) = shared {
                return Ok(*address);
            }
        }
        let is_free =
            |address: &IpAddr| !self.owners.contains_key(address) && !self.reserved.contains(address);
        let free = ranges().find_map(|range| range.addresses().find(is_free));
        free.ok_or_else(|| Refusal::Exhausted(family, pools.iter().map(|pool| pool.name.clone()).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn pool(name: &str, cidrs: &[&str]) -> Pool {
        let ranges = cidrs.iter().map(|cidr| Range::of(cidr.parse().expect("a CIDR"), false)).collect();
        Pool { name: name.to_owned(), ranges, is_disabled: false }
    }

    fn wish(name: &str) -> Wish {
        Wish {
            service: ("shop".to_owned(), name.to_owned()),
            families: [true, false],
            pools: ["a".to_owned(), "b".to_owned()].into(),
            ports: [("TCP".to_owned(), 80)].into(),
            ..Wish::default()
        }
    }

    fn sharing(name: &str, port: u16) -> Wish {
        Wish { sharing_key: Some("k".to_owned()), ports: [("TCP".to_owned(), port)].into(), ..wish(name) }
    }

    fn given(pools: &[Pool], wishes: &[Wish]) -> Vec<String> {
        let text = |outcome: &Outcome| {
            let addresses = outcome.addresses.iter().map(ToString::to_string);
            addresses.chain(outcome.refusals.iter().map(ToString::to_string)).collect::<Vec<_>>().join(", ")
        };
        give(pools, wishes, &BTreeSet::new()).iter().map(text).collect()
    }

    #[test]
    fn a_service_keeps_what_it_has_and_new_ones_get_what_is_free() {
        let pools = [pool("a", &["192.0.2.0/31", "2001:db8::/127"])];
        let both = Wish { families: [true, true], ..wish("b") };
        let keeps = Wish { has: vec![ip("192.0.2.1")], ..wish("z") };
        assert_eq!(given(&pools, &[both.clone(), keeps.clone()]), ["192.0.2.0, 2001:db8::", "192.0.2.1"]);
        let full = "every IPv4 address of the pools a is in use";
        assert_eq!(given(&pools, &[both, keeps, wish("c")])[2], full);
        // What it has is in no pool of its any more.
        let moved = Wish { has: vec![ip("198.51.100.7")], ..wish("d") };
        assert_eq!(given(&pools, &[moved]), ["192.0.2.0"]);
        let of_none = Wish { pools: BTreeSet::new(), has: vec![ip("192.0.2.1")], ..wish("e") };
        assert_eq!(
            given(&pools, &[of_none]),
            ["no load-balancer pool with IPv4 addresses is for this Service"]
        );
    }

    #[test]
    fn who_asks_gets_that_address_or_a_reason() {
        let pools = [pool("a", &["192.0.2.0/30"])];
        let asks = |name: &str, address: &str| Wish { asks: vec![ip(address)], ..wish(name) };
        assert_eq!(
            given(
                &pools,
                &[wish("any"), asks("b", "192.0.2.0"), asks("c", "192.0.2.0"), asks("d", "203.0.113.1")]
            ),
            [
                "192.0.2.1",
                "192.0.2.0",
                "192.0.2.0 is Service shop/b's, and cannot be shared: one of the two has no sharing key",
                "203.0.113.1 is in no load-balancer pool that is for this Service",
            ]
        );
        // Who has it goes before who asks, however young.
        let has = Wish { has: vec![ip("192.0.2.2")], ..wish("z") };
        assert!(given(&pools, &[asks("b", "192.0.2.2"), has])[0].contains("is Service shop/z's"));
        // Who asks for another one now lets go of what it had.
        let changes = Wish { has: vec![ip("192.0.2.1")], ..asks("e", "192.0.2.3") };
        assert_eq!(given(&pools, &[changes]), ["192.0.2.3"]);
    }

    #[test]
    fn one_key_shares_one_address_where_the_ports_differ() {
        let pools = [pool("a", &["192.0.2.0/30"])];
        assert_eq!(
            given(&pools, &[sharing("a", 80), sharing("b", 81), sharing("c", 80), wish("d")]),
            ["192.0.2.0", "192.0.2.0", "192.0.2.1", "192.0.2.2"]
        );
        let elsewhere = Wish { service: ("other".to_owned(), "b".to_owned()), ..sharing("b", 81) };
        assert_eq!(given(&pools, &[sharing("a", 80), elsewhere.clone()])[1], "192.0.2.1");
        let lets = |wish: Wish, with: &str| Wish { shares_with: [with.to_owned()].into(), ..wish };
        assert_eq!(given(&pools, &[lets(sharing("a", 80), "other"), elsewhere.clone()])[1], "192.0.2.1");
        assert_eq!(given(&pools, &[lets(sharing("a", 80), "other"), lets(elsewhere, "*")])[1], "192.0.2.0");
        let local = Wish { local_selector: Some(BTreeMap::new()), ..sharing("b", 81) };
        assert_eq!(given(&pools, &[sharing("a", 80), local])[1], "192.0.2.1");
    }

    #[test]
    fn a_pool_that_overlaps_an_earlier_one_or_is_disabled_gives_nothing_new() {
        let pools = [pool("a", &["192.0.2.0/32"]), pool("b", &["192.0.2.0/30"])];
        assert_eq!(overlapping(&pools), [("b".to_owned(), "a".to_owned())].into());
        let keeps = Wish { has: vec![ip("192.0.2.3")], ..wish("z") };
        let full = "every IPv4 address of the pools a is in use";
        assert_eq!(given(&pools, &[keeps, wish("a"), wish("b")]), ["192.0.2.3", "192.0.2.0", full]);
        let disabled = [Pool { is_disabled: true, ..pool("a", &["192.0.2.0/30"]) }];
        let none = "no load-balancer pool with IPv4 addresses is for this Service";
        assert_eq!(given(&disabled, &[wish("a")]), [none]);
    }

    #[test]
    fn ranges_keep_their_ends_free_where_they_are_told_to() {
        let range = |cidr: &str, free| {
            let Range { first, last } = Range::of(cidr.parse().expect("a CIDR"), free);
            format!("{first}-{last}")
        };
        assert_eq!(range("192.0.2.0/30", true), "192.0.2.1-192.0.2.2");
        assert_eq!(range("192.0.2.0/31", true), "192.0.2.0-192.0.2.1");
        assert_eq!(range("192.0.2.0/30", false), "192.0.2.0-192.0.2.3");
        assert!(Range::new(ip("192.0.2.2"), ip("192.0.2.1")).is_err());
        assert!(Range::new(ip("192.0.2.2"), ip("2001:db8::")).is_err());
        let reserved = BTreeSet::from([ip("192.0.2.0")]);
        let outcome = give(&[pool("a", &["192.0.2.0/31"])], &[wish("a")], &reserved);
        assert_eq!(outcome[0].addresses, [ip("192.0.2.1")]);
    }

    proptest::proptest! {
        /// Nobody has an address twice who may not share, nobody gets what is in no pool of its, and what was given stays.
        #[test]
        fn what_is_given_is_nobody_elses_and_stays(
            steps in proptest::collection::vec((0..4_u8, 0..3_u8, 0..4_u16, proptest::bool::ANY), 1..12)
        ) {
            let pools = [pool("a", &["192.0.2.0/30"])];
            let mut wishes = Vec::new();
            for (n, (asks, key, port, may)) in steps.into_iter().enumerate() {
                let mut wish = sharing(&format!("s{n:02}"), 80 + port);
                wish.sharing_key = (key > 0).then(|| key.to_string());
                wish.asks = if asks == 3 { vec![ip("192.0.2.2")] } else { vec![] };
                if !may { wish.pools.clear(); }
                wishes.push(wish);
            }
            let first = give(&pools, &wishes, &BTreeSet::new());
            for (n, one) in first.iter().enumerate() {
                for address in &one.addresses {
                    proptest::prop_assert!(pools[0].ranges[0].contains(*address) && !wishes[n].pools.is_empty());
                    for (m, other) in first.iter().enumerate().skip(n + 1) {
                        let shares = other.addresses.contains(address);
                        proptest::prop_assert!(!shares || obstacle(&wishes[n], &wishes[m]).is_none());
                    }
                }
            }
            for (wish, outcome) in wishes.iter_mut().zip(&first) { wish.has.clone_from(&outcome.addresses); }
            let addresses = |outcomes: Vec<Outcome>| outcomes.into_iter().map(|one| one.addresses).collect::<Vec<_>>();
            proptest::prop_assert_eq!(addresses(give(&pools, &wishes, &BTreeSet::new())), addresses(first));
        }
    }
}
