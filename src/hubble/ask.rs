//! Filters by the names of the stock command line: `weir observe` and the page use the same ones.

use super::convert::event_types;
use super::json::from_str_strict;
use super::proto::flow::{
    DropReason, EventTypeFilter, FlowFilter, HttpHeader, IpVersion, NetworkInterface, TcpFlags,
    TraceObservationPoint, TrafficDirection, Verdict, WeirEvent, Workload,
};
use crate::flow::reserved_identity;

/// One flag: its name, other names, what its value is called (none: it needs no value), help.
pub struct Flag {
    /// Without dashes.
    pub name: &'static str,
    /// Other names that mean the same.
    pub aliases: &'static [&'static str],
    /// One letter.
    pub short: Option<char>,
    /// Empty: there is no value.
    pub value: &'static str,
    /// For people.
    pub help: &'static str,
}

const fn flag(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { name, aliases: &[], short: None, value, help }
}

/// Every filter.
pub const FLAGS: &[Flag] = &[
    flag("pod", "[NS/]PREFIX", "From or to a pod whose name begins so; NS/ is all of a namespace"),
    flag("from-pod", "[NS/]PREFIX", "From a pod whose name begins so"),
    flag("to-pod", "[NS/]PREFIX", "To a pod whose name begins so"),
    Flag { short: Some('n'), ..flag("namespace", "NAME", "From or to a namespace") },
    flag("from-namespace", "NAME", "From a namespace"),
    flag("to-namespace", "NAME", "To a namespace"),
    Flag { short: Some('A'), ..flag("all-namespaces", "", "From or to a pod of any namespace") },
    flag("from-all-namespaces", "", "From a pod of any namespace"),
    flag("to-all-namespaces", "", "To a pod of any namespace"),
    Flag {
        short: Some('l'),
        ..flag("label", "SELECTOR", "From or to a party with these labels: key=value, !key, key in (a,b)")
    },
    flag("from-label", "SELECTOR", "From a party with these labels"),
    flag("to-label", "SELECTOR", "To a party with these labels"),
    flag("service", "[NS/]PREFIX", "From or to a service whose name begins so"),
    flag("from-service", "[NS/]PREFIX", "From a service whose name begins so"),
    flag("to-service", "[NS/]PREFIX", "To a service whose name begins so"),
    flag("workload", "[KIND/]NAME", "From or to a pod of a workload"),
    flag("from-workload", "[KIND/]NAME", "From a pod of a workload"),
    flag("to-workload", "[KIND/]NAME", "To a pod of a workload"),
    flag("ip", "IP[/N]", "From or to an address or prefix"),
    flag("from-ip", "IP[/N]", "From an address or prefix"),
    flag("to-ip", "IP[/N]", "To an address or prefix"),
    flag("snat-ip", "IP[/N]", "Sent under this address after source translation"),
    flag("fqdn", "PATTERN", "From or to a DNS name, as *.example.org"),
    flag("from-fqdn", "PATTERN", "From a DNS name"),
    flag("to-fqdn", "PATTERN", "To a DNS name"),
    flag("port", "PORT", "From or to a port"),
    flag("from-port", "PORT", "From a port"),
    flag("to-port", "PORT", "To a port"),
    flag("identity", "IDENTITY", "From or to an identity: a number, or a name as world or host"),
    flag("from-identity", "IDENTITY", "From an identity"),
    flag("to-identity", "IDENTITY", "To an identity"),
    flag("cluster", "NAME", "From or to a cluster"),
    flag("from-cluster", "NAME", "From a cluster"),
    flag("to-cluster", "NAME", "To a cluster"),
    flag("protocol", "PROTOCOL", "tcp, udp, sctp, icmp, icmpv4, icmpv6, http, dns"),
    flag("verdict", "VERDICT", "forwarded, dropped, error, audit, redirected, traced, translated"),
    Flag {
        aliases: &["drop-reason"],
        ..flag("drop-reason-desc", "REASON", "Why it was dropped, as policy_denied")
    },
    Flag {
        aliases: &["direction"],
        ..flag("traffic-direction", "DIRECTION", "ingress or egress, seen from the pod")
    },
    Flag {
        short: Some('t'),
        ..flag("type", "TYPE[:SUBTYPE]", "drop, l7, policy-verdict, trace[:to-endpoint], new, update, end")
    },
    flag("reply", "", "Replies only"),
    flag("not-reply", "", "No replies"),
    flag("tcp-flags", "FLAGS", "With all of these TCP flags, as syn,ack"),
    Flag { short: Some('4'), ..flag("ipv4", "", "IPv4 only") },
    Flag { short: Some('6'), ..flag("ipv6", "", "IPv6 only") },
    flag("ip-version", "VERSION", "v4, v6 or none"),
    flag("interface", "NAME", "Seen at this interface"),
    flag("node-name", "PATTERN", "Seen by this node, as worker-* or cluster/node"),
    flag("node-label", "SELECTOR", "Seen by a node with these labels"),
    flag("encrypted", "", "Encrypted only"),
    flag("unencrypted", "", "Not encrypted only"),
    flag("uuid", "UUID", "The flow of this number"),
    flag("trace-id", "ID", "Of this trace"),
    flag("ip-trace-id", "ID", "Of this trace in an IP option"),
    flag("http-status", "CODE", "404, or 4+ for all that begin with 4"),
    flag("http-method", "METHOD", "GET, POST, ..."),
    flag("http-path", "REGEX", "Path of the request"),
    flag("http-url", "REGEX", "URL of the request"),
    flag("http-header", "NAME:VALUE", "With this header"),
    flag("dns-query", "REGEX", "Asking for this DNS name"),
    flag("latency", "DURATION", "Answers that took at least this long, as 100ms or 2s"),
    flag("cel-expression", "CEL", "True of the flow, as _flow.source.identity == 2"),
];

