//! Reading a document field by field, so that every error names its path.
//!
//! Kubernetes treats `null` like a field that is not there, and so does this.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::Cidr;
use crate::model::Protocol;

/// What is wrong with a document, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The field, as in `spec.ingress[0].from[1].ipBlock.cidr`; empty for the document itself.
    pub path: String,
    /// What it is and what it may be.
    pub reason: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.reason)
    }
}

impl std::error::Error for FieldError {}

/// The outcome of reading a field.
pub type Result<T> = std::result::Result<T, FieldError>;

/// One field of a document, there or not.
#[derive(Clone, Debug)]
pub struct Field<'a> {
    path: String,
    value: Option<&'a Value>,
    is_strict: bool,
}

impl<'a> Field<'a> {
    /// The whole document. A strict one may hold no field that its reader does not know.
    pub fn root(value: &'a Value, is_strict: bool) -> Self {
        Self { path: String::new(), value: Some(value), is_strict }
    }

    /// The document was written by a person and not yet checked by an API server.
    pub fn is_strict(&self) -> bool {
        self.is_strict
    }

    /// The field `key` of this object.
    pub fn get(&self, key: &str) -> Result<Field<'a>> {
        let value = match self.value {
            None => None,
            Some(Value::Object(fields)) => fields.get(key).filter(|value| !value.is_null()),
            Some(_) => return Err(self.wanted("an object")),
        };
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Ok(Field { path, value, is_strict: self.is_strict })
    }

    /// Its value; `None` where it is absent or null.
    pub(super) fn value(&self) -> Option<&'a Value> {
        self.value
    }

    /// True unless the field is absent or null.
    pub fn is_present(&self) -> bool {
        self.value.is_some()
    }

    /// The error that this field has `reason`.
    pub fn error(&self, reason: impl Into<String>) -> FieldError {
        FieldError { path: self.path.clone(), reason: reason.into() }
    }

    /// Refuses fields other than `known` in a strict document: a misspelt field would otherwise
    /// quietly mean something else.
    pub fn only(&self, known: &[&str]) -> Result<()> {
        if self.is_strict { self.only_known(known) } else { Ok(()) }
    }

    /// Refuses fields other than `known` wherever the document is from: one that a newer API server
    /// has may narrow what a policy allows.
    pub fn only_known(&self, known: &[&str]) -> Result<()> {
        let Some(Value::Object(fields)) = self.value else { return Ok(()) };
        match fields.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(self.get(key)?.error(format!("unknown field; known are {}", known.join(", ")))),
            None => Ok(()),
        }
    }

    /// A string.
    pub fn string(&self) -> Result<Option<&'a str>> {
        match self.value {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wanted("a string")),
        }
    }

    /// A string that must be there and not be empty.
    pub fn required_string(&self) -> Result<&'a str> {
        match self.string()? {
            Some("") | None => Err(self.error("is required")),
            Some(text) => Ok(text),
        }
    }

    /// True or false.
    pub fn boolean(&self) -> Result<Option<bool>> {
        match self.value {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wanted("true or false")),
        }
    }

    /// A port number, 1 to 65535.
    pub fn port(&self) -> Result<Option<u16>> {
        match self.value {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_i64() {
                Some(port @ 1..=65535) => Ok(Some(port as u16)),
                _ => Err(self.error(format!("{number} is not a port number (1 to 65535)"))),
            },
            Some(_) => Err(self.wanted("a port number (1 to 65535)")),
        }
    }

    /// A port number; 0 is as if it were not there.
    pub fn port_or_zero(&self) -> Result<Option<u16>> {
        match self.value {
            Some(Value::Number(number)) if number.as_u64() == Some(0) => Ok(None),
            _ => self.port(),
        }
    }

    /// A whole number that is not negative.
    pub fn unsigned(&self) -> Result<Option<u64>> {
        match self.value {
            None => Ok(None),
            Some(Value::Number(number)) if number.is_u64() => Ok(number.as_u64()),
            Some(_) => Err(self.wanted("a whole number that is not negative")),
        }
    }

    /// The elements of a list; `None` when there is no list.
    pub fn items(&self) -> Result<Option<Vec<Field<'a>>>> {
        match self.value {
            None => Ok(None),
            Some(Value::Array(items)) => {
                Ok(Some(items.iter().enumerate().map(|(n, item)| self.item(n, item)).collect()))
            }
            Some(_) => Err(self.wanted("a list")),
        }
    }

    fn item(&self, index: usize, value: &'a Value) -> Field<'a> {
        let value = Some(value).filter(|value| !value.is_null());
        Field { path: format!("{}[{index}]", self.path), value, is_strict: self.is_strict }
    }

    /// The fields of an object, by key.
    pub fn entries(&self) -> Result<Vec<(&'a str, Field<'a>)>> {
        match self.value {
            None => Ok(Vec::new()),
            Some(Value::Object(fields)) => {
                fields.keys().map(|key| Ok((key.as_str(), self.get(key)?))).collect()
            }
            Some(_) => Err(self.wanted("an object")),
        }
    }

    /// An object of strings, as labels are.
    pub fn strings(&self) -> Result<BTreeMap<String, String>> {
        let text =
            |(key, field): (&str, Field<'a>)| Ok((key.to_owned(), field.string()?.unwrap_or("").to_owned()));
        self.entries()?.into_iter().map(text).collect()
    }

    /// An IP address.
    pub fn address(&self) -> Result<IpAddr> {
        let text = self.required_string()?;
        let address: IpAddr =
            text.parse().map_err(|_| self.error(format!("{text:?} is not an IPv4 or IPv6 address")))?;
        Ok(address.to_canonical())
    }

    /// A range of addresses; bits behind the prefix do not count, as upstream has it.
    pub fn cidr(&self) -> Result<IpNet> {
        let cidr: Cidr = self.required_string()?.parse().map_err(|reason: String| self.error(reason))?;
        Ok(cidr.into())
    }

    /// `protocol`, TCP when absent.
    pub fn protocol(&self) -> Result<Protocol> {
        match self.string()? {
            None | Some("" | "TCP") => Ok(Protocol::Tcp),
            Some("UDP") => Ok(Protocol::Udp),
            Some("SCTP") => Ok(Protocol::Sctp),
            Some(other) => Err(self.error(format!("{other:?} is not TCP, UDP or SCTP"))),
        }
    }

    fn wanted(&self, wanted: &str) -> FieldError {
        let is = match self.value {
            None | Some(Value::Null) => "absent",
            Some(Value::Bool(_)) => "true or false",
            Some(Value::Number(_)) => "a number",
            Some(Value::String(_)) => "a string",
            Some(Value::Array(_)) => "a list",
            Some(Value::Object(_)) => "an object",
        };
        self.error(format!("is {is}, must be {wanted}"))
    }
}
