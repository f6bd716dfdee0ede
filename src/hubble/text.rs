//! Flows as lines for people, in the forms of the stock command line.

use std::fmt::Write;

use clap::ValueEnum;
use jiff::Timestamp;

use super::convert::event_types;
use super::proto::flow::{
    Endpoint, Flow, L7FlowType, Service, TraceObservationPoint, TrafficDirection, Verdict, layer7,
};
use super::proto::observer::GetFlowsResponse;
use super::proto::observer::get_flows_response::ResponseTypes;
use super::proto::relay::NodeState;
use super::proto::time;
use super::view::{deciding, policy_name, ports};
use crate::flow::{Colours, DropReason, escape, reserved_name};
use crate::model::{IdentityId, MatchType};

/// How times are written, by the stock command line's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TimeFormat {
    /// Jan _2 15:04:05.000
    #[default]
    #[value(name = "StampMilli")]
    StampMilli,
    /// 2006-01-02
    #[value(name = "YearMonthDay")]
    YearMonthDay,
    /// 2006-01-02T15Z07:00
    #[value(name = "YearMonthDayHour")]
    YearMonthDayHour,
    /// 2006-01-02T15:04Z07:00
    #[value(name = "YearMonthDayHourMinute")]
    YearMonthDayHourMinute,
    /// 2006-01-02T15:04:05Z07:00
    #[value(name = "RFC3339")]
    Rfc3339,
    /// 2006-01-02T15:04:05.999Z07:00
    #[value(name = "RFC3339Milli")]
    Rfc3339Milli,
    /// 2006-01-02T15:04:05.999999Z07:00
    #[value(name = "RFC3339Micro")]
    Rfc3339Micro,
    /// 2006-01-02T15:04:05.999999999Z07:00
    #[value(name = "RFC3339Nano")]
    Rfc3339Nano,
    /// Mon, 02 Jan 2006 15:04:05 -0700
    #[value(name = "RFC1123Z")]
    Rfc1123Z,
}

impl TimeFormat {
    /// In UTC, as all times here.
    fn write(self, at: Timestamp) -> String {
        let (pattern, digits) = match self {
            Self::StampMilli => return at.strftime("%b %e %H:%M:%S%.3f").to_string(),
            Self::YearMonthDay => ("%Y-%m-%d", None),
            Self::YearMonthDayHour => ("%Y-%m-%dT%HZ", None),
            Self::YearMonthDayHourMinute => ("%Y-%m-%dT%H:%MZ", None),
            Self::Rfc1123Z => ("%a, %d %b %Y %H:%M:%S +0000", None),
            Self::Rfc3339 => ("%Y-%m-%dT%H:%M:%SZ", None),
            Self::Rfc3339Milli => ("%Y-%m-%dT%H:%M:%S", Some(3)),
            Self::Rfc3339Micro => ("%Y-%m-%dT%H:%M:%S", Some(6)),
            Self::Rfc3339Nano => ("%Y-%m-%dT%H:%M:%S", Some(9)),
        };
        let mut text = at.strftime(pattern).to_string();
        if let Some(digits) = digits {
            // Zeros at the end are not written.
            let fraction = format!("{:09}", at.subsec_nanosecond().max(0));
            let fraction = fraction[..digits].trim_end_matches('0');
            if !fraction.is_empty() {
                text.push('.');
                text.push_str(fraction);
            }
            text.push('Z');
        }
        text
    }
}

/// What is shown.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Whether verdicts have colours.
    pub colours: Colours,
    /// How times are written.
    pub time: TimeFormat,
    /// The node that saw it.
    pub node: bool,
    /// The policies that decided.
    pub policies: bool,
    /// Addresses, not names.
    pub numeric: bool,
}

/// One line, without its end.
pub fn compact(answer: &GetFlowsResponse, style: Style) -> String {
    let flow = match &answer.response_types {
        Some(ResponseTypes::Flow(flow)) => flow,
        _ => return other(answer),
    };
    let [mut from, mut to] = sides(flow, style);
    let arrow = match flow.is_reply {
        None => "<>",
        Some(false) => "->",
        Some(true) => {
            std::mem::swap(&mut from, &mut to);
            "<-"
        }
    };
    let node = if style.node { format!(" [{}]", escape(&flow.node_name)) } else { String::new() };
    format!(
        "{}{node}: {from} {arrow} {to} {} {} ({})",
        when(flow, style),
        what(flow),
        verdict(flow, style),
        escape(&summary(flow))
    )
}

