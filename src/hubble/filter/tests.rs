//! Every field of `FlowFilter` against flows that have and lack it.

use serde_json::{Value, json};

use super::Filters;
use crate::flow::Event;
use crate::flow::tests::{dropped, forwarded};
use crate::hubble::json::{from_str, to_value};
use crate::hubble::proto::flow::{Flow, FlowFilter};
use crate::hubble::tests::flow;

fn filter(value: &Value) -> FlowFilter {
    from_str(&value.to_string()).expect("a filter")
}

/// Filters, and whether the forwarded and the dropped record match, by the record and by the flow.
#[test]
fn fields_of_packets() {
    for (wanted, expected) in [
        (json!({}), [true, true]),
        (json!({"source_ip": ["10.0.0.3"]}), [true, false]),
        (json!({"source_ip": ["10.0.0.0/8", "192.0.2.1"]}), [true, true]),
        (json!({"destination_ip": ["10.1.0.0/16"]}), [true, true]),
        (json!({"destination_ip": ["10.0.0.3"]}), [false, false]),
        (json!({"source_ip_xlated": ["10.0.0.3"]}), [false, false]),
        (json!({"source_pod": ["shop/frontend"]}), [true, false]),
        (json!({"source_pod": ["other/frontend"]}), [false, false]),
        (json!({"destination_pod": ["shop/"]}), [true, true]),
        (json!({"destination_pod": ["back"]}), [true, true]),
        (json!({"destination_pod": ["/back"]}), [true, true]),
        (json!({"destination_pod": ["front"]}), [false, false]),
        (json!({"source_service": ["shop/backend"]}), [false, false]),
        (json!({"destination_service": ["shop/back"]}), [true, false]),
        (json!({"source_label": ["app=frontend"]}), [true, false]),
        (json!({"source_label": ["reserved:world"]}), [false, true]),
        (json!({"source_label": ["k8s:app in (frontend, other)"]}), [true, false]),
        (json!({"destination_label": ["any:app=backend,!tier"]}), [true, true]),
        (json!({"source_fqdn": ["*.example.org"]}), [false, false]),
        (json!({"source_workload": [{"name": "web"}]}), [false, false]),
        (json!({"source_cluster_name": ["default"]}), [true, false]),
        (json!({"destination_cluster_name": ["other"]}), [false, false]),
        (json!({"traffic_direction": ["INGRESS"]}), [false, true]),
        (json!({"verdict": ["DROPPED"]}), [false, true]),
        (json!({"verdict": ["FORWARDED", "DROPPED"]}), [true, true]),
        (json!({"verdict": ["AUDIT"]}), [false, false]),
        (json!({"drop_reason_desc": ["POLICY_DENIED"]}), [false, true]),
        (json!({"drop_reason_desc": ["TTL_EXCEEDED"]}), [false, false]),
        (json!({"interface": [{"index": 9}]}), [true, true]),
        (json!({"interface": [{"name": "none such"}]}), [false, false]),
        (json!({"event_type": [{"type": 1}]}), [false, true]),
        (json!({"event_type": [{"type": 5}]}), [true, false]),
        (json!({"event_type": [{"type": 1, "match_sub_type": true, "sub_type": 133}]}), [false, true]),
        (json!({"event_type": [{"type": 1, "match_sub_type": true, "sub_type": 0}]}), [false, false]),
        (json!({"weir_event": ["CONNECTION_NEW"]}), [true, false]),
        (json!({"weir_event": ["PACKET_DROP", "CONNECTION_END"]}), [false, true]),
        (json!({"protocol": ["tcp"]}), [true, true]),
        (json!({"protocol": ["UDP", "icmp", "icmpv4", "icmpv6", "sctp", "vrrp", "igmp"]}), [false, false]),
        (json!({"protocol": ["http", "dns"]}), [false, false]),
        (json!({"source_port": ["43210"]}), [true, true]),
        (json!({"destination_port": ["8080", "1"]}), [true, true]),
        (json!({"destination_port": ["80"]}), [false, false]),
        (json!({"reply": [false]}), [true, true]),
        (json!({"reply": [true]}), [false, false]),
        (json!({"source_identity": [2]}), [false, true]),
        (json!({"destination_identity": [300, 1]}), [true, true]),
        (json!({"tcp_flags": [{"SYN": true}]}), [true, true]),
        (json!({"tcp_flags": [{"SYN": true, "ACK": true}]}), [true, false]),
        (json!({"tcp_flags": [{"RST": true}]}), [false, false]),
        (json!({"node_name": ["a"]}), [true, true]),
        (json!({"node_name": ["default/*"]}), [true, true]),
        (json!({"node_name": ["other/", "b*"]}), [false, false]),
        (json!({"node_labels": ["zone=1"]}), [true, true]),
        (json!({"node_labels": ["zone=2"]}), [false, false]),
        (json!({"ip_version": ["IPv4"]}), [true, true]),
        (json!({"ip_version": ["IPv6", "IP_NOT_USED"]}), [false, false]),
        (json!({"trace_id": ["1"]}), [false, false]),
        (json!({"ip_trace_id": ["1"]}), [false, false]),
        (json!({"encrypted": [false]}), [true, true]),
        (json!({"encrypted": [true]}), [false, false]),
        (json!({"uuid": ["none such"]}), [false, false]),
        (json!({"http_status_code": ["4+"]}), [false, false]),
        (json!({"weir_latency_ns_min": "1"}), [false, false]),
        (json!({"experimental": {"cel_expression": ["_flow.verdict == 2"]}}), [false, true]),
        (
            json!({"experimental": {"cel_expression": ["false", "_flow.source.identity == 256"]}}),
            [true, false],
        ),
        (json!({"verdict": ["DROPPED"], "source_pod": ["shop/"]}), [false, false]),
    ] {
        let filters = Filters::new(&[filter(&wanted)], &[]).expect("a good filter");
        let shown = |event: &Event| filters.may_match(event) && filters.matches(&flow(event));
        assert_eq!([forwarded(), dropped()].map(|event| shown(&event)), expected, "{wanted}");
        let read_back =
            |event: &Event| filters.matches(&from_str(&to_value(&flow(event)).to_string()).expect("a flow"));
        assert_eq!(
            [forwarded(), dropped()].map(|event| read_back(&event)),
            expected,
            "from a file: {wanted}"
        );
        let excluding = Filters::new(&[], &[filter(&wanted)]).expect("a good filter");
        let hidden = |event: &Event| !(excluding.may_match(event) && excluding.matches(&flow(event)));
        assert_eq!([forwarded(), dropped()].map(|event| hidden(&event)), expected, "not {wanted}");
    }
    let uuid = flow(&dropped()).uuid;
    let filters = Filters::new(&[filter(&json!({"uuid": [uuid]}))], &[]).expect("a good filter");
    assert_eq!([forwarded(), dropped()].map(|event| filters.matches(&flow(&event))), [false, true]);
}

