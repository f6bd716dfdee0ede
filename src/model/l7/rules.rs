//! Rules of layer 7: HTTP, DNS, Kafka and the server names of TLS.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::NamePattern;
use crate::model::Origins;

/// What of one protocol may pass. A message passes if one of the rules allows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum L7Rules {
    /// HTTP/1.0, HTTP/1.1, HTTP/2 without TLS, and gRPC. No rule at all allows any HTTP.
    Http(Vec<HttpRule>),
    /// DNS over UDP and TCP. No rule at all allows any name.
    Dns(Vec<DnsRule>),
    /// Kafka's protocol. No rule at all allows any request.
    Kafka(Vec<KafkaRule>),
    /// The names that a TLS client may ask for: exact, or patterns as those of DNS. No name at all allows any TLS.
    ServerNames(Vec<String>),
}

impl L7Rules {
    /// The protocol's name, as users write it.
    pub fn protocol(&self) -> &'static str {
        match self {
            Self::Http(_) => "http",
            Self::Dns(_) => "dns",
            Self::Kafka(_) => "kafka",
            Self::ServerNames(_) => "serverNames",
        }
    }

    /// Says what is wrong with rules that the proxy could not enforce.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Http(rules) => rules.iter().try_for_each(HttpRule::check),
            Self::Dns(rules) => rules.iter().try_for_each(DnsRule::check),
            Self::Kafka(rules) => rules.iter().try_for_each(KafkaRule::check),
            Self::ServerNames(names) => names.iter().try_for_each(|name| check_pattern(name)),
        }
    }
}

/// One line of HTTP rules: all its parts must hold. A part that is `None` or empty always holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct HttpRule {
    /// A regular expression that the whole method must match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// A regular expression that the whole path, with the query, must match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A regular expression that the whole host must match, with or without its port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Headers that the request must have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderRule>,
}

impl HttpRule {
    fn check(&self) -> Result<(), String> {
        for (what, pattern) in [("method", &self.method), ("path", &self.path), ("host", &self.host)] {
            if let Some(pattern) = pattern {
                full_match(pattern).map_err(|error| format!("{what} {pattern:?}: {error}"))?;
            }
        }
        self.headers.iter().try_for_each(HeaderRule::check)
    }
}

/// A regular expression that must match the whole of the bytes.
///
/// The size of what it compiles to is bounded, and so is the time that a match takes.
pub fn full_match(pattern: &str) -> Result<regex::bytes::Regex, String> {
    const COMPILED_MAX: usize = 4 << 20;
    let build = |pattern: &str| {
        let mut builder = regex::bytes::RegexBuilder::new(pattern);
        builder.unicode(false).size_limit(COMPILED_MAX).dfa_size_limit(COMPILED_MAX).build()
    };
    // A pattern that closes a group it has not opened must not get out of the one around it.
    build(pattern).and_then(|_| build(&format!("^(?:{pattern})$"))).map_err(|error| error.to_string())
}

/// A header that a request must have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeaderRule {
    /// Its name, in any case.
    pub name: String,
    /// Its whole value; `None`: any value will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// What becomes of a request without it.
    #[serde(default)]
    pub mismatch: Mismatch,
}

impl HeaderRule {
    /// A line of `headers` in Cilium's form: `Name`, `Name: value` or `Name value`.
    pub fn from_line(line: &str) -> Self {
        let (name, value) = match line.split_once(' ') {
            Some((name, value)) => (name, Some(value.trim()).filter(|value| !value.is_empty())),
            None => (line, None),
        };
        Self {
            name: name.trim_end_matches(':').to_owned(),
            value: value.map(str::to_owned),
            mismatch: Mismatch::Deny,
        }
    }

    fn check(&self) -> Result<(), String> {
        let Self { name, value, mismatch } = self;
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(format!("header {name:?}: not the name of a header"));
        }
        if let Some(value) = value
            && value.bytes().any(|byte| byte < b' ' && byte != b'\t' || byte == 0x7f)
        {
            return Err(format!("header {name}: the value has control characters"));
        }
        if *mismatch != Mismatch::Deny {
            let lower = name.to_ascii_lowercase();
            if FRAMING_HEADERS.contains(&lower.as_str()) {
                return Err(format!("header {name}: a mismatch must not change how requests are read"));
            }
            if value.is_none() && matches!(mismatch, Mismatch::Add | Mismatch::Replace) {
                return Err(format!("header {name}: a mismatch that writes a value needs one"));
            }
        }
        Ok(())
    }
}

