//! What may be said inside of connections: `rules` and `serverNames` of a port.

use std::sync::Arc;

use super::Reader;
use crate::kube::convert::{Field, FieldError, Result, items};
use crate::model::l7::{DnsRule, HeaderRule, HttpRule, KafkaRule, L7Rules, Mismatch, kafka_api_key};
use crate::model::{IpProtocol, PortMatch, PortSelector};

/// What a port asks for of layer 7.
pub(super) enum Asked {
    /// Nothing.
    Nothing,
    /// These rules.
    Rules(Arc<L7Rules>),
    /// It could not be read, or nobody enforces it.
    Unread,
}

const RULES: [&str; 5] = ["http", "dns", "kafka", "l7proto", "l7"];

impl Reader<'_> {
    /// The rules of one element of `toPorts`.
    pub(super) fn layer7(&mut self, part: &Field) -> Asked {
        let fields = part.get("rules").and_then(|rules| Ok((rules, part.get("serverNames")?)));
        let Some((rules, names)) = self.notes.read(fields) else { return Asked::Unread };
        let read = rules.only_known(&RULES).and_then(|()| given(&rules, names));
        let Some(given) = self.notes.read(read) else { return Asked::Unread };
        match &given[..] {
            [] => Asked::Nothing,
            [(name @ ("l7proto" | "l7"), field)] => {
                self.not_yet(field, &format!("{name}, a parser of one's own,"));
                Asked::Unread
            }
            [(name, list)] => self.layer7_rules(name, list),
            [_, (_, second), ..] => {
                self.notes.doubt(second.error("rules are of one protocol for a port"));
                Asked::Unread
            }
        }
    }

    fn layer7_rules(&mut self, name: &str, list: &Field) -> Asked {
        let read = list.items().map(Option::unwrap_or_default);
        let Some(lines) = self.notes.read(read) else { return Asked::Unread };
        let rules = match name {
            "http" => L7Rules::Http(self.lines(&lines, http)),
            "dns" => L7Rules::Dns(self.lines(&lines, dns)),
            "kafka" => L7Rules::Kafka(self.lines(&lines, kafka)),
            _ => L7Rules::ServerNames(self.lines(&lines, server_name)),
        };
        // No rule would be every rule.
        let is_empty = match &rules {
            L7Rules::Http(rules) => rules.is_empty(),
            L7Rules::Dns(rules) => rules.is_empty(),
            L7Rules::Kafka(rules) => rules.is_empty(),
            L7Rules::ServerNames(names) => names.is_empty(),
        };
        if is_empty { Asked::Unread } else { Asked::Rules(Arc::new(rules)) }
    }

    /// What can be read of a list, each line by itself: a line that cannot be read allows nothing.
    fn lines<T: Ord>(&mut self, lines: &[Field], read: fn(&Field) -> Result<(T, L7Rules)>) -> Vec<T> {
        let mut all = Vec::new();
        for line in lines {
            let checked = read(line).and_then(|(rule, alone)| {
                alone.check().map_err(|fault| line.error(fault))?;
                Ok(rule)
            });
            all.extend(self.notes.read(checked));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The ports for which these rules can be: an allow of the others allows nothing.
    pub(super) fn ports_of_layer7(
        &mut self,
        part: &Field,
        ports: Vec<PortMatch>,
        rules: &L7Rules,
    ) -> Vec<PortMatch> {
        if ports.iter().any(|port| port.port == PortSelector::Any) {
            self.notes.doubt(part.error("rules need a port: 0 is every port"));
            return Vec::new();
        }
        let is_for = |port: &PortMatch| {
            port.protocol == IpProtocol::TCP
                || port.protocol == IpProtocol::UDP && matches!(rules, L7Rules::Dns(_))
        };
        let count = ports.len();
        let fitting: Vec<PortMatch> = ports.into_iter().filter(is_for).collect();
        if fitting.is_empty() && count > 0 {
            let protocol = rules.protocol();
            self.notes
                .doubt(part.error(format!("rules of {protocol} are for TCP, and this is no port of it")));
        }
        fitting
    }
}

/// The lists that are there and not empty.
fn given<'a>(rules: &Field<'a>, names: Field<'a>) -> Result<Vec<(&'static str, Field<'a>)>> {
    let mut given = Vec::new();
    for name in RULES {
        given.push((name, rules.get(name)?));
    }
    given.push(("serverNames", names));
    let is_given = |(name, field): &(&str, Field)| match (*name, field.items()) {
        ("l7proto", _) => field.is_present(),
        (_, Ok(list)) => list.is_some_and(|list| !list.is_empty()),
        (_, Err(_)) => true,
    };
    Ok(given.into_iter().filter(is_given).collect())
}

