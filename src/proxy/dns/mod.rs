//! DNS over UDP and TCP: questions are judged, answers are announced before the client has them.

pub mod tcp;
pub mod udp;

use crate::model::l7::DnsRule;

use super::name::NamePattern;

/// The rules of a set; no rule at all allows any name.
#[derive(Debug)]
pub struct DnsRules(Vec<NamePattern>);

impl DnsRules {
    /// Compiles rules.
    pub fn new(rules: &[DnsRule]) -> Self {
        let compile = |rule: &DnsRule| match rule {
            DnsRule::MatchName(name) | DnsRule::MatchPattern(name) => NamePattern::new(name),
        };
        Self(rules.iter().map(compile).collect())
    }

    /// True if a name may be asked for; its labels are in lower case.
    pub fn allows(&self, name: &[&[u8]]) -> bool {
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches(name))
    }
}
