//! Words of flows for people.

use std::borrow::Cow;

use super::{Icmp, L4Protocol};

/// Whether to colour verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// A terminal that wants them.
    On,
    /// A pipe, a file, or NO_COLOR.
    Off,
}

/// An ICMP message by its name, where it has one.
pub fn icmp_text(protocol: L4Protocol, icmp: Icmp) -> Cow<'static, str> {
    let name = match (protocol, icmp.r#type) {
        (L4Protocol::IcmpV4, 0) | (L4Protocol::IcmpV6, 129) => "EchoReply",
        (L4Protocol::IcmpV4, 8) | (L4Protocol::IcmpV6, 128) => "EchoRequest",
        (L4Protocol::IcmpV4, 3) | (L4Protocol::IcmpV6, 1) => "DestinationUnreachable",
        (L4Protocol::IcmpV6, 2) => "PacketTooBig",
        (L4Protocol::IcmpV4, 11) | (L4Protocol::IcmpV6, 3) => "TimeExceeded",
        (L4Protocol::IcmpV4, 12) | (L4Protocol::IcmpV6, 4) => "ParameterProblem",
        (L4Protocol::IcmpV4, 5) | (L4Protocol::IcmpV6, 137) => "Redirect",
        (L4Protocol::IcmpV6, 133) => "RouterSolicitation",
        (L4Protocol::IcmpV6, 134) => "RouterAdvertisement",
        (L4Protocol::IcmpV6, 135) => "NeighborSolicitation",
        (L4Protocol::IcmpV6, 136) => "NeighborAdvertisement",
        (_, number) => return Cow::Owned(format!("type {number} code {}", icmp.code)),
    };
    match icmp.code {
        0 => Cow::Borrowed(name),
        code => Cow::Owned(format!("{name} code {code}")),
    }
}

/// `text` with everything that could command a terminal, or turn the order of what is read, made visible.
pub fn escape(text: &str) -> Cow<'_, str> {
    let is_unsafe = |character: char| {
        character.is_control()
            || matches!(character, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    text.chars()
        .map(
            |character| {
                if is_unsafe(character) { character.escape_unicode().to_string() } else { character.into() }
            },
        )
        .collect::<String>()
        .into()
}
