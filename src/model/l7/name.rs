//! Patterns of names, as DNS rules and server names have them.

/// Which names match: `*` stands for characters of one label, `**.` at the front for one or more labels, and `*`
/// alone for any name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamePattern {
    /// Any name, the root too.
    Any,
    /// Labels in order, in lower case.
    Labels {
        /// One label or more may stand before them.
        has_more: bool,
        /// Each may have `*` in it.
        labels: Vec<Vec<u8>>,
    },
}

impl NamePattern {
    /// Of a pattern in any case, with or without the last dot.
    pub fn new(pattern: &str) -> Self {
        if pattern == "*" {
            return Self::Any;
        }
        let pattern = pattern.to_ascii_lowercase();
        let pattern = pattern.strip_suffix('.').unwrap_or(&pattern);
        let (has_more, rest) = match pattern.strip_prefix("**.") {
            Some(rest) => (true, rest),
            None => (false, pattern),
        };
        Self::Labels { has_more, labels: rest.split('.').map(|label| label.as_bytes().to_vec()).collect() }
    }

    /// True if a name with dots between its labels, in lower case, matches.
    pub fn matches_text(&self, name: &str) -> bool {
        let labels: Vec<&[u8]> = match name {
            "" => Vec::new(),
            name => name.split('.').map(str::as_bytes).collect(),
        };
        self.matches(&labels)
    }

    /// True if the labels of a name, in lower case, match.
    pub fn matches(&self, name: &[&[u8]]) -> bool {
        let Self::Labels { has_more, labels } = self else { return true };
        let Some(more) = name.len().checked_sub(labels.len()) else { return false };
        if *has_more != (more > 0) {
            return false;
        }
        name[..more].iter().all(|label| label.iter().all(is_plain))
            && labels.iter().zip(&name[more..]).all(|(pattern, label)| matches_label(pattern, label))
    }
}

fn is_plain(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// `*` matches any number of characters that names have.
fn matches_label(pattern: &[u8], label: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    // Where to go on when the last `*` takes one character more.
    let mut again: Option<(usize, usize)> = None;
    while seen < label.len() {
        match pattern.get(at) {
            Some(b'*') => {
                again = Some((at + 1, seen));
                at += 1;
            }
            Some(byte) if *byte == label[seen] => {
                at += 1;
                seen += 1;
            }
            _ => match again {
                Some((next, taken)) if is_plain(&label[taken]) => {
                    again = Some((next, taken + 1));
                    (at, seen) = (next, taken + 1);
                }
                _ => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_labels() {
        let matches = |pattern: &str, name: &str| NamePattern::new(pattern).matches_text(name);
        let yes = [
            ("example.com", "example.com"),
            ("Example.COM.", "example.com"),
            ("*.example.com", "www.example.com"),
            ("a*c.example.com", "abbbc.example.com"),
            ("*a*b*.x", "aab.x"),
            ("*a*b*.x", "zzazzbzz.x"),
            ("**.example.com", "a.example.com"),
            ("**.example.com", "a.b.c.example.com"),
            ("**.*b.com", "x.y.ab.com"),
            ("*", "anything.at.all"),
            ("*", ""),
        ];
        for (pattern, name) in yes {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        let no = [
            ("example.com", "www.example.com"),
            ("example.com", "example.org"),
            ("example.com", ""),
            ("*.example.com", "example.com"),
            ("*.example.com", "a.b.example.com"),
            ("**.example.com", "example.com"),
            ("**.example.com", "a.badexample.com"),
            ("a*c.x", "ab.x"),
            ("*.x", "a\\b.x"),
            ("**.x", "a b.x"),
        ];
        for (pattern, name) in no {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