/// Filters as they are asked for, one flag after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    white: Side,
    black: Side,
    allow: Vec<FlowFilter>,
    deny: Vec<FlowFilter>,
}

/// Conditions on either side make two filters: on the source, on the destination.
#[derive(Clone, Debug, Default, PartialEq)]
struct Side {
    left: FlowFilter,
    right: FlowFilter,
    namespaces: Vec<String>,
    from_namespaces: Vec<String>,
    to_namespaces: Vec<String>,
    given: Vec<&'static str>,
}

impl Ask {
    /// Adds a filter; with `not` what matches it is left out.
    pub fn add(&mut self, name: &str, value: &str, not: bool) -> Result<(), String> {
        let is_it = |flag: &&Flag| flag.name == name || flag.aliases.contains(&name);
        let Some(flag) = FLAGS.iter().find(is_it) else { return Err(format!("there is no filter {name}")) };
        // Each --not is on its own: they are joined by "or".
        if not {
            let mut one = Side::default();
            one.add(flag.name, value)?;
            self.deny.extend(one.filters());
            return Ok(());
        }
        self.white.add(flag.name, value)
    }

    /// Adds a filter that was written as JSON.
    pub fn add_raw(&mut self, json: &str, not: bool) -> Result<(), String> {
        let filter = from_str_strict(json).map_err(|error| error.to_string())?;
        if not {
            self.deny.push(filter)
        } else {
            self.allow.push(filter)
        }
        Ok(())
    }

    /// Whitelist and blacklist of a request.
    pub fn lists(self) -> [Vec<FlowFilter>; 2] {
        let join = |side: Side, mut more: Vec<FlowFilter>| {
            more.extend(side.filters());
            more
        };
        [join(self.white, self.allow), join(self.black, self.deny)]
    }
}

impl Side {
    fn add(&mut self, name: &'static str, value: &str) -> Result<(), String> {
        self.check(name)?;
        self.given.push(name);
        if self.add_party(name, value)? || self.add_packet(name, value)? {
            return Ok(());
        }
        self.add_request(name, value)
    }

    /// `--pod` and `--from-pod` together would mean nothing.
    fn check(&self, name: &str) -> Result<(), String> {
        let general = name.strip_prefix("from-").or_else(|| name.strip_prefix("to-"));
        let clashes = |given: &&&str| match general {
            Some(general) => **given == general,
            None => given.strip_prefix("from-").or_else(|| given.strip_prefix("to-")) == Some(name),
        };
        match self.given.iter().find(clashes) {
            Some(given) => Err(format!("filters {given} and {name} cannot be combined")),
            None => Ok(()),
        }
    }

