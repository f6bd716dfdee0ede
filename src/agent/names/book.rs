//! What pods were told: names, their addresses, and until when these count. Bounded on every side that a pod or
//! a server chooses; what was heard longest ago goes first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::EndpointId;
use crate::policy::Told;

/// What is kept at most, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Addresses of one name, as one pod was told it.
    pub of_name: usize,
    /// Addresses of all names of one pod.
    pub of_endpoint: usize,
    /// Addresses of all names of all pods.
    pub of_all: usize,
    /// A shorter TTL counts as this one, in seconds.
    pub ttl_min_s: u64,
    /// New addresses of one pod in a minute. Each may take a number of an identity, and these must last for longer
    /// than any connection or record has them.
    pub of_minute: usize,
    /// The same of all pods.
    pub of_minute_all: usize,
}

/// A longer TTL counts as this one: a week, as RFC 8767 has it.
const TTL_MAX_S: u64 = 604_800;
/// An address that a connection runs to is kept for so long before that is looked at again.
const KEPT_FOR_S: u64 = 30;

/// One address of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    /// Seconds since the machine started.
    until_s: u64,
    /// Raised with every answer.
    heard: u64,
}

/// The names of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct OfEndpoint {
    /// The pod's attachment: another one with the same number was told nothing.
    owner: String,
    names: BTreeMap<Arc<str>, BTreeMap<IpAddr, Row>>,
    /// How many addresses there are.
    #[serde(skip)]
    count: usize,
    /// When which names were heard, oldest first; a name that was heard again later is there more than once.
    #[serde(skip)]
    ages: VecDeque<(u64, Arc<str>)>,
    #[serde(skip)]
    taken: Taken,
}

/// How many new addresses there were in a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Taken {
    minute: u64,
    count: usize,
}

impl Taken {
    /// How many more there may be.
    fn left(&mut self, now_s: u64, most: usize) -> usize {
        // An answer that is read late is of this minute.
        if self.minute < now_s / 60 {
            *self = Self { minute: now_s / 60, count: 0 };
        }
        most.saturating_sub(self.count)
    }
}

impl OfEndpoint {
    /// Counts again.
    fn index(&mut self) {
        self.count = self.names.values().map(BTreeMap::len).sum();
        let ages =
            self.names.iter().flat_map(|(name, rows)| rows.values().map(|row| (row.heard, name.clone())));
        self.ages = ages.collect::<BTreeSet<_>>().into_iter().collect();
    }

    /// A name was heard, and has so many addresses more.
    fn heard(&mut self, heard: u64, name: &Arc<str>, more: usize) {
        self.count += more;
        self.ages.push_back((heard, name.clone()));
        if self.ages.len() > 2 * self.count + 64 {
            self.index();
        }
    }

    /// Takes at most so many addresses of a name that were heard then, the first of them.
    fn take(&mut self, heard: u64, name: &Arc<str>, most: usize) -> usize {
        let Some(rows) = self.names.get_mut(name) else { return 0 };
        let old = rows.iter().filter(|(_, row)| row.heard == heard);
        let old: Vec<IpAddr> = old.map(|(address, _)| *address).take(most).collect();
        for address in &old {
            rows.remove(address);
        }
        if rows.is_empty() {
            self.names.remove(name);
        }
        self.count -= old.len();
        old.len()
    }
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Saved")]
pub struct Book {
    of: BTreeMap<EndpointId, OfEndpoint>,
    heard: u64,
    /// Addresses that went because there was no room.
    #[serde(skip)]
    pub evicted: u64,
    #[serde(skip)]
    taken: Taken,
    #[serde(skip)]
    count: usize,
}

/// What a file has.
#[derive(Deserialize)]
struct Saved {
    of: BTreeMap<EndpointId, OfEndpoint>,
    heard: u64,
}

impl From<Saved> for Book {
    fn from(saved: Saved) -> Self {
        let mut book = Self { of: saved.of, heard: saved.heard, ..Self::default() };
        for of in book.of.values_mut() {
            of.index();
            book.count += of.count;
        }
        book
    }
}

/// An address of a name, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Who was told it.
    pub endpoint: EndpointId,
    /// The name.
    pub name: Arc<str>,
    /// The address.
    pub address: IpAddr,
    /// How long it counts yet; 0: a connection runs to it, or it goes soon.
    pub seconds_left: u64,
}

