//! Rules of names as one automaton, which reads a name once, byte by byte, whatever number of rules there are.
//! `bpf/abi/l7.h` says how the kernel reads it.

use std::collections::{BTreeSet, HashMap};

use super::NamePattern;

/// Kinds of bytes of names: letters, digits, hyphen, underscore, between two labels, any other.
pub const CLASSES: usize = 40;
const DOT: u8 = 38;
const OTHER: u8 = 39;
/// The most states of one automaton. Rules that need more are judged by the proxy.
pub const STATES_MAX: usize = 4096;
/// The most steps of work on one automaton: a tenth of a second.
pub const WORK_MAX: usize = 2_000_000;

/// One state: the next one by the kind of the next byte, and whether a name may end here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Numbers of states.
    pub next: [u16; CLASSES],
    /// A name that ends here is one of those.
    pub accepts: bool,
}

/// The names that rules mean. Out of state 0 no name comes any more; state 1 is the beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Automaton(Vec<State>);

/// A part of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Part {
    /// This kind of byte.
    Byte(u8),
    /// Any number of bytes that patterns have, within one label.
    Star,
    /// The beginning of a label that stands before the pattern's own; its rest is the node before.
    More,
    /// The rest of such a label; its beginning is the node behind.
    MoreRest,
    /// The name is one of those, whatever comes.
    Everything,
    /// The pattern has ended.
    End,
}

impl Automaton {
    /// Of patterns; `None`: it would have too many states, or take too much work.
    pub fn new(patterns: &[NamePattern]) -> Option<Self> {
        Self::counted(patterns).0
    }

    /// The same, and how many steps of work it was.
    pub fn counted(patterns: &[NamePattern]) -> (Option<Self>, usize) {
        let mut nodes = Nodes::default();
        let begins: Vec<usize> = patterns.iter().map(|pattern| nodes.add(pattern)).collect();
        let mut made = Made { nodes, numbers: HashMap::new(), sets: vec![Vec::new()], work: 0 };
        // The beginning is no other state: the empty name is not one of a pattern that begins with a star.
        made.sets.push(made.closure(&begins));
        (made.states().map(Self), made.work)
    }

    /// Its states, in the order of their numbers.
    pub fn states(&self) -> &[State] {
        &self.0
    }

    /// True if the labels of a name, in lower case, lead to the end.
    pub fn matches(&self, labels: &[&[u8]]) -> bool {
        let mut state = 1_u16;
        for (place, label) in labels.iter().enumerate() {
            if place > 0 {
                state = self.0[usize::from(state)].next[usize::from(DOT)];
            }
            for byte in *label {
                state = self.0[usize::from(state)].next[usize::from(class_of(*byte))];
            }
        }
        self.0[usize::from(state)].accepts
    }
}

/// Parts of all patterns, each with the part behind it. Equal ends are one.
#[derive(Default)]
struct Nodes {
    all: Vec<(Part, usize)>,
    known: HashMap<(Part, usize), usize>,
}

impl Nodes {
    /// Where a pattern begins.
    fn add(&mut self, pattern: &NamePattern) -> usize {
        let mut at = self.node(Part::End, 0);
        let NamePattern::Labels { has_more, labels } = pattern else {
            return self.node(Part::Everything, at);
        };
        for (place, label) in labels.iter().enumerate().rev() {
            for byte in label.iter().rev() {
                let part = if *byte == b'*' { Part::Star } else { Part::Byte(class_of(*byte)) };
                at = self.node(part, at);
            }
            if place > 0 {
                at = self.node(Part::Byte(DOT), at);
            }
        }
        if !*has_more {
            return at;
        }
        let rest = self.node(Part::MoreRest, at);
        if rest + 1 == self.all.len() {
            self.node(Part::More, rest);
        }
        rest + 1
    }

    fn node(&mut self, part: Part, behind: usize) -> usize {
        let Self { all, known } = self;
        *known.entry((part, behind)).or_insert_with(|| {
            all.push((part, behind));
            all.len() - 1
        })
    }
}

/// Sets of places in patterns: each is a state.
struct Made {
    nodes: Nodes,
    numbers: HashMap<Vec<usize>, u16>,
    sets: Vec<Vec<usize>>,
    work: usize,
}

impl Made {
    /// Every state that can be reached.
    fn states(&mut self) -> Option<Vec<State>> {
        let mut states = vec![State { next: [0; CLASSES], accepts: false }];
        while let Some(set) = self.sets.get(states.len()).cloned() {
            let is_beginning = states.len() == 1;
            let ends = |at: &usize| match self.nodes.all[*at].0 {
                Part::Everything => true,
                Part::End => !is_beginning,
                _ => false,
            };
            let accepts = set.iter().any(ends);
            states.push(State { next: self.next(&set)?, accepts });
        }
        Some(states)
    }

    /// Where each class of bytes leads to.
    fn next(&mut self, set: &[usize]) -> Option<[u16; CLASSES]> {
        let mut is_named = [false; CLASSES];
        for at in set {
            if let Part::Byte(class) = self.nodes.all[*at].0 {
                is_named[usize::from(class)] = true;
            }
        }
        let mut next = [0; CLASSES];
        // Bytes that no pattern has at this place all lead to the same state.
        let mut of_others = None;
        for (class, next) in (0..).zip(&mut next) {
            let is_other = class < DOT && !is_named[usize::from(class)];
            *next = match of_others.filter(|_| is_other) {
                Some(number) => number,
                None => self.number(set, class)?,
            };
            if is_other {
                of_others = Some(*next);
            }
        }
        Some(next)
    }

