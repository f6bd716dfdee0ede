//! A file of manifests to documents: YAML or JSON, several to a file, Lists unpacked.
//!
//! The text is split at `---` before anything is parsed, so that a broken document
//! costs only itself. Nothing that a file can hold makes this panic, recurse without
//! end or take memory out of proportion to the file.

use serde_json::Value;

use super::convert::{self, Converted, Field, FieldError, ObjectId};
use super::foreign::{self, ForeignPolicy};
use super::kind::{Kind, Object, ObjectKind};
use super::kinds::NetworkPolicy;
use crate::yaml::{self, YamlError};

/// More documents than this in one file are refused.
const DOCUMENTS_MAX: usize = 20_000;
/// Lists within lists deeper than this are refused.
const LIST_DEPTH_MAX: usize = 4;

/// What one document, or one item of a List, came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Counted from 1; documents without content do not count.
    pub number: usize,
    /// The line of the file where it begins, from 1.
    pub line: usize,
    /// What is in it.
    pub content: Content,
}

/// What a document holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An object of a kind that we know.
    Object(ObjectId, Converted<Object>),
    /// An object of ours that is broken.
    BrokenObject(ObjectId, FieldError),
    /// Cannot be read so far as to say which object it is.
    Broken(FieldError),
    /// An object of a kind that does not concern us: `apiVersion/kind`.
    Unknown(String),
    /// A policy of a kind that is not enforced.
    Foreign(ForeignPolicy),
}

/// Reads all documents of a file.
pub fn read(text: &str) -> Result<Vec<Document>, FieldError> {
    let parts = split(text);
    if parts.len() > DOCUMENTS_MAX {
        return Err(whole(format!("has {} documents; at most {DOCUMENTS_MAX} are read", parts.len())));
    }
    let mut documents = Vec::new();
    for (index, (line, part)) in parts.into_iter().enumerate() {
        let mut contents = Vec::new();
        match parse(part, line) {
            Ok(value) => interpret(&value, None, 0, &mut contents),
            Err(error) => contents.push(Content::Broken(error)),
        }
        documents.extend(contents.into_iter().map(|content| Document { number: index + 1, line, content }));
    }
    Ok(documents)
}

/// The documents that have content, each with the line where it begins.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if line.starts_with("---") && line[3..].chars().next().is_none_or(char::is_whitespace) {
            parts.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, index + 1);
        }
        offset += line.len();
    }
    parts.push((start_line, &text[start..]));
    parts.retain(|(_, part)| has_content(part));
    parts
}

fn has_content(part: &str) -> bool {
    part.lines().any(|line| {
        let line = line.strip_prefix("---").unwrap_or(line).trim();
        !(line.is_empty() || line.starts_with('#') || line.starts_with('%') || line == "...")
    })
}

fn parse(part: &str, line: usize) -> Result<Value, FieldError> {
    yaml::read(part).map_err(|YamlError { message, place }| {
        whole(match place {
            Some((at, column)) => {
                format!("is not YAML: {message} (line {}, column {column})", line + at.saturating_sub(1))
            }
            None => format!("is not YAML: {message}"),
        })
    })
}

/// `implied`: apiVersion and kind that a List of one kind leaves out of its items.
fn interpret(value: &Value, implied: Option<(&str, &str)>, depth: usize, contents: &mut Vec<Content>) {
    let root = Field::root(value, true);
    let header = || {
        let (api_version, kind) = (root.get("apiVersion")?, root.get("kind")?);
        match implied {
            Some(implied) if !kind.is_present() && !api_version.is_present() => Ok(implied),
            _ => Ok((api_version.required_string()?, kind.required_string()?)),
        }
    };
    let (api_version, kind) = match header() {
        Ok(header) => header,
        Err(error) => return contents.push(Content::Broken(error)),
    };
    if let Some(item_kind) =
        kind.strip_suffix("List").filter(|_| value.get("items").is_some_and(Value::is_array))
    {
        if depth == LIST_DEPTH_MAX {
            return contents.push(Content::Broken(whole("is a List within too many Lists".to_owned())));
        }
        let implied = (!item_kind.is_empty()).then_some((api_version, item_kind));
        for item in value["items"].as_array().into_iter().flatten() {
            interpret(item, implied, depth + 1, contents);
        }
        return;
    }
    contents.push(object(&root, value, api_version, kind));
}