impl Book {
    /// Takes in an answer that `owner` gets; gives the names whose addresses changed.
    pub fn hear(
        &mut self,
        (endpoint, owner): (EndpointId, &str),
        name: &Arc<str>,
        (addresses, ttl_s): (&[IpAddr], u32),
        now_s: u64,
        bounds: &Bounds,
    ) -> BTreeSet<Told> {
        let mut touched = BTreeSet::new();
        if self.of.get(&endpoint).is_some_and(|known| known.owner != owner) {
            touched.extend(self.forget(endpoint));
        }
        self.heard += 1;
        let until_s = now_s + u64::from(ttl_s).clamp(bounds.ttl_min_s, TTL_MAX_S.max(bounds.ttl_min_s));
        let of_endpoint = self.of.entry(endpoint).or_default();
        owner.clone_into(&mut of_endpoint.owner);
        let rows = of_endpoint.names.entry(name.clone()).or_default();
        let left = of_endpoint.taken.left(now_s, bounds.of_minute);
        let left = left.min(self.taken.left(now_s, bounds.of_minute_all));
        let mut new = 0;
        let before = rows.len();
        for address in addresses.iter().take(bounds.of_name) {
            if new == left && !rows.contains_key(address) {
                self.evicted += 1;
                continue;
            }
            let row = rows.entry(*address).or_insert_with(|| {
                new += 1;
                touched.insert((endpoint, name.clone()));
                Row { until_s, heard: 0 }
            });
            *row = Row { until_s: until_s.max(row.until_s), heard: self.heard };
        }
        of_endpoint.taken.count += new;
        self.taken.count += new;
        if rows.is_empty() {
            of_endpoint.names.remove(name);
            return touched;
        }
        let more = rows.len() - before;
        of_endpoint.heard(self.heard, name, more);
        self.count += more;
        self.evicted += (addresses.len().saturating_sub(bounds.of_name)) as u64;
        touched.extend(self.make_room(endpoint, name, bounds));
        touched
    }

    /// Lets go what was heard longest ago: of the name, of the pod, and then of the pod that has most.
    fn make_room(&mut self, endpoint: EndpointId, name: &Arc<str>, bounds: &Bounds) -> BTreeSet<Told> {
        let mut touched = self.evict_of_name(endpoint, name, bounds.of_name);
        touched.extend(self.evict(endpoint, bounds.of_endpoint));
        while self.count > bounds.of_all {
            let most = self.of.iter().map(|(endpoint, of)| (of.count, *endpoint)).max();
            let Some((count, most)) = most.filter(|(count, _)| *count > 0) else { break };
            touched.extend(self.evict(most, count - (self.count - bounds.of_all).min(count)));
        }
        touched
    }

    /// Leaves so many addresses of a name.
    fn evict_of_name(&mut self, endpoint: EndpointId, name: &Arc<str>, room: usize) -> BTreeSet<Told> {
        let mut touched = BTreeSet::new();
        let Some(of) = self.of.get_mut(&endpoint) else { return touched };
        let Some(rows) = of.names.get(name).filter(|rows| rows.len() > room) else { return touched };
        let mut excess = rows.len() - room;
        let ages: BTreeSet<u64> = rows.values().map(|row| row.heard).collect();
        for heard in ages {
            if excess == 0 {
                break;
            }
            let taken = of.take(heard, name, excess);
            excess -= taken;
            self.count -= taken;
            self.evicted += taken as u64;
            touched.insert((endpoint, name.clone()));
        }
        touched
    }

    /// Leaves so many addresses of a pod.
    fn evict(&mut self, endpoint: EndpointId, room: usize) -> BTreeSet<Told> {
        let mut touched = BTreeSet::new();
        let Some(of) = self.of.get_mut(&endpoint) else { return touched };
        while of.count > room {
            let Some((heard, name)) = of.ages.pop_front() else { break };
            let excess = of.count - room;
            let taken = of.take(heard, &name, excess);
            if taken == 0 {
                continue;
            }
            self.count -= taken;
            self.evicted += taken as u64;
            touched.insert((endpoint, name.clone()));
            if taken == excess {
                // There may be more of that time.
                of.ages.push_front((heard, name));
            }
        }
        touched
    }

    /// The addresses that have passed their time.
    pub fn expired(&self, now_s: u64) -> BTreeSet<(EndpointId, IpAddr)> {
        let lines = self.lines(now_s).filter(|line| line.seconds_left == 0);
        lines.map(|line| (line.endpoint, line.address)).collect()
    }

