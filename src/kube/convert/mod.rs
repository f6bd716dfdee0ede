//! Kubernetes objects to `model` types, at the edge and nowhere else: what all kinds have in common.
//!
//! Both sources end here with a JSON value, so that the same object means the same
//! and is refused with the same words whether an API server or a file gave it.
//! What is in an object of one kind is said in [`super::kinds`].

mod field;
#[cfg(test)]
mod tests;
mod typed;

use std::fmt;

pub use crate::model::names::{self, is_object_name};
pub use field::{Field, FieldError, Result};
pub use typed::Cidr;

use super::kind::Kind;
use crate::model::{Labels, Marks, ObjectKey, Priority, Visibility};

/// Which object: kind, namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Its kind.
    pub kind: Kind,
    /// Namespace, empty for cluster-scoped kinds, and name.
    pub key: ObjectKey,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.key.namespace {
            "" => write!(f, "{} {}", self.kind, self.key.name),
            _ => write!(f, "{} {}", self.kind, self.key),
        }
    }
}

/// What came of a document; `T` is a row, or one of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted<T> {
    /// The row; `None` for an object that is well formed and does not concern us, such as a
    /// Service of type ExternalName.
    pub row: Option<T>,
    /// What was left out of it, and why.
    pub warnings: Vec<FieldError>,
    /// What could not be read of it and is taken for closed.
    pub doubts: Vec<FieldError>,
}

/// So many doubts about one object are said; who mends them sees the next ones.
const DOUBTS_MAX: usize = 20;

/// What is to be said of an object.
#[derive(Default)]
pub struct Notes {
    /// What was left out of it: it was never more than a hint.
    pub warnings: Vec<FieldError>,
    /// What could not be read of it and is taken for closed.
    pub doubts: Vec<FieldError>,
    count: usize,
}

impl Notes {
    /// The value, or a doubt.
    pub(super) fn read<T>(&mut self, outcome: Result<T>) -> Option<T> {
        outcome.map_err(|doubt| self.doubt(doubt)).ok()
    }

    pub(super) fn doubt(&mut self, doubt: FieldError) {
        self.count += 1;
        // Each field of what is no object fails with the same words.
        if self.doubts.len() < DOUBTS_MAX && self.doubts.last() != Some(&doubt) {
            self.doubts.push(doubt);
        }
    }

    /// How many doubts there were, whether they are kept or not.
    pub(super) fn doubt_count(&self) -> usize {
        self.count
    }

    /// The doubts, for people.
    pub(super) fn texts(&self) -> Vec<String> {
        self.doubts.iter().map(ToString::to_string).collect()
    }
}

/// Which object a document is about, as far as it says so.
pub fn identify(kind: Kind, document: &Field) -> Result<ObjectId> {
    let metadata = document.get("metadata")?;
    let name = metadata.get("name")?;
    let text = name.required_string()?;
    if !is_object_name(text) {
        return Err(name.error(format!(
            "{text:?} is not a name (lower-case letters, digits, '-' and '.', at most 253 characters)"
        )));
    }
    let namespace = metadata.get("namespace")?;
    let namespace = match namespace.string()? {
        _ if !kind.is_namespaced() => "",
        None | Some("") => "default",
        Some(text) if names::is_dns_label(text) => text,
        Some(text) => {
            return Err(namespace.error(format!(
                "{text:?} is not a namespace's name (lower-case letters, digits and '-', at most 63 characters)"
            )));
        }
    };
    Ok(ObjectId { kind, key: ObjectKey::new(namespace, text) })
}

/// `metadata.labels`.
pub(super) fn labels(document: &Field) -> Result<Labels> {
    let field = document.get("metadata")?.get("labels")?;
    let labels = field.strings()?;
    check_labels(&field, &labels)?;
    Ok(labels)
}

/// What the annotations of an object ask of policy. What cannot be read of them asks for nothing.
pub(super) fn marks(document: &Field, warnings: &mut Vec<FieldError>) -> Marks {
    let of = |name: &str| {
        let field = document.get("metadata")?.get("annotations")?.get(name)?;
        Ok((field.string()?.map(str::to_owned), field))
    };
    let mut marks = Marks::default();
    let mut read = |name: &str, take: &mut dyn FnMut(&str) -> bool| match of(name) {
        Ok((None, _)) => {}
        Ok((Some(text), field)) if !take(&text) => {
            warnings.push(field.error(format!("{text:?} is not read")));
        }
        Ok(_) => {}
        Err(error) => warnings.push(error),
    };
    read("weir.dev/audit", &mut |text| {
        marks.audit = text == "true";
        matches!(text, "true" | "false")
    });
    read("weir.dev/deny-response", &mut |text| {
        marks.reject = match text {
            "reject" => Some(true),
            "drop" => Some(false),
            _ => None,
        };
        marks.reject.is_some()
    });
    read("weir.dev/visibility", &mut |text| {
        let read = Visibility::read(text);
        marks.visibility = read.unwrap_or_default();
        read.is_some()
    });
    read("kubernetes.io/egress-bandwidth", &mut |text| {
        marks.egress_bandwidth = bytes_per_second(text);
        marks.egress_bandwidth.is_some()
    });
    read("kubernetes.io/ingress-bandwidth", &mut |text| {
        marks.ingress_bandwidth = bytes_per_second(text);
        marks.ingress_bandwidth.is_some()
    });
    read("bandwidth.cilium.io/priority", &mut |text| {
        marks.priority = Priority::read(text);
        marks.priority.is_some()
    });
    marks
}

/// A rate in bits a second, as a quantity of Kubernetes: 1k to 1P, as its own plugin has it.
fn bytes_per_second(text: &str) -> Option<u64> {
    let split = text.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor = match suffix {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => f64::from(1 << 10),
        "Mi" => f64::from(1 << 20),
        "Gi" => f64::from(1 << 30),
        "Ti" => f64::from(1 << 30) * f64::from(1 << 10),
        _ => return None,
    };
    let bits = number.parse::<f64>().ok()? * factor;
    (1e3..=1e15).contains(&bits).then_some((bits / 8.0) as u64)
}

/// Refuses labels that no API server would store; only strict documents need the check.
pub(super) fn check_labels(field: &Field, labels: &Labels) -> Result<()> {
    if !field.is_strict() {
        return Ok(());
    }
    for (key, value) in labels {
        if !names::is_label_key(key) {
            return Err(field.error(format!("{key:?} is not a label key")));
        }
        if !names::is_label_value(value) {
            return Err(field.get(key)?.error(format!(
                "{value:?} is not a label value (at most 63 letters, digits, '-', '_' and '.')"
            )));
        }
    }
    Ok(())
}

/// The elements of a list, none when it is absent.
pub(super) fn items<'a>(field: &Field<'a>) -> Result<Vec<Field<'a>>> {
    Ok(field.items()?.unwrap_or_default())
}

#[cfg(test)]
mod rate_tests {
    use super::bytes_per_second;

    #[test]
    fn rates_are_quantities_of_bits() {
        assert_eq!(bytes_per_second("10M"), Some(1_250_000));
        assert_eq!(bytes_per_second("1Gi"), Some(134_217_728));
        assert_eq!(bytes_per_second("1.5k"), Some(187));
        assert_eq!(bytes_per_second("8000"), Some(1000));
        for nonsense in ["", "M", "10 M", "-1M", "100m", "1", "fast", "1e400", "NaN", "inf"] {
            assert_eq!(bytes_per_second(nonsense), None, "{nonsense}");
        }
    }
}
