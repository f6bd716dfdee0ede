//! Rows: what is decided about a packet's protocol and port, as the LPM of `policy_rules` holds it.
//!
//! The longest match is not what decides between rules: a deny of all TCP counts before an
//! allow of port 80. So rules are weighed here, for every match that any of them names, and
//! the map gets what came of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::layer7::Parts;
use crate::model::l7::L7Rules;
use crate::model::{Action, IpProtocol, L7Set, NamedPort, Origins, PolicyRef, Tier};

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

/// How strong a rule is: the least one decides. Of equal rules a deny does, then a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order {
    /// The policy's tier.
    pub tier: Tier,
    /// The policy's priority.
    pub priority: u32,
    /// The rule's place in its policy, where that matters.
    pub position: u32,
}

/// What one rule, or a default, says of one match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Of which packets.
    pub matched: Match,
    /// How strong it is.
    pub order: Order,
    /// What it says.
    pub action: Action,
    /// Who says so; nobody where it is a default.
    pub origins: Origins,
    /// A denial of it is only reported.
    pub is_audit: bool,
    /// What of it is allowed to be said; `None`: anything. Of a pass: what is shown where nothing else judges it.
    pub l7: Option<Arc<L7Rules>>,
}

/// What is decided: `Allow` or `Deny`, and who says so.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decision {
    /// `Allow` or `Deny`.
    pub action: Action,
    /// Who says so.
    pub origins: Origins,
    /// They would deny what is allowed, and only report that.
    pub is_audit: bool,
    /// By what the proxy judges what is allowed.
    pub l7: Option<Arc<L7Set>>,
}

/// The decisions of a class; what none matches is denied.
pub type Rows = BTreeMap<Match, Decision>;

impl Order {
    /// What no rule of the tier has decided.
    pub fn default_of(tier: Tier) -> Self {
        Self { tier, priority: u32::MAX, position: u32::MAX }
    }
}

impl Match {
    /// Every packet.
    pub const ANY: Self = Self { protocol: None, port: 0, port_prefix_length: 0 };

    /// Every port of a protocol.
    pub fn protocol(protocol: IpProtocol) -> Self {
        Self { protocol: Some(protocol.0), port: 0, port_prefix_length: 0 }
    }

    /// One port.
    pub fn port(port: NamedPort) -> Self {
        Self { protocol: Some(port.protocol.number()), port: port.port, port_prefix_length: 16 }
    }

    /// The ports `from` to `to`, both included, in as few prefixes as there can be.
    pub fn range(protocol: IpProtocol, from: u16, to: u16) -> impl Iterator<Item = Self> {
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
                protocol: Some(protocol.0),
                port,
                port_prefix_length: u8::try_from(16 - bits).expect("at most 16"),
            })
        })
    }

    /// The matches other than this that hold all that this one holds, the narrowest first.
    fn wider(self) -> impl Iterator<Item = Self> {
        let shorter = (0..self.port_prefix_length).rev().map(move |length| self.cut(length));
        shorter.chain((self != Self::ANY).then_some(Self::ANY))
    }

    fn cut(self, length: u8) -> Self {
        let mask = u16::MAX.checked_shl(16 - u32::from(length)).unwrap_or(0);
        Self { port: self.port & mask, port_prefix_length: length, ..self }
    }

    /// The other half of the match that is one bit shorter.
    fn sibling(self) -> Option<Self> {
        let bit = 1_u16.checked_shl(16 - u32::from(self.port_prefix_length))?;
        (self.port_prefix_length > 0).then_some(Self { port: self.port ^ bit, ..self })
    }
}

/// The claims on a match: those that count, and with those that are only reported.
#[derive(Clone, Debug, Default)]
struct Both {
    counting: Weighed,
    all: Weighed,
    /// Without anything that a policy under audit says.
    without: Weighed,
    /// What is shown.
    shown: Option<Arc<L7Rules>>,
}

