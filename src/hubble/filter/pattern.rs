//! The small languages that filters are written in.

use std::net::IpAddr;

use ipnet::IpNet;
use regex::{Regex, RegexBuilder};

use super::BadFilter;

/// A compiled expression may take so many bytes: clients write them.
const REGEX_BYTES_MAX: usize = 256 * 1024;

/// `namespace/prefix`, `namespace/` or `prefix`.
pub struct NamePrefix {
    namespace: String,
    prefix: String,
}

impl NamePrefix {
    /// From the text of a filter.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, BadFilter> {
        if text.is_empty() {
            return Err(BadFilter { field, reason: "a name must not be empty".to_owned() });
        }
        let (namespace, prefix) = text.split_once('/').unwrap_or(("", text));
        Ok(Self { namespace: namespace.to_owned(), prefix: prefix.to_owned() })
    }

    /// True for this namespace and name. What has neither is matched by nothing.
    pub fn matches(&self, namespace: &str, name: &str) -> bool {
        !(namespace.is_empty() && name.is_empty())
            && name.starts_with(&self.prefix)
            && (self.namespace.is_empty() || self.namespace == namespace)
    }
}

/// An address or a prefix.
pub fn network(field: &'static str, text: &str) -> Result<IpNet, BadFilter> {
    text.parse::<IpAddr>()
        .map(IpNet::from)
        .or_else(|_| text.parse())
        .map_err(|_| BadFilter { field, reason: format!("{text:?} is no address or prefix") })
}

/// A port's number.
pub fn port(field: &'static str, text: &str) -> Result<u16, BadFilter> {
    text.parse().map_err(|_| BadFilter { field, reason: format!("{text:?} is no port") })
}

/// A regular expression that may match anywhere.
pub fn regex(field: &'static str, text: &str) -> Result<Regex, BadFilter> {
    RegexBuilder::new(text)
        .size_limit(REGEX_BYTES_MAX)
        .build()
        .map_err(|error| BadFilter { field, reason: error.to_string() })
}

/// A DNS name with `*` for any part of it.
pub fn fqdn(field: &'static str, text: &str) -> Result<Regex, BadFilter> {
    regex(field, &format!(r"\A{}\z", glob(field, text)?))
}

/// `node`, `cluster/node`, `cluster/` or `/node`, with `*`; the name it is held against has a cluster.
pub fn node_name(field: &'static str, text: &str) -> Result<Regex, BadFilter> {
    let (cluster, node) = text.split_once('/').unwrap_or(("", text));
    let part = |part: &str| match part {
        "" => Ok("[-0-9_a-z.]+".to_owned()),
        part => glob(field, part),
    };
    if text.is_empty() {
        return Err(BadFilter { field, reason: "a pattern must not be empty".to_owned() });
    }
    regex(field, &format!(r"\A{}/{}\z", part(cluster)?, part(node)?))
}

fn glob(field: &'static str, text: &str) -> Result<String, BadFilter> {
    let trimmed = text.trim();
    let name = trimmed.strip_suffix('.').unwrap_or(trimmed).to_ascii_lowercase();
    if name.is_empty() || name.ends_with('.') {
        return Err(BadFilter { field, reason: format!("{text:?} is no name") });
    }
    let mut out = String::new();
    for character in name.chars() {
        match character {
            '.' => out.push_str(r"\."),
            '*' => out.push_str("[-.0-9a-z]*"),
            '-' | '_' | '0'..='9' | 'a'..='z' => out.push(character),
            other => return Err(BadFilter { field, reason: format!("{other:?} cannot be in a name") }),
        }
    }
    Ok(out)
}

/// `404`, `4+` (any that begins with 4) or `50+`.
pub struct StatusCode {
    digits: String,
    is_prefix: bool,
}

impl StatusCode {
    /// From the text of a filter.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, BadFilter> {
        let (digits, is_prefix) = match text.strip_suffix('+') {
            Some(digits) => (digits, true),
            None => (text, false),
        };
        let is_right = digits.bytes().all(|byte| byte.is_ascii_digit())
            && (if is_prefix { (1..=2).contains(&digits.len()) } else { digits.len() == 3 });
        match is_right {
            true => Ok(Self { digits: digits.to_owned(), is_prefix }),
            false => Err(BadFilter { field, reason: format!("{text:?} is neither 404 nor 4+") }),
        }
    }

    /// True for this status code.
    pub fn matches(&self, code: u32) -> bool {
        let code = code.to_string();
        if self.is_prefix { code.starts_with(&self.digits) } else { code == self.digits }
    }
}