/// Headers that decide where a request ends or where it goes: a rule may ask for them but never write them.
const FRAMING_HEADERS: [&str; 8] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "http2-settings",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// What becomes of a request without the header that a rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mismatch {
    /// The rule does not allow it.
    #[default]
    Deny,
    /// The rule allows it, and the record says so.
    Log,
    /// The rule allows it, and the header is added.
    Add,
    /// The rule allows it, and headers of that name are taken out.
    Delete,
    /// The rule allows it, and the header takes the place of those of that name.
    Replace,
}

/// Which names may be asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DnsRule {
    /// This name.
    MatchName(String),
    /// `*` stands for characters of one label, `**.` at the front for one or more labels, and `*` alone for any
    /// name.
    MatchPattern(String),
}

impl DnsRule {
    /// The name or the pattern.
    pub fn text(&self) -> &str {
        match self {
            Self::MatchName(text) | Self::MatchPattern(text) => text,
        }
    }

    /// The names that it means.
    pub fn pattern(&self) -> NamePattern {
        NamePattern::new(self.text())
    }

    /// Says what is wrong with a rule that could not be enforced.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::MatchName(name) => check_name(name, false),
            Self::MatchPattern(pattern) => check_pattern(pattern),
        }
    }
}

/// As users write it: `matchName example.com`.
impl fmt::Display for DnsRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MatchName(name) => write!(f, "matchName {name}"),
            Self::MatchPattern(pattern) => write!(f, "matchPattern {pattern}"),
        }
    }
}

fn check_pattern(pattern: &str) -> Result<(), String> {
    if pattern == "*" {
        return Ok(());
    }
    check_name(pattern.strip_prefix("**.").unwrap_or(pattern), true)
}

/// Names of at most 255 bytes with labels of letters, digits, `-`, `_` and, in a pattern, `*`.
fn check_name(name: &str, is_pattern: bool) -> Result<(), String> {
    let is_valid = |byte: u8| {
        byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' || (is_pattern && byte == b'*')
    };
    let labels = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(is_valid);
    if name.len() <= 255 && labels.split('.').all(is_label) {
        return Ok(());
    }
    Err(format!("{name:?} is not the {} of a name", if is_pattern { "pattern" } else { "form" }))
}

/// One line of Kafka rules, in the form that Cilium had until 1.19: all its parts must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct KafkaRule {
    /// The API keys of a role, or one key; empty: any.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub api_keys: BTreeSet<i16>,
    /// The version of the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<i16>,
    /// Who the client says it is.
    #[serde(rename = "clientID", skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    /// The topic. Of a request with topics each one must be allowed. A request whose API has no topics passes
    /// by a rule with one if the rest of the rule holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
}

impl KafkaRule {
    /// The keys of a role: `produce` or `consume`.
    pub fn role_keys(role: &str) -> Option<BTreeSet<i16>> {
        let names: &[&str] = match role {
            "produce" => &["produce", "metadata", "apiversions", "initproducerid", "describetopicpartitions"],
            "consume" => &[
                "fetch",
                "listoffsets",
                "metadata",
                "offsetcommit",
                "offsetfetch",
                "findcoordinator",
                "joingroup",
                "heartbeat",
                "leavegroup",
                "syncgroup",
                "apiversions",
                "offsetforleaderepoch",
                "describetopicpartitions",
            ],
            _ => return None,
        };
        Some(names.iter().filter_map(|name| kafka_api_key(name)).collect())
    }

    fn check(&self) -> Result<(), String> {
        let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        match &self.topic {
            Some(topic) if !(1..=249).contains(&topic.len()) || !topic.bytes().all(is_valid) => {
                Err(format!("{topic:?} is not the name of a topic"))
            }
            _ => Ok(()),
        }
    }
}

/// Kafka's APIs by number.
const KAFKA_APIS: &[(i16, &str)] = &[
    (0, "produce"),
    (1, "fetch"),
    (2, "listoffsets"),
    (3, "metadata"),
    (4, "leaderandisr"),
    (5, "stopreplica"),
    (6, "updatemetadata"),
    (7, "controlledshutdown"),
    (8, "offsetcommit"),
    (9, "offsetfetch"),
    (10, "findcoordinator"),
    (11, "joingroup"),
    (12, "heartbeat"),
    (13, "leavegroup"),
    (14, "syncgroup"),
    (15, "describegroups"),
    (16, "listgroups"),
    (17, "saslhandshake"),
    (18, "apiversions"),
    (19, "createtopics"),
    (20, "deletetopics"),
    (21, "deleterecords"),
    (22, "initproducerid"),
    (23, "offsetforleaderepoch"),
    (24, "addpartitionstotxn"),
    (25, "addoffsetstotxn"),
    (26, "endtxn"),
    (27, "writetxnmarkers"),
    (28, "txnoffsetcommit"),
    (29, "describeacls"),
    (30, "createacls"),
    (31, "deleteacls"),
    (32, "describeconfigs"),
    (33, "alterconfigs"),
    (36, "saslauthenticate"),
    (37, "createpartitions"),
    (42, "deletegroups"),
    (47, "offsetdelete"),
    (60, "describecluster"),
    (75, "describetopicpartitions"),
];

