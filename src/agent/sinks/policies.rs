//! Compiled policies: `policy_rules` and `policy_peers`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Drift, Limits, Problem, Refusal, Round, Sink};
use crate::agent::compute::Desired;
use crate::agent::proxy::Proxy;
use crate::datapath::{DnsWriter, PolicyWriter, RuleSets};
use crate::model::l7::{DnsRule, L7Rules, RuleSetId};
use crate::model::{CompiledPolicy, PolicyId};

type Compiled = BTreeMap<PolicyId, Arc<CompiledPolicy>>;
type Names = BTreeMap<RuleSetId, Arc<[DnsRule]>>;

/// Writes each policy by itself. One that has too many rows, or does not fit, costs its own endpoints.
pub struct Policies {
    writer: PolicyWriter,
    limits: Limits,
    /// What the map did not take at the last try, why, and how many tries in a row that were.
    tried: BTreeMap<PolicyId, (String, u32)>,
    /// What `delete` may take as desired.
    fitting: Compiled,
    layer7: Layer7,
    /// The rules of names that the kernel judges by.
    dns: DnsWriter,
    /// What `write` gave it.
    judged: Names,
}

/// So long a policy waits until the proxy has its rules. After that it counts: what it leaves to the proxy is closed.
const PROXY_WITHIN: Duration = Duration::from_secs(2);

/// Which rule sets policies leave to the proxy.
struct Layer7 {
    sets: RuleSets,
    proxy: Proxy,
    of_policy: BTreeMap<PolicyId, (Arc<CompiledPolicy>, BTreeSet<RuleSetId>)>,
    waiting: BTreeMap<PolicyId, Instant>,
    /// The rules of names of every number in `of_policy`; a number means the same as long as a policy has it.
    rules: BTreeMap<RuleSetId, Option<Arc<[DnsRule]>>>,
}

impl Layer7 {
    /// The rules of names by which policies that `counts` deny; others show only.
    fn names(&self, counts: impl Fn(&PolicyId) -> bool) -> Names {
        let counting = self.of_policy.iter().filter(|(id, _)| counts(id));
        let sets: BTreeSet<RuleSetId> = counting.flat_map(|(_, (_, sets))| sets).copied().collect();
        sets.into_iter().filter_map(|id| Some((id, self.rules.get(&id)?.clone()?))).collect()
    }

    /// Reads the rules of numbers that are new, and forgets those that no policy has.
    fn read_rules(&mut self) {
        let wanted: BTreeSet<RuleSetId> =
            self.of_policy.values().flat_map(|(_, sets)| sets).copied().collect();
        self.rules.retain(|id, _| wanted.contains(id));
        for id in wanted {
            let sets = &self.sets;
            self.rules.entry(id).or_insert_with(|| match sets.get(id)? {
                set if set.visibility_only => None,
                set => match set.rules {
                    L7Rules::Dns(rules) => Some(rules.into()),
                    _ => None,
                },
            });
        }
    }

    /// Asks for the rule sets of these policies. Returns the policies that wait for the proxy.
    fn ask(&mut self, policies: &Compiled) -> BTreeMap<PolicyId, Refusal> {
        let before = self.of_policy.len();
        self.of_policy.retain(|id, _| policies.contains_key(id));
        let mut is_changed = self.of_policy.len() < before;
        for (id, policy) in policies {
            let known = self.of_policy.get(id);
            if known.is_none_or(|(known, _)| !Arc::ptr_eq(known, policy)) {
                let sets = policy.rule_sets().map(|set| self.sets.id_of(set)).collect();
                self.of_policy.insert(*id, (policy.clone(), sets));
                is_changed = true;
            }
        }
        if is_changed {
            self.read_rules();
        }
        self.proxy.want(self.of_policy.values().flat_map(|(_, sets)| sets).copied().collect());
        let now = Instant::now();
        let lacking = self.of_policy.iter().filter(|(_, (_, sets))| !self.proxy.knows(sets));
        let lacking: BTreeSet<PolicyId> = lacking.map(|(id, _)| *id).collect();
        self.waiting.retain(|id, _| lacking.contains(id));
        for id in lacking {
            self.waiting.entry(id).or_insert(now);
        }
        let cause = || "the proxy does not have its rules yet".to_owned();
        let waits = self.waiting.iter().filter(|(_, since)| now.duration_since(**since) < PROXY_WITHIN);
        waits.map(|(id, _)| (*id, Refusal { cause: cause(), closes: false })).collect()
    }
}

