//! A file of manifests, judged without applying it.

use super::convert::FieldError;
use super::document::{self, Content};
use super::health::closed;
use super::kind::Kind;

/// A document of a file, and what is to be said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Counted from 1.
    pub document: usize,
    /// Where it begins.
    pub line: usize,
    /// The object, where it could be read so far.
    pub object: Option<String>,
    /// It is of a kind that Weir enforces or serves.
    pub is_known: bool,
    /// What is wrong: it is skipped, or closed for that part.
    pub errors: Vec<String>,
    /// What is left out of it.
    pub warnings: Vec<String>,
}

/// Reads all documents of a file, as the directory of manifests does.
pub fn check(text: &str) -> Result<Vec<Checked>, FieldError> {
    let documents = document::read(text.trim_start_matches('\u{feff}'))?;
    let checked = |document: document::Document| {
        let mut checked = Checked {
            document: document.number,
            line: document.line,
            object: None,
            is_known: true,
            errors: Vec::new(),
            warnings: Vec::new(),
        };
        match document.content {
            Content::Object(id, converted) => {
                checked.errors = converted.doubts.iter().map(|doubt| closed(id.kind, doubt)).collect();
                checked.warnings = converted.warnings.iter().map(ToString::to_string).collect();
                checked.object = Some(id.to_string());
            }
            Content::BrokenObject(id, error) => {
                checked.object = Some(id.to_string());
                checked.errors.push(format!("{error}; skipped"));
            }
            Content::Broken(error) => checked.errors.push(format!("{error}; skipped")),
            Content::Unknown(kind) => {
                checked.is_known = false;
                checked.warnings.push(format!("{kind} is not read"));
            }
            Content::Foreign(policy) => {
                checked.is_known = false;
                checked.errors.push(format!("{} is a policy that Weir does not enforce", policy.kind));
            }
        }
        checked
    };
    Ok(documents.into_iter().map(checked).collect())
}

/// The kinds that are read, for messages.
pub fn known_kinds() -> Vec<String> {
    Kind::ALL.iter().map(|kind| format!("{}/{kind}", kind.api_version())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_is_judged() {
        let text = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\nspec: {podSelector: {}}\n\
                    ---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: b}\nspec: {ingress: 7}\n\
                    ---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: c}\n\
                    ---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n";
        let said: Vec<(usize, usize, bool, usize, usize)> = check(text)
            .expect("YAML")
            .iter()
            .map(|it| (it.document, it.line, it.is_known, it.errors.len(), it.warnings.len()))
            .collect();
        assert_eq!(
            said,
            [(1, 1, true, 0, 0), (2, 5, true, 1, 0), (3, 10, false, 1, 0), (4, 14, false, 0, 1)]
        );
        let none = check("{").expect("the document is broken, not the file");
        assert_eq!(none[0].errors.len(), 1);
    }
}