fn object(root: &Field, value: &Value, api_version: &str, kind: &str) -> Content {
    let known = Kind::named(kind).filter(|known| has_group(*known, api_version));
    let Some(known) = known else { return unknown(root, format!("{api_version}/{kind}")) };
    let id = match convert::identify(known, root) {
        Ok(id) => id,
        Err(error) => return Content::Broken(error),
    };
    if known.api_version() != api_version {
        if let Some(converted) = known.read_other_version(&id, value) {
            return Content::Object(id, converted);
        }
        let reason = format!("{api_version:?} is not read; write {}", known.api_version());
        return Content::BrokenObject(id, FieldError { path: "apiVersion".to_owned(), reason });
    }
    match known.read(&id, value, true) {
        Ok(converted) => Content::Object(id, converted),
        Err(error) => Content::BrokenObject(id, error),
    }
}

fn unknown(root: &Field, kind: String) -> Content {
    if !foreign::is_policy(&kind) {
        return Content::Unknown(kind);
    }
    let text = |name: &str| {
        let text = root.get("metadata").and_then(|metadata| Ok(metadata.get(name)?.string()?.unwrap_or("")));
        text.unwrap_or_default().to_owned()
    };
    Content::Foreign(ForeignPolicy { kind, namespace: text("namespace"), name: text("name") })
}

fn has_group(kind: Kind, api_version: &str) -> bool {
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    group == kind.group() || (kind == NetworkPolicy::KIND && group == "extensions")
}

