//! When an identity that nobody uses is marked, and when it is deleted: what the operator and the
//! agents that share a directory of manifests have in common. `operator/identities.rs` has the argument
//! why nothing that a pod has is deleted.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Passes begin at most and at least this far from one another, else four in a grace time.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What one collector remembers of its passes. `V` is one state of one identity: another mark is another one.
pub struct Unused<V> {
    grace: Duration,
    /// Unused and without a mark in the last pass.
    unmarked: HashSet<V>,
    /// Unused and marked, since this collector first saw it so.
    marked: HashMap<V, Instant>,
}

/// What a pass came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Due<V> {
    /// Unused in two passes.
    pub mark: Vec<V>,
    /// Unused and marked for the grace time.
    pub delete: Vec<V>,
}

impl<V: Eq + Hash + Clone> Unused<V> {
    /// Knows nothing yet.
    pub fn new(grace: Duration) -> Self {
        Self { grace, unmarked: HashSet::new(), marked: HashMap::new() }
    }

    /// What is due when exactly `unused` are, each with whether it is marked.
    pub fn pass(&mut self, unused: Vec<(V, bool)>, now: Instant) -> Due<V> {
        let (marked, unmarked): (Vec<_>, Vec<_>) = unused.into_iter().partition(|(_, is_marked)| *is_marked);
        let mut before = std::mem::take(&mut self.marked);
        let mut delete = Vec::new();
        for (version, _) in marked {
            let since = before.remove(&version).unwrap_or(now);
            if now.saturating_duration_since(since) >= self.grace {
                delete.push(version);
            } else {
                self.marked.insert(version, since);
            }
        }
        let unmarked: HashSet<V> = unmarked.into_iter().map(|(version, _)| version).collect();
        let mark = unmarked.intersection(&self.unmarked).cloned().collect();
        self.unmarked = unmarked;
        Due { mark, delete }
    }

    /// How long to wait for the next pass.
    pub fn pause(&self) -> Duration {
        (self.grace / 4).clamp(PAUSE_MIN, PAUSE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(4);

    /// What each pass, a second apart, makes of what is unused: `!` marks, `-` deletes.
    fn passes(rows: &[&[(&'static str, bool)]]) -> Vec<String> {
        let (mut unused, start) = (Unused::new(GRACE), Instant::now());
        let pass = |(second, row): (usize, &&[(&'static str, bool)])| -> String {
            let due = unused.pass(row.to_vec(), start + Duration::from_secs(second as u64));
            let marked = due.mark.iter().map(|version| format!("!{version}"));
            marked.chain(due.delete.iter().map(|version| format!("-{version}"))).collect()
        };
        rows.iter().enumerate().map(pass).collect()
    }

    #[test]
    fn what_is_unused_in_two_passes_is_marked() {
        let (a, none): (&[_], &[_]) = (&[("a", false)], &[]);
        assert_eq!(passes(&[a, none, a, a]), ["", "", "", "!a"]);
    }

    #[test]
    fn what_is_marked_for_the_grace_time_is_deleted() {
        let a: &[_] = &[("a", true)];
        assert_eq!(passes(&[a, a, a, a, a, a]), ["", "", "", "", "-a", ""]);
    }

    #[test]
    fn the_grace_time_begins_anew_with_another_mark_and_after_a_use() {
        let (a, b, none): (&[_], &[_], &[_]) = (&[("a", true)], &[("b", true)], &[]);
        assert_eq!(passes(&[a, a, a, b, b, b, b]), [""; 7]);
        assert_eq!(passes(&[a, a, a, none, a, a, a]), [""; 7]);
    }

    #[test]
    fn passes_are_a_quarter_of_the_grace_time_apart_within_bounds() {
        for (grace, pause) in [(0.0, 0.2), (4.0, 1.0), (900.0, 60.0)] {
            let unused = Unused::<()>::new(Duration::from_secs_f64(grace));
            assert_eq!(unused.pause(), Duration::from_secs_f64(pause));
        }
    }
}
