//! Request heads, read strictly: what two parsers could read in two ways is refused.

use std::fmt;

use super::body::Framing;
use crate::proxy::http::Request;

/// The longest head in bytes.
pub const HEAD_MAX: usize = 16 << 10;
/// The most headers of a request.
pub const HEADERS_MAX: usize = 100;

/// Why a request is refused before any rule is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status of the answer.
    pub status: u16,
    /// For people.
    pub why: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.why)
    }
}

/// The request could be read in two ways, or in none.
pub(super) fn malformed(why: &'static str) -> Refusal {
    Refusal { status: 400, why }
}

/// A request's head.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// What rules ask of it; the path of an absolute URI is its path.
    pub request: Request<'a>,
    /// HTTP/1.1, not HTTP/1.0.
    pub is_11: bool,
    /// How its body ends.
    pub framing: Framing,
    /// The client wants `100 Continue` before it sends the body.
    pub expects: bool,
    /// The client wants the connection closed behind the answer.
    pub closes: bool,
    /// The protocol that the client wants to go on with.
    pub upgrade: Option<&'a [u8]>,
}

/// Where the head ends that begins at the start of `bytes`; `None`: it is not whole yet. `from` is how much
/// of it was looked at before.
pub fn end_of_head(bytes: &[u8], from: usize) -> Result<Option<usize>, Refusal> {
    let mut place = from.saturating_sub(3);
    while let Some(found) = bytes[place..].iter().position(|byte| matches!(byte, b'\n' | b'\r' | 0)) {
        let at = place + found;
        match bytes[at] {
            0 => return Err(malformed("a NUL in the head")),
            b'\r' if at + 1 == bytes.len() => return too_long(bytes),
            b'\r' if bytes[at + 1] != b'\n' => return Err(malformed("a CR without LF")),
            b'\r' => {}
            _ if at == 0 || bytes[at - 1] != b'\r' => return Err(malformed("an LF without CR")),
            _ if bytes[..at].ends_with(b"\r\n\r") => return limited(at + 1),
            _ if at == 1 => return Err(malformed("an empty line before the request")),
            _ => {}
        }
        place = at + 1;
    }
    too_long(bytes)
}

fn limited(length: usize) -> Result<Option<usize>, Refusal> {
    if length > HEAD_MAX {
        return Err(Refusal { status: 431, why: "the head is too long" });
    }
    Ok(Some(length))
}

fn too_long(bytes: &[u8]) -> Result<Option<usize>, Refusal> {
    limited(bytes.len()).map(|_| None)
}

/// Reads a whole head, and hands what it says to `then`: it borrows from `bytes`.
pub fn with_head<T>(bytes: &[u8], then: impl FnOnce(&Head<'_>) -> T) -> Result<T, Refusal> {
    let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut lines);
    match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(malformed("a head without an end")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Refusal { status: 431, why: "too many headers" });
        }
        Err(httparse::Error::Version) => {
            return Err(Refusal { status: 505, why: "not a version of HTTP/1" });
        }
        Err(_) => return Err(malformed("not a request of HTTP/1.1")),
    }
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(malformed("not a request of HTTP/1.1"));
    };
    let line = method.len() + target.len() + " HTTP/1.1\r\n".len() + 1;
    if !bytes[..line.min(bytes.len())].ends_with(b"\r\n") {
        return Err(malformed("the request line has more than three words"));
    }
    let mut headers: [(&[u8], &[u8]); HEADERS_MAX] = [(b"", b""); HEADERS_MAX];
    let headers = &mut headers[..parsed.headers.len()];
    for (header, line) in headers.iter_mut().zip(parsed.headers.iter()) {
        *header = (line.name.as_bytes(), line.value);
    }
    let head = read(method.as_bytes(), target.as_bytes(), minor == 1, headers)?;
    Ok(then(&head))
}

fn read<'a>(
    method: &'a [u8],
    target: &'a [u8],
    is_11: bool,
    headers: &'a [(&'a [u8], &'a [u8])],
) -> Result<Head<'a>, Refusal> {
    let mut seen = Seen::default();
    for (name, value) in headers {
        seen.take(name, value)?;
    }
    if is_11 && seen.host.is_none() {
        return Err(malformed("no Host header"));
    }
    let (path, host) = path_and_host(method, target, seen.host)?;
    if seen.length.is_some() && seen.is_chunked {
        return Err(malformed("both Content-Length and Transfer-Encoding"));
    }
    if seen.is_chunked && !is_11 {
        return Err(malformed("Transfer-Encoding in HTTP/1.0"));
    }
    let framing = match seen.length {
        _ if seen.is_chunked => Framing::Chunked,
        None | Some(0) => Framing::None,
        Some(length) => Framing::Length(length),
    };
    let request = Request { method, path, host, headers };
    let closes = if is_11 { seen.says_close } else { !seen.says_keep_alive };
    let upgrade = seen.upgrade.filter(|_| seen.says_upgrade);
    if seen.upgrade.is_some() && upgrade.is_none() {
        return Err(malformed("Upgrade that Connection does not name"));
    }
    Ok(Head { request, is_11, framing, expects: seen.expects, closes, upgrade })
}

