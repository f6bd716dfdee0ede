//! Rules of layer 7 on one match: what several policies allow together.
//!
//! A deny counts before every allow. Of what is allowed with and without rules of layer 7 the proxy gets all:
//! it judges by the rules of all policies together, and denies nothing where one of them allows everything
//! that is said there.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::l7::L7Rules;
use crate::model::{Action, L7Set, Origins};

/// What is said of one match by claims that are equally strong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    rules: BTreeSet<Arc<L7Rules>>,
    /// One of them allows anything.
    has_plain: bool,
}

impl Parts {
    /// What one claim says.
    pub fn of(rules: Option<&Arc<L7Rules>>) -> Self {
        Self { rules: rules.into_iter().cloned().collect(), has_plain: rules.is_none() }
    }

    /// What another claim says besides.
    pub fn add(&mut self, other: &Self) {
        self.has_plain |= other.has_plain;
        self.rules.extend(other.rules.iter().cloned());
    }

    /// What becomes of it. Rules for several protocols on one port contradict each other: nothing passes.
    pub fn decide(&self, origins: &Origins) -> (Action, Option<Arc<L7Set>>) {
        let Some(first) = self.rules.first() else { return (Action::Allow, None) };
        let together = self.rules.iter().skip(1).try_fold(L7Rules::clone(first), |all, next| join(all, next));
        let rules = match together {
            Some(rules) => rules,
            None if self.has_plain => L7Rules::clone(first),
            None => return (Action::Deny, None),
        };
        let set = L7Set { rules, origins: origins.clone(), visibility_only: self.has_plain };
        (Action::Allow, Some(Arc::new(set)))
    }
}

/// The rules of both; `None`: they are for different protocols.
fn join(all: L7Rules, next: &L7Rules) -> Option<L7Rules> {
    fn union<T: Ord + Clone>(all: Vec<T>, next: &[T]) -> Vec<T> {
        all.into_iter().chain(next.iter().cloned()).collect::<BTreeSet<T>>().into_iter().collect()
    }
    match (all, next) {
        (L7Rules::Http(all), L7Rules::Http(next)) => Some(L7Rules::Http(union(all, next))),
        (L7Rules::Dns(all), L7Rules::Dns(next)) => Some(L7Rules::Dns(union(all, next))),
        (L7Rules::Kafka(all), L7Rules::Kafka(next)) => Some(L7Rules::Kafka(union(all, next))),
        (L7Rules::ServerNames(all), L7Rules::ServerNames(next)) => {
            Some(L7Rules::ServerNames(union(all, next)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::l7::{DnsRule, HttpRule};
    use crate::model::{IpProtocol, Tier};
    use crate::policy::rules::{Claim, Match, Order, flatten};

    fn http(method: &str) -> Option<Arc<L7Rules>> {
        Some(Arc::new(L7Rules::Http(vec![HttpRule { method: Some(method.into()), ..HttpRule::default() }])))
    }

    fn claim(matched: Match, action: Action, l7: Option<Arc<L7Rules>>) -> Claim {
        let order = Order { tier: Tier::Namespaced, priority: 0, position: 0 };
        Claim { matched, order, action, origins: Origins::default(), is_audit: false, l7 }
    }

    const TCP: Match = Match { protocol: Some(IpProtocol::TCP.0), port: 0, port_prefix_length: 0 };
    const WEB: Match = Match { port: 80, port_prefix_length: 16, ..TCP };

    /// The methods that port 80 has rules for; `None`: it has none, or is closed.
    fn on_web(claims: &[Claim]) -> (Action, Option<(Vec<String>, bool)>) {
        let rows = flatten(claims);
        let row = rows.get(&WEB).or_else(|| rows.get(&TCP)).or_else(|| rows.get(&Match::ANY));
        let Some(row) = row else { return (Action::Deny, None) };
        let methods = row.l7.as_ref().map(|set| {
            let L7Rules::Http(rules) = &set.rules else { return (Vec::new(), set.visibility_only) };
            (rules.iter().filter_map(|rule| rule.method.clone()).collect(), set.visibility_only)
        });
        (row.action, methods)
    }

    #[test]
    fn rules_of_several_policies_are_one_set() {
        let default =
            Claim { order: Order::default_of(Tier::Namespaced), ..claim(Match::ANY, Action::Deny, None) };
        let claims =
            [default.clone(), claim(WEB, Action::Allow, http("GET")), claim(WEB, Action::Allow, http("PUT"))];
        assert_eq!(on_web(&claims), (Action::Allow, Some((vec!["GET".into(), "PUT".into()], false))));
        // An allow of the whole protocol, or of the port, lets everything be said.
        for wider in [TCP, WEB, Match::ANY] {
            let claims =
                [default.clone(), claim(WEB, Action::Allow, http("GET")), claim(wider, Action::Allow, None)];
            assert_eq!(on_web(&claims), (Action::Allow, Some((vec!["GET".into()], true))));
        }
        let claims =
            [default.clone(), claim(WEB, Action::Allow, http("GET")), claim(TCP, Action::Deny, None)];
        assert_eq!(on_web(&claims), (Action::Deny, None));
        // A narrower row that asks for less is not what the wider one says.
        let claims = [default, claim(TCP, Action::Allow, None), claim(WEB, Action::Allow, http("GET"))];
        assert_eq!(flatten(&claims).len(), 2);
    }

    #[test]
    fn what_is_shown_decides_nothing() {
        let default =
            Claim { order: Order::default_of(Tier::Namespaced), ..claim(Match::ANY, Action::Deny, None) };
        let shown =
            Claim { order: Order::default_of(Tier::Baseline), ..claim(WEB, Action::Pass, http("HEAD")) };
        let all = |claims: &[&Claim]| on_web(&claims.iter().copied().cloned().collect::<Vec<Claim>>());
        let only_shown = (Action::Allow, Some((vec!["HEAD".into()], true)));
        assert_eq!(all(&[&shown]), only_shown, "without a policy");
        assert_eq!(all(&[&default, &shown]), (Action::Deny, None));
        for wider in [TCP, WEB, Match::ANY] {
            let plain = claim(wider, Action::Allow, None);
            assert_eq!(all(&[&default, &plain, &shown]), only_shown);
        }
        let judged = claim(WEB, Action::Allow, http("GET"));
        assert_eq!(all(&[&default, &judged, &shown]), (Action::Allow, Some((vec!["GET".into()], false))));
        let denied = claim(TCP, Action::Deny, None);
        assert_eq!(all(&[&denied, &shown]), (Action::Deny, None));
    }

    #[test]
    fn two_protocols_on_one_port_close_it() {
        let dns = Some(Arc::new(L7Rules::Dns(vec![DnsRule::MatchPattern("*".into())])));
        let default =
            Claim { order: Order::default_of(Tier::Namespaced), ..claim(Match::ANY, Action::Deny, None) };
        let claims = [default, claim(WEB, Action::Allow, http("GET")), claim(WEB, Action::Allow, dns)];
        assert_eq!(on_web(&claims).0, Action::Deny);
    }
}