/// A reply's source is the server: filters hold the packet's sides, also on the raw record.
#[test]
fn replies_are_turned_round() {
    let flags = crate::datapath::types::event_flags::EVENT_REPLY.0 as u8;
    let reply = Event { flags, ..forwarded() };
    for (wanted, expected) in [
        (json!({"source_ip": ["10.1.0.8"]}), true),
        (json!({"source_port": ["8080"]}), true),
        (json!({"destination_identity": [256]}), true),
        (json!({"source_pod": ["shop/backend"]}), true),
        (json!({"source_ip": ["10.0.0.3"]}), false),
        (json!({"reply": [true]}), true),
        (json!({"reply": [false]}), false),
    ] {
        let filters = Filters::new(&[filter(&wanted)], &[]).expect("a good filter");
        assert_eq!(filters.may_match(&reply) && filters.matches(&flow(&reply)), expected, "{wanted}");
    }
}

#[test]
fn fields_of_requests() {
    let request: Flow = from_str(
        &json!({
            "l7": {"type": "RESPONSE", "latency_ns": "250000000", "http": {
                "code": 404, "method": "GET", "url": "http://shop.example/cart/7?user=1",
                "headers": [{"key": "X-Team", "value": "blue"}],
            }},
            "destination_names": ["shop.example.org"],
            "destination": {"workloads": [{"name": "cart", "kind": "Deployment"}]},
            "trace_context": {"parent": {"trace_id": "ab12"}},
        })
        .to_string(),
    )
    .expect("a flow");
    let query: Flow =
        from_str(&json!({"l7": {"dns": {"query": "kube.cluster.local."}}}).to_string()).expect("a flow");
    for (wanted, expected) in [
        (json!({"http_status_code": ["404"]}), [true, false]),
        (json!({"http_status_code": ["4+"]}), [true, false]),
        (json!({"http_status_code": ["5+", "200"]}), [false, false]),
        (json!({"weir_latency_ns_min": "250000000"}), [true, false]),
        (json!({"weir_latency_ns_min": "250000001"}), [false, false]),
        (json!({"http_method": ["get"]}), [true, false]),
        (json!({"http_path": ["^/cart/\\d+$"]}), [true, false]),
        (json!({"http_path": ["user"]}), [false, false]),
        (json!({"http_url": ["user=1"]}), [true, false]),
        (json!({"http_header": [{"key": "x-team", "value": "blue"}]}), [true, false]),
        (json!({"http_header": [{"key": "x-team", "value": "red"}]}), [false, false]),
        (json!({"dns_query": ["kube.*local"]}), [false, true]),
        (json!({"protocol": ["dns"]}), [false, true]),
        (json!({"protocol": ["http"]}), [true, false]),
        (json!({"destination_fqdn": ["*.example.org"]}), [true, false]),
        (json!({"destination_fqdn": ["example.org"]}), [false, false]),
        (json!({"destination_workload": [{"name": "cart"}]}), [true, false]),
        (json!({"destination_workload": [{"name": "cart", "kind": "StatefulSet"}]}), [false, false]),
        (json!({"trace_id": ["ab12"]}), [true, false]),
    ] {
        let filters = Filters::new(&[filter(&wanted)], &[]).expect("a good filter");
        assert_eq!([&request, &query].map(|flow| filters.matches(flow)), expected, "{wanted}");
    }
}