    /// The number of the state that a class of bytes leads to.
    fn number(&mut self, set: &[usize], class: u8) -> Option<u16> {
        self.work += set.len() + 1;
        if self.work > WORK_MAX {
            return None;
        }
        let after: Vec<usize> = set.iter().flat_map(|at| self.step(*at, class)).collect();
        if after.is_empty() {
            return Some(0);
        }
        let set = self.closure(&after);
        if let Some(number) = self.numbers.get(&set) {
            return Some(*number);
        }
        if self.sets.len() >= STATES_MAX {
            return None;
        }
        let number = u16::try_from(self.sets.len()).ok()?;
        self.numbers.insert(set.clone(), number);
        self.sets.push(set);
        Some(number)
    }

    fn step(&self, at: usize, class: u8) -> impl Iterator<Item = usize> + use<> {
        let is_plain = class < DOT;
        let (part, behind) = self.nodes.all[at];
        let [first, second] = match part {
            Part::Byte(byte) if byte == class => [Some(behind), None],
            Part::Star if is_plain => [Some(at), None],
            Part::More if is_plain => [Some(behind), None],
            Part::MoreRest if is_plain => [Some(at), None],
            Part::MoreRest if class == DOT => [Some(at + 1), Some(behind)],
            Part::Everything => [Some(at), None],
            _ => [None, None],
        };
        first.into_iter().chain(second)
    }

    /// A star may stand for nothing.
    fn closure(&self, places: &[usize]) -> Vec<usize> {
        let mut all = BTreeSet::new();
        for place in places {
            let mut at = *place;
            while all.insert(at) && self.nodes.all[at].0 == Part::Star {
                at = self.nodes.all[at].1;
            }
        }
        all.into_iter().collect()
    }
}

/// The kind of a byte of a label, in either case.
fn class_of(byte: u8) -> u8 {
    match byte.to_ascii_lowercase() {
        letter @ b'a'..=b'z' => letter - b'a',
        digit @ b'0'..=b'9' => 26 + digit - b'0',
        b'-' => 36,
        b'_' => 37,
        _ => OTHER,
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    fn of(patterns: &[&str]) -> Option<Automaton> {
        Automaton::new(&patterns.iter().map(|pattern| NamePattern::new(pattern)).collect::<Vec<_>>())
    }

    #[test]
    fn what_would_grow_too_large_is_the_proxys() {
        let many: Vec<String> = (0..200).map(|number| format!("host-{number}.of.a.long.name.test")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(of(&many).is_some_and(|automaton| automaton.states().len() < STATES_MAX));
        let stars: Vec<String> = (0..16)
            .map(|letter| format!("*{}*{}*", char::from(b'a' + letter), char::from(b'b' + letter)))
            .collect();
        assert!(of(&stars.iter().map(String::as_str).collect::<Vec<_>>()).is_none());
        let wide = ["a*"; 1].map(|pattern| pattern.repeat(31));
        assert!(of(&[&wide[0]]).is_some());
        assert_eq!(of(&[]).map(|none| none.matches(&[b"a"])), Some(false));
    }

    #[test]
    fn a_byte_that_names_do_not_have_is_no_separator() {
        let automaton = of(&["*.test", "**.more.test"]).expect("it is small");
        assert!(automaton.matches(&[b"a", b"test"]));
        assert!(!automaton.matches(&[b"a.test"]), "a dot within a label");
        assert!(!automaton.matches(&[b"a\0b", b"test"]));
        assert!(!automaton.matches(&[b"a b", b"c", b"more", b"test"]));
        assert!(!automaton.matches(&[]), "the root");
        assert!(of(&["*"]).is_some_and(|any| any.matches(&[]) && any.matches(&[b"\xff"])));
    }

    fn label(letters: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
        vec(select(letters), 1..5)
    }

    fn labels() -> impl Strategy<Value = String> {
        vec(label(b"ab*-"), 1..4).prop_map(|labels| {
            let text = |label: Vec<u8>| String::from_utf8_lossy(&label).into_owned();
            labels.into_iter().map(text).collect::<Vec<_>>().join(".")
        })
    }

    fn pattern() -> impl Strategy<Value = String> {
        prop_oneof![
            8 => labels(),
            3 => labels().prop_map(|labels| format!("**.{labels}")),
            1 => Just("*".to_owned()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: cases(), ..ProptestConfig::default() })]

        #[test]
        fn it_means_what_the_patterns_mean(
            patterns in vec(pattern(), 0..5),
            names in vec(vec(label(b"aaabb-_.\x00"), 0..5), 1..20),
        ) {
            let patterns: Vec<NamePattern> = patterns.iter().map(|pattern| NamePattern::new(pattern)).collect();
            let Some(automaton) = Automaton::new(&patterns) else { return Ok(()) };
            for name in names {
                let labels: Vec<&[u8]> = name.iter().map(Vec::as_slice).collect();
                let expected = patterns.iter().any(|pattern| pattern.matches(&labels));
                prop_assert_eq!(automaton.matches(&labels), expected, "{:?} {:?}", patterns, labels);
            }
        }
    }

    /// More of them where the environment says so: `PROPTEST_CASES`.
    fn cases() -> u32 {
        std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(256)
    }
}
