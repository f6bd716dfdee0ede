//! HTTP rules, compiled: whether a request may pass, and what is changed in it.

use regex::bytes::Regex;

use crate::model::l7::{HeaderRule, HttpRule, Mismatch, full_match};

use super::path::readings;

/// What rules ask of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// `GET`
    pub method: &'a [u8],
    /// With the query.
    pub path: &'a [u8],
    /// From the Host header or `:authority`.
    pub host: &'a [u8],
    /// Names in any case, and values.
    pub headers: &'a [(&'a [u8], &'a [u8])],
}

impl<'a> Request<'a> {
    /// The first value of a header.
    pub fn header(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.values(name).next()
    }

    fn values(&self, name: &[u8]) -> impl Iterator<Item = &'a [u8]> {
        let headers = self.headers;
        headers.iter().filter(move |(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }
}

/// A change of a request's headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// A line more.
    Add(String, String),
    /// All lines of that name go.
    Delete(String),
}

/// What rules say of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// It may pass.
    pub is_allowed: bool,
    /// What is changed in it.
    pub edits: Vec<Edit>,
    /// What a rule wants to be said of it.
    pub note: String,
    /// A rule names the Upgrade header that the request has.
    pub names_upgrade: bool,
    /// A rule names the method CONNECT.
    pub names_connect: bool,
}

/// The rules of a set; no rule at all allows everything.
#[derive(Debug)]
pub struct HttpRules(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    method: Option<Matcher>,
    path: Option<Matcher>,
    host: Option<Matcher>,
    headers: Vec<HeaderRule>,
    names_connect: bool,
}

/// A pattern that the whole must match.
#[derive(Debug)]
enum Matcher {
    Exact(Vec<u8>),
    Pattern(Regex),
}

impl Matcher {
    fn new(pattern: &str) -> Result<Self, String> {
        let is_literal = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_:".contains(&byte);
        if pattern.bytes().all(is_literal) {
            return Ok(Self::Exact(pattern.as_bytes().to_vec()));
        }
        full_match(pattern).map(Self::Pattern)
    }

    fn matches(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => exact == bytes,
            Self::Pattern(pattern) => pattern.is_match(bytes),
        }
    }
}

fn holds(matcher: Option<&Matcher>, bytes: &[u8]) -> bool {
    matcher.is_none_or(|matcher| matcher.matches(bytes))
}

impl HttpRules {
    /// Compiles rules, or says which one cannot be.
    pub fn new(rules: &[HttpRule]) -> Result<Self, String> {
        rules.iter().map(Rule::new).collect::<Result<_, _>>().map(Self)
    }

    /// Judges a request; a path with several readings must be allowed in each.
    pub fn judge(&self, request: &Request<'_>) -> Judgement {
        let sent = self.judge_reading(request);
        if !sent.is_allowed {
            return sent;
        }
        let Ok(readings) = readings(request.path) else {
            return Judgement { note: "the path cannot be judged".to_owned(), ..Judgement::default() };
        };
        let is_allowed = |path: &Vec<u8>| self.judge_reading(&Request { path, ..*request }).is_allowed;
        match readings.iter().find(|path| !is_allowed(path)) {
            None => sent,
            Some(path) => {
                let note = format!("a server may read the path as {}", super::text(path));
                Judgement { note, ..Judgement::default() }
            }
        }
    }

    fn judge_reading(&self, request: &Request<'_>) -> Judgement {
        if self.0.is_empty() {
            return Judgement { is_allowed: true, ..Judgement::default() };
        }
        self.0.iter().find_map(|rule| rule.judge(request)).unwrap_or_default()
    }
}

impl Rule {
    fn new(rule: &HttpRule) -> Result<Self, String> {
        let compile = |pattern: &Option<String>| pattern.as_deref().map(Matcher::new).transpose();
        Ok(Self {
            method: compile(&rule.method)?,
            path: compile(&rule.path)?,
            host: compile(&rule.host)?,
            headers: rule.headers.clone(),
            names_connect: rule.method.as_deref().is_some_and(|method| method.contains("CONNECT")),
        })
    }

    /// `None`: the rule does not allow it.
    fn judge(&self, request: &Request<'_>) -> Option<Judgement> {
        let is_match = holds(self.method.as_ref(), request.method)
            && holds(self.path.as_ref(), request.path)
            && self.host.as_ref().is_none_or(|host| matches_host(host, request.host));
        if !is_match {
            return None;
        }
        let mut judgement =
            Judgement { is_allowed: true, names_connect: self.names_connect, ..Judgement::default() };
        for header in &self.headers {
            judgement.names_upgrade |= header.name.eq_ignore_ascii_case("upgrade");
            if !has(request, header) {
                mismatch(header, request, &mut judgement)?;
            }
        }
        Some(judgement)
    }
}

/// Hosts are compared as sent and in lower case, with and without their port.
fn matches_host(pattern: &Matcher, host: &[u8]) -> bool {
    let lower = host.to_ascii_lowercase();
    let bare = |host: &[u8]| {
        let digits = host.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
        let name = &host[..host.len() - digits];
        name.strip_suffix(b":").filter(|_| digits > 0).map(<[u8]>::to_vec)
    };
    pattern.matches(host)
        || pattern.matches(&lower)
        || bare(host).is_some_and(|host| pattern.matches(&host))
        || bare(&lower).is_some_and(|host| pattern.matches(&host))
}