#[test]
fn bad_filters_are_refused_by_name() {
    for (wanted, field) in [
        (json!({"source_ip": ["nowhere"]}), "source_ip"),
        (json!({"destination_pod": [""]}), "destination_pod"),
        (json!({"source_label": ["a b"]}), "source_label"),
        (json!({"destination_port": ["70000"]}), "destination_port"),
        (json!({"protocol": ["carrier pigeon"]}), "protocol"),
        (json!({"http_path": ["("]}), "http_path"),
        (json!({"http_status_code": ["4+4"]}), "http_status_code"),
        (json!({"node_name": ["a/b/c"]}), "node_name"),
        (json!({"destination_fqdn": [".."]}), "destination_fqdn"),
        (json!({"dns_query": [format!("(a{{1000}}){{1000}}")]}), "dns_query"),
        (json!({"experimental": {"cel_expression": ["_flow."]}}), "cel_expression"),
        (json!({"experimental": {"cel_expression": vec!["true"; 9]}}), "cel_expression"),
    ] {
        let refused = Filters::new(&[filter(&wanted)], &[]).err().map(|error| error.to_string());
        assert!(refused.as_ref().is_some_and(|text| text.contains(field)), "{wanted}: {refused:?}");
    }
    assert!(Filters::new(&vec![FlowFilter::default(); 300], &[]).is_err());
}