/// The number of a Kafka API by its name in any case, or by its number.
pub fn kafka_api_key(name: &str) -> Option<i16> {
    let lower = name.to_ascii_lowercase();
    let by_name = KAFKA_APIS.iter().find(|(_, api)| *api == lower).map(|(key, _)| *key);
    by_name.or_else(|| name.parse().ok().filter(|key| (0..=1000).contains(key)))
}

/// The name of a Kafka API, where it has one.
pub fn kafka_api_name(key: i16) -> Option<&'static str> {
    KAFKA_APIS.iter().find(|(known, _)| *known == key).map(|(_, name)| *name)
}

/// The number of a rule set. 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RuleSetId(pub u16);

impl fmt::Display for RuleSetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Rules with a number. The rules of a number never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleSet {
    /// Its number.
    pub id: RuleSetId,
    /// What may pass.
    pub rules: L7Rules,
    /// The policies that say so, for records.
    #[serde(default, skip_serializing_if = "has_none")]
    pub origins: Origins,
    /// Shows everything and denies nothing, even what is not of the protocol.
    #[serde(default)]
    pub visibility_only: bool,
    /// An Envoy judges what this set judges alone: `weir proxy` refuses that.
    #[serde(default)]
    pub by_envoy: bool,
}

fn has_none(origins: &Origins) -> bool {
    origins.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_cannot_leave_its_group() {
        for pattern in ["a)|(?:.*", "a)$|^(?:.*", "(", "[", "a{1000}{1000}"] {
            assert!(full_match(pattern).is_err(), "{pattern}");
        }
        let either = full_match("a|b").expect("this compiles");
        assert!(either.is_match(b"a") && either.is_match(b"b"));
        assert!(!either.is_match(b"ab") && !either.is_match(b"a\n"));
        assert!(full_match("/.*").expect("this compiles").is_match(b"/\xff"), "bytes need not be UTF-8");
    }

    #[test]
    fn rules_that_cannot_be_enforced_are_named() {
        let http = |rule: HttpRule| L7Rules::Http(vec![rule]).check();
        assert!(http(HttpRule { path: Some("(".into()), ..HttpRule::default() }).is_err());
        let header = |line: &str, mismatch| {
            let header = HeaderRule { mismatch, ..HeaderRule::from_line(line) };
            http(HttpRule { headers: vec![header], ..HttpRule::default() })
        };
        assert_eq!(header("X-Team: red", Mismatch::Add), Ok(()));
        assert!(header("X-Team", Mismatch::Add).is_err());
        assert!(header("Content-Length: 5", Mismatch::Replace).is_err());
        assert!(header("no\u{1}token x", Mismatch::Deny).is_err());
        let dns = |pattern: &str| L7Rules::Dns(vec![DnsRule::MatchPattern(pattern.into())]).check();
        for pattern in ["*", "**.example.com", "*.example.com.", "a*b.c"] {
            assert_eq!(dns(pattern), Ok(()), "{pattern}");
        }
        for pattern in ["", "a..b", "**..b", "a b", "."] {
            assert!(dns(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn header_lines_are_read_as_cilium_reads_them() {
        let read = |line: &str| {
            let HeaderRule { name, value, .. } = HeaderRule::from_line(line);
            (name, value)
        };
        assert_eq!(read("X-Token"), ("X-Token".into(), None));
        assert_eq!(read("X-Token: a b"), ("X-Token".into(), Some("a b".into())));
        assert_eq!(read("X-Token ab"), ("X-Token".into(), Some("ab".into())));
    }

    #[test]
    fn rule_sets_come_back_as_they_went() {
        let set = RuleSet {
            id: RuleSetId(7),
            rules: L7Rules::Kafka(vec![KafkaRule {
                api_keys: KafkaRule::role_keys("produce").expect("a role"),
                topic: Some("orders".into()),
                ..KafkaRule::default()
            }]),
            origins: Origins::default(),
            visibility_only: false,
            by_envoy: false,
        };
        let text = serde_json::to_string(&set).expect("a rule set is JSON");
        assert_eq!(serde_json::from_str::<RuleSet>(&text).expect("it is read again"), set);
        let http = L7Rules::Http(vec![HttpRule { method: Some("GET".into()), ..HttpRule::default() }]);
        assert_eq!(serde_json::to_string(&http).expect("JSON"), r#"{"http":[{"method":"GET"}]}"#);
    }
}