impl Policies {
    /// The writer, and how much it may write for one policy.
    pub fn new(writer: PolicyWriter, dns: DnsWriter, limits: Limits, proxy: Proxy) -> Self {
        let layer7 = Layer7 {
            sets: writer.rule_sets(),
            proxy,
            of_policy: BTreeMap::new(),
            waiting: BTreeMap::new(),
            rules: BTreeMap::new(),
        };
        Self {
            writer,
            limits,
            tried: BTreeMap::new(),
            fitting: BTreeMap::new(),
            layer7,
            dns,
            judged: Names::new(),
        }
    }

    /// Policies that are not even tried: those over the budget and, when all policies are more than the
    /// maps can hold, the largest ones.
    fn too_large(&self, policies: &Compiled) -> BTreeMap<PolicyId, String> {
        let (rules, peers) = self.writer.capacity();
        too_large(policies, self.limits.policy_rows, rules, peers)
    }
}

impl Sink for Policies {
    fn name(&self) -> &'static str {
        "policies"
    }

    fn is_for_pods(&self) -> bool {
        true
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        let mut drift = Drift::rows(&self.writer.compare()?);
        drift.extend(Drift::rows(&self.dns.compare()?));
        Ok(drift)
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = &round.desired.policies;
        let too_large = self.too_large(desired);
        self.tried.retain(|id, _| desired.contains_key(id) && !too_large.contains_key(id));
        let waiting = self.layer7.ask(desired);
        // Before the rules that name them, and the pods that have those.
        self.dns.write_names(&round.desired.named_by)?;
        let judged = self.layer7.names(|id| !too_large.contains_key(id) || round.in_force.contains(id));
        self.dns.write_rules(&judged)?;
        self.judged = judged;
        let may = |id: &PolicyId| {
            !too_large.contains_key(id)
                && !waiting.contains_key(id)
                && (round.is_retry || !self.tried.contains_key(id))
        };
        let fitting: Compiled =
            desired.iter().filter(|(id, _)| may(id)).map(|(id, policy)| (*id, policy.clone())).collect();
        let refused = self.writer.write(&fitting, round.in_force);
        if round.is_retry {
            self.tried.retain(|id, _| refused.contains_key(id));
        }
        for (id, error) in refused {
            let tried = self.tried.entry(id).or_default();
            *tried = (format!("{:#}", anyhow::Error::from(error)), tried.1 + 1);
        }
        self.fitting = fitting;
        self.fitting.retain(|id, _| !self.tried.contains_key(id));
        let too_large = too_large.into_iter().map(|(id, cause)| (id, Refusal { cause, closes: true }));
        // The first time, `delete` may still make room.
        let tried = self
            .tried
            .iter()
            .map(|(id, (cause, tries))| (*id, Refusal { cause: cause.clone(), closes: *tries > 1 }));
        let refused: BTreeMap<PolicyId, Refusal> = too_large.chain(tried).chain(waiting).collect();
        let problems = refused.iter().map(|(id, refusal)| problem(round.desired, *id, &refusal.cause));
        let problems = problems.collect();
        round.refused.extend(refused);
        Ok(problems)
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        self.writer.prune(&self.fitting, round.in_force)?;
        Ok(self.dns.prune(&self.judged)?)
    }
}