/// True if the request has the header, and the value that the rule names: of several lines, joined by commas.
fn has(request: &Request<'_>, header: &HeaderRule) -> bool {
    let values: Vec<&[u8]> = request.values(header.name.as_bytes()).collect();
    match &header.value {
        None => !values.is_empty(),
        Some(value) => !values.is_empty() && values.join(&b","[..]) == value.as_bytes(),
    }
}

fn mismatch(header: &HeaderRule, request: &Request<'_>, judgement: &mut Judgement) -> Option<()> {
    let HeaderRule { name, value, mismatch } = header;
    let value = || value.clone().unwrap_or_default();
    let is_there = request.header(name.as_bytes()).is_some();
    match mismatch {
        Mismatch::Deny => return None,
        Mismatch::Log => {}
        Mismatch::Add => judgement.edits.push(Edit::Add(name.clone(), value())),
        Mismatch::Delete if is_there => judgement.edits.push(Edit::Delete(name.clone())),
        Mismatch::Delete => {}
        Mismatch::Replace => {
            judgement.edits.push(Edit::Delete(name.clone()));
            judgement.edits.push(Edit::Add(name.clone(), value()));
        }
    }
    let what = if is_there { "has another value" } else { "is missing" };
    if !judgement.note.is_empty() {
        judgement.note.push_str("; ");
    }
    judgement.note.push_str(&format!("header {name} {what}"));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(method: &str, path: &str, host: &str, headers: &[(&str, Mismatch)]) -> HttpRule {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let header = |(line, mismatch): &(&str, Mismatch)| HeaderRule {
            mismatch: *mismatch,
            ..HeaderRule::from_line(line)
        };
        HttpRule {
            method: some(method),
            path: some(path),
            host: some(host),
            headers: headers.iter().map(header).collect(),
        }
    }

    fn judge(
        rules: &[HttpRule],
        method: &str,
        path: &str,
        host: &str,
        headers: &[(&str, &str)],
    ) -> Judgement {
        let rules = HttpRules::new(rules).expect("these rules compile");
        let headers: Vec<(&[u8], &[u8])> =
            headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        let (method, path, host) = (method.as_bytes(), path.as_bytes(), host.as_bytes());
        rules.judge(&Request { method, path, host, headers: &headers })
    }

    #[test]
    fn every_part_of_a_rule_must_hold() {
        let health = rule("GET|HEAD", "/health", "", &[]);
        let api = rule("", "/api/v[0-9]+/.*", r"api\.example\.com", &[("X-Token", Mismatch::Deny)]);
        let rules = [health, api];
        let token = [("x-token", "1")];
        type Case<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, &'a str)], bool);
        let cases: &[Case<'_>] = &[
            ("GET", "/health", "a", &[], true),
            ("GET", "/healthy", "a", &[], false),
            ("GET", "/x/health", "a", &[], false),
            ("GET", "/health?full=1", "a", &[], false),
            ("POST", "/health", "a", &[], false),
            ("GETX", "/health", "a", &[], false),
            ("PUT", "/api/v1/a", "api.example.com", &token, true),
            ("PUT", "/api/v1/a", "API.example.com:8080", &token, true),
            ("PUT", "/api/v1/a", "api.example.com", &[], false),
            ("PUT", "/api/v1/a", "apixexample.com", &token, false),
            ("GET", "/health/../secret", "a", &[], false),
            ("PUT", "/api/v1/%2e%2e/%2e%2e/secret", "api.example.com", &token, false),
            ("PUT", "/api/v1/a%20b", "api.example.com", &token, true),
        ];
        for (method, path, host, headers, is_allowed) in cases {
            let judgement = judge(&rules, method, path, host, headers);
            assert_eq!(judgement.is_allowed, *is_allowed, "{method} {path} {host}: {judgement:?}");
        }
    }

    #[test]
    fn no_rules_and_an_empty_rule_allow_any_request() {
        assert!(judge(&[], "PUT", "/x", "a", &[]).is_allowed);
        assert!(judge(&[HttpRule::default()], "PUT", "/x/../y", "a", &[]).is_allowed);
    }

    #[test]
    fn headers_are_changed_as_the_rule_says() {
        let of = |line: &str, mismatch, headers: &[(&str, &str)]| {
            let judgement = judge(&[rule("", "", "", &[(line, mismatch)])], "GET", "/", "a", headers);
            judgement.is_allowed.then_some(judgement.edits)
        };
        let add = Edit::Add("X-Team".into(), "red".into());
        let delete = Edit::Delete("X-Team".into());
        let (red, blue) = ([("X-team", "red")], [("x-team", "blue")]);
        for mismatch in [Mismatch::Deny, Mismatch::Log, Mismatch::Add, Mismatch::Delete, Mismatch::Replace] {
            assert_eq!(of("X-Team: red", mismatch, &red), Some(vec![]), "{mismatch:?}");
        }
        assert_eq!(of("X-Team: red", Mismatch::Deny, &blue), None);
        assert_eq!(of("X-Team: red", Mismatch::Log, &blue), Some(vec![]));
        assert_eq!(of("X-Team: red", Mismatch::Add, &blue), Some(vec![add.clone()]));
        assert_eq!(of("X-Team: red", Mismatch::Delete, &blue), Some(vec![delete.clone()]));
        assert_eq!(of("X-Team: red", Mismatch::Delete, &[]), Some(vec![]));
        assert_eq!(of("X-Team: red", Mismatch::Replace, &blue), Some(vec![delete, add]));
        assert_eq!(of("X-Team: red", Mismatch::Deny, &[red[0], blue[0]]), None, "two lines are one value");
    }
}