/// What the headers say of framing.
#[derive(Default)]
struct Seen<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    is_chunked: bool,
    expects: bool,
    says_close: bool,
    says_keep_alive: bool,
    says_upgrade: bool,
    upgrade: Option<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn take(&mut self, name: &[u8], value: &'a [u8]) -> Result<(), Refusal> {
        if value.iter().any(|byte| *byte < b' ' && *byte != b'\t' || *byte == 0x7f) {
            return Err(malformed("a control character in a header"));
        }
        let is = |known: &[u8]| name.eq_ignore_ascii_case(known);
        if is(b"host") {
            once(&mut self.host, value, "several Host headers")?;
            return if is_host(value) { Ok(()) } else { Err(malformed("not a host")) };
        }
        if is(b"content-length") {
            return once(&mut self.length, number(value)?, "several Content-Length headers");
        }
        if is(b"transfer-encoding") {
            if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(malformed("a Transfer-Encoding other than chunked"));
            }
            self.is_chunked = true;
            return Ok(());
        }
        if is(b"upgrade") {
            return once(&mut self.upgrade, value, "several Upgrade headers");
        }
        if is(b"expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Refusal { status: 417, why: "an Expect other than 100-continue" });
            }
            self.expects = true;
        }
        if is(b"connection") {
            return self.connection(value);
        }
        if name.contains(&b'_') && is_framing(&dashed(name)) {
            return Err(malformed("a header that some servers take for one of framing"));
        }
        Ok(())
    }

    fn connection(&mut self, value: &[u8]) -> Result<(), Refusal> {
        for option in value.split(|byte| *byte == b',') {
            let option = option.trim_ascii();
            self.says_close |= option.eq_ignore_ascii_case(b"close");
            self.says_keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            self.says_upgrade |= option.eq_ignore_ascii_case(b"upgrade");
            if is_framing(option) {
                return Err(malformed("Connection names a header that frames the request"));
            }
        }
        Ok(())
    }
}

fn once<T>(place: &mut Option<T>, value: T, why: &'static str) -> Result<(), Refusal> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(malformed(why)),
    }
}

/// True for the headers that say where a request goes or ends.
pub(super) fn is_framing(name: &[u8]) -> bool {
    let names: [&[u8]; 3] = [b"content-length", b"transfer-encoding", b"host"];
    names.iter().any(|known| name.eq_ignore_ascii_case(known))
}

fn dashed(name: &[u8]) -> Vec<u8> {
    name.iter().map(|byte| if *byte == b'_' { b'-' } else { *byte }).collect()
}

/// Digits only, and no number that some server cannot hold.
pub(super) fn number(value: &[u8]) -> Result<u64, Refusal> {
    let digits =
        std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits
        .filter(|digits| (1..=18).contains(&digits.len()))
        .and_then(|digits| digits.parse().ok())
        .ok_or(malformed("a Content-Length that is no number"))
}

/// A name or an address, and perhaps a port.
fn is_host(value: &[u8]) -> bool {
    let is_valid = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+;=".contains(byte);
    value.len() <= 300 && value.iter().all(is_valid)
}

/// The path and the host that a target and the Host header name together.
fn path_and_host<'a>(
    method: &[u8],
    target: &'a [u8],
    host: Option<&'a [u8]>,
) -> Result<(&'a [u8], &'a [u8]), Refusal> {
    if target.iter().any(|byte| *byte <= b' ' || matches!(byte, 0x7f | b'#')) {
        return Err(malformed("a target that is no path"));
    }
    let host = host.unwrap_or_default();
    if method == b"CONNECT" {
        return if target == host { Ok((target, host)) } else { Err(malformed("CONNECT to another host")) };
    }
    if target.starts_with(b"/") || (target == b"*" && method == b"OPTIONS") {
        return Ok((target, host));
    }
    let rest = match target.get(..7) {
        Some(scheme) if scheme.eq_ignore_ascii_case(b"http://") => &target[7..],
        _ => return Err(malformed("a target that is no path")),
    };
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if authority.is_empty() || !is_host(authority) || !authority.eq_ignore_ascii_case(host) {
        return Err(malformed("a URI of another host than the Host header"));
    }
    match path.first() {
        None => Ok((b"/", host)),
        Some(b'/') => Ok((path, host)),
        // Some servers read it as a path without a slash, others with one.
        Some(_) => Err(malformed("a URI without a path")),
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_head_breaks_the_reader_and_none_has_two_lengths(
            method in "[A-Z]{1,5}|[ -~]{0,4}",
            path in "/[a-z/.%]{0,8}|[ -~]{0,8}",
            headers in proptest::collection::vec(
                "(Content-Length: [0-9 ]{0,4}|Transfer-Encoding: (chunked|[a-z, ]{0,8})|Host: [a-z.]{0,6}|[ -~]{0,12})\r\n",
                0..5,
            ),
        ) {
            let head = format!("{method} {path} HTTP/1.1\r\n{}\r\n", headers.concat());
            let bytes = head.as_bytes();
            if let Ok(Some(end)) = end_of_head(bytes, 0) {
                prop_assert!(end <= bytes.len());
                let is_length = |header: &&String| header.to_ascii_lowercase().starts_with("content-length:");
                let is_coding = |header: &&String| header.to_ascii_lowercase().starts_with("transfer-encoding:");
                let lengths = headers.iter().filter(is_length).count();
                let codings = headers.iter().filter(is_coding).count();
                let is_read = with_head(&bytes[..end], |_| ()).is_ok();
                // A head that ends early has fewer headers than were written.
                let is_whole = end == bytes.len();
                prop_assert!(!(is_read && is_whole && lengths + codings > 1), "{head:?}");
            }
        }
    }
}