/// Several lines, each a key and its value.
pub fn dict(answer: &GetFlowsResponse, style: Style) -> String {
    let Some(ResponseTypes::Flow(flow)) = &answer.response_types else { return other(answer) };
    let [from, to] = sides(flow, style);
    let mut text = format!("  TIMESTAMP: {}\n", when(flow, style));
    if style.node {
        let _infallible = writeln!(text, "       NODE: {}", escape(&flow.node_name));
    }
    let _infallible = write!(
        text,
        "     SOURCE: {from}\nDESTINATION: {to}\n       TYPE: {}\n    VERDICT: {}\n    SUMMARY: {}\n------------",
        what(flow),
        verdict(flow, style),
        escape(&summary(flow))
    );
    text
}

/// The heads of the columns of `row`.
pub const HEADS: [&str; 7] = ["TIMESTAMP", "NODE", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"];

/// The cells of a table's row; `None` for what is no flow.
pub fn row(answer: &GetFlowsResponse, style: Style) -> Option<[String; 7]> {
    let Some(ResponseTypes::Flow(flow)) = &answer.response_types else { return None };
    let [from, to] = sides(flow, style);
    let node = escape(&flow.node_name).into_owned();
    let style = Style { colours: Colours::Off, ..style };
    Some([
        when(flow, style),
        node,
        from,
        to,
        what(flow),
        verdict(flow, style),
        escape(&summary(flow)).into_owned(),
    ])
}

/// Losses and nodes.
pub fn other(answer: &GetFlowsResponse) -> String {
    match &answer.response_types {
        Some(ResponseTypes::LostEvents(lost)) => {
            let place = match lost.source {
                1 => "in the kernel: the agent did not keep up",
                _ => "here: this reader did not keep up",
            };
            format!("EVENTS LOST: {} on {} {place}", lost.num_events_lost, escape(&answer.node_name))
        }
        Some(ResponseTypes::NodeStatus(status)) => {
            let state = NodeState::try_from(status.state_change).unwrap_or(NodeState::UnknownNodeState);
            let names = escape(&status.node_names.join(", ")).into_owned();
            let why = match status.message.is_empty() {
                true => String::new(),
                false => format!(": {}", escape(&status.message)),
            };
            format!("{} {names}{why}", state.as_str_name())
        }
        Some(ResponseTypes::Flow(_)) | None => String::new(),
    }
}

fn when(flow: &Flow, style: Style) -> String {
    let at = flow.time.as_ref().and_then(time);
    at.map_or_else(|| "N/A".to_owned(), |at| style.time.write(at))
}

fn sides(flow: &Flow, style: Style) -> [String; 2] {
    let ports = ports(flow);
    let ip = flow.ip.as_ref();
    [
        side(
            ip.map(|ip| ip.source.as_str()),
            ports.map(|[from, _]| from),
            flow.source.as_ref(),
            flow.source_service.as_ref(),
            style,
        ),
        side(
            ip.map(|ip| ip.destination.as_str()),
            ports.map(|[_, to]| to),
            flow.destination.as_ref(),
            flow.destination_service.as_ref(),
            style,
        ),
    ]
}

/// Pod, else service, else address; its port; its identity.
fn side(
    ip: Option<&str>,
    port: Option<u32>,
    endpoint: Option<&Endpoint>,
    service: Option<&Service>,
    style: Style,
) -> String {
    let pod = endpoint.filter(|endpoint| !endpoint.pod_name.is_empty() && !style.numeric);
    let service = service.filter(|service| !service.name.is_empty() && !style.numeric);
    let name = match (pod, service) {
        (Some(pod), _) => format!("{}/{}", escape(&pod.namespace), escape(&pod.pod_name)),
        (None, Some(service)) => format!("{}/{}", escape(&service.namespace), escape(&service.name)),
        (None, None) => match ip {
            Some(ip) if ip.contains(':') && port.is_some() => format!("[{}]", escape(ip)),
            Some(ip) => escape(ip).into_owned(),
            None => "?".to_owned(),
        },
    };
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    let identity = endpoint.map_or(0, |endpoint| endpoint.identity);
    let identity = match reserved_name(IdentityId(identity)) {
        Some(name) => name.to_owned(),
        None => format!("ID:{identity}"),
    };
    format!("{name}{port} ({identity})")
}

/// What happened.
fn what(flow: &Flow) -> String {
    let Some(event) = flow.event_type.as_ref() else { return "UNKNOWN".to_owned() };
    let direction = TrafficDirection::try_from(flow.traffic_direction).unwrap_or(TrafficDirection::Unknown);
    match event.r#type {
        event_types::DROP => {
            u8::try_from(event.sub_type).map_or("drop", |reason| DropReason(reason).text()).to_owned()
        }
        event_types::TRACE if event.sub_type == 0 => "to-endpoint".to_owned(),
        event_types::TRACE => TraceObservationPoint::try_from(event.sub_type).map_or_else(
            |_| "trace".to_owned(),
            |point| point.as_str_name().to_lowercase().replace('_', "-"),
        ),
        event_types::POLICY_VERDICT => {
            let place = usize::try_from(flow.policy_match_type).unwrap_or(usize::MAX);
            let matched = MatchType::EACH.get(place).copied().unwrap_or_default().word();
            format!("policy-verdict:{matched} {}", direction.as_str_name())
        }
        event_types::L7 => request(flow),
        other => format!("type {other}"),
    }
}

