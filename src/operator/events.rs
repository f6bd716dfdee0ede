//! Events that say what is wrong with an object.

use kube::runtime::events::{Event, EventType};

/// A note has at most 1024 bytes (events.k8s.io/v1, `note`).
const NOTE_MAX: usize = 1024;

/// A warning: a reason in one word, what was tried, and the text, cut where it is too long.
pub fn warning(reason: &str, action: &str, text: &str) -> Event {
    let end =
        (0..=text.len().min(NOTE_MAX)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    Event {
        type_: EventType::Warning,
        reason: reason.to_owned(),
        note: Some(text[..end].to_owned()),
        action: action.to_owned(),
        secondary: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_cut_by_bytes_between_letters() {
        let note = |text: &str| warning("Malformed", "Read", text).note.expect("a note");
        assert_eq!(note("short"), "short");
        assert_eq!(note(&"a".repeat(2000)).len(), NOTE_MAX);
        // Three bytes each: 341 of them are 1023.
        assert_eq!(note(&"€".repeat(2000)).len(), 1023);
    }
}
