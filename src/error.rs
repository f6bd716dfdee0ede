//! Errors for people.

/// An error and its causes, each said once: many errors name their cause and have it as their source, too.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text += ": ";
        }
        text += &cause;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("connecting: {0}")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a16_each_cause_is_said_once() {
        let cause = std::io::Error::other("no route");
        let error = anyhow::Error::new(Outer(cause)).context("listing nodes");
        assert_eq!(format!("{error:#}"), "listing nodes: connecting: no route: no route");
        assert_eq!(chain(&error), "listing nodes: connecting: no route");
    }
}
