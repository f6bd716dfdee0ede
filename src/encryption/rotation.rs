//! When keys change: what a node does next, from its own keys and what the other nodes have published.
//!
//! Keys have a generation, and all nodes go from one generation to the next together: whoever begins, the others
//! follow. A node with keys of two generations receives by both, and sends by its active one.
//!
//! ```text
//! begin   a key of the next generation is made and published
//! move    every other node can be reached by it: it is the one that this node sends by
//! drop    no other node sends by the former one: it is forgotten
//! jump    more nodes have another generation than this node's: it takes theirs
//! ```

use super::heard::Reach;
use serde::{Deserialize, Serialize};

/// The generations that a node has keys of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generations {
    /// By which it sends.
    pub active: u32,
    /// The next one, or the former one, while keys change.
    pub other: Option<u32>,
}

impl Generations {
    /// It has a key of this generation.
    pub fn has(self, generation: u32) -> bool {
        self.active == generation || self.other == Some(generation)
    }

    /// The next one, where its key has been made already.
    pub fn next(self) -> Option<u32> {
        self.other.filter(|other| Some(*other) == self.active.checked_add(1))
    }
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name.
    pub node: String,
    /// What it has published.
    pub generations: Generations,
    /// How it is with its key of this node's active generation.
    pub by_active: Reach,
    /// The same with this node's other generation.
    pub by_other: Reach,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Stay,
    /// Make a key of this generation.
    Begin(u32),
    /// Send by the next generation.
    Move,
    /// Forget the other generation.
    Drop,
    /// Have this generation alone, with a new key.
    Jump(u32),
}

/// The next step of a node. `wants`: somebody asks for new keys, or they are old.
pub fn next_step(own: Generations, others: &[Neighbour], wants: bool) -> Step {
    if let Some(generation) = better(own, others.iter().map(|other| other.generations)) {
        return Step::Jump(generation);
    }
    if own.next().is_some() {
        return if waits_for(own, others).is_none() { Step::Move } else { Step::Stay };
    }
    if let Some(other) = own.other {
        return match uses(own, others) {
            // As a jump left it that was cut in half.
            Some(_) if other > own.active && others.iter().all(|it| !it.generations.has(own.active)) => {
                Step::Move
            }
            Some(_) => Step::Stay,
            None => Step::Drop,
        };
    }
    let Some(next) = own.active.checked_add(1) else { return Step::Stay };
    let follows = others.iter().any(|other| other.generations.has(next));
    if wants || follows { Step::Begin(next) } else { Step::Stay }
}

/// The node without which this one does not move on. One that is away is not waited for.
pub fn waits_for(own: Generations, others: &[Neighbour]) -> Option<&Neighbour> {
    own.next()?;
    others.iter().find(|other| {
        let is_there = other.generations.has(own.active) && other.by_active != Reach::Away;
        is_there && other.by_other != Reach::Reached
    })
}

/// The node for which this one keeps its other generation. Not for one that is away: when it comes back, it jumps.
/// But where more nodes are away than are there, this one would have to go to them.
pub fn uses(own: Generations, others: &[Neighbour]) -> Option<&Neighbour> {
    let other = own.other?;
    let mut users = others.iter().filter(|it| it.generations.active == other);
    let without = Generations { other: None, ..own };
    if better(without, others.iter().map(|it| it.generations)).is_some() {
        return users.next();
    }
    users.find(|it| it.by_other != Reach::Away)
}