/// A request or an answer, by its protocol.
fn request(flow: &Flow) -> String {
    let Some(l7) = &flow.l7 else { return "l7".to_owned() };
    let kind = match l7.r#type() {
        L7FlowType::Request => "request",
        L7FlowType::Response => "response",
        L7FlowType::Sample | L7FlowType::UnknownL7Type => "record",
    };
    match &l7.record {
        Some(layer7::Record::Http(_)) => format!("http-{kind}"),
        Some(layer7::Record::Kafka(_)) => format!("kafka-{kind}"),
        Some(layer7::Record::Dns(dns)) => {
            format!("dns-{kind} {}", escape(&dns.observation_source)).trim_end().to_owned()
        }
        None => format!("l7-{kind}"),
    }
}

fn verdict(flow: &Flow, style: Style) -> String {
    let verdict = Verdict::try_from(flow.verdict).unwrap_or(Verdict::Unknown);
    let is_judged = flow.event_type.as_ref().is_some_and(|event| event.r#type == event_types::POLICY_VERDICT);
    let mut text = match verdict {
        Verdict::Forwarded | Verdict::Redirected if is_judged => "ALLOWED",
        Verdict::Dropped if is_judged => "DENIED",
        Verdict::Audit if is_judged => "AUDITED",
        other => other.as_str_name(),
    }
    .to_owned();
    if style.policies {
        let named = deciding(flow).filter(|policy| !policy.kind.is_empty() && !policy.name.is_empty());
        let named: Vec<String> =
            named.map(|policy| format!("{} ({})", escape(&policy.name), escape(&policy.kind))).collect();
        if !named.is_empty() {
            let _infallible = write!(text, " BY {}", named.join(", "));
        }
    }
    let (start, end) = match (style.colours, verdict) {
        (Colours::On, Verdict::Forwarded | Verdict::Redirected) => ("\x1b[32m", "\x1b[0m"),
        (Colours::On, Verdict::Dropped | Verdict::Error) => ("\x1b[31m", "\x1b[0m"),
        (Colours::On, Verdict::Audit) => ("\x1b[33m", "\x1b[0m"),
        _ => ("", ""),
    };
    format!("{start}{text}{end}")
}

/// The protocol's words, and for a drop by policies who decided.
fn summary(flow: &Flow) -> String {
    let mut text = flow.summary.clone();
    let Some(weir) = &flow.weir else { return text };
    if !weir.service.is_empty() {
        let _infallible = write!(text, "; service {}", weir.service);
    }
    if weir.round_trip_ns > 0 {
        let _infallible = write!(text, "; round trip {}", milliseconds(weir.round_trip_ns));
    }
    if flow.drop_reason_desc != 133 && flow.drop_reason_desc != 181 {
        return text;
    }
    let denied: Vec<String> = deciding(flow).map(policy_name).collect();
    let isolated: Vec<String> = weir.isolated_by.iter().map(policy_name).collect();
    let _infallible = match (denied.is_empty(), isolated.is_empty()) {
        (false, _) => write!(text, "; denied by {}", denied.join(", ")),
        (true, false) => write!(text, "; no rule allows it, isolated by {}", isolated.join(", ")),
        (true, true) => write!(text, "; no rule allows it"),
    };
    text
}

/// With three digits that count.
fn milliseconds(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds as f64 / 1e6;
    let digits = match milliseconds {
        ..1.0 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{milliseconds:.digits$} ms")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Event;
    use crate::flow::tests::{dropped, forwarded};
    use crate::hubble::tests::flow;

    const STYLE: Style = Style {
        colours: Colours::Off,
        time: TimeFormat::StampMilli,
        node: false,
        policies: false,
        numeric: false,
    };

    #[test]
    fn times_are_written_by_their_names() {
        let at: Timestamp = "2026-01-02T03:04:05.120000340Z".parse().expect("a time");
        for (format, text) in [
            ("StampMilli", "Jan  2 03:04:05.120"),
            ("YearMonthDay", "2026-01-02"),
            ("YearMonthDayHour", "2026-01-02T03Z"),
            ("YearMonthDayHourMinute", "2026-01-02T03:04Z"),
            ("RFC3339", "2026-01-02T03:04:05Z"),
            ("RFC3339Milli", "2026-01-02T03:04:05.12Z"),
            ("RFC3339Micro", "2026-01-02T03:04:05.12Z"),
            ("RFC3339Nano", "2026-01-02T03:04:05.12000034Z"),
            ("RFC1123Z", "Fri, 02 Jan 2026 03:04:05 +0000"),
        ] {
            let format = TimeFormat::from_str(format, false).expect("a name");
            assert_eq!(format.write(at), text, "{format:?}");
        }
    }

    fn answer(flow: Flow) -> GetFlowsResponse {
        GetFlowsResponse { response_types: Some(ResponseTypes::Flow(flow)), ..GetFlowsResponse::default() }
    }

    #[test]
    fn lines_as_the_stock_command_line_has_them() {
        let reply = Event {
            flags: crate::datapath::types::event_flags::EVENT_REPLY.0 as u8,
            r#type: 2,
            ..forwarded()
        };
        for (event, style, expected) in [
            (
                forwarded(),
                Style { policies: true, node: true, ..STYLE },
                "Nov 22 19:20:13.123 [a]: shop/frontend-1:43210 (ID:256) -> shop/backend-1:8080 (ID:300) \
                 policy-verdict:L3-L4 EGRESS ALLOWED BY backend-ingress (NetworkPolicy) \
                 (TCP Flags: SYN, ACK; service 10.96.0.10:80)",
            ),
            (
                dropped(),
                STYLE,
                "Nov 22 19:20:13.123: 192.0.2.1:43210 (world) <> shop/backend-1:8080 (ID:300) Policy denied DROPPED \
                 (TCP Flags: SYN; no rule allows it)",
            ),
            (
                Event { rule_id: 7, reason: 181, ..dropped() },
                STYLE,
                "Nov 22 19:20:13.123: 192.0.2.1:43210 (world) <> shop/backend-1:8080 (ID:300) Denied by a deny rule \
                 DROPPED (TCP Flags: SYN; denied by NetworkPolicy shop/backend-ingress)",
            ),
            (
                reply,
                Style { numeric: true, ..STYLE },
                "Nov 22 19:20:13.123: 10.0.0.3:43210 (ID:256) <- 10.1.0.8:8080 (ID:300) to-endpoint FORWARDED \
                 (TCP Flags: SYN, ACK)",
            ),
        ] {
            assert_eq!(compact(&answer(flow(&event)), style), expected);
        }
        let text = dict(&answer(flow(&dropped())), STYLE);
        assert!(text.contains("DESTINATION: shop/backend-1:8080 (ID:300)\n"), "{text}");
        let cells = row(&answer(flow(&dropped())), STYLE).expect("a flow");
        assert_eq!((cells.len(), cells[5].as_str()), (HEADS.len(), "DROPPED"));
    }

    #[test]
    fn bypass_14_nothing_of_a_flow_commands_the_terminal() {
        let mut evil = flow(&dropped());
        let escape_code = "x\x1b]0;owned\x07\u{202e}";
        evil.node_name = escape_code.to_owned();
        evil.summary = escape_code.to_owned();
        if let Some(source) = &mut evil.source {
            source.pod_name = escape_code.to_owned();
            source.namespace = escape_code.to_owned();
        }
        if let Some(ip) = &mut evil.ip {
            ip.destination = escape_code.to_owned();
        }
        if let Some(destination) = &mut evil.destination {
            destination.pod_name.clear();
        }
        let style = Style { node: true, policies: true, ..STYLE };
        let cells = row(&answer(evil.clone()), style).expect("a flow").concat();
        for text in [compact(&answer(evil.clone()), style), dict(&answer(evil), style), cells] {
            assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text:?}");
            assert!(!text.contains('\u{202e}'), "{text:?}");
        }
    }
}