    /// Lets go what has passed its time, but for those that connections run to.
    pub fn expire(&mut self, now_s: u64, running: &BTreeSet<(EndpointId, IpAddr)>) -> BTreeSet<Told> {
        let mut touched = BTreeSet::new();
        for (endpoint, of) in &mut self.of {
            for (name, rows) in &mut of.names {
                let before = rows.len();
                rows.retain(|address, row| {
                    let is_running = row.until_s <= now_s && running.contains(&(*endpoint, *address));
                    if is_running {
                        row.until_s = now_s + KEPT_FOR_S;
                    }
                    row.until_s > now_s
                });
                if rows.len() != before {
                    of.count -= before - rows.len();
                    self.count -= before - rows.len();
                    touched.insert((*endpoint, name.clone()));
                }
            }
            of.names.retain(|_, rows| !rows.is_empty());
        }
        self.of.retain(|_, of| !of.names.is_empty());
        touched
    }

    /// Lets go the names of pods that `is_there` denies.
    pub fn retain(&mut self, is_there: impl Fn(EndpointId, &str) -> bool) -> BTreeSet<Told> {
        let gone = self.of.iter().filter(|(endpoint, of)| !is_there(**endpoint, &of.owner));
        let gone: Vec<EndpointId> = gone.map(|(endpoint, _)| *endpoint).collect();
        gone.into_iter().flat_map(|endpoint| self.forget(endpoint)).collect()
    }

    fn forget(&mut self, endpoint: EndpointId) -> Vec<Told> {
        let of = self.of.remove(&endpoint).unwrap_or_default();
        self.count -= of.count;
        of.names.into_keys().map(|name| (endpoint, name)).collect()
    }

    /// The addresses of a name, as a pod was told them.
    pub fn addresses(&self, (endpoint, name): &Told) -> Option<Arc<[IpAddr]>> {
        Some(self.of.get(endpoint)?.names.get(name)?.keys().copied().collect())
    }

    /// All names.
    pub fn told(&self) -> impl Iterator<Item = Told> {
        self.of.iter().flat_map(|(endpoint, of)| of.names.keys().map(|name| (*endpoint, name.clone())))
    }

    /// Every address.
    pub fn lines(&self, now_s: u64) -> impl Iterator<Item = Line> {
        self.of.iter().flat_map(move |(endpoint, of)| {
            of.names.iter().flat_map(move |(name, rows)| {
                rows.iter().map(move |(address, row)| Line {
                    endpoint: *endpoint,
                    name: name.clone(),
                    address: *address,
                    seconds_left: row.until_s.saturating_sub(now_s),
                })
            })
        })
    }

