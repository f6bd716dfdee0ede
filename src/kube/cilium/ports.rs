//! Ports and ICMP types of Cilium's rules.

use super::layer7::Asked;
use super::{Named, PortRule, Ports, Reader};
use crate::kube::convert::{Field, Result, items, names};
use crate::model::{Action, IpProtocol, PortMatch, PortSelector};

/// So many ports a rule may name, as upstream has it.
const PORTS_MAX: usize = 40;

/// What a port may ask for besides.
const BEYOND: [&str; 5] = ["rules", "serverNames", "terminatingTLS", "originatingTLS", "listener"];
/// What of it nobody enforces.
const UNENFORCED: [&str; 3] = ["terminatingTLS", "originatingTLS", "listener"];

impl Reader<'_> {
    /// A list that is empty is as if it were not there.
    pub(super) fn ports(&mut self, rule: &Field, action: Action) -> Ports {
        let lists = rule.get("toPorts").and_then(|ports| Ok((items(&ports)?, items(&rule.get("icmps")?)?)));
        let Some((ports, messages)) = self.notes.read(lists) else { return unread(action) };
        if !ports.is_empty() && !messages.is_empty() && action == Action::Allow {
            self.notes.doubt(rule.error("has toPorts and icmps; write a rule for each"));
            return Named::These(Vec::new());
        }
        if ports.is_empty() && messages.is_empty() {
            return Named::Absent;
        }
        let mut all = Vec::new();
        for part in &ports {
            match self.port_rule(part, action) {
                Some(list) => all.extend(list),
                None => return Named::All,
            }
        }
        for part in &messages {
            let fields =
                part.only_known(&["fields"]).and_then(|()| items(&part.get("fields")?)).and_then(few(part));
            for field in self.notes.read(fields).unwrap_or_default() {
                match self.notes.read(message(&field)) {
                    Some(message) => all.push((message, None)),
                    None if action == Action::Allow => {}
                    None => return Named::All,
                }
            }
        }
        Named::These(all)
    }

    /// One element of `toPorts`; `None`: all ports are meant, for what was not read.
    fn port_rule(&mut self, part: &Field, action: Action) -> Option<Vec<PortRule>> {
        let unread = || (action == Action::Allow).then(Vec::new);
        let mut known = vec!["ports"];
        known.extend(BEYOND);
        if self.notes.read(part.only_known(&known)).is_none() {
            return unread();
        }
        let is_beyond = |name: &&str| part.get(name).is_ok_and(|field| asks_for_something(&field));
        if let Some(name) =
            BEYOND.into_iter().find(|name| is_beyond(name)).filter(|_| action != Action::Allow)
        {
            self.notes.doubt(part.error(format!("a rule that denies cannot have {name}")));
            return unread();
        }
        if let Some(name) = UNENFORCED.into_iter().find(|name| is_beyond(name)) {
            if let Some(field) = self.notes.read(part.get(name)) {
                self.not_yet(&field, "this");
            }
            return unread();
        }
        let asked = match self.layer7(part) {
            Asked::Nothing => None,
            Asked::Rules(rules) => Some(rules),
            Asked::Unread => return unread(),
        };
        let list = part.get("ports").and_then(|list| items(&list)).and_then(few(part));
        let Some(list) = self.notes.read(list) else { return unread() };
        let mut all = Vec::new();
        for field in &list {
            match self.notes.read(port(field)) {
                Some(ports) => all.extend(ports),
                None if action == Action::Allow => {}
                None => return None,
            }
        }
        if let Some(rules) = &asked {
            all = self.ports_of_layer7(part, all, rules);
        }
        Some(all.into_iter().map(|port| (port, asked.clone())).collect())
    }
}

fn unread(action: Action) -> Ports {
    if action == Action::Allow { Named::These(Vec::new()) } else { Named::All }
}