/// A generation that this node has not, and that more nodes have than its own; of two that are equal, the higher one.
///
/// While keys change, all nodes have one generation in common, and none is better. It is better for nodes that were
/// away, or are new: perhaps some of them at once, that have one in common among them.
pub fn better(own: Generations, others: impl Iterator<Item = Generations>) -> Option<u32> {
    let others: Vec<Generations> = others.collect();
    let count = |generation: u32| others.iter().chain([&own]).filter(|it| it.has(generation)).count();
    // A former key goes: it makes no generation better.
    let has = |it: &Generations, generation: u32| it.has(generation) && generation >= it.active;
    let strength = |generation: u32| others.iter().filter(|it| has(it, generation)).count();
    let senders = |generation: u32| others.iter().filter(|it| it.active == generation).count();
    let mine = std::iter::once(own.active).chain(own.other).map(count).max()?;
    let all = others.iter().flat_map(|it| std::iter::once(it.active).chain(it.other));
    let strange = all.filter(|generation| !own.has(*generation));
    let best = strange.max_by_key(|it| (strength(*it), senders(*it), *it))?;
    ((strength(best), best) > (mine, own.active)).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(active: u32, other: Option<u32>) -> Generations {
        Generations { active, other }
    }

    fn node(active: u32, other: Option<u32>) -> Neighbour {
        let (by_active, by_other) = (Reach::Reached, Reach::Unknown);
        Neighbour { node: "b".to_owned(), generations: at(active, other), by_active, by_other }
    }

    fn reached(active: u32, other: Option<u32>) -> Neighbour {
        Neighbour { by_other: Reach::Reached, ..node(active, other) }
    }

    fn away(active: u32, other: Option<u32>) -> Neighbour {
        Neighbour { by_active: Reach::Away, by_other: Reach::Away, ..node(active, other) }
    }

    fn unknown(active: u32, other: Option<u32>) -> Neighbour {
        Neighbour { by_active: Reach::Unknown, ..node(active, other) }
    }

    #[test]
    fn a_step_is_taken_when_all_others_allow_it() {
        for (own, others, wants, step) in [
            (at(3, None), vec![node(3, None)], false, Step::Stay),
            (at(3, None), vec![node(3, None)], true, Step::Begin(4)),
            (at(3, None), vec![node(3, None), node(3, Some(4))], false, Step::Begin(4)),
            (at(3, None), vec![], true, Step::Begin(4)),
            (at(3, Some(4)), vec![], false, Step::Move),
            (at(3, Some(4)), vec![reached(3, Some(4)), node(3, None)], false, Step::Stay),
            (at(3, Some(4)), vec![reached(3, Some(4)), node(3, Some(4))], false, Step::Stay),
            (at(3, Some(4)), vec![reached(3, Some(4)), reached(4, Some(3))], false, Step::Move),
            // Nothing reaches it now, so nothing is lost.
            (at(3, Some(4)), vec![away(3, None)], false, Step::Move),
            // This node has just started, and knows nothing of the other one.
            (at(3, Some(4)), vec![unknown(3, None)], false, Step::Stay),
            (at(3, Some(4)), vec![unknown(3, Some(4))], false, Step::Stay),
            // A node that is dead keeps no former key.
            (at(4, Some(3)), vec![away(3, None), reached(4, Some(3))], false, Step::Drop),
            (at(4, Some(3)), vec![unknown(3, None), reached(4, Some(3))], false, Step::Stay),
            (at(4, None), vec![away(3, None)], false, Step::Stay),
            (at(4, Some(3)), vec![away(3, None), away(3, None)], false, Step::Stay),
            // A jump that was cut in half.
            (at(0, Some(5)), vec![node(5, None), node(5, None)], false, Step::Move),
            (at(5, Some(0)), vec![node(5, None), node(5, None)], false, Step::Drop),
            // It has come meanwhile, with the next generation alone.
            (at(3, Some(4)), vec![node(4, None), reached(4, Some(3))], false, Step::Move),
            (at(4, Some(3)), vec![node(3, Some(4)), node(4, Some(3))], false, Step::Stay),
            (at(4, Some(3)), vec![node(4, None), node(4, Some(3))], true, Step::Drop),
            // A new one waits until the former one is forgotten.
            (at(4, Some(3)), vec![node(4, Some(5))], false, Step::Drop),
            (at(u32::MAX, None), vec![node(u32::MAX, None)], true, Step::Stay),
        ] {
            assert_eq!(next_step(own, &others, wants), step, "{own:?} {others:?}");
        }
    }

    #[test]
    fn a_node_takes_what_most_have() {
        for (own, others, step) in [
            (at(0, None), vec![node(7, None)], Step::Jump(7)),
            (at(7, None), vec![node(0, None)], Step::Stay),
            (at(0, None), vec![node(7, Some(8)), node(8, Some(7)), node(7, None)], Step::Jump(7)),
            // What one node says of itself moves no others.
            (at(3, None), vec![node(3, None), node(u32::MAX, None)], Step::Stay),
            (at(u32::MAX, None), vec![node(3, None), node(3, None)], Step::Jump(3)),
            (at(3, Some(4)), vec![node(6, None), node(6, None)], Step::Jump(6)),
            // Two that come at once.
            (at(0, None), vec![node(0, None), node(5, None), node(5, None)], Step::Jump(5)),
            (at(0, None), vec![node(0, None), node(5, None)], Step::Stay),
            (at(5, None), vec![node(0, None), node(0, None)], Step::Jump(0)),
            // One that the others send by.
            (at(0, None), vec![node(7, Some(8)), node(7, Some(8))], Step::Jump(7)),
            // A number's last value is no end.
            (at(0, None), vec![node(u32::MAX, None), node(u32::MAX, None)], Step::Jump(u32::MAX)),
        ] {
            assert_eq!(next_step(own, &others, false), step, "{own:?} {others:?}");
        }
    }

    /// Nodes that see one another's news late, in any order, and begin wherever they like: whoever sends, the
    /// receiver has the key, and all end with the same one.
    #[test]
    fn no_node_sends_by_a_key_that_another_one_has_not() {
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let count = random.usize(2..6);
            let mut own = vec![at(0, None); count];
            let mut seen = vec![own.clone(); count];
            let mut wants = vec![false; count];
            wants[random.usize(0..count)] = true;
            for round in 0..4000 {
                let node = random.usize(0..count);
                let (of, by) = (random.usize(0..count), random.usize(0..count));
                // Late news; what is new of one node comes in order.
                seen[by][of] = own[of];
                if round < 2000 && random.u32(0..50) == 0 {
                    wants[random.usize(0..count)] = true;
                }
                let others: Vec<Neighbour> = (0..count)
                    .filter(|other| *other != node)
                    .map(|other| {
                        let generations = seen[node][other];
                        // A handshake needs both: each has seen the other's key.
                        let next = own[node].next();
                        let is_reached = next.is_some_and(|next| {
                            generations.has(next) && own[other].has(next) && seen[other][node].has(next)
                        });
                        let by_other = if is_reached { Reach::Reached } else { Reach::Unknown };
                        let by_active = Reach::Reached;
                        Neighbour { node: other.to_string(), generations, by_active, by_other }
                    })
                    .collect();
                let at = &mut own[node];
                match next_step(*at, &others, wants[node]) {
                    Step::Stay => {}
                    Step::Begin(next) => (at.other, wants[node]) = (Some(next), false),
                    Step::Move => (at.active, at.other) = (at.other.unwrap_or(0), Some(at.active)),
                    Step::Drop => at.other = None,
                    Step::Jump(_) => panic!("they always have one in common"),
                }
                for sender in &own {
                    assert!(own.iter().all(|receiver| receiver.has(sender.active)), "seed {seed}: {own:?}");
                }
            }
            assert!(own.iter().all(|it| *it == own[0] && it.other.is_none()), "seed {seed}: {own:?}");
            assert!(own[0].active > 0);
        }
    }

    /// A cluster of which some nodes are dead, and newcomers that come at once.
    struct Cluster {
        own: Vec<Generations>,
        seen: Vec<Vec<Generations>>,
        is_dead: Vec<bool>,
    }

    impl Cluster {
        /// How the kernel of `node` knows the key of another one. What is dead is known to be so when it is late.
        fn reach(&self, node: usize, other: usize, generation: Option<u32>, is_late: bool) -> Reach {
            let Some(generation) = generation else { return Reach::Unknown };
            let is_peer = self.seen[node][other].has(generation);
            if self.is_dead[other] {
                return if is_late && is_peer { Reach::Away } else { Reach::Unknown };
            }
            let knows = self.own[other].has(generation) && self.seen[other][node].has(generation);
            if is_peer && knows { Reach::Reached } else { Reach::Unknown }
        }

        fn step(&mut self, node: usize, wants: bool, is_late: bool) -> Step {
            let own = self.own[node];
            let others: Vec<Neighbour> = (0..self.own.len())
                .filter(|other| *other != node)
                .map(|other| Neighbour {
                    node: other.to_string(),
                    generations: self.seen[node][other],
                    by_active: self.reach(node, other, Some(own.active), is_late),
                    by_other: self.reach(node, other, own.other, is_late),
                })
                .collect();
            let step = next_step(own, &others, wants);
            let now = &mut self.own[node];
            match step {
                Step::Stay => {}
                Step::Begin(next) => now.other = Some(next),
                Step::Move => *now = Generations { active: now.other.unwrap_or(0), other: Some(now.active) },
                Step::Drop => now.other = None,
                Step::Jump(generation) => *now = Generations { active: generation, other: None },
            }
            step
        }
    }

    /// One to three newcomers at once, any distance, in the middle of a change or not; perhaps half a jump of an
    /// agent that was killed, and dead nodes: all that live end with one generation. While newcomers are fewer, the
    /// others lose nothing of what goes between them.
    #[test]
    fn nodes_that_come_at_once_end_with_what_the_others_have() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (old, new, dead) = (random.usize(1..6), random.usize(0..4), random.usize(0..3));
            let distance = random.u32(1..7);
            let mut own = vec![at(distance, None); old];
            own.extend(vec![at(0, None); new]);
            if new > 0 && random.bool() {
                own[old] = at(0, Some(distance));
            }
            own.extend(vec![at(distance, None); dead]);
            let count = own.len();
            let is_dead = (0..count).map(|node| node >= old + new).collect();
            let mut cluster = Cluster { seen: vec![own.clone(); count], own, is_dead };
            let mut wants = vec![false; count];
            wants[random.usize(0..old)] = random.bool();
            for round in 0..12_000 {
                let is_late = round > 4000;
                let (of, by) = (random.usize(0..count), random.usize(0..count));
                cluster.seen[by][of] = cluster.own[of];
                let node = random.usize(0..old + new);
                if let Step::Begin(_) = cluster.step(node, wants[node], is_late) {
                    wants[node] = false;
                }
                let members = &cluster.own[..old];
                let is_served = |sender: &Generations| members.iter().all(|it| it.has(sender.active));
                if new < old && dead < old {
                    assert!(members.iter().all(is_served), "seed {seed}: {:?}", cluster.own);
                }
            }
            let living = &cluster.own[..old + new];
            // More dead nodes than others: their generation is kept, so that one of them can come back.
            let is_done = |it: &Generations| it.other.is_none() || dead > living.len();
            let is_one = living.iter().all(|it| it.active == living[0].active && is_done(it));
            assert!(is_one, "seed {seed}: {old} {new} {dead} {:?}", cluster.own);
        }
    }
}
