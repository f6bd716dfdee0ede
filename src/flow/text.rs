//! Flows as lines for people.

use std::borrow::Cow;
use std::fmt::Write;

use crate::model::IdentityId;

use super::names::reserved_name;
use super::{Direction, EventType, Flow, Icmp, Item, L4Protocol, LostSource, Party, Verdict};

/// Whether to colour verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// A terminal that wants them.
    On,
    /// A pipe, a file, or NO_COLOR.
    Off,
}

/// One line, without its end: time, who, whom, what happened, what became of it, why.
pub fn compact(item: &Item, colours: Colours) -> String {
    match item {
        Item::Flow(flow) => flow_line(flow, colours),
        Item::LostEvents(lost) => {
            let place = match lost.source {
                LostSource::PerfEventRingBuffer => "in the kernel: the agent did not keep up",
                LostSource::HubbleRingBuffer => "here: this reader did not keep up",
            };
            format!("EVENTS LOST: {} {place}", lost.num_events_lost)
        }
    }
}

fn flow_line(flow: &Flow, colours: Colours) -> String {
    let mut line = flow.time.strftime("%b %d %H:%M:%S%.3f").to_string();
    let arrow = if flow.is_reply { "<-" } else { "->" };
    let _infallible = write!(line, "  {} {arrow} {}", party(&flow.source), party(&flow.destination));
    if let Some(service) = &flow.service {
        let _infallible = match &*service.name {
            "" => write!(line, " [svc {}]", socket(&service.ip.to_string(), service.port)),
            name => write!(line, " [svc {}/{}:{}]", escape(&service.namespace), escape(name), service.port),
        };
    }
    let _infallible = write!(line, "  {}", what(flow));
    let (start, end) = match (colours, flow.verdict) {
        (Colours::Off, _) => ("", ""),
        (Colours::On, Verdict::Forwarded) => ("\x1b[32m", "\x1b[0m"),
        (Colours::On, Verdict::Dropped) => ("\x1b[31m", "\x1b[0m"),
    };
    let _infallible = write!(line, "  {start}{}{end}", flow.verdict);
    let summary = summary(flow);
    if !summary.is_empty() {
        let _infallible = write!(line, "  ({summary})");
    }
    line
}

/// Pod or address, port, identity.
fn party(party: &Party) -> String {
    let name = match &*party.pod_name {
        "" => return format!("{} ({})", socket(&party.ip.to_string(), party.port), identity(party.identity)),
        name => format!("{}/{}", escape(&party.namespace), escape(name)),
    };
    match party.port {
        0 => format!("{name} ({})", identity(party.identity)),
        port => format!("{name}:{port} ({})", identity(party.identity)),
    }
}

fn socket(ip: &str, port: u16) -> String {
    match port {
        0 => ip.to_owned(),
        port if ip.contains(':') => format!("[{ip}]:{port}"),
        port => format!("{ip}:{port}"),
    }
}

/// An identity by its number, or its name where it is reserved.
pub fn identity(identity: IdentityId) -> String {
    reserved_name(identity).map_or_else(|| identity.to_string(), str::to_owned)
}

/// What happened, and which way.
fn what(flow: &Flow) -> String {
    let what = match (flow.event_type, flow.drop_reason_desc) {
        (_, Some(reason)) => reason.text(),
        (EventType::New, None) => "new",
        (EventType::Update, None) => "update",
        (EventType::End, None) => "end",
        (EventType::Drop, None) => "drop",
    };
    match flow.traffic_direction {
        Direction::Unknown => what.to_owned(),
        direction => format!("{what}|{direction}"),
    }
}

/// The protocol's own words, and for policy drops who decided.
fn summary(flow: &Flow) -> String {
    let mut summary = match flow.protocol {
        L4Protocol::Tcp => {
            let flags: Vec<_> = flow.tcp_flags.names().collect();
            if flags.is_empty() { "TCP".to_owned() } else { format!("TCP Flags: {}", flags.join(", ")) }
        }
        L4Protocol::IcmpV4 | L4Protocol::IcmpV6 => flow.icmp.map_or_else(
            || flow.protocol.to_string(),
            |icmp| format!("{} {}", flow.protocol, icmp_text(flow.protocol, icmp)),
        ),
        L4Protocol::Other(number) => format!("IP protocol {number}"),
        protocol => protocol.to_string(),
    };
    if flow.drop_reason_desc.is_some_and(|reason| reason.is_policy()) {
        let policies: Vec<String> = flow.policies.iter().map(ToString::to_string).collect();
        let _infallible = match policies.is_empty() {
            false => write!(summary, "; denied by {}", escape(&policies.join(", "))),
            true => write!(summary, "; no rule allows it"),
        };
    }
    summary
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
