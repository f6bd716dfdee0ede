//! Which groups of Services this node leads. Pure: what is posted and the time in, steps out.
//!
//! A node leads a group while the group's Lease names the node, and while the node renews its own Lease. Who
//! has seen the leader's Lease unchanged for its whole duration, by its own clock, takes over. The leader
//! counts from before it sent its last renewal, and stops when two thirds of the duration are over. What it had then
//! it takes anew, by a write that names the version that it replaces: another's write may be on its way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::kube::Postings;
use crate::model::ObjectKey;
use crate::service::announced::Group;

/// Between the tries of two candidates.
const TURN: Duration = Duration::from_millis(200);
/// Candidates whose turn comes later than this all try then.
const TURNS_MAX: usize = 10;

/// All groups, by their names.
pub type Groups = BTreeMap<ObjectKey, Group>;

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// This node becomes the leader.
    Take(ObjectKey),
    /// The group has no leader then.
    GiveBack(ObjectKey),
    /// The group is no more.
    Remove(ObjectKey),
}

/// What this node remembers of it.
pub struct Election {
    node: String,
    duration: Duration,
    /// Each leader's Lease as it was last seen, and since when it is like that.
    seen: BTreeMap<String, (String, Instant)>,
    /// Since when a group has no leader that lives.
    vacant: BTreeMap<ObjectKey, Instant>,
    renewed: Option<Instant>,
    taken: BTreeSet<ObjectKey>,
}

impl Election {
    /// Nothing is known yet.
    pub fn new(node: &str, duration: Duration) -> Self {
        Self {
            node: node.to_owned(),
            duration,
            seen: BTreeMap::new(),
            vacant: BTreeMap::new(),
            renewed: None,
            taken: BTreeSet::new(),
        }
    }

    /// Learns what is posted now.
    pub fn observe(&mut self, postings: &Postings, now: Instant) {
        let holders: BTreeSet<&String> = postings.services.values().map(|posted| &posted.holder).collect();
        self.seen.retain(|node, _| holders.contains(node));
        for holder in holders {
            let version = postings.nodes.get(holder).cloned().unwrap_or_default();
            match self.seen.get(holder) {
                Some((seen, _)) if *seen == version => {}
                _ => drop(self.seen.insert(holder.clone(), (version, now))),
            }
        }
        if self.left(now).is_zero() {
            self.taken.clear();
        }
    }

    /// The node's Lease is to be renewed now.
    pub fn is_due(&self, groups: &Groups, postings: &Postings, now: Instant) -> bool {
        let is_early = self.renewed.is_some_and(|renewed| now - renewed < self.duration / 5);
        let is_wanted = |(name, group): (&ObjectKey, &Group)| {
            let holder = postings.services.get(name).map_or("", |posted| &posted.holder);
            group.candidates.contains(&*self.node) && (holder == self.node || !self.is_alive(holder, now))
        };
        !is_early && groups.iter().any(is_wanted)
    }

    /// The Lease was renewed by a request that was sent then.
    pub fn renew(&mut self, sent: Instant) {
        self.renewed = Some(sent);
    }

    /// How long this node may lead without another renewal.
    pub fn left(&self, now: Instant) -> Duration {
        let end = self.renewed.map(|renewed| renewed + self.duration * 2 / 3);
        end.map_or(Duration::ZERO, |end| end.saturating_duration_since(now))
    }

    fn is_alive(&self, node: &str, now: Instant) -> bool {
        let seen = self.seen.get(node).filter(|_| !node.is_empty());
        seen.is_some_and(|(_, since)| now - *since < self.duration)
    }

    /// What is to be written now. What is to be given back is led no more.
    pub fn steps(&mut self, groups: &Groups, postings: &Postings, now: Instant) -> Vec<Step> {
        let mut steps = Vec::new();
        let is_live = !self.left(now).is_zero();
        self.vacant.retain(|name, _| groups.contains_key(name));
        for (name, group) in groups {
            let holder = postings.services.get(name).map_or("", |posted| &posted.holder);
            let may_lead = group.candidates.contains(&*self.node);
            if holder == self.node {
                self.vacant.remove(name);
                if !may_lead {
                    self.taken.remove(name);
                    steps.push(Step::GiveBack(name.clone()));
                } else if is_live && !self.taken.contains(name) {
                    steps.push(Step::Take(name.clone()));
                }
                continue;
            }
            self.taken.remove(name);
            if self.is_alive(holder, now) {
                self.vacant.remove(name);
                continue;
            }
            let since = *self.vacant.entry(name.clone()).or_insert(now);
            if may_lead && is_live {
                let rank = group.rank(name, &self.node, |node| node != holder);
                if now - since >= TURN * rank.min(TURNS_MAX) as u32 {
                    steps.push(Step::Take(name.clone()));
                }
            }
        }
        for (name, posted) in postings.services.iter().filter(|(name, _)| !groups.contains_key(*name)) {
            self.taken.remove(name);
            if posted.holder == self.node || posted.holder.is_empty() {
                steps.push(Step::Remove(name.clone()));
            } else if is_live && !self.is_alive(&posted.holder, now) {
                steps.push(Step::Take(name.clone()));
            }
        }
        steps
    }

