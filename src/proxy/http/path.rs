//! The ways in which servers may read one path.
//!
//! Servers differ in whether they decode before they look for `..`, merge slashes, or take `;` for the end of a
//! segment's name. A path that has only one reading costs one look at its bytes. Of any other path every reading
//! must be allowed, so no server can be made to serve what the rules do not allow.

use std::collections::BTreeSet;

/// How often a path may be encoded over again.
const DECODINGS_MAX: usize = 3;

/// The readings of `path` other than the path as sent, each with the query; `Err` says why the path has none
/// that could be judged.
pub fn readings(path: &[u8]) -> Result<Vec<Vec<u8>>, &'static str> {
    let end = path.iter().position(|byte| *byte == b'?').unwrap_or(path.len());
    let (path, query) = path.split_at(end);
    if !path.starts_with(b"/") || is_plain(path) {
        return Ok(Vec::new());
    }
    let mut readings = BTreeSet::new();
    for decoded in decodings(path)? {
        if decoded.iter().any(|byte| *byte < b' ' || *byte == 0x7f) {
            return Err("the path has an encoded control character");
        }
        for has_backslashes in [false, true] {
            for has_parameters in [false, true] {
                for merges in [false, true] {
                    readings.insert(reading(&decoded, has_backslashes, has_parameters, merges));
                }
            }
        }
    }
    readings.remove(path);
    let with_query = |mut reading: Vec<u8>| {
        reading.extend_from_slice(query);
        reading
    };
    Ok(readings.into_iter().map(with_query).collect())
}

/// True if all servers read the path in one way: no encoding, no `\`, `;`, `//`, and no segment of dots.
fn is_plain(path: &[u8]) -> bool {
    !path.iter().any(|byte| matches!(byte, b'%' | b'\\' | b';'))
        && path.split(|byte| *byte == b'/').skip(1).enumerate().all(|(place, segment)| {
            let is_last = place + 1 == path.split(|byte| *byte == b'/').count() - 1;
            !is_dots(segment) && (!segment.is_empty() || is_last)
        })
}

fn is_dots(segment: &[u8]) -> bool {
    matches!(segment, b"." | b"..")
}

/// The path decoded not at all, without its slashes, once, and as often as it is encoded.
fn decodings(path: &[u8]) -> Result<Vec<Vec<u8>>, &'static str> {
    let mut decodings = vec![path.to_vec()];
    let mut current = path.to_vec();
    for _ in 0..DECODINGS_MAX {
        if !current.contains(&b'%') {
            return Ok(decodings);
        }
        let partly = decode(&current, |byte| !matches!(byte, b'/' | b'\\'));
        let wholly = decode(&current, |_| true);
        if wholly == current {
            return Ok(decodings);
        }
        decodings.push(partly);
        decodings.push(wholly.clone());
        current = wholly;
    }
    if current == decode(&current, |_| true) {
        return Ok(decodings);
    }
    Err("the path is encoded many times over")
}

/// Decodes each `%XX` whose byte is wanted.
fn decode(path: &[u8], is_wanted: impl Fn(u8) -> bool) -> Vec<u8> {
    let digit = |place: usize| path.get(place).and_then(|byte| char::from(*byte).to_digit(16));
    let mut decoded = Vec::with_capacity(path.len());
    let mut place = 0;
    while place < path.len() {
        if path[place] == b'%'
            && let (Some(high), Some(low)) = (digit(place + 1), digit(place + 2))
        {
            // Two hexadecimal digits fit a byte.
            let byte = (high * 16 + low) as u8;
            if is_wanted(byte) {
                decoded.push(byte);
                place += 3;
                continue;
            }
        }
        decoded.push(path[place]);
        place += 1;
    }
    decoded
}

fn reading(path: &[u8], has_backslashes: bool, has_parameters: bool, merges: bool) -> Vec<u8> {
    let is_slash = |byte: &u8| *byte == b'/' || (has_backslashes && *byte == b'\\');
    let mut segments: Vec<&[u8]> = Vec::new();
    // A path that ends with a slash, `.` or `..` names a directory.
    let mut is_directory = false;
    for segment in path.split(is_slash).skip(1) {
        let segment = match segment.iter().position(|byte| has_parameters && *byte == b';') {
            Some(end) => &segment[..end],
            None => segment,
        };
        is_directory = segment.is_empty() || is_dots(segment);
        match segment {
            b"." => {}
            b".." => drop(segments.pop()),
            b"" if merges => {}
            segment => segments.push(segment),
        }
    }
    // The empty segment behind the last slash is not one that was kept.
    if is_directory && segments.last().is_some_and(|last| last.is_empty()) {
        segments.pop();
    }
    let mut reading = Vec::with_capacity(path.len());
    for segment in &segments {
        reading.push(b'/');
        reading.extend_from_slice(segment);
    }
    if is_directory || reading.is_empty() {
        reading.push(b'/');
    }
    reading
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str) -> Vec<String> {
        let readings = readings(path.as_bytes()).expect("this path can be judged");
        readings.into_iter().map(|reading| String::from_utf8(reading).expect("text")).collect()
    }

    #[test]
    fn a_plain_path_has_one_reading() {
        for path in ["/", "/a", "/a/", "/a/b.c/..d?x=../%2e//", "*", "/a.b/c...d"] {
            assert_eq!(read(path), Vec::<String>::new(), "{path}");
        }
    }

    #[test]
    fn every_way_out_of_a_directory_is_seen() {
        let tricks = [
            "/public/../secret",
            "/public/%2e%2e/secret",
            "/public/%2E./secret",
            "/public/..%2fsecret",
            "/public/..%2Fsecret",
            "/public/..\\secret",
            "/public/..%5csecret",
            "/public/..;/secret",
            "/public/..;a=b/secret",
            "/public/%252e%252e/secret",
            "/public/%2e%2e%3b/secret",
            "/public//../secret",
            "/public/x/../../secret/%2e%2e/public",
            "/public/./../secret?x",
            "//secret/../public/../secret",
        ];
        for path in tricks {
            let found = read(path);
            assert!(found.iter().any(|reading| reading.starts_with("/secret")), "{path}: {found:?}");
        }
    }

    #[test]
    fn a_directory_stays_one() {
        assert_eq!(read("/a/b/.."), ["/a/"]);
        assert_eq!(read("/a//"), ["/a/"]);
        assert_eq!(read("/.."), ["/"]);
        assert_eq!(read("//"), ["/"]);
        assert_eq!(read("/a;x/b"), ["/a/b"]);
    }

    #[test]
    fn what_cannot_be_judged_is_refused() {
        assert!(readings(b"/a%00b").is_err());
        assert!(readings(b"/a%0d%0ab").is_err());
        assert!(readings(b"/%25252525252e").is_err());
        assert!(readings(b"/100%").is_ok(), "a lone percent sign is itself");
    }
}
