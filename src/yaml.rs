//! YAML in and out: the only module that knows the parser (docs/decisions/401-yaml.md).
//!
//! YAML 1.2 is read, so `yes` and `0755` are strings. Nothing that a text can hold makes this panic,
//! recurse without end or take memory out of proportion to the text: anchors may repeat what is
//! bounded, and depth is bounded.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_saphyr::Error;

/// Values deeper than this are refused.
const DEPTH_MAX: usize = 64;
/// Values that aliases may add to those that are written out.
const REPEATED_MAX: usize = 100_000;
/// Bytes that aliases may add to those that are written out.
const REPEATED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Why a text could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct YamlError {
    /// What is wrong, without the place.
    pub message: String,
    /// Line and column, from 1, where they are known.
    pub place: Option<(usize, usize)>,
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Some((line, column)) => write!(f, "{} (line {line}, column {column})", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for YamlError {}

/// Reads a text of one document.
pub fn read<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    serde_saphyr::from_str_with_options(text, options(text)).map_err(|error| explained(&error))
}

/// Reads every document that has content.
pub fn read_all<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, YamlError> {
    serde_saphyr::from_multiple_with_options(text, options(text)).map_err(|error| explained(&error))
}

/// Writes one document, without a `---`. What a reader of YAML 1.1 (kubectl) would not take for a
/// string is quoted.
pub fn write(value: &impl Serialize) -> Result<String, YamlError> {
    serde_saphyr::to_string(value).map_err(|error| YamlError { message: error.to_string(), place: None })
}

fn options(text: &str) -> serde_saphyr::Options {
    // A value takes a byte at least; its start, its end and its key are three events at most.
    let values = text.len().saturating_add(REPEATED_MAX);
    let budget = serde_saphyr::budget! {
        max_depth: DEPTH_MAX,
        max_nodes: values,
        max_events: values.saturating_mul(3),
        max_total_scalar_bytes: text.len().saturating_add(REPEATED_BYTES_MAX),
        max_documents: text.len().saturating_add(1),
        // One anchor may be used many times: what that amounts to is bounded above.
        enforce_alias_anchor_ratio: false,
    };
    serde_saphyr::options! {
        budget: budget,
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: REPEATED_MAX },
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    }
}

fn explained(error: &Error) -> YamlError {
    let error = error.without_snippet();
    let place = error.location().map(|at| (at.line() as usize, at.column() as usize));
    YamlError { message: message(error), place }
}

fn message(error: &Error) -> String {
    match error {
        // What went wrong within the text that an alias repeats.
        Error::AliasError { error, .. } => message(error),
        Error::DuplicateMappingKey { key: Some(key), .. } => format!("the key {key:?} is there twice"),
        Error::UnsupportedTag { tag, .. } => format!("the tag {tag} has no meaning here"),
        Error::NullIntoString { .. } => "null stands where a string must be; quote it".to_owned(),
        Error::MultipleDocuments { .. } => "there is more than one document".to_owned(),
        Error::Budget { .. } | Error::AliasReplayLimitExceeded { .. } => {
            "its aliases repeat too much, or its values are too deep".to_owned()
        }
        error => {
            let text = error.to_string();
            text[..text.find(" at line ").unwrap_or(text.len())].to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn scalars_are_those_of_yaml_1_2() {
        let text =
            "a: yes\nb: on\nc: true\nd: 0755\ne: 1_000\nf: 0x1F\ng: ~\nh: 1:30\ni: 2001-01-01\nj: 1.5\n";
        let expected = json!({"a": "yes", "b": "on", "c": true, "d": "0755", "e": "1_000", "f": 31, "g": null,
                              "h": "1:30", "i": "2001-01-01", "j": 1.5});
        assert_eq!(read::<Value>(text), Ok(expected));
        assert_eq!(read::<Value>("i: 18446744073709551615"), Ok(json!({"i": u64::MAX})));
    }

    #[test]
    fn anchors_and_merges_are_followed() {
        let text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n";
        let expected = json!({"base": {"a": 1, "b": 2}, "more": {"a": 1, "b": 3}});
        assert_eq!(read::<Value>(text), Ok(expected));
        // One anchor, many uses.
        let many = format!("base: &base x\nall: [{}]\n", vec!["*base"; 5000].join(", "));
        assert_eq!(read::<Value>(&many).expect("not too many")["all"].as_array().map(Vec::len), Some(5000));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (text, message) in [
            ("a: 1\na: 2\n", "the key \"a\" is there twice (line 2, column 1)"),
            ("a: !x y\n", "the tag !x has no meaning here (line 1, column 7)"),
            ("a: *x\n", "alias references unknown anchor (line 1, column 4)"),
            ("~: 1\n", "null stands where a string must be; quote it (line 1, column 1)"),
        ] {
            assert_eq!(
                read::<Value>(text).map_err(|error| error.to_string()),
                Err(message.to_owned()),
                "{text}"
            );
        }
    }

    #[test]
    fn large_texts_are_read_and_small_ones_with_large_meanings_are_not() {
        let large = "- {a: 1, b: [x, y, z], c: {d: e}}\n".repeat(30_000);
        assert_eq!(read::<Vec<Value>>(&large).expect("only large").len(), 30_000);
        let long = "x".repeat(1_000_000);
        let copies = format!("a: &a {long}\nb: [{}]\n", vec!["*a"; 1000].join(", "));
        assert!(read::<Value>(&copies).is_err());
        let deep = |levels| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(read::<Value>(&deep(60)).is_ok());
        assert!(read::<Value>(&deep(100)).is_err());
    }

    #[test]
    fn what_is_written_is_read_back_and_no_reader_takes_it_for_another_type() {
        let strings =
            ["yes", "on", "y", "1.0", "0x1", "null", "", " x", "a: b", "#x", "*x", "~", "0755", "1e3", "<<"];
        let value =
            json!({"strings": strings, "text": "two\nlines\n", "long": "word ".repeat(40), "empty": {}});
        let text = write(&value).expect("plain data");
        assert_eq!(read(&text), Ok(value));
        for ambiguous in ["yes", "on", "y", "0755", "~"] {
            assert!(text.contains(&format!("- \"{ambiguous}\"\n")), "{text}");
        }
    }
}