fn whole(reason: String) -> FieldError {
    FieldError { path: String::new(), reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn broken(text: &str) -> Vec<String> {
        let describe = |document: Document| match document.content {
            Content::Broken(error) => Some(format!("{}@{}: {error}", document.number, document.line)),
            Content::BrokenObject(id, error) => {
                Some(format!("{}@{}: {id}: {error}", document.number, document.line))
            }
            _ => None,
        };
        read(text).expect("the text has few documents").into_iter().filter_map(describe).collect()
    }

    fn ids(text: &str) -> Vec<String> {
        let id = |document: Document| match document.content {
            Content::Object(id, _) => format!("{}@{} {id}", document.number, document.line),
            other => format!("{}@{} {other:?}", document.number, document.line),
        };
        read(text).expect("the text has few documents").into_iter().map(id).collect()
    }

    #[test]
    fn documents_are_counted_where_there_is_something_in_them() {
        let text = "# a comment\n---\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n\n--- # b\n\
                    {apiVersion: v1, kind: Namespace, metadata: {name: b}}\n...\n";
        assert_eq!(ids(text), ["1@3 Namespace a", "2@9 Namespace b"]);
    }

    #[test]
    fn lists_are_unpacked_with_or_without_kinds() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n\
                    apiVersion: v1\nkind: PodList\nitems:\n- {metadata: {name: b}}\n- {metadata: {name: c, namespace: d}}\n";
        assert_eq!(ids(text), ["1@1 Namespace a", "2@5 Pod default/b", "2@5 Pod d/c"]);
    }

    #[test]
    fn a_broken_document_leaves_its_neighbours_alone() {
        let text = "kind: [\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\na: 1\na: 2\n";
        assert_eq!(ids(text)[1], "2@2 Namespace a");
        assert_eq!(
            broken(text),
            [
                "1@1: is not YAML: unclosed bracket '[' (line 1, column 7)",
                "3@6: is not YAML: the key \"a\" is there twice (line 8, column 1)",
            ]
        );
    }

    #[test]
    fn what_is_no_object_is_said_to_be_none() {
        for (text, expected) in [
            ("just words", "1@1: is a string, must be an object"),
            ("[1, 2]", "1@1: is a list, must be an object"),
            ("kind: Pod", "1@1: apiVersion: is required"),
            ("{apiVersion: v1, kind: Pod}", "1@1: metadata.name: is required"),
            ("{apiVersion: v1, kind: 7}", "1@1: kind: is a number, must be a string"),
            ("{1: 2}", "1@1: apiVersion: is required"),
            ("{[1]: 2}", "1@1: is not YAML: expected string scalar (line 1, column 2)"),
            ("{a: {b: [!x y]}}", "1@1: is not YAML: the tag !x has no meaning here (line 1, column 13)"),
            (
                "{apiVersion: v1, kind: Pod, metadata: {name: ../x}}",
                "1@1: metadata.name: \"../x\" is not a name (lower-case letters, digits, '-' and '.', at most 253 \
                 characters)",
            ),
            (
                "{apiVersion: discovery.k8s.io/v1beta1, kind: EndpointSlice, metadata: {name: a}}",
                "1@1: EndpointSlice default/a: apiVersion: \"discovery.k8s.io/v1beta1\" is not read; write \
                 discovery.k8s.io/v1",
            ),
        ] {
            assert_eq!(broken(text), [expected], "{text}");
        }
    }

    #[test]
    fn a5_a_policy_of_another_version_isolates_what_it_selects() {
        let text = "{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: a}, spec: {podSelector: \
                    {matchLabels: {app: web}}, ingress: [{}]}}";
        let content = read(text).expect("one document").remove(0).content;
        let Content::Object(id, Converted { row: Some(row), doubts, .. }) = content else {
            panic!("{content:?}")
        };
        assert_eq!(id.to_string(), "NetworkPolicy default/a");
        let said = "apiVersion: \"extensions/v1beta1\" is not read; write networking.k8s.io/v1";
        assert_eq!(doubts.iter().map(ToString::to_string).collect::<Vec<_>>(), [said]);
        let policy = row.row::<crate::model::Policy>().expect("a policy");
        let closed =
            Some(crate::model::PolicyDirection { default: crate::model::Action::Deny, rules: vec![] });
        assert_eq!((&policy.ingress, &policy.egress), (&closed, &closed));
    }

    #[test]
    fn other_kinds_are_left_alone() {
        let text = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}";
        let content = Content::Unknown("apps/v1/Deployment".to_owned());
        assert_eq!(read(text), Ok(vec![Document { number: 1, line: 1, content }]));
    }

    #[test]
    fn bombs_are_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let alias = format!("*a{}", level - 1);
            text += &format!("a{level}: &a{level} [{}]\n", vec![alias; 10].join(", "));
        }
        assert_eq!(
            broken(&text),
            ["1@1: is not YAML: its aliases repeat too much, or its values are too deep (line 5, column 45)"]
        );
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(broken(&deep).len(), 1);
        assert!(read(&"--- {}\n".repeat(DOCUMENTS_MAX + 1)).is_err());
    }

    /// One of every kind, as the tests of the converters have them.
    const EVERY_KIND: &str = include_str!("testdata/every_kind.yaml");

    #[test]
    fn every_kind_is_read() {
        assert_eq!(broken(EVERY_KIND), [""; 0]);
        assert_eq!(ids(EVERY_KIND).len(), Kind::ALL.len());
    }

    proptest! {
        #[test]
        fn no_input_panics(text in "\\PC*") {
            let _ = read(&text);
        }

        #[test]
        fn no_mutation_of_a_good_file_panics(
            edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, "[\\PC\n]{0,6}"), 1..8)
        ) {
            let mut text: Vec<char> = EVERY_KIND.chars().collect();
            for (at, removed, inserted) in edits {
                let start = at.index(text.len());
                let end = (start + removed).min(text.len());
                text.splice(start..end, inserted.chars());
                if text.is_empty() {
                    text.push('x');
                }
            }
            let _ = read(&text.into_iter().collect::<String>());
        }

        #[test]
        fn no_swapped_value_panics(at in any::<prop::sample::Index>(), value in prop_oneof![
            Just("null"), Just("true"), Just("-1"), Just("1e400"), Just("18446744073709551615"), Just("\"\""),
            Just("[]"), Just("{}"), Just("[null]"), Just("~"), Just(".nan"), Just("::/0"), Just("99999"), Just("{a: {}}"),
        ]) {
            let lines: Vec<&str> = EVERY_KIND.lines().collect();
            let chosen = at.index(lines.len());
            let swap = |(index, line): (usize, &&str)| match line.split_once(": ") {
                Some((key, _)) if index == chosen => format!("{key}: {value}\n"),
                _ => format!("{line}\n"),
            };
            let _ = read(&lines.iter().enumerate().map(swap).collect::<String>());
        }
    }
}
