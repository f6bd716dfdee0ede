//! When keys change: what a node does next, from its own keys and what the other nodes have published.
//!
//! Keys have a generation, and all nodes go from one generation to the next together: whoever begins, the others
//! follow. A node with keys of two generations receives by both, and sends by its active one.
//!
//! ```text
//! begin   a key of the next generation is made and published
//! move    every other node can be reached by it: it is the one that this node sends by
//! drop    no other node sends by the former one: it is forgotten
//! jump    a node that has no generation in common with any other one takes theirs
//! ```

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

    fn shares(self, other: Self) -> bool {
        self.has(other.active) || other.other.is_some_and(|generation| self.has(generation))
    }
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name.
    pub node: String,
    /// What it has published.
    pub generations: Generations,
    /// It is spoken to by the active generation.
    pub is_alive: bool,
    /// It can be reached by the next generation.
    pub is_reached: bool,
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
    /// Send by this generation, which the others have.
    Jump(u32),
}

/// The next step of a node. `wants`: somebody asks for new keys, or they are old.
pub fn next_step(own: Generations, others: &[Neighbour], wants: bool) -> Step {
    if let Some(generation) = rejoins(own, others) {
        return Step::Jump(generation);
    }
    if own.next().is_some() {
        return if waits_for(own, others).is_none() { Step::Move } else { Step::Stay };
    }
    if let Some(former) = own.other {
        let is_used = others.iter().any(|other| other.generations.active == former);
        return if is_used { Step::Stay } else { Step::Drop };
    }
    let Some(next) = own.active.checked_add(1) else { return Step::Stay };
    let follows = others.iter().any(|other| other.generations.has(next));
    if wants || follows { Step::Begin(next) } else { Step::Stay }
}

/// The node without which this one does not move on. One that nothing reaches now is not waited for.
pub fn waits_for(own: Generations, others: &[Neighbour]) -> Option<&Neighbour> {
    own.next()?;
    others.iter().find(|other| other.is_alive && other.generations.has(own.active) && !other.is_reached)
}

/// A node that was away while keys changed, or is new, takes what most others have; of two alone, the older one moves.
fn rejoins(own: Generations, others: &[Neighbour]) -> Option<u32> {
    if others.is_empty() || others.iter().any(|other| own.shares(other.generations)) {
        return None;
    }
    let count =
        |generation: u32| others.iter().filter(|other| other.generations.active == generation).count();
    let best = others.iter().map(|other| other.generations.active).max_by_key(|it| (count(*it), *it))?;
    (count(best) > 1 || best > own.active).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(active: u32, other: Option<u32>) -> Generations {
        Generations { active, other }
    }

    fn node(active: u32, other: Option<u32>) -> Neighbour {
        Neighbour { node: "b".to_owned(), generations: at(active, other), is_alive: true, is_reached: false }
    }

    fn reached(active: u32, other: Option<u32>) -> Neighbour {
        Neighbour { is_reached: true, ..node(active, other) }
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
            (at(3, Some(4)), vec![Neighbour { is_alive: false, ..node(3, None) }], false, Step::Move),
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
    fn a_node_without_anything_in_common_takes_what_most_have() {
        for (own, others, step) in [
            (at(0, None), vec![node(7, None)], Step::Jump(7)),
            (at(7, None), vec![node(0, None)], Step::Stay),
            (at(0, None), vec![node(7, Some(8)), node(8, Some(7)), node(7, None)], Step::Jump(7)),
            // What one node says of itself moves no others.
            (at(3, None), vec![node(3, None), node(u32::MAX, None)], Step::Stay),
            (at(u32::MAX, None), vec![node(3, None), node(3, None)], Step::Jump(3)),
            (at(3, Some(4)), vec![node(6, None), node(6, None)], Step::Jump(6)),
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
                        Neighbour { node: other.to_string(), generations, is_alive: true, is_reached }
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
}
