//! Who has which address: `addresses` and `prefixes`.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use anyhow::Result;
use ipnet::IpNet;

use super::encryption::Shared;
use super::policies::few;
use super::{Drift, Problem, Refusal, Round, Sink};
use crate::agent::compute::Desired;
use crate::datapath::AddressWriter;
use crate::model::{CompiledDirection, CompiledPolicy, IdentityId, PolicyId};

/// Writes after the policies: a new identity has its class before an address shows it.
pub struct Addresses {
    writer: AddressWriter,
    /// Whom nothing goes to in plain; none: encryption is off.
    encrypted: Option<Shared>,
    /// How many tries in a row prefixes did not fit.
    tries: u32,
}

impl Addresses {
    /// Of the writer, and of what the sink of encryption says.
    pub fn new(writer: AddressWriter, encrypted: Option<Shared>) -> Self {
        Self { writer, encrypted, tries: 0 }
    }

    fn problems(&self) -> Vec<Problem> {
        let addresses: Vec<String> = self.writer.refused().map(|(address, _)| address.to_string()).collect();
        let address = self.writer.refused().next().map(|(_, cause)| {
            Problem::new(format!(
                "unknown to the datapath, so that no pod reaches them: {}: {cause}",
                few(&addresses)
            ))
        });
        let refused = self.writer.refused_prefixes();
        let prefixes: Vec<String> = refused.keys().map(ToString::to_string).collect();
        let prefix = refused.values().next().map(|cause| {
            Problem::new(format!("policies that name them are closed: {}: {cause}", few(&prefixes)))
        });
        address.into_iter().chain(prefix).collect()
    }
}

impl Sink for Addresses {
    fn name(&self) -> &'static str {
        "addresses"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["policies"]
    }

    /// Endpoints may still have a policy that means something by a prefix which is to go.
    fn needs_to_delete(&self) -> &'static [&'static str] {
        &["endpoints"]
    }

    fn is_for_pods(&self) -> bool {
        true
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        Ok(Drift::rows(&self.writer.compare()?))
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = round.desired;
        if round.is_retry {
            self.writer.retry_refused();
        }
        if let Some(encrypted) = &self.encrypted {
            self.writer.encrypt(&encrypted.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.writer.write(&desired.addresses, &desired.prefixes)?;
        let refused = self.writer.refused_prefixes();
        if refused.is_empty() {
            self.tries = 0;
        } else if round.is_retry {
            self.tries += 1;
        }
        let closes = self.tries > 1;
        for (id, prefix) in misled(desired, refused) {
            let cause = format!("the prefix {prefix} does not fit into map prefixes");
            round.refused.entry(id).or_insert(Refusal { cause, closes });
        }
        Ok(self.problems())
    }

    fn delete(&mut self, round: &mut Round<'_>) -> Result<()> {
        self.writer.prune(&round.desired.addresses, &round.desired.prefixes)
    }
}

/// The policies that would take addresses of a prefix without a row for something else: those in which
/// the prefix's identity has another class than that of the next shorter prefix with a row.
fn misled(desired: &Desired, refused: &BTreeMap<IpNet, String>) -> BTreeMap<PolicyId, IpNet> {
    let mut found = BTreeMap::new();
    for prefix in refused.keys() {
        // Without the row of a name less is allowed.
        let Some(meant) = desired.prefixes.get(prefix).filter(|row| !row.is_learned) else { continue };
        let taken_for = shorter(desired, refused, prefix);
        let differs = |direction: &CompiledDirection| {
            direction.peers.get(&meant.identity) != direction.peers.get(&taken_for)
        };
        let is_misled = |policy: &CompiledPolicy| policy.ingress.iter().chain(&policy.egress).any(differs);
        let misled = desired.policies.iter().filter(|(_, policy)| is_misled(policy));
        found.extend(misled.map(|(id, _)| (*id, *prefix)));
    }
    found
}

/// The identity that addresses of a prefix without a row have.
fn shorter(desired: &Desired, refused: &BTreeMap<IpNet, String>, prefix: &IpNet) -> IdentityId {
    let covers = desired
        .prefixes
        .iter()
        .filter(|(other, _)| *other != prefix && other.contains(prefix) && !refused.contains_key(*other));
    let longest = covers.max_by_key(|(other, _)| other.prefix_len());
    longest.map_or(IdentityId::WORLD, |(_, entry)| entry.identity)
}
