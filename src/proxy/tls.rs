//! TLS: the name that a client asks for is judged, and then the bytes pass.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::model::l7::{L7Message, NamePattern, RuleSetId};

use super::pipe;
use super::session::{Entry, Session};
use super::store::Rules;

/// The longest beginning of a connection that is read for the name.
const HELLO_MAX: usize = 64 << 10;
/// The alert access_denied, fatal, as a record of TLS 1.2.
const ACCESS_DENIED: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];

/// The names of a set; no name at all allows any TLS.
#[derive(Debug)]
pub struct ServerNames(Vec<NamePattern>);

impl ServerNames {
    /// Compiles names.
    pub fn new(names: &[String]) -> Self {
        Self(names.iter().map(|name| NamePattern::new(name)).collect())
    }

    /// True if a client may ask for the name; without a name no pattern is met.
    fn allow(&self, name: Option<&str>) -> bool {
        let Some(name) = name else { return self.0.is_empty() };
        let labels: Vec<&[u8]> = name.split('.').map(str::as_bytes).collect();
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches(&labels))
    }
}

/// Serves a connection.
pub async fn serve(mut session: Session, mut client: TcpStream) {
    let mut bytes = Vec::new();
    let limits = session.shared.limits;
    if session.is_visibility_only() && tokio::time::timeout(limits.head, client.readable()).await.is_err() {
        // The server may be the one that speaks first.
        return pipe::pipe(session, client, bytes).await;
    }
    let reading = read_hello(&mut client, &mut bytes);
    let hello = tokio::time::timeout(limits.head, reading).await.unwrap_or(Err(NotTls::TooSlow));
    if session.refresh().is_err() {
        return;
    }
    let name = match hello {
        Ok(name) => name,
        Err(_) if session.is_visibility_only() => {
            session.record(Entry::request(L7Message::Unknown));
            return pipe::pipe(session, client, bytes).await;
        }
        Err(why) => {
            session.record(Entry::error(L7Message::Unknown, why.text()));
            // It may be gone.
            let _ = client.set_zero_linger();
            return;
        }
    };
    let message = L7Message::Tls { server_name: name.clone() };
    match judge(&session, name.as_deref()) {
        Ok(()) => {
            session.record(Entry::request(message));
            pipe::pipe(session, client, bytes).await;
        }
        Err(by) => {
            session.record(Entry::denied(message, Some(by), ""));
            // It may be gone.
            let _ = client.write_all(&ACCESS_DENIED).await;
            super::http1::close(client).await;
        }
    }
}

fn judge(session: &Session, name: Option<&str>) -> Result<(), RuleSetId> {
    for set in session.sets()?.iter().filter(|set| !set.is_visibility_only) {
        match &set.rules {
            Rules::ServerNames(names) if names.allow(name) => {}
            _ => return Err(set.id),
        }
    }
    Ok(())
}

async fn read_hello(client: &mut TcpStream, bytes: &mut Vec<u8>) -> Result<Option<String>, NotTls> {
    loop {
        if client.read_buf(bytes).await.map_err(|_| NotTls::Ended)? == 0 {
            return Err(NotTls::Ended);
        }
        match client_hello(bytes)? {
            Some(name) => return Ok(name),
            None if bytes.len() >= HELLO_MAX => return Err(NotTls::Malformed),
            None => {}
        }
    }
}

/// Why a connection is not TLS that could be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NotTls {
    Ended,
    TooSlow,
    Malformed,
}

impl NotTls {
    fn text(self) -> &'static str {
        match self {
            Self::Ended => "the connection ended before a ClientHello",
            Self::TooSlow => "no ClientHello came in time",
            Self::Malformed => "not a ClientHello of TLS",
        }
    }
}

