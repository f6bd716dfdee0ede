//! DNS messages, read as far as a judge must: the question, and the addresses of an answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The longest message.
pub const MESSAGE_MAX: usize = 65_535;
/// The most records of an answer that are read.
const RECORDS_MAX: usize = 1000;
/// REFUSED and NXDOMAIN of the response codes.
pub const REFUSED: u8 = 5;
/// See [`REFUSED`].
pub const NXDOMAIN: u8 = 3;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

/// A name in lower case, by labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Name(Vec<Vec<u8>>);

impl Name {
    /// The labels, the top one last.
    pub fn labels(&self) -> Vec<&[u8]> {
        self.0.iter().map(Vec::as_slice).collect()
    }

    /// With dots between the labels; bytes that names do not have are written as `\ddd`.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (place, label) in self.0.iter().enumerate() {
            if place > 0 {
                text.push('.');
            }
            for byte in label {
                if byte.is_ascii_graphic() && !matches!(byte, b'.' | b'\\') {
                    text.push(char::from(*byte));
                } else {
                    text.push_str(&format!("\\{byte:03}"));
                }
            }
        }
        text
    }
}

/// The one question of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Chosen by the client.
    pub id: u16,
    /// The name that is asked for.
    pub name: Name,
    /// The type that is asked for.
    pub kind: u16,
    class: u16,
    /// Where the question ends in the message.
    end: usize,
}

impl Question {
    /// The type as people write it.
    pub fn kind_text(&self) -> String {
        let known = match self.kind {
            1 => "A",
            2 => "NS",
            5 => "CNAME",
            6 => "SOA",
            12 => "PTR",
            15 => "MX",
            16 => "TXT",
            28 => "AAAA",
            33 => "SRV",
            64 => "SVCB",
            65 => "HTTPS",
            255 => "ANY",
            kind => return format!("TYPE{kind}"),
        };
        known.to_owned()
    }

    /// True if an answer's question is this one.
    pub fn is_same(&self, other: &Self) -> bool {
        self.id == other.id && self.name == other.name && self.kind == other.kind && self.class == other.class
    }
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The response code.
    pub code: u8,
    /// The addresses of the name that was asked for, behind any CNAME.
    pub addresses: Vec<IpAddr>,
    /// The names on the way.
    pub cnames: Vec<String>,
    /// The shortest TTL on the way.
    pub ttl_s: Option<u32>,
}

/// The question of a query; `None`: it is not a plain query with one question.
pub fn query(message: &[u8]) -> Option<Question> {
    let header = message.get(..12)?;
    let is_response = header[2] & 0x80 != 0;
    let opcode = header[2] >> 3 & 15;
    let counts: Vec<u16> = (4..12).step_by(2).filter_map(|at| number(header, at)).collect();
    // A query has no answers; the additional section has EDNS.
    if is_response || opcode != 0 || counts[0] != 1 || counts[1] != 0 || counts[2] != 0 {
        return None;
    }
    question(message)
}

/// The question of an answer, and what it says; `None`: it cannot be read.
pub fn answer(message: &[u8]) -> Option<(Question, Answer)> {
    let header = message.get(..12)?;
    if header[2] & 0x80 == 0 || number(header, 4)? != 1 {
        return None;
    }
    let question = question(message)?;
    let mut answer = Answer { code: header[3] & 15, ..Answer::default() };
    let mut records = Vec::new();
    let mut at = question.end;
    for _ in 0..usize::from(number(header, 6)?).min(RECORDS_MAX) {
        // A truncated answer ends anywhere; the client asks again by TCP.
        let Some((record, end)) = record(message, at) else { break };
        records.push(record);
        at = end;
    }
    follow(&question, &records, &mut answer);
    Some((question, answer))
}

/// Aliases of an answer that are followed; resolvers follow fewer.
const ALIASES_MAX: usize = 16;

/// Follows CNAMEs from the name that was asked for to its addresses, in whatever order they stand.
fn follow(question: &Question, records: &[Resource], answer: &mut Answer) {
    let mut names = vec![question.name.clone()];
    let mut next = 0;
    while let Some(name) = names.get(next).cloned() {
        next += 1;
        for record in records.iter().filter(|record| record.name == name) {
            match &record.data {
                Data::Address(address) => answer.addresses.push(*address),
                Data::Alias(alias) if names.len() <= ALIASES_MAX && !names.contains(alias) => {
                    answer.cnames.push(alias.text());
                    names.push(alias.clone());
                }
                Data::Alias(_) | Data::Other => continue,
            }
            answer.ttl_s = Some(answer.ttl_s.map_or(record.ttl_s, |ttl| ttl.min(record.ttl_s)));
        }
    }
}

struct Resource {
    name: Name,
    ttl_s: u32,
    data: Data,
}

enum Data {
    Address(IpAddr),
    Alias(Name),
    Other,
}