fn few<'a, 'b>(part: &'b Field<'a>) -> impl FnOnce(Vec<Field<'a>>) -> Result<Vec<Field<'a>>> + use<'a, 'b> {
    move |list| match list.len() {
        0..=PORTS_MAX => Ok(list),
        count => Err(part.error(format!("has {count} entries; at most {PORTS_MAX} are read"))),
    }
}

/// There, and not an empty object or list.
fn asks_for_something(field: &Field) -> bool {
    match (field.items(), field.entries()) {
        (Ok(Some(list)), _) => !list.is_empty(),
        (_, Ok(entries)) => !entries.is_empty(),
        _ => field.is_present(),
    }
}

/// A port of every protocol that it is of.
fn port(field: &Field) -> Result<Vec<PortMatch>> {
    field.only_known(&["port", "endPort", "protocol"])?;
    let named = field.get("protocol")?;
    let protocols = match named.string()? {
        None | Some("") => IpProtocol::WITH_PORTS.to_vec(),
        Some(any) if any.eq_ignore_ascii_case("ANY") => IpProtocol::WITH_PORTS.to_vec(),
        Some(name) => match IpProtocol::named(name) {
            Some(protocol) => vec![protocol],
            None => return Err(named.error(format!("{name:?} is no protocol"))),
        },
    };
    let has_ports = protocols.iter().all(|protocol| IpProtocol::WITH_PORTS.contains(protocol));
    let selector = numbers(field, has_ports)?;
    if !has_ports && selector != PortSelector::Any {
        return Err(field.error("the protocol has no ports"));
    }
    Ok(protocols.into_iter().map(|protocol| PortMatch { protocol, port: selector.clone() }).collect())
}

fn numbers(field: &Field, is_required: bool) -> Result<PortSelector> {
    let (port, end) = (field.get("port")?, field.get("endPort")?);
    let last = end.unsigned()?.filter(|last| *last != 0);
    let first = match port.string() {
        Ok(None) if is_required => return Err(port.error("is required; 0 is every port")),
        Ok(None) => 0,
        Ok(Some(text)) => match text.parse::<u16>() {
            Ok(number) => number,
            Err(_) if names::is_port_name(&text.to_ascii_lowercase()) => {
                return match last {
                    None => Ok(PortSelector::Named(text.to_ascii_lowercase())),
                    Some(_) => Err(end.error("needs a numeric port beside it")),
                };
            }
            Err(_) => return Err(port.error(format!("{text:?} is neither a port number nor a port's name"))),
        },
        Err(_) => port.port()?.unwrap_or(0),
    };
    match (first, last) {
        (0, None) => Ok(PortSelector::Any),
        (first, None) => Ok(PortSelector::Range(first, first)),
        (first, Some(last)) => match u16::try_from(last) {
            Ok(last) if first > 0 && last >= first => Ok(PortSelector::Range(first, last)),
            _ => Err(end.error(format!("{last} is not a port from {first} on"))),
        },
    }
}

/// A type of ICMP, by number or by name. A type is to the rows what a port is.
fn message(field: &Field) -> Result<PortMatch> {
    field.only_known(&["family", "type"])?;
    let family = field.get("family")?;
    let (protocol, known) = match family.string()? {
        None | Some("" | "IPv4") => (IpProtocol::ICMP, &ICMP[..]),
        Some("IPv6") => (IpProtocol::ICMPV6, &ICMPV6[..]),
        Some(other) => return Err(family.error(format!("{other:?} is not IPv4 or IPv6"))),
    };
    let wanted = field.get("type")?;
    let number = match wanted.string() {
        Ok(Some(text)) => {
            let named = known.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
            named.or_else(|| text.parse().ok())
        }
        Ok(None) => return Err(wanted.error("is required")),
        Err(_) => wanted.unsigned()?.and_then(|number| u8::try_from(number).ok()),
    };
    let number = number.ok_or_else(|| wanted.error("is no ICMP type of this family"))?;
    Ok(PortMatch { protocol, port: PortSelector::Range(number.into(), number.into()) })
}

/// Names of RFC 792 and its followers, as Cilium spells them.
const ICMP: [(&str, u8); 14] = [
    ("EchoReply", 0),
    ("DestinationUnreachable", 3),
    ("Redirect", 5),
    ("Echo", 8),
    ("EchoRequest", 8),
    ("RouterAdvertisement", 9),
    ("RouterSelection", 10),
    ("TimeExceeded", 11),
    ("ParameterProblem", 12),
    ("Timestamp", 13),
    ("TimestampReply", 14),
    ("Photuris", 40),
    ("ExtendedEchoRequest", 42),
    ("ExtendedEchoReply", 43),
];

const ICMPV6: [(&str, u8); 27] = [
    ("DestinationUnreachable", 1),
    ("PacketTooBig", 2),
    ("TimeExceeded", 3),
    ("ParameterProblem", 4),
    ("EchoRequest", 128),
    ("EchoReply", 129),
    ("MulticastListenerQuery", 130),
    ("MulticastListenerReport", 131),
    ("MulticastListenerDone", 132),
    ("RouterSolicitation", 133),
    ("RouterAdvertisement", 134),
    ("NeighborSolicitation", 135),
    ("NeighborAdvertisement", 136),
    ("RedirectMessage", 137),
    ("RouterRenumbering", 138),
    ("ICMPNodeInformationQuery", 139),
    ("ICMPNodeInformationResponse", 140),
    ("InverseNeighborDiscoverySolicitation", 141),
    ("InverseNeighborDiscoveryAdvertisement", 142),
    ("HomeAgentAddressDiscoveryRequest", 144),
    ("HomeAgentAddressDiscoveryReply", 145),
    ("MobilePrefixSolicitation", 146),
    ("MobilePrefixAdvertisement", 147),
    ("DuplicateAddressRequestCodeSuffix", 157),
    ("DuplicateAddressConfirmationCodeSuffix", 158),
    ("ExtendedEchoRequest", 160),
    ("ExtendedEchoReply", 161),
];