    /// A write was the first: this node leads.
    pub fn take(&mut self, name: &ObjectKey) {
        self.taken.insert(name.clone());
    }

    /// This node leads the group, and nobody else can.
    pub fn leads(&self, name: &ObjectKey, postings: &Postings) -> bool {
        self.taken.contains(name) && self.is_holder(name, postings)
    }

    /// This node was the last that led the group, as far as is known.
    pub fn is_holder(&self, name: &ObjectKey, postings: &Postings) -> bool {
        postings.services.get(name).is_some_and(|posted| posted.holder == self.node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::Posted;

    const DURATION: Duration = Duration::from_secs(9);

    /// Nodes that see one board, each with a clock of its own.
    struct World {
        groups: Groups,
        postings: Postings,
        nodes: Vec<Election>,
        now: Instant,
        version: u64,
    }

    impl World {
        fn new(count: usize) -> Self {
            let names: Vec<String> = (0..count).map(|number| format!("n{number}")).collect();
            let group = Group {
                candidates: names.iter().map(|name| name.as_str().into()).collect(),
                ..Group::default()
            };
            let nodes = names.iter().map(|name| Election::new(name, DURATION)).collect();
            let groups = (0..3).map(|n| (ObjectKey::new("shop", format!("s{n}")), group.clone())).collect();
            Self { groups, postings: Postings::default(), nodes, now: Instant::now(), version: 0 }
        }

        /// A round of a node that may write.
        fn round(&mut self, number: usize) {
            let (groups, now) = (&self.groups, self.now);
            let node = &mut self.nodes[number];
            node.observe(&self.postings, now);
            if node.is_due(groups, &self.postings, now) {
                self.version += 1;
                self.postings.nodes.insert(node.node.clone(), self.version.to_string());
                node.renew(now);
            }
            for step in node.steps(groups, &self.postings, now) {
                self.version += 1;
                let post =
                    |holder: &str| Posted { holder: holder.to_owned(), version: self.version.to_string() };
                match step {
                    Step::Take(name) => {
                        self.postings.services.insert(name.clone(), post(&node.node));
                        node.take(&name);
                    }
                    Step::GiveBack(name) => drop(self.postings.services.insert(name, post(""))),
                    Step::Remove(name) => drop(self.postings.services.remove(&name)),
                }
            }
        }

        /// Half-second rounds of these nodes.
        fn run(&mut self, nodes: &[usize], time: Duration) {
            let end = self.now + time;
            while self.now < end {
                self.now += Duration::from_millis(500);
                nodes.iter().for_each(|number| self.round(*number));
                self.check();
            }
        }

        /// Nobody leads what another leads, whoever is cut off.
        fn check(&self) {
            for name in self.groups.keys() {
                let leads = |node: &&Election| !node.left(self.now).is_zero() && node.taken.contains(name);
                let leaders: Vec<_> = self.nodes.iter().filter(leads).map(|node| &node.node).collect();
                assert!(leaders.len() <= 1, "{name}: {leaders:?}");
            }
        }

        fn holders(&self) -> BTreeSet<String> {
            self.postings.services.values().map(|posted| posted.holder.clone()).collect()
        }
    }

    #[test]
    fn each_group_has_one_leader_and_another_when_that_is_silent() {
        let mut world = World::new(2);
        world.run(&[0, 1], Duration::from_secs(3));
        assert_eq!(world.postings.services.len(), 3);
        let before = world.postings.services.clone();
        world.run(&[0, 1], Duration::from_secs(60));
        assert_eq!(world.postings.services, before, "nobody takes over from a leader that lives");
        world.run(&[1], DURATION + Duration::from_secs(2));
        assert_eq!(world.holders(), ["n1".to_owned()].into());
        // It comes back, and takes nothing from a leader that lives.
        world.run(&[0, 1], Duration::from_secs(30));
        assert_eq!(world.holders(), ["n1".to_owned()].into());
    }

    #[test]
    fn who_was_silent_takes_anew_what_nobody_has_taken() {
        let mut world = World::new(1);
        world.run(&[0], Duration::from_secs(3));
        let before = world.postings.services.clone();
        world.run(&[], DURATION);
        world.run(&[0], Duration::from_secs(1));
        assert_eq!(world.holders(), ["n0".to_owned()].into());
        assert!(world.postings.services.iter().all(|(name, posted)| before[name].version != posted.version));
    }

    #[test]
    fn who_may_lead_no_more_gives_back_and_the_last_takes_the_lease_away() {
        let mut world = World::new(2);
        world.run(&[0, 1], Duration::from_secs(3));
        world.groups.values_mut().for_each(|group| group.candidates = ["n1".into()].into());
        world.run(&[0, 1], Duration::from_secs(2));
        assert_eq!(world.holders(), ["n1".to_owned()].into());
        world.groups.clear();
        world.run(&[0, 1], Duration::from_secs(1));
        assert_eq!(world.postings.services.len(), 0);
    }
}
