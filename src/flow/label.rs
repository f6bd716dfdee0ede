//! Label filters: the text form of Kubernetes' label selectors.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::model::{Requirement, Selector};

/// `app=web,tier!=db`, `app in (a,b)`, `!legacy`, `reserved:world`: every part must hold. A key may
/// have a source before it (`k8s:app`); without one, any source does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelPattern {
    selector: Selector,
}

impl LabelPattern {
    /// True if the labels of a party (`source:key=value`) meet every part.
    pub fn matches(&self, labels: &[impl AsRef<str>]) -> bool {
        let mut map = BTreeMap::new();
        for label in labels {
            let label = label.as_ref();
            let (key, value) = label.split_once('=').unwrap_or((label, ""));
            map.insert(key.to_owned(), value.to_owned());
            if let Some((_, key)) = key.split_once(':') {
                map.insert(key.to_owned(), value.to_owned());
            }
        }
        self.selector.matches(&map)
    }
}

impl FromStr for LabelPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let requirements = split_outside_parentheses(text).map(requirement).collect::<Result<_, _>>()?;
        Ok(Self { selector: Selector { requirements } })
    }
}

fn split_outside_parentheses(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    text.split(move |character| {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        character == ',' && depth == 0
    })
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let text = text.trim();
    let values = |text: &str| -> Result<_, String> {
        let inner = text.trim().strip_prefix('(').and_then(|text| text.strip_suffix(')'));
        let inner = inner.ok_or_else(|| format!("values in parentheses must follow, not {text:?}"))?;
        Ok(inner.split(',').map(|value| value.trim().to_owned()).collect())
    };
    if let Some((key, rest)) = text.split_once(" notin ") {
        return Ok(Requirement::NotIn(key_of(key)?, values(rest)?));
    }
    if let Some((key, rest)) = text.split_once(" in ") {
        return Ok(Requirement::In(key_of(key)?, values(rest)?));
    }
    if let Some((key, value)) = text.split_once("!=") {
        return Ok(Requirement::NotIn(key_of(key)?, [value.trim().to_owned()].into()));
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return Ok(Requirement::In(key_of(key)?, [value.trim().to_owned()].into()));
    }
    match text.strip_prefix('!') {
        Some(key) => Ok(Requirement::DoesNotExist(key_of(key)?)),
        None => Ok(Requirement::Exists(key_of(text)?)),
    }
}

fn key_of(text: &str) -> Result<String, String> {
    let key = text.trim();
    // Hubble's word for "of any source".
    let key = key.strip_prefix("any:").unwrap_or(key);
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if key.is_empty() || !key.chars().all(is_allowed) {
        return Err(format!(
            "{key:?} is no label key; write key=value, key!=value, key, !key or key in (a,b)"
        ));
    }
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn selectors_as_kubernetes_writes_them() {
        let labels: Vec<Arc<str>> =
            ["k8s:app=web", "k8s:tier=front", "reserved:world"].into_iter().map(Arc::from).collect();
        for (text, expected) in [
            ("app=web", true),
            ("app==web", true),
            ("app=db", false),
            ("k8s:app=web", true),
            ("other:app=web", false),
            ("app!=db", true),
            ("absent!=db", true),
            ("app", true),
            ("!app", false),
            ("!absent", true),
            ("reserved:world", true),
            ("world", true),
            ("app in (db, web)", true),
            ("app in (db,web),tier notin (back)", true),
            ("app notin (db,web)", false),
            ("app=web,tier=back", false),
        ] {
            let pattern: LabelPattern = text.parse().expect(text);
            assert_eq!(pattern.matches(&labels), expected, "{text}");
        }
        for text in ["", "a=b,,c", "app in web", "a b", "=x"] {
            assert!(text.parse::<LabelPattern>().is_err(), "{text:?}");
        }
    }
}