impl Both {
    fn add(&mut self, claim: &Claim) {
        if claim.action == Action::Pass && claim.l7.is_some() {
            self.shown.clone_from(&claim.l7);
            return;
        }
        let parts = Parts::of(claim.l7.as_ref());
        self.all.add(claim.order, claim.action, &claim.origins, &parts);
        if !(claim.is_audit && claim.action == Action::Deny) {
            self.counting.add(claim.order, claim.action, &claim.origins, &parts);
        }
        if !claim.is_audit {
            self.without.add(claim.order, claim.action, &claim.origins, &parts);
        }
    }

    fn add_all(&mut self, parent: &Self) {
        self.all.add_all(&parent.all);
        self.counting.add_all(&parent.counting);
        self.without.add_all(&parent.without);
        self.shown = self.shown.take().or_else(|| parent.shown.clone());
    }

    /// What counts; where that allows what all together deny, these are named.
    fn decide(&self) -> Decision {
        let (mut counting, all) = (self.counting.decide(), self.all.decide());
        let without = self.without.decide();
        // What is allowed anyway, a policy under audit only shows.
        if let (Some(set), Action::Allow, None) = (&mut counting.l7, without.action, &without.l7) {
            Arc::make_mut(set).visibility_only = true;
        }
        if let (Action::Allow, None, Some(rules)) = (counting.action, &counting.l7, &self.shown) {
            let (rules, origins) = (L7Rules::clone(rules), counting.origins.clone());
            counting.l7 = Some(Arc::new(L7Set { rules, origins, visibility_only: true }));
        }
        match (counting.action, all.action) {
            (Action::Allow, Action::Deny) => {
                Decision { action: Action::Allow, origins: all.origins, is_audit: true, l7: counting.l7 }
            }
            _ => counting,
        }
    }
}

/// The strongest of the claims on a match, in each tier.
#[derive(Clone, Debug, Default)]
struct Weighed([Option<(Order, Action, Origins, Parts)>; 3]);

impl Weighed {
    fn add(&mut self, order: Order, action: Action, origins: &Origins, parts: &Parts) {
        let slot = &mut self.0[order.tier as usize];
        match slot {
            Some((known, known_action, all, known_parts)) if (*known, *known_action) == (order, action) => {
                known_parts.add(parts);
                if origins.iter().any(|origin| !all.contains(origin)) {
                    let mut union: Vec<PolicyRef> = all.iter().chain(&**origins).cloned().collect();
                    union.sort_unstable();
                    union.dedup();
                    *all = union.into();
                }
            }
            Some((known, known_action, ..)) if (*known, *known_action) < (order, action) => {}
            _ => *slot = Some((order, action, origins.clone(), parts.clone())),
        }
    }

    fn add_all(&mut self, other: &Self) {
        for (order, action, origins, parts) in other.0.iter().flatten() {
            self.add(*order, *action, origins, parts);
        }
    }

    /// The first tier that does not pass it on; what all pass on is allowed.
    fn decide(&self) -> Decision {
        let decisive = self.0.iter().flatten().find(|(_, action, ..)| *action != Action::Pass);
        let Some((_, action, origins, parts)) = decisive else {
            return Decision {
                action: Action::Allow,
                origins: Origins::default(),
                is_audit: false,
                l7: None,
            };
        };
        let (action, l7) = match action {
            Action::Allow => parts.decide(origins),
            action => (*action, None),
        };
        Decision { action, origins: origins.clone(), is_audit: false, l7 }
    }
}

/// Weighs claims: the rows of which the longest match says what the strongest claim on a packet says.
/// With no claim at all everything is allowed.
pub fn flatten<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> Rows {
    let mut own: BTreeMap<Match, Both> = BTreeMap::from([(Match::ANY, Both::default())]);
    for claim in claims {
        own.entry(claim.matched).or_default().add(claim);
    }
    // A match is weighed with all that is wider. These come before it in this order.
    let mut matches: Vec<Match> = own.keys().copied().collect();
    matches.sort_by_key(|matched| (matched.protocol.is_some(), matched.port_prefix_length));
    let mut rows = Rows::new();
    for matched in &matches {
        let parent = matched.wider().find_map(|wider| own.get(&wider).cloned());
        let Some(weighed) = own.get_mut(matched) else { continue };
        if let Some(parent) = parent {
            weighed.add_all(&parent);
        }
        rows.insert(*matched, weighed.decide());
    }
    without_contained(&mut rows);
    merge(&mut rows);
    without_contained(&mut rows);
    rows
}