/// The name in a ClientHello, in lower case; `Ok(None)`: it is not whole yet.
fn client_hello(bytes: &[u8]) -> Result<Option<Option<String>>, NotTls> {
    let mut handshake = Vec::new();
    let mut records = Reader(bytes);
    loop {
        if let Some(length) = handshake.get(1..4) {
            if handshake[0] != 1 {
                return Err(NotTls::Malformed);
            }
            let length = usize::from(length[0]) << 16 | usize::from(length[1]) << 8 | usize::from(length[2]);
            if length > HELLO_MAX {
                return Err(NotTls::Malformed);
            }
            if let Some(hello) = handshake.get(4..4 + length) {
                // What follows in the same flight would be a second handshake message.
                let is_alone = handshake.len() == 4 + length;
                let name = is_alone.then(|| server_name(hello)).flatten();
                return name.map(Some).ok_or(NotTls::Malformed);
            }
        }
        match records.0 {
            [22, 3, 0..=4, high, low, rest @ ..] => {
                let length = usize::from(*high) << 8 | usize::from(*low);
                if length == 0 || length > 1 << 14 {
                    return Err(NotTls::Malformed);
                }
                let Some(fragment) = rest.get(..length) else { return Ok(None) };
                handshake.extend_from_slice(fragment);
                records = Reader(&rest[length..]);
            }
            [] | [22] | [22, 3] | [22, 3, 0..=4] | [22, 3, 0..=4, _] => return Ok(None),
            _ => return Err(NotTls::Malformed),
        }
    }
}

/// The name that a ClientHello asks for; the outer `None`: it is malformed.
fn server_name(hello: &[u8]) -> Option<Option<String>> {
    let mut hello = Reader(hello);
    hello.take(2 + 32)?;
    let session = hello.block(1)?;
    let (suites, compressions) = (hello.block(2)?, hello.block(1)?);
    if session.len() > 32 || suites.is_empty() || suites.len() % 2 != 0 || compressions.is_empty() {
        return None;
    }
    if hello.0.is_empty() {
        return Some(None);
    }
    let mut extensions = Reader(hello.block(2)?);
    if !hello.0.is_empty() {
        return None;
    }
    let mut name = None;
    let mut seen = std::collections::HashSet::new();
    while !extensions.0.is_empty() {
        let kind = extensions.take(2)?;
        let content = extensions.block(2)?;
        // Two of a kind would leave it to the server which one counts.
        if !seen.insert([kind[0], kind[1]]) {
            return None;
        }
        if kind == [0, 0] {
            name = Some(one_name(content)?);
        }
    }
    Some(name)
}

/// A list of server names has one entry: a host name.
fn one_name(content: &[u8]) -> Option<String> {
    let mut content = Reader(content);
    let mut list = Reader(content.block(2)?);
    let kind = list.take(1)?;
    let name = list.block(2)?;
    let is_valid = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_whole = content.0.is_empty() && list.0.is_empty() && kind == [0];
    if !is_whole || !(1..=255).contains(&name.len()) || !name.iter().all(is_valid) {
        return None;
    }
    let name = String::from_utf8(name.to_ascii_lowercase()).ok()?;
    Some(name.strip_suffix('.').map(str::to_owned).unwrap_or(name))
}

/// Takes bytes from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// Bytes behind their number, which has `width` bytes itself.
    fn block(&mut self, width: usize) -> Option<&'a [u8]> {
        let count = self.take(width)?.iter().fold(0, |count, byte| count << 8 | usize::from(*byte));
        self.take(count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_hello_breaks_the_reader(
            rest in vec(prop_oneof![0_u8..4, any::<u8>()], 0..300),
            is_record in any::<bool>(),
        ) {
            let length = u16::try_from(rest.len()).expect("short").to_be_bytes();
            let head: &[u8] = if is_record { &[22, 3, 1, length[0], length[1], 1, 0] } else { &[] };
            let bytes = [head, &rest].concat();
            if let Ok(Some(Some(name))) = client_hello(&bytes) {
                prop_assert!(!name.is_empty() && name.len() <= bytes.len());
            }
        }
    }
}
