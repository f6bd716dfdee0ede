//! A question to a DNS server, without the C library: the image has no files that its resolver
//! could load, and the test wants the server's own answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

/// What `/etc/resolv.conf` says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    pub servers: Vec<IpAddr>,
    pub search: Vec<String>,
}

impl ResolvConf {
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    conf.servers.extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()))
                }
                Some("search") => conf.search = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        conf
    }

    /// The whole name of `SERVICE.NAMESPACE`, by the cluster's own domain.
    pub fn service_name(&self, service: &str) -> String {
        let domain = self.search.iter().find(|domain| domain.starts_with("svc."));
        format!("{service}.{}", domain.map_or("svc.cluster.local", String::as_str))
    }
}

/// Asks for the addresses of a name, IPv6 ones or IPv4 ones.
pub fn question(id: u16, name: &str, is_ipv6: bool) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + name.len() + 6);
    // Recursion desired, one question.
    for word in [id, 0x0100, 1, 0, 0, 0] {
        message.extend(word.to_be_bytes());
    }
    for label in name.trim_end_matches('.').split('.') {
        message.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(if is_ipv6 { TYPE_AAAA } else { TYPE_A }.to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    message
}

/// The addresses of an answer to question `id`; an error in words where it has none.
pub fn addresses(message: &[u8], id: u16) -> Result<Vec<IpAddr>, String> {
    let word = |at: usize| -> Option<u16> {
        Some(u16::from_be_bytes(message.get(at..at.checked_add(2)?)?.try_into().ok()?))
    };
    let short = || "the DNS answer is cut short".to_owned();
    if word(0) != Some(id) || word(2).is_none_or(|flags| flags & 0x8000 == 0) {
        return Err("that is no answer to the DNS question".to_owned());
    }
    match word(2).ok_or_else(short)? & 0xf {
        0 => {}
        2 => return Err("the DNS server failed (SERVFAIL)".to_owned()),
        3 => return Err("the DNS server does not know the name (NXDOMAIN)".to_owned()),
        5 => return Err("the DNS server refused".to_owned()),
        code => return Err(format!("the DNS server answered with code {code}")),
    }
    let mut at = HEADER;
    for _ in 0..word(4).ok_or_else(short)? {
        at = skip_name(message, at).ok_or_else(short)? + 4;
    }
    let mut found = Vec::new();
    for _ in 0..word(6).ok_or_else(short)? {
        at = skip_name(message, at).ok_or_else(short)?;
        let (kind, length) = (word(at).ok_or_else(short)?, word(at + 8).ok_or_else(short)?);
        let value = message.get(at + 10..at + 10 + usize::from(length)).ok_or_else(short)?;
        match kind {
            TYPE_A => {
                found.extend(<[u8; 4]>::try_from(value).map(|octets| IpAddr::V4(Ipv4Addr::from(octets))))
            }
            TYPE_AAAA => {
                found.extend(<[u8; 16]>::try_from(value).map(|octets| IpAddr::V6(Ipv6Addr::from(octets))));
            }
            _ => {}
        }
        at += 10 + usize::from(length);
    }
    match found.is_empty() {
        true => Err("the DNS server knows no address of this family".to_owned()),
        false => Ok(found),
    }
}

/// Where what follows a name begins; a compressed name ends with its pointer.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match message.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += usize::from(*length) + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer with a CNAME and an address, names compressed.
    fn answer(id: u16, code: u16) -> Vec<u8> {
        let mut message = question(id, "web.shop.svc.cluster.local", false);
        message[2..4].copy_from_slice(&(0x8580 | code).to_be_bytes());
        message[7] = 2;
        message.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 5, 0, 2, 0xc0, 12]);
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 7]);
        message
    }

    #[test]
    fn addresses_of_an_answer() {
        assert_eq!(addresses(&answer(7, 0), 7), Ok(vec![IpAddr::from([10, 96, 0, 7])]));
        assert!(addresses(&answer(7, 0), 8).is_err());
        assert!(addresses(&answer(7, 3), 7).is_err_and(|error| error.contains("NXDOMAIN")));
        assert!(addresses(&question(7, "a", true), 7).is_err());
    }

    #[test]
    fn a_broken_answer_is_an_error_wherever_it_is_cut() {
        let whole = answer(7, 0);
        for length in 0..whole.len() {
            assert!(addresses(&whole[..length], 7).is_err(), "{length}");
        }
    }

    #[test]
    fn names_follow_the_clusters_domain() {
        let conf = ResolvConf::parse(
            "search shop.svc.example.org svc.example.org example.org\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n",
        );
        assert_eq!(conf.servers.len(), 2);
        assert_eq!(conf.service_name("web.shop"), "web.shop.svc.example.org");
        assert_eq!(ResolvConf::default().service_name("web.shop"), "web.shop.svc.cluster.local");
    }
}