/// Drops the rows that say what the row says that they hide. Of what is allowed it is enough that one of
/// the policies is named that allow it; of what is denied, it is those that deny it.
fn without_contained(rows: &mut Rows) {
    let mut matches: Vec<Match> = rows.keys().copied().collect();
    matches.sort_by_key(|matched| (matched.protocol.is_some(), matched.port_prefix_length));
    for matched in matches {
        let hidden = matched.wider().find_map(|wider| rows.get(&wider));
        let is_contained = match (hidden, &rows[&matched]) {
            (Some(hidden), row) if row.action == Action::Allow && !row.is_audit => {
                hidden.action == Action::Allow && !hidden.is_audit && hidden.l7 == row.l7
            }
            (Some(hidden), row) => hidden == row,
            // What has no row is denied, and nobody says so.
            (None, row) => row.action == Action::Deny && row.origins.is_empty(),
        };
        if is_contained {
            rows.remove(&matched);
        }
    }
}

/// Puts neighbouring halves that say the same together, the longest first: 46,000 single ports are as many
/// rows as the range of them. What the whole said before, both halves have hidden.
fn merge(rows: &mut Rows) {
    if rows.len() < 2 {
        return;
    }
    for length in (1..=16).rev() {
        let of_length = rows.keys().filter(|matched| matched.port_prefix_length == length);
        for matched in of_length.copied().collect::<Vec<_>>() {
            let Some(sibling) = matched.sibling() else { continue };
            if rows.get(&matched).is_some_and(|row| rows.get(&sibling) == Some(row)) {
                rows.remove(&sibling);
                if let Some(row) = rows.remove(&matched) {
                    rows.insert(matched.cut(length - 1), row);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;

    const TCP_PROTOCOL: IpProtocol = IpProtocol(6);

    fn range(from: u16, to: u16) -> Vec<(u16, u8)> {
        Match::range(TCP_PROTOCOL, from, to).map(|row| (row.port, row.port_prefix_length)).collect()
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
            let rows: Vec<Match> = Match::range(IpProtocol(17), from, to).collect();
            for port in 0..=u16::MAX {
                let count = rows
                    .iter()
                    .filter(|row| u32::from(row.port ^ port) >> (16 - row.port_prefix_length) == 0)
                    .count();
                assert_eq!(count, usize::from((from..=to).contains(&port)), "{from}-{to}, {port}");
            }
        }
    }

    fn order(tier: Tier, priority: u32) -> Order {
        Order { tier, priority, position: 0 }
    }

    const EQUAL: Order = Order { tier: Tier::Namespaced, priority: 0, position: 0 };

    fn policy(name: &str) -> PolicyRef {
        PolicyRef {
            kind: crate::model::PolicyKind::NetworkPolicy,
            namespace: None,
            name: name.into(),
            spec: 0,
        }
    }

    fn claim(matched: Match, order: Order, action: Action, name: &str) -> Claim {
        let origins = Some(name).filter(|name| !name.is_empty()).map(policy).into_iter().collect();
        Claim { matched, order, action, origins, is_audit: false, l7: None }
    }

    fn deny_by_default() -> Claim {
        claim(Match::ANY, Order::default_of(Tier::Namespaced), Action::Deny, "")
    }

    fn tcp(port: u16) -> Match {
        Match::port(NamedPort { protocol: Protocol::Tcp, port })
    }

    const TCP: Match = Match { protocol: Some(6), port: 0, port_prefix_length: 0 };

    /// `protocol/port/length action who`.
    fn shown(claims: &[Claim]) -> Vec<String> {
        let row = |(matched, row): (&Match, &Decision)| {
            let names: Vec<_> = row.origins.iter().map(|origin| &*origin.name).collect();
            let Match { protocol, port, port_prefix_length: length } = matched;
            let at = protocol.map_or("any".to_owned(), |protocol| format!("{protocol}/{port}/{length}"));
            format!("{at} {:?} {}", row.action, names.join(","))
        };
        flatten(claims).iter().map(row).collect()
    }

    #[test]
    fn a_longer_allow_does_not_beat_a_shorter_deny() {
        use Action::{Allow, Deny};
        let claims = [
            deny_by_default(),
            claim(tcp(80), EQUAL, Allow, "web"),
            claim(Match::ANY, EQUAL, Allow, "all"),
            claim(TCP, EQUAL, Deny, "no"),
        ];
        assert_eq!(shown(&claims), ["any Allow all", "6/0/0 Deny no"]);
        let claims = [deny_by_default(), claim(TCP, EQUAL, Allow, "all"), claim(tcp(80), EQUAL, Deny, "no")];
        assert_eq!(shown(&claims), ["6/0/0 Allow all", "6/80/16 Deny no"]);
    }

    #[test]
    fn tiers_and_priorities_come_before_the_length_of_a_match() {
        use Action::{Allow, Deny, Pass};
        let claims = [
            claim(TCP, order(Tier::Admin, 5), Deny, "five"),
            claim(tcp(80), order(Tier::Admin, 9), Allow, "nine"),
            claim(tcp(81), order(Tier::Admin, 1), Allow, "one"),
            claim(tcp(82), order(Tier::Admin, 1), Pass, "one"),
            claim(tcp(82), EQUAL, Allow, "web"),
            claim(tcp(83), order(Tier::Admin, 1), Pass, "one"),
            deny_by_default(),
            claim(Match::ANY, order(Tier::Baseline, 0), Allow, "base"),
        ];
        assert_eq!(
            shown(&claims),
            ["6/0/0 Deny five", "6/81/16 Allow one", "6/82/16 Allow web", "6/83/16 Deny "]
        );
        // Nobody isolates: what no rule decides is allowed.
        let claims = [claim(tcp(80), EQUAL, Deny, "no")];
        assert_eq!(shown(&claims), ["any Allow ", "6/80/16 Deny no"]);
        assert_eq!(shown(&[]), ["any Allow "]);
    }

    #[test]
    fn all_that_say_so_are_named_and_contained_rows_go() {
        use Action::Allow;
        let mut claims = vec![
            deny_by_default(),
            claim(TCP, EQUAL, Allow, "two"),
            claim(TCP, EQUAL, Allow, "one"),
            claim(tcp(80), EQUAL, Allow, "one"),
            claim(Match::port(NamedPort { protocol: Protocol::Udp, port: 53 }), EQUAL, Allow, "two"),
        ];
        assert_eq!(shown(&claims), ["6/0/0 Allow one,two", "17/53/16 Allow two"]);
        claims.push(claim(Match::ANY, EQUAL, Allow, "two"));
        assert_eq!(shown(&claims), ["any Allow two"]);
    }

    #[test]
    fn neighbouring_ports_are_one_row() {
        let mut claims: Vec<Claim> =
            (1..=46_000).map(|port| claim(tcp(port), EQUAL, Action::Allow, "many")).collect();
        claims.push(deny_by_default());
        assert_eq!(flatten(&claims).len(), Match::range(TCP_PROTOCOL, 1, 46_000).count());
        claims.extend((0..=u16::MAX).map(|port| claim(tcp(port), EQUAL, Action::Allow, "more")));
        let claims: Vec<Claim> = claims
            .into_iter()
            .filter(|claim| claim.origins.first().is_none_or(|it| *it.name == *"more"))
            .collect();
        assert_eq!(shown(&claims), ["6/0/0 Allow more"]);
    }

    #[test]
    fn what_is_only_reported_stands_in_nobodys_way() {
        use Action::{Allow, Deny};
        let audit = |claim: Claim| Claim { is_audit: true, ..claim };
        let reported = |claims: &[Claim]| -> Vec<String> {
            let row = |(_, row): (&Match, &Decision)| format!("{:?} {}", row.action, row.is_audit);
            flatten(claims).iter().map(row).collect()
        };
        // A deny of an audited policy is let through, unless somebody else denies it.
        let no = audit(claim(TCP, EQUAL, Deny, "no"));
        assert_eq!(reported(std::slice::from_ref(&no)), ["Allow false", "Allow true"]);
        assert_eq!(reported(&[no.clone(), deny_by_default()]), [""; 0]);
        assert_eq!(
            reported(&[no.clone(), deny_by_default(), claim(TCP, EQUAL, Allow, "web")]),
            ["Allow true"]
        );
        let strict = claim(Match::ANY, Order::default_of(Tier::Baseline), Deny, "base");
        assert_eq!(reported(&[no, strict]), ["Deny false"]);
        // What the isolation of an audited policy would deny.
        let isolating = audit(Claim { origins: Origins::from([policy("web")]), ..deny_by_default() });
        assert_eq!(
            reported(&[isolating, claim(tcp(80), EQUAL, Allow, "web")]),
            ["Allow true", "Allow false"]
        );
    }

    /// Few matches, tiers and priorities, so that claims meet often.
    fn claims() -> impl proptest::strategy::Strategy<Value = Vec<Claim>> {
        use proptest::prelude::*;
        let matched = prop_oneof![
            1 => Just(Match::ANY),
            2 => prop::sample::select(vec![IpProtocol(6), IpProtocol(17)]).prop_map(Match::protocol),
            6 => (0..8_u16, 13..=16_u8).prop_map(|(port, length)| tcp(port).cut(length)),
        ];
        let tier = prop::sample::select(vec![Tier::Admin, Tier::Namespaced, Tier::Baseline]);
        let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Pass]);
        let claim =
            (matched, tier, 0..3_u32, action, 0..3_u8).prop_map(|(matched, tier, priority, action, name)| {
                let priority = if tier.is_ordered() { priority } else { 0 };
                claim(matched, order(tier, priority), action, &name.to_string())
            });
        let default = prop::sample::select(vec![Tier::Admin, Tier::Namespaced, Tier::Baseline])
            .prop_map(|tier| Claim { order: Order::default_of(tier), ..deny_by_default() });
        prop::collection::vec(prop_oneof![8 => claim, 1 => default], 0..12)
    }

    /// The tiers read literally, for one packet.
    fn literally(claims: &[Claim], protocol: u8, port: u16) -> Action {
        for tier in [Tier::Admin, Tier::Namespaced, Tier::Baseline] {
            let meets = |claim: &&Claim| {
                let Match { protocol: wanted, port: at, port_prefix_length: length } = claim.matched;
                claim.order.tier == tier
                    && wanted.is_none_or(|wanted| wanted == protocol)
                    && (u32::from(at) ^ u32::from(port)) >> (16 - length) == 0
            };
            let mut met: Vec<&Claim> = claims.iter().filter(meets).collect();
            met.sort_by_key(|claim| claim.order.priority);
            let Some(first) = met.first() else { continue };
            let equal: Vec<Action> = met
                .iter()
                .filter(|claim| claim.order.priority == first.order.priority)
                .map(|claim| claim.action)
                .collect();
            if equal.contains(&Action::Deny) {
                return Action::Deny;
            }
            if !equal.contains(&Action::Pass) {
                return Action::Allow;
            }
        }
        Action::Allow
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { cases: 2000, ..Default::default() })]

        #[test]
        fn the_longest_match_says_what_the_tiers_say(claims in claims()) {
            let rows = flatten(&claims);
            for protocol in [1, 6, 17] {
                for port in 0..10_u16 {
                    let exact = Match { protocol: Some(protocol), port, port_prefix_length: 16 };
                    let found = std::iter::once(exact).chain(exact.wider()).find_map(|at| rows.get(&at));
                    let action = found.map_or(Action::Deny, |row| row.action);
                    proptest::prop_assert_eq!(action, literally(&claims, protocol, port), "{}/{}", protocol, port);
                }
            }
        }
    }
}