/// A text that is there and not empty.
fn text(rule: &Field, name: &str) -> Result<Option<String>> {
    Ok(rule.get(name)?.string()?.filter(|text| !text.is_empty()).map(str::to_owned))
}

fn http(line: &Field) -> Result<(HttpRule, L7Rules)> {
    line.only_known(&["path", "method", "host", "headers", "headerMatches"])?;
    let mut headers = Vec::new();
    for header in items(&line.get("headers")?)? {
        headers.push(HeaderRule::from_line(header.required_string()?));
    }
    for header in items(&line.get("headerMatches")?)? {
        headers.push(header_match(&header)?);
    }
    let rule = HttpRule {
        method: text(line, "method")?,
        path: text(line, "path")?,
        host: text(line, "host")?,
        headers,
    };
    Ok((rule.clone(), L7Rules::Http(vec![rule])))
}

fn header_match(field: &Field) -> Result<HeaderRule> {
    field.only_known(&["name", "value", "secret", "mismatch"])?;
    let secret = field.get("secret")?;
    if secret.is_present() {
        return Err(secret.error("values of Secrets are not enforced yet"));
    }
    let named = field.get("mismatch")?;
    let mismatch = match named.string()? {
        None | Some("") => Mismatch::Deny,
        Some("LOG") => Mismatch::Log,
        Some("ADD") => Mismatch::Add,
        Some("DELETE") => Mismatch::Delete,
        Some("REPLACE") => Mismatch::Replace,
        Some(other) => return Err(named.error(format!("{other:?} is not LOG, ADD, DELETE or REPLACE"))),
    };
    Ok(HeaderRule {
        name: field.get("name")?.required_string()?.to_owned(),
        value: text(field, "value")?,
        mismatch,
    })
}

/// A name or a pattern of names, as `rules.dns` and `toFQDNs` have it.
pub(super) fn name_rule(line: &Field) -> Result<DnsRule> {
    line.only_known(&["matchName", "matchPattern"])?;
    let folded = |name: &str| name.to_ascii_lowercase().trim_end_matches('.').to_owned();
    match (text(line, "matchName")?, text(line, "matchPattern")?) {
        (Some(name), None) => Ok(DnsRule::MatchName(folded(&name))),
        (None, Some(pattern)) => Ok(DnsRule::MatchPattern(folded(&pattern))),
        _ => Err(line.error("must have one of matchName and matchPattern")),
    }
}

fn dns(line: &Field) -> Result<(DnsRule, L7Rules)> {
    let rule = name_rule(line)?;
    Ok((rule.clone(), L7Rules::Dns(vec![rule])))
}

fn server_name(line: &Field) -> Result<(String, L7Rules)> {
    let name = line.required_string()?.to_ascii_lowercase();
    Ok((name.clone(), L7Rules::ServerNames(vec![name])))
}

/// As upstream had it until 1.19.
fn kafka(line: &Field) -> Result<(KafkaRule, L7Rules)> {
    line.only_known(&["role", "apiKey", "apiVersion", "clientID", "topic"])?;
    let (role, key, version) = (line.get("role")?, line.get("apiKey")?, line.get("apiVersion")?);
    let unknown =
        |field: &Field, what: &str| -> FieldError { field.error(format!("is no {what} of Kafka's")) };
    let api_keys = match (text(line, "role")?, text(line, "apiKey")?) {
        (Some(_), Some(_)) => return Err(line.error("has role and apiKey: one of them will do")),
        (Some(name), None) => KafkaRule::role_keys(&name).ok_or_else(|| unknown(&role, "role"))?,
        (None, Some(name)) => [kafka_api_key(&name).ok_or_else(|| unknown(&key, "API"))?].into(),
        (None, None) => Default::default(),
    };
    let api_version = match text(line, "apiVersion")? {
        Some(number) => Some(number.parse::<u8>().map(i16::from).map_err(|_| unknown(&version, "version"))?),
        None => None,
    };
    let rule =
        KafkaRule { api_keys, api_version, client_id: text(line, "clientID")?, topic: text(line, "topic")? };
    Ok((rule.clone(), L7Rules::Kafka(vec![rule])))
}