    fn both(&mut self, set: impl Fn(&mut FlowFilter)) {
        set(&mut self.left);
        set(&mut self.right);
    }

    /// Conditions on who; false if it is none.
    fn add_party(&mut self, name: &str, value: &str) -> Result<bool, String> {
        let (from, to, what) = match (name.strip_prefix("from-"), name.strip_prefix("to-")) {
            (Some(what), _) => (true, false, what),
            (_, Some(what)) => (false, true, what),
            _ => (false, false, name),
        };
        if what == "namespace" || what == "all-namespaces" {
            let list = match (from, to) {
                (true, _) => &mut self.from_namespaces,
                (_, true) => &mut self.to_namespaces,
                _ => &mut self.namespaces,
            };
            list.push(if what == "namespace" { value.to_owned() } else { String::new() });
            return Ok(true);
        }
        let Some(set) = party(what, value)? else { return Ok(false) };
        if from || !to {
            set(&mut self.left, true);
        }
        if to || !from {
            set(&mut self.right, false);
        }
        if from {
            set(&mut self.right, true);
        }
        if to {
            set(&mut self.left, false);
        }
        Ok(true)
    }

    /// Conditions on the packet; false if it is none.
    fn add_packet(&mut self, name: &str, value: &str) -> Result<bool, String> {
        match name {
            "snat-ip" => self.both(|filter| filter.source_ip_xlated.push(value.to_owned())),
            "protocol" => self.both(|filter| filter.protocol.push(value.to_owned())),
            "verdict" => {
                let verdict = named(name, value, Verdict::from_str_name)?;
                self.both(|filter| filter.verdict.push(verdict.into()));
            }
            "drop-reason-desc" => {
                let reason = drop_reason(value)?;
                self.both(|filter| filter.drop_reason_desc.push(reason));
            }
            "traffic-direction" => {
                let direction = named(name, value, TrafficDirection::from_str_name)?;
                self.both(|filter| filter.traffic_direction.push(direction.into()));
            }
            "type" => self.add_type(value)?,
            "reply" | "not-reply" => self.both(|filter| filter.reply.push(name == "reply")),
            "encrypted" | "unencrypted" => self.both(|filter| filter.encrypted.push(name == "encrypted")),
            "tcp-flags" => {
                let flags = tcp_flags(value)?;
                self.both(|filter| filter.tcp_flags.push(flags));
            }
            "ipv4" | "ipv6" | "ip-version" => {
                let version = ip_version(if name == "ip-version" { value } else { name })?;
                self.both(|filter| filter.ip_version.push(version.into()));
            }
            "interface" => {
                let interface = NetworkInterface { name: value.to_owned(), index: 0 };
                self.both(|filter| filter.interface.push(interface.clone()));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn add_type(&mut self, value: &str) -> Result<(), String> {
        let event = match value {
            "new" => Some(WeirEvent::ConnectionNew),
            "update" => Some(WeirEvent::ConnectionUpdate),
            "end" => Some(WeirEvent::ConnectionEnd),
            _ => None,
        };
        if let Some(event) = event {
            self.both(|filter| filter.weir_event.push(event.into()));
            return Ok(());
        }
        let filter = event_type(value)?;
        self.both(|into| into.event_type.push(filter));
        Ok(())
    }

    fn add_request(&mut self, name: &str, value: &str) -> Result<(), String> {
        let text = value.to_owned();
        match name {
            "node-name" => self.both(|filter| filter.node_name.push(text.clone())),
            "node-label" => self.both(|filter| filter.node_labels.push(text.clone())),
            "uuid" => self.both(|filter| filter.uuid.push(text.clone())),
            "trace-id" => self.both(|filter| filter.trace_id.push(text.clone())),
            "ip-trace-id" => {
                let id = value.parse().map_err(|_| format!("{value:?} is no number"))?;
                self.both(|filter| filter.ip_trace_id.push(id));
            }
            "http-status" => self.both(|filter| filter.http_status_code.push(text.clone())),
            "http-method" => self.both(|filter| filter.http_method.push(text.clone())),
            "http-path" => self.both(|filter| filter.http_path.push(text.clone())),
            "http-url" => self.both(|filter| filter.http_url.push(text.clone())),
            "http-header" => {
                let (key, value) = value.split_once(':').ok_or("write NAME:VALUE")?;
                let header = HttpHeader { key: key.to_owned(), value: value.to_owned() };
                self.both(|filter| filter.http_header.push(header.clone()));
            }
            "dns-query" => self.both(|filter| filter.dns_query.push(text.clone())),
            "latency" => {
                let least = latency(value)?;
                self.both(|filter| filter.weir_latency_ns_min = least);
            }
            "cel-expression" => self.both(|filter| {
                filter.experimental.get_or_insert_default().cel_expression.push(text.clone());
            }),
            other => return Err(format!("there is no filter {other}")),
        }
        Ok(())
    }

    /// One filter where both sides are the same, two otherwise, none where nothing was asked.
    fn filters(mut self) -> Vec<FlowFilter> {
        if self.given.is_empty() {
            return Vec::new();
        }
        for filter in [&mut self.left, &mut self.right] {
            within(&self.from_namespaces, &mut filter.source_pod, &mut filter.source_service);
            within(&self.to_namespaces, &mut filter.destination_pod, &mut filter.destination_service);
        }
        within(&self.namespaces, &mut self.left.source_pod, &mut self.left.source_service);
        within(&self.namespaces, &mut self.right.destination_pod, &mut self.right.destination_service);
        if self.left == self.right { vec![self.left] } else { vec![self.left, self.right] }
    }
}

/// Names that have no namespace are of these.
fn within(namespaces: &[String], pods: &mut Vec<String>, services: &mut Vec<String>) {
    if namespaces.is_empty() {
        return;
    }
    if pods.is_empty() && services.is_empty() {
        pods.push(String::new());
    }
    for names in [pods, services] {
        let qualified = |name: &String| match name.contains('/') {
            true => vec![name.clone()],
            false => namespaces.iter().map(|namespace| format!("{namespace}/{name}")).collect(),
        };
        *names = names.iter().flat_map(qualified).collect();
    }
}

/// Sets a condition on the source (true) or the destination of a filter.
type SetParty = Box<dyn Fn(&mut FlowFilter, bool)>;

/// A condition on one side; `None` where `what` is no such condition.
fn party(what: &str, value: &str) -> Result<Option<SetParty>, String> {
    macro_rules! set {
        ($value:expr, $source:ident, $destination:ident) => {{
            let value = $value;
            Box::new(move |filter: &mut FlowFilter, is_source: bool| {
                let list = if is_source { &mut filter.$source } else { &mut filter.$destination };
                list.push(value.clone());
            })
        }};
    }
    let text = value.to_owned();
    Ok(Some(match what {
        "pod" => set!(text, source_pod, destination_pod),
        "label" => set!(text, source_label, destination_label),
        "service" => set!(text, source_service, destination_service),
        "workload" => set!(workload(value), source_workload, destination_workload),
        "ip" => set!(text, source_ip, destination_ip),
        "fqdn" => set!(text, source_fqdn, destination_fqdn),
        "port" => set!(text, source_port, destination_port),
        "identity" => set!(identity(value)?, source_identity, destination_identity),
        "cluster" => set!(text, source_cluster_name, destination_cluster_name),
        _ => return Ok(None),
    }))
}

fn workload(value: &str) -> Workload {
    let (kind, name) = value.split_once('/').unwrap_or(("", value));
    Workload { kind: kind.to_owned(), name: name.to_owned() }
}

fn identity(value: &str) -> Result<u32, String> {
    let name = value.strip_prefix("reserved:").unwrap_or(value);
    reserved_identity(name)
        .map(|identity| identity.0)
        .or_else(|| value.parse().ok())
        .ok_or_else(|| format!("{value:?} is no number or reserved name as world, host"))
}

/// A value of an enum by its name, in any case.
fn named<T>(flag: &str, value: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, String> {
    let name = value.to_ascii_uppercase().replace('-', "_");
    parse(&name).ok_or_else(|| format!("{flag}: there is no {value:?}"))
}

/// A length of time in nanoseconds, as `100ms`.
fn latency(value: &str) -> Result<u64, String> {
    let length = value.parse::<jiff::SignedDuration>().ok();
    let nanoseconds = length.and_then(|length| u64::try_from(length.as_nanos()).ok());
    nanoseconds
        .filter(|length| *length > 0)
        .ok_or_else(|| format!("latency: {value:?} is no time as 100ms or 2s"))
}

fn drop_reason(value: &str) -> Result<i32, String> {
    let by_number = || value.parse::<u8>().ok().map(i32::from);
    let name = value.to_ascii_uppercase().replace('-', "_");
    DropReason::from_str_name(&name).map(i32::from).or_else(by_number).ok_or_else(|| {
        let known: Vec<_> = crate::flow::DropReason::all().map(crate::flow::DropReason::name).collect();
        format!("unknown drop reason {value:?}; the programs give {}", known.join(", "))
    })
}

fn tcp_flags(value: &str) -> Result<TcpFlags, String> {
    let mut flags = TcpFlags::default();
    for flag in value.split(',') {
        let place = match flag.to_ascii_uppercase().as_str() {
            "FIN" => &mut flags.fin,
            "SYN" => &mut flags.syn,
            "RST" => &mut flags.rst,
            "PSH" => &mut flags.psh,
            "ACK" => &mut flags.ack,
            "URG" => &mut flags.urg,
            "ECE" => &mut flags.ece,
            "CWR" => &mut flags.cwr,
            "NS" => &mut flags.ns,
            other => return Err(format!("unknown TCP flag {other:?}")),
        };
        *place = true;
    }
    Ok(flags)
}

fn ip_version(value: &str) -> Result<IpVersion, String> {
    match value.to_ascii_lowercase().as_str() {
        "4" | "v4" | "ipv4" | "ip4" => Ok(IpVersion::IPv4),
        "6" | "v6" | "ipv6" | "ip6" => Ok(IpVersion::IPv6),
        "none" => Ok(IpVersion::IpNotUsed),
        other => Err(format!("{other:?} is not v4, v6 or none")),
    }
}

/// `TYPE` or `TYPE:SUBTYPE`, each a name or a number.
fn event_type(value: &str) -> Result<EventTypeFilter, String> {
    let (kind, sub) = value.split_once(':').map_or((value, None), |(kind, sub)| (kind, Some(sub)));
    let r#type = match kind {
        "drop" => event_types::DROP,
        "debug" => 2,
        "capture" => 3,
        "trace" => event_types::TRACE,
        "policy-verdict" => event_types::POLICY_VERDICT,
        "trace-sock" => event_types::TRACE_SOCK,
        "l7" => event_types::L7,
        "agent" => 130,
        number => number.parse().map_err(|_| format!("unknown type {kind:?}"))?,
    };
    let Some(sub) = sub else { return Ok(EventTypeFilter { r#type, ..EventTypeFilter::default() }) };
    let point = || {
        let point = TraceObservationPoint::from_str_name(&sub.to_ascii_uppercase().replace('-', "_"))?;
        Some(if point == TraceObservationPoint::ToEndpoint { 0 } else { point.into() })
    };
    let sub_type = match r#type {
        event_types::TRACE => sub.parse().ok().or_else(point),
        event_types::DROP => drop_reason(sub).ok(),
        _ => sub.parse().ok(),
    };
    let sub_type = sub_type.ok_or_else(|| format!("unknown sub-type {sub:?} of {kind}"))?;
    Ok(EventTypeFilter { r#type, match_sub_type: true, sub_type })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::hubble::json::to_value;

    fn lists(flags: &[(&str, &str)]) -> Result<[Vec<Value>; 2], String> {
        let mut ask = Ask::default();
        for (name, value) in flags {
            match name.strip_prefix("not.") {
                Some(name) => ask.add(name, value, true)?,
                None => ask.add(name, value, false)?,
            }
        }
        Ok(ask.lists().map(|list| list.iter().map(to_value).collect()))
    }

    #[test]
    fn flags_become_the_filters_of_the_stock_command_line() {
        for (flags, white) in [
            (&[][..], json!([])),
            (&[("from-pod", "shop/web")], json!([{"source_pod": ["shop/web"]}])),
            (
                &[("pod", "shop/web")],
                json!([{"source_pod": ["shop/web"]}, {"destination_pod": ["shop/web"]}]),
            ),
            (
                &[("pod", "a/b"), ("verdict", "dropped")],
                json!([
                    {"source_pod": ["a/b"], "verdict": ["DROPPED"]},
                    {"destination_pod": ["a/b"], "verdict": ["DROPPED"]},
                ]),
            ),
            (&[("namespace", "shop")], json!([{"source_pod": ["shop/"]}, {"destination_pod": ["shop/"]}])),
            (
                &[("namespace", "shop"), ("from-port", "80")],
                json!([
                    {"source_pod": ["shop/"], "source_port": ["80"]},
                    {"destination_pod": ["shop/"], "source_port": ["80"]},
                ]),
            ),
            (&[("to-namespace", "shop"), ("to-pod", "web")], json!([{"destination_pod": ["shop/web"]}])),
            (&[("from-all-namespaces", "")], json!([{"source_pod": ["/"]}])),
            (
                &[("to-identity", "world"), ("to-identity", "300")],
                json!([{"destination_identity": [2, 300]}]),
            ),
            (
                &[("type", "trace:to-endpoint")],
                json!([{"event_type": [{"type": 4, "match_sub_type": true}]}]),
            ),
            (
                &[("type", "drop:policy_denied")],
                json!([{"event_type": [{"type": 1, "match_sub_type": true, "sub_type": 133}]}]),
            ),
            (&[("type", "end")], json!([{"weir_event": ["CONNECTION_END"]}])),
            (&[("drop-reason", "policy-denied")], json!([{"drop_reason_desc": ["POLICY_DENIED"]}])),
            (&[("direction", "Egress")], json!([{"traffic_direction": ["EGRESS"]}])),
            (&[("tcp-flags", "syn,ack")], json!([{"tcp_flags": [{"SYN": true, "ACK": true}]}])),
            (&[("not-reply", "")], json!([{"reply": [false]}])),
            (&[("ipv6", "")], json!([{"ip_version": ["IPv6"]}])),
            (&[("http-header", "a:b")], json!([{"http_header": [{"key": "a", "value": "b"}]}])),
            (
                &[("to-workload", "Deployment/web")],
                json!([{"destination_workload": [{"name": "web", "kind": "Deployment"}]}]),
            ),
        ] {
            assert_eq!(lists(flags).map(|[white, _]| Value::from(white)), Ok(white), "{flags:?}");
        }
        let [white, black] = lists(&[("not.verdict", "forwarded"), ("not.port", "53")]).expect("good flags");
        assert!(white.is_empty());
        assert_eq!(
            Value::from(black),
            json!([{"verdict": ["FORWARDED"]}, {"source_port": ["53"]}, {"destination_port": ["53"]}])
        );
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for flags in [
            &[("pod", "a"), ("from-pod", "b")][..],
            &[("to-port", "1"), ("port", "2")],
            &[("colour", "red")],
            &[("verdict", "maybe")],
            &[("type", "trace:nowhere")],
            &[("tcp-flags", "syn,xyz")],
            &[("identity", "somebody")],
            &[("latency", "soon")],
        ] {
            assert!(lists(flags).is_err(), "{flags:?}");
        }
        let mut ask = Ask::default();
        assert!(ask.add_raw("{\"verdict\":[\"DROPED\"]}", false).is_err());
        assert_eq!(ask.add_raw("{\"verdict\":[\"DROPPED\"]}", false), Ok(()));
        assert_eq!(ask.lists()[0].len(), 1);
    }

    #[test]
    fn every_flag_is_understood() {
        for flag in FLAGS {
            let value = match flag.name {
                name if name.ends_with("identity") => "host",
                name if name.ends_with("ip-trace-id") || name.ends_with("port") => "1",
                "verdict" => "dropped",
                "latency" => "100ms",
                "drop-reason-desc" => "POLICY_DENY",
                "traffic-direction" => "ingress",
                "type" => "l7",
                "tcp-flags" => "fin",
                "ip-version" => "none",
                "http-header" => "a:b",
                _ => "x",
            };
            assert_eq!(lists(&[(flag.name, value)]).err(), None, "{}", flag.name);
        }
    }
}
