//! Paths by which an Envoy judges: those that every server reads as the Envoy does.
//!
//! The Envoy normalises a path before it judges: `/../`, `//`, and encoded dots. `weir proxy` judges each reading of what
//! is left (src/proxy/http/path.rs); an Envoy has one pattern for all of a rule, so it refuses what may have several.

/// Matches a path, with its query, that has one reading: no `;`, `\`, `#`, control character or lone `%`, and nothing
/// encoded but bytes that no server needs to decode to find its way. `%`, `/`, `\`, `;`, `.`, letters and digits are
/// never encoded.
pub const ONE_READING: &str = concat!(
    r"(?:[^\x00-\x20\x7f#%;?\\]",
    r"|%(?:2[0-46-9a-cA-C]|3[acdefACDEF]|40|5[bdeBDE]|60|7[b-dB-D]|[89a-fA-F][0-9a-fA-F])",
    r")*(?:\?(?s:.*))?",
);

#[cfg(test)]
mod tests {
    use super::*;

    fn has_one_reading(path: &str) -> bool {
        let pattern = regex::Regex::new(&format!("^(?:{ONE_READING})$")).expect("an expression");
        pattern.is_match(path)
    }

    #[test]
    fn a_path_that_servers_may_read_otherwise_is_refused() {
        let several = [
            "/public/..;/secret",
            "/public/..;a=b/secret",
            "/public;x/a",
            "/public/%252e%252e/secret",
            "/public/%25252e%25252e/secret",
            "/public/%2e%2e/secret",
            "/public/%2E./secret",
            "/public/..%2fsecret",
            "/public/..%2Fsecret",
            "/public/..\\secret",
            "/public/..%5csecret",
            "/public/..%5Csecret",
            "/public/..%3b/secret",
            "/public/..%3B/secret",
            "/%73ecret",
            "/%53ecret",
            "/secre%74",
            "/%31",
            "/%2d%5F%7e",
            "/a%00b",
            "/a%0d%0ab",
            "/a%7Fb",
            "/a%1fb",
            "/a\nb",
            "/a b",
            "/a#b",
            "/%u002e",
            "/100%",
            "/100%?a",
        ];
        for path in several {
            assert!(!has_one_reading(path), "{path}");
        }
    }

    #[test]
    fn a_path_that_all_read_alike_passes_whatever_its_query() {
        let one = [
            "/",
            "/a",
            "/a/",
            "/a/b.c/..d?x=../%2e//;\\%25",
            "/a.b/c...d",
            "/caf%C3%A9/caf\u{e9}",
            "/a%20b/%7Bc%7d/~d/e:f@g,h=i",
            "/grpc.health.v1.Health/Check",
            "/a?",
            "/a?b#c",
        ];
        for path in one {
            assert!(has_one_reading(path), "{path}");
        }
    }
}
