//! Reading a field by a derived type, with the words that reading by hand has.

use std::str::FromStr;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Error as _};
use serde_json::Value;

use super::{Field, Result};

impl Field<'_> {
    /// The field as a `T`. What is absent is an empty object; nulls in it are as if they were not there.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        let value = self.value().map_or_else(|| Value::Object(Default::default()), without_nulls);
        serde_path_to_error::deserialize(value).map_err(|error| {
            let inner = error.path().to_string();
            let (key, reason) = in_our_words(&error.inner().to_string());
            // An unknown or missing field is said of the object that it is or should be in.
            let parts = [Some(inner).filter(|path| path != "."), key];
            let mut at = self.error(reason);
            for part in parts.into_iter().flatten() {
                let is_said = at.path == part || at.path.ends_with(&format!(".{part}"));
                if !is_said || part.contains(['.', '[']) {
                    let dot = if at.path.is_empty() || part.starts_with('[') { "" } else { "." };
                    at.path = format!("{}{dot}{part}", at.path);
                }
            }
            at
        })
    }
}

/// Kubernetes treats `null` like a field that is not there.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let there = fields.iter().filter(|(_, value)| !value.is_null());
            Value::Object(there.map(|(key, value)| (key.clone(), without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}

/// What serde says, in the words of [`Field`]; with the field that it names, if that is not yet in the path.
fn in_our_words(text: &str) -> (Option<String>, String) {
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    if let Some(types) = text.strip_prefix("invalid type: ")
        && let Some((given, wanted)) = types.split_once(", expected ")
    {
        return (None, format!("is {}, must be {}", word(given), word(wanted)));
    }
    if let Some(field) = text.strip_prefix("missing field ") {
        return (quoted(field).into_iter().next(), "is required".to_owned());
    }
    if text.starts_with("unknown field ") {
        let mut names = quoted(text).into_iter();
        let field = names.next();
        return (field, format!("unknown field; known are {}", names.collect::<Vec<_>>().join(", ")));
    }
    (None, text.to_owned())
}

fn word(serdes: &str) -> &str {
    match serdes.split([' ', '`']).next().unwrap_or_default() {
        "null" | "unit" => "absent",
        "boolean" => "true or false",
        "integer" | "floating" => "a number",
        "string" => "a string",
        "sequence" => "a list",
        "map" | "struct" => "an object",
        "u8" | "u16" | "u32" | "u64" => "a whole number that is not negative",
        _ => match serdes {
            "a sequence" => "a list",
            "a map" => "an object",
            "a boolean" => "true or false",
            other => other,
        },
    }
}

/// A range of addresses, as [`Field::cidr`] reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr(IpNet);

impl From<Cidr> for IpNet {
    fn from(cidr: Cidr) -> Self {
        cidr.0
    }
}

impl FromStr for Cidr {
    type Err = String;

    /// Bits behind the prefix do not count, as upstream has it.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = |_| format!("{text:?} is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32");
        match text.parse::<IpNet>().map_err(wrong)? {
            IpNet::V6(net) if net.prefix_len() >= 96 && net.addr().to_ipv4_mapped().is_some() => {
                let address = net.addr().to_canonical();
                let net = IpNet::new(address, net.prefix_len() - 96);
                Ok(Self(net.map_err(|error| format!("{text:?}: {error}"))?.trunc()))
            }
            net => Ok(Self(net.trunc())),
        }
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::convert::FieldError;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Outer {
        #[serde(default, rename = "cidrs")]
        _cidrs: Vec<Cidr>,
        #[serde(default, rename = "inner")]
        _inner: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Inner {
        #[serde(rename = "isIt")]
        _is_it: bool,
        #[serde(default, rename = "port")]
        _port: u16,
    }

    #[test]
    fn derived_types_say_where_what_is_given_and_what_is_allowed() {
        for (yaml, expected) in [
            ("7", "spec: is a number, must be an object"),
            ("{cidrs: 10.0.0.0/8}", "spec.cidrs: is a string, must be a list"),
            ("{cidrs: [10.0.0.0/8, 7]}", "spec.cidrs[1]: is a number, must be a string"),
            (
                "{cidrs: [10.0.0.0]}",
                "spec.cidrs[0]: \"10.0.0.0\" is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32",
            ),
            ("{cdrs: []}", "spec.cdrs: unknown field; known are cidrs, inner"),
            ("{inner: [{}]}", "spec.inner[0].isIt: is required"),
            ("{inner: [{isIt: true}, {isIt: 1}]}", "spec.inner[1].isIt: is a number, must be true or false"),
            (
                "{inner: [{isIt: true, port: http}]}",
                "spec.inner[0].port: is a string, must be a whole number that is not negative",
            ),
            ("{inner: [{isIt: true, name: a}]}", "spec.inner[0].name: unknown field; known are isIt, port"),
        ] {
            let value: Value = crate::yaml::read(&format!("{{spec: {yaml}}}")).expect("YAML");
            let root = Field::root(&value, true);
            let read = root.get("spec").expect("an object").read::<Outer>();
            assert_eq!(read.map_err(|error: FieldError| error.to_string()).expect_err(yaml), expected);
        }
        let value: Value =
            crate::yaml::read("{spec: {cidrs: null, inner: [{isIt: true, port: null}]}}").expect("YAML");
        let root = Field::root(&value, true);
        assert!(root.get("spec").expect("an object").read::<Outer>().is_ok());
        assert!(root.get("absent").expect("an object").read::<Outer>().is_ok());
    }
}