fn too_large(policies: &Compiled, budget: usize, rules: usize, peers: usize) -> BTreeMap<PolicyId, String> {
    let mut sizes: Vec<(usize, usize, PolicyId)> =
        policies.iter().map(|(id, policy)| (policy.rule_rows(), policy.peer_rows(), *id)).collect();
    sizes.sort_unstable();
    let (mut rules_used, mut peers_used) = (0, 0);
    let mut refused = BTreeMap::new();
    for (rule_rows, peer_rows, id) in sizes {
        if rule_rows > budget {
            let cause = format!(
                "{rule_rows} rows, and one policy may have {budget}: raise it with --policy-rows-max"
            );
            refused.insert(id, cause);
            continue;
        }
        if rules_used + rule_rows > rules || peers_used + peer_rows > peers {
            let (map, rows, size) = if rules_used + rule_rows > rules {
                ("policy_rules", rule_rows, rules)
            } else {
                ("policy_peers", peer_rows, peers)
            };
            let cause = format!(
                "its {rows} rows do not fit into map {map} ({size} rows): raise it with --map-size {map}={}",
                size * 2
            );
            refused.insert(id, cause);
            continue;
        }
        rules_used += rule_rows;
        peers_used += peer_rows;
    }
    refused
}

/// Names the objects that the policy is made of, and the pods that it costs.
fn problem(desired: &Desired, id: PolicyId, cause: &str) -> Problem {
    let endpoints = desired.endpoints.iter().filter(|(_, entry)| entry.policy == id);
    let (mut objects, mut pods) = (BTreeSet::new(), Vec::new());
    for (endpoint, entry) in endpoints {
        pods.push(entry.endpoint.pod.to_string());
        objects.extend(desired.selected_by.get(endpoint).into_iter().flat_map(|by| by.iter()));
    }
    let selects = format!("which selects {}: {cause}", few(&pods));
    let names: Vec<String> = objects.iter().map(ToString::to_string).collect();
    let closes = objects
        .into_iter()
        .map(|object| (object.clone(), format!("is not enforced for {}: {cause}", few(&pods))));
    Problem { closes: closes.collect(), ..Problem::new(format!("{}, {selects}", names.join(", "))) }
}

/// The first few of many names.
pub fn few(names: &[String]) -> String {
    const FEW: usize = 3;
    match names.len() {
        0 => "nothing".to_owned(),
        count if count <= FEW => names.join(", "),
        count => format!("{} and {} more", names[..FEW].join(", "), count - FEW),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Action, CompiledDirection, CompiledRule, CompiledRuleKey, IdentityId, ObjectKey, Origins, PolicyRef,
    };

    fn policy(rules: u16, peers: u32) -> Arc<CompiledPolicy> {
        let origins = Origins::from([PolicyRef::network_policy(&ObjectKey::new("shop", "web"))]);
        let rule = |port| {
            let key = CompiledRuleKey { class: 1, protocol: Some(6), port, port_prefix_length: 16 };
            (key, CompiledRule { action: Action::Allow, origins: origins.clone(), is_audit: false, l7: None })
        };
        let direction = CompiledDirection {
            peers: (0..peers).map(|peer| (IdentityId(300 + peer), 1_u32)).collect(),
            rules: (0..rules).map(rule).collect(),
            ..CompiledDirection::default()
        };
        Arc::new(CompiledPolicy { ingress: Some(direction), egress: None })
    }

    #[test]
    fn a1_the_largest_policies_are_left_out_and_the_small_ones_stay() {
        let policies: Compiled = [
            (1, policy(60, 1)),
            (2, policy(5, 1)),
            (3, policy(101, 1)),
            (4, policy(50, 1)),
            (5, policy(1, 9)),
        ]
        .map(|(id, policy)| (PolicyId(id), policy))
        .into();
        let refused = too_large(&policies, 100, 100, 100);
        let rows = |id| refused.get(&PolicyId(id)).map(String::as_str);
        assert_eq!(refused.keys().map(|id| id.0).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(rows(3), Some("101 rows, and one policy may have 100: raise it with --policy-rows-max"));
        assert_eq!(
            rows(1),
            Some(
                "its 60 rows do not fit into map policy_rules (100 rows): raise it with --map-size policy_rules=200"
            )
        );
    }
}