    /// How many addresses there are.
    pub fn count(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: (EndpointId, &str) = (EndpointId(1), "one");
    const TWO: (EndpointId, &str) = (EndpointId(2), "two");
    const BOUNDS: Bounds = Bounds {
        of_name: 4,
        of_endpoint: 6,
        of_all: 8,
        ttl_min_s: 10,
        of_minute: usize::MAX,
        of_minute_all: usize::MAX,
    };

    fn addresses(numbers: impl IntoIterator<Item = u8>) -> Vec<IpAddr> {
        numbers.into_iter().map(|number| IpAddr::from([192, 0, 2, number])).collect()
    }

    fn hear(
        book: &mut Book,
        who: (EndpointId, &str),
        name: &str,
        numbers: &[u8],
        ttl_s: u32,
        now_s: u64,
    ) -> usize {
        let addresses = addresses(numbers.iter().copied());
        book.hear(who, &Arc::from(name), (&addresses, ttl_s), now_s, &BOUNDS).len()
    }

    fn of(book: &Book, who: (EndpointId, &str), name: &str) -> Vec<IpAddr> {
        book.addresses(&(who.0, Arc::from(name))).map(|all| all.to_vec()).unwrap_or_default()
    }

    #[test]
    fn addresses_count_for_their_ttl_and_no_less_than_the_least() {
        let mut book = Book::default();
        assert_eq!(hear(&mut book, ONE, "a.test", &[1, 2], 100, 0), 1);
        assert_eq!(hear(&mut book, ONE, "b.test", &[3], 0, 0), 1);
        assert_eq!(hear(&mut book, ONE, "a.test", &[1], 100, 50), 0, "a longer time changes no address");
        assert!(book.expired(9).is_empty());
        assert_eq!(book.expire(10, &book.expired(10).clone()).len(), 0, "a connection runs there");
        assert_eq!(of(&book, ONE, "b.test").len(), 1);
        assert_eq!(book.expire(10 + KEPT_FOR_S, &BTreeSet::new()).len(), 1);
        assert!(of(&book, ONE, "b.test").is_empty());
        book.expire(100, &BTreeSet::new());
        assert_eq!(of(&book, ONE, "a.test"), addresses([1]));
        hear(&mut book, ONE, "c.test", &[9], u32::MAX, 0);
        assert!(book.lines(0).all(|line| line.seconds_left <= TTL_MAX_S));
    }

    #[test]
    fn nobody_takes_more_than_its_share_and_the_last_answer_stays() {
        let mut book = Book::default();
        hear(&mut book, ONE, "a.test", &[1, 2, 3], 1000, 0);
        hear(&mut book, ONE, "a.test", &[4, 5], 1, 0);
        assert_eq!(of(&book, ONE, "a.test").len(), 4);
        assert!(of(&book, ONE, "a.test").contains(&addresses([5])[0]), "the last answer is there");
        hear(&mut book, ONE, "a.test", &(10..200).collect::<Vec<_>>(), 1, 0);
        assert_eq!(of(&book, ONE, "a.test"), addresses(10..14));
        for name in ["b.test", "c.test", "d.test"] {
            hear(&mut book, ONE, name, &[20, 21], 60, 0);
        }
        assert_eq!(book.count(), 6);
        assert_eq!(of(&book, ONE, "d.test").len(), 2);
        hear(&mut book, TWO, "a.test", &[30, 31, 32, 33], 60, 0);
        assert_eq!((book.count(), of(&book, TWO, "a.test").len()), (8, 4), "who has most makes room");
        assert!(book.evicted > 180);
    }

    #[test]
    fn new_addresses_of_a_minute_are_bounded_and_known_ones_are_not() {
        let bounds =
            Bounds { of_name: 100, of_endpoint: 100, of_all: 100, of_minute: 5, of_minute_all: 8, ..BOUNDS };
        let mut book = Book::default();
        let mut told = |who: (EndpointId, &str), numbers: std::ops::Range<u8>, now_s| {
            book.hear(who, &Arc::from("a.test"), (&addresses(numbers), 600), now_s, &bounds);
            (of(&book, who, "a.test").len(), book.evicted)
        };
        assert_eq!(told(ONE, 0..3, 0), (3, 0));
        assert_eq!(told(ONE, 0..7, 30), (5, 2));
        assert_eq!(told(TWO, 0..7, 59), (3, 6), "all pods together");
        assert_eq!(told(TWO, 0..3, 59), (3, 6), "what is known takes nothing");
        assert_eq!(told(ONE, 0..7, 60), (7, 6), "another minute");
    }

    #[test]
    fn counts_are_what_is_there_and_the_oldest_goes_first() {
        let mut book = Book::default();
        let is_counted = |book: &Book| {
            let rows = book.lines(0).count();
            let of: usize = book.of.values().map(|of| of.count).sum();
            let ages: usize = book.of.values().map(|of| of.ages.len()).sum();
            assert!((book.count(), of) == (rows, rows) && ages <= 2 * rows + 2 * 64 + 2, "{rows} {ages}");
        };
        for round in 0..2000_u64 {
            let who = if round % 5 == 0 { TWO } else { ONE };
            let name = format!("n{}.test", round % 7);
            let first = (round % 200) as u8;
            hear(&mut book, who, &name, &[first, first + 1, 250], 60, round);
            if round % 50 == 0 {
                book.expire(round, &BTreeSet::new());
                book = serde_json::from_str(&serde_json::to_string(&book).expect("JSON")).expect("the book");
            }
            is_counted(&book);
        }
        book.forget(ONE.0);
        is_counted(&book);
        let mut book = Book::default();
        for number in 0..4 {
            hear(&mut book, ONE, &format!("n{number}.test"), &[number, number + 10], 60, 0);
        }
        assert!(of(&book, ONE, "n0.test").is_empty() && of(&book, ONE, "n1.test").len() == 2);
        hear(&mut book, ONE, "n1.test", &[1, 11], 60, 0);
        hear(&mut book, ONE, "n4.test", &[4, 14], 60, 0);
        assert!(of(&book, ONE, "n2.test").is_empty() && of(&book, ONE, "n1.test").len() == 2, "heard again");
    }

    #[test]
    fn a_number_that_is_another_pods_was_told_nothing() {
        let mut book = Book::default();
        hear(&mut book, ONE, "a.test", &[1], 60, 0);
        let text = serde_json::to_string(&book).expect("JSON");
        let mut again: Book = serde_json::from_str(&text).expect("it is read again");
        assert_eq!(of(&again, ONE, "a.test"), addresses([1]));
        assert_eq!(again.retain(|_, owner| owner == "another").len(), 1);
        assert_eq!(hear(&mut book, (ONE.0, "another"), "b.test", &[2], 60, 0), 2);
        assert!(of(&book, ONE, "a.test").is_empty());
    }
}
