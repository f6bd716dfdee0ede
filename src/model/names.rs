//! The syntax of names, labels and port names, as the API server checks it.

/// Lower-case letters, digits, `-` and `.`, at most 253, each part beginning and ending
/// with a letter or digit: what nearly every object's name must be. Safe in a file name.
pub fn is_object_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_part)
}

/// The same without dots, at most 63: namespaces, names of a Service's ports.
pub fn is_dns_label(name: &str) -> bool {
    name.len() <= 63 && is_dns_part(name)
}

fn is_dns_part(part: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !part.is_empty() && part.bytes().all(is_inner) && !part.starts_with('-') && !part.ends_with('-')
}

/// A label's key: a name of at most 63, with an optional domain and a slash in front.
pub fn is_label_key(key: &str) -> bool {
    let name = match key.split_once('/') {
        Some((domain, name)) if is_object_name(domain) => name,
        Some(_) => return false,
        None => key,
    };
    !name.is_empty() && is_label_value(name)
}

/// A label's value: empty, or at most 63 letters, digits, `-`, `_` and `.`, beginning and
/// ending with a letter or digit.
pub fn is_label_value(value: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_edge = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.len() <= 63 && value.bytes().all(is_inner) && is_edge(bytes.first()) && is_edge(bytes.last())
}

/// A port's name by the rules of IANA: at most 15 lower-case letters, digits and single
/// hyphens, at least one letter, no hyphen at an end.
pub fn is_port_name(name: &str) -> bool {
    name.len() <= 15
        && is_dns_part(name)
        && !name.contains("--")
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_as_upstream_does() {
        for (name, object, label, port) in [
            ("web", true, true, true),
            ("a.b-c.d", true, false, false),
            ("", false, false, false),
            ("-a", false, false, false),
            ("a..b", false, false, false),
            ("../etc", false, false, false),
            ("A", false, false, false),
            ("80", true, true, false),
            ("http--alt", true, true, false),
            ("sixteen-letters-x", true, true, false),
        ] {
            assert_eq!(
                (is_object_name(name), is_dns_label(name), is_port_name(name)),
                (object, label, port),
                "{name:?}"
            );
        }
    }

    #[test]
    fn label_keys_may_have_a_domain_and_values_may_be_empty() {
        assert!(is_label_key("app"));
        assert!(is_label_key("app.kubernetes.io/Name_1"));
        assert!(!is_label_key("/app"));
        assert!(!is_label_key("a/b/c"));
        assert!(!is_label_key(""));
        assert!(is_label_value(""));
        assert!(is_label_value("V1.2_3"));
        assert!(!is_label_value("-x"));
        assert!(!is_label_value("a b"));
    }
}
