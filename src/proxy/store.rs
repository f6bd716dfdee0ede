//! The rule sets that the agent has sent, compiled.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

use crate::model::l7::{L7Rules, RuleSet, RuleSetId};

use super::dns::DnsRules;
use super::http::HttpRules;
use super::kafka::KafkaRules;
use super::tls::ServerNames;

/// A rule set, ready to judge.
#[derive(Debug)]
pub struct Compiled {
    /// Its number.
    pub id: RuleSetId,
    /// Denies nothing.
    pub is_visibility_only: bool,
    /// An Envoy judges what this set judges alone.
    pub is_by_envoy: bool,
    /// The rules.
    pub rules: Rules,
}

/// Compiled rules of one protocol.
#[derive(Debug)]
pub enum Rules {
    /// HTTP and gRPC.
    Http(HttpRules),
    /// DNS.
    Dns(DnsRules),
    /// Kafka.
    Kafka(KafkaRules),
    /// TLS.
    ServerNames(ServerNames),
}

impl Compiled {
    /// Compiles a rule set, or says what is wrong with it.
    pub fn new(set: &RuleSet) -> Result<Self, String> {
        set.rules.check()?;
        let rules = match &set.rules {
            L7Rules::Http(rules) => Rules::Http(HttpRules::new(rules)?),
            L7Rules::Dns(rules) => Rules::Dns(DnsRules::new(rules)),
            L7Rules::Kafka(rules) => Rules::Kafka(KafkaRules::new(rules)),
            L7Rules::ServerNames(names) => Rules::ServerNames(ServerNames::new(names)),
        };
        Ok(Self { id: set.id, is_visibility_only: set.visibility_only, is_by_envoy: set.by_envoy, rules })
    }
}

/// All rule sets; readers never wait.
#[derive(Debug, Default)]
pub struct Store {
    sets: ArcSwap<HashMap<RuleSetId, Arc<Compiled>>>,
    version: AtomicU64,
}

impl Store {
    /// A rule set by its number.
    pub fn get(&self, id: RuleSetId) -> Option<Arc<Compiled>> {
        self.sets.load().get(&id).cloned()
    }

    /// Changes whenever a rule set came or went.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Takes new sets in and old ones out, and gives those that cannot be compiled: what they judge is denied,
    /// as it is for a set that is not known. With `replaces` no other set stays.
    pub fn change(&self, set: &[RuleSet], remove: &[RuleSetId], replaces: bool) -> Vec<(RuleSetId, String)> {
        let mut sets = if replaces { HashMap::new() } else { HashMap::clone(&self.sets.load()) };
        for id in remove {
            sets.remove(id);
        }
        let mut refused = Vec::new();
        for set in set {
            match Compiled::new(set) {
                Ok(compiled) => drop(sets.insert(set.id, Arc::new(compiled))),
                Err(why) => {
                    sets.remove(&set.id);
                    refused.push((set.id, why));
                }
            }
        }
        self.sets.store(Arc::new(sets));
        self.version.fetch_add(1, Ordering::Release);
        refused
    }
}