fn record(message: &[u8], at: usize) -> Option<(Resource, usize)> {
    let (name, at) = read_name(message, at)?;
    let (kind, class) = (number(message, at)?, number(message, at + 2)?);
    let ttl = message.get(at + 4..at + 8)?;
    let ttl_s = u32::from_be_bytes(ttl.try_into().ok()?);
    let length = usize::from(number(message, at + 8)?);
    let start = at + 10;
    let data = message.get(start..start + length)?;
    let data = match (kind, class) {
        (TYPE_A, CLASS_IN) => Data::Address(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
        (TYPE_AAAA, CLASS_IN) => Data::Address(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
        (TYPE_CNAME, CLASS_IN) => match read_name(message, start)? {
            (alias, end) if end == start + length => Data::Alias(alias),
            _ => return None,
        },
        _ => Data::Other,
    };
    Some((Resource { name, ttl_s, data }, start + length))
}

fn question(message: &[u8]) -> Option<Question> {
    let (name, at) = read_name(message, 12)?;
    let (kind, class) = (number(message, at)?, number(message, at + 2)?);
    Some(Question { id: number(message, 0)?, name, kind, class, end: at + 4 })
}

/// A name, and where it ends. Pointers lead backwards only, so they end.
fn read_name(message: &[u8], start: usize) -> Option<(Name, usize)> {
    let (mut at, mut end, mut lowest, mut length) = (start, None, start, 1);
    let mut labels = Vec::new();
    loop {
        let size = usize::from(*message.get(at)?);
        match size >> 6 {
            0 if size == 0 => return Some((Name(labels), end.unwrap_or(at + 1))),
            0 => {
                length += size + 1;
                if length > 255 {
                    return None;
                }
                labels.push(message.get(at + 1..at + 1 + size)?.to_ascii_lowercase());
                at += 1 + size;
            }
            3 => {
                let target = usize::from(number(message, at)? & 0x3fff);
                end = end.or(Some(at + 2));
                if target >= lowest {
                    return None;
                }
                (at, lowest) = (target, target);
            }
            _ => return None,
        }
    }
}

fn number(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?))
}

/// The proxy's own answer to a query: the code, and nothing else.
pub fn refusal(message: &[u8], question: &Question, code: u8) -> Vec<u8> {
    let mut answer = message[..question.end].to_vec();
    // QR, the query's opcode and RD; RA and the code; one question and nothing else.
    answer[2] = 0x80 | (message[2] & 0x79);
    answer[3] = 0x80 | code;
    answer[4..12].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    answer
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// A query and its answer: `a.b` is an alias of `c`, which has an address.
    const VALID: [&[u8]; 2] = [
        b"\x01\x02\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x01b\x00\x00\x01\x00\x01",
        b"\x01\x02\x81\x80\x00\x01\x00\x02\x00\x00\x00\x00\x01a\x01b\x00\x00\x01\x00\x01\
          \xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x03\x01c\x00\
          \x01c\x00\x00\x01\x00\x01\x00\x00\x00\x1e\x00\x04\xc0\x00\x02\x01",
    ];

    fn message() -> impl Strategy<Value = Vec<u8>> {
        let damaged = (0..2_usize, vec((any::<Index>(), any::<u8>()), 0..5), any::<Index>());
        let damaged = damaged.prop_map(|(which, changes, end)| {
            let mut message = VALID[which].to_vec();
            for (place, byte) in changes {
                let place = place.index(message.len());
                message[place] = byte;
            }
            // Mostly whole.
            let end = end.index(2 * message.len());
            message.truncate(end.max(12));
            message
        });
        prop_oneof![4 => damaged, 1 => vec(any::<u8>(), 0..300)]
    }

    #[test]
    fn aliases_lead_to_addresses() {
        let (question, said) = answer(VALID[1]).expect("an answer");
        assert!(question.is_same(&query(VALID[0]).expect("a query")));
        assert_eq!(said.addresses, ["192.0.2.1".parse::<IpAddr>().expect("an address")]);
        assert_eq!((said.cnames, said.ttl_s), (vec!["c".to_owned()], Some(30)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_message_breaks_the_reader(message in message()) {
            if let Some(question) = query(&message) {
                let refused = refusal(&message, &question, REFUSED);
                prop_assert!(refused.len() <= message.len());
                let (same, said) = answer(&refused).expect("a refusal is an answer");
                prop_assert!(same.is_same(&question));
                prop_assert_eq!((said.code, said.addresses.len()), (REFUSED, 0));
            }
            if let Some((question, said)) = answer(&message) {
                let length: usize = question.name.labels().iter().map(|label| label.len() + 1).sum();
                prop_assert!(length <= 255);
                prop_assert!(said.addresses.len() <= message.len() / 14, "no address out of nothing");
            }
        }
    }
}
