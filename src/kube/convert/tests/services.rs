use super::*;
use crate::model::{Algorithm, Distribution, Forwarding, Hints, TrafficPolicy};

#[test]
fn services_have_addresses_unless_they_are_headless() {
    let service = |addresses: &[&str], ports: Vec<ServicePort>| Service {
        addresses: addresses.iter().map(|address| address.parse().expect("an address")).collect(),
        ports,
        ..Service::new(ObjectKey::new("shop", "web"))
    };
    for (spec, expected) in [
        (
            "{clusterIP: 10.96.0.1, ports: [{port: 80}]}",
            service(&["10.96.0.1"], vec![port("", Protocol::Tcp, 80)]),
        ),
        (
            "{clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, 'fd00::1'], ports: [{name: a, port: 53, protocol: UDP}, \
             {name: b, port: 53}]}",
            service(
                &["10.96.0.1", "fd00::1"],
                vec![port("a", Protocol::Udp, 53), port("b", Protocol::Tcp, 53)],
            ),
        ),
        ("{clusterIP: None, ports: [{port: 80}]}", service(&[], vec![port("", Protocol::Tcp, 80)])),
        ("{clusterIP: None, clusterIPs: [None]}", service(&[], vec![])),
        ("{type: ClusterIP, clusterIP: '::1:2'}", service(&["::1:2"], vec![])),
    ] {
        let yaml = format!("{{metadata: {{name: web, namespace: shop}}, spec: {spec}}}");
        assert_eq!(object::<kinds::Service>(&yaml), expected, "{spec}");
    }
    for (kind, yaml) in [
        (
            kinds::Service::KIND,
            "{metadata: {name: a}, spec: {type: ExternalName, externalName: example.com}}",
        ),
        (
            kinds::Service::KIND,
            "{metadata: {name: a, labels: {service.kubernetes.io/service-proxy-name: other}}, spec: {clusterIP: 10.0.0.1}}",
        ),
        (kinds::EndpointSlice::KIND, "{metadata: {name: a}, addressType: IPv4}"),
    ] {
        assert_eq!(any(kind, yaml), Ok(Converted { row: None, warnings: vec![], doubts: vec![] }), "{yaml}");
    }
}

#[test]
fn what_is_not_served_is_said() {
    let service = "{metadata: {name: web, annotations: {weir.dev/algorithm: least, service.cilium.io/forwarding-mode: hybrid}},
                   spec: {clusterIP: 10.96.0.1, externalIPs: [127.0.0.1, 169.254.1.1], ports: [{port: 80, protocol: SCTP}]}}";
    let slice = "{metadata: {name: a, labels: {kubernetes.io/service-name: b}}, addressType: FQDN}";
    let said = |kind, yaml| {
        let converted = any(kind, yaml).expect("it is taken");
        let warnings: Vec<String> = converted.warnings.iter().map(ToString::to_string).collect();
        (converted.row.is_some(), warnings)
    };
    let expected = [
        "spec.externalIPs[0]: 127.0.0.1 is a loopback address; left out",
        "spec.externalIPs[1]: 169.254.1.1 is a link-local address; left out",
        "metadata.annotations.weir.dev/algorithm: \"least\" is not random or maglev",
        "metadata.annotations.service.cilium.io/forwarding-mode: \"hybrid\" is not snat or dsr",
        "spec.ports[0].protocol: Weir serves TCP and UDP only",
    ];
    assert_eq!(said(kinds::Service::KIND, service), (true, expected.map(str::to_owned).to_vec()));
    let expected = "addressType: FQDN names no addresses, so this slice has no backends".to_owned();
    assert_eq!(said(kinds::EndpointSlice::KIND, slice), (false, vec![expected]));
}

#[test]
fn a_load_balancer_is_read_with_all_that_it_asks_for() {
    let yaml = "{metadata: {name: web, namespace: shop, annotations: {service.cilium.io/lb-algorithm: maglev, weir.dev/forwarding: dsr}},
        spec: {type: LoadBalancer, clusterIP: 10.96.0.1, externalIPs: [203.0.113.7, 203.0.113.7],
        ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 81, nodePort: 0}], sessionAffinity: ClientIP,
        sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}, internalTrafficPolicy: Local, externalTrafficPolicy: Local,
        trafficDistribution: PreferClose, healthCheckNodePort: 32000, loadBalancerSourceRanges: [192.0.2.1/24]},
        status: {loadBalancer: {ingress: [{ip: 203.0.113.8}, {ip: 203.0.113.9, ipMode: Proxy}, {hostname: a.example.com},
        {ip: '2001:db8::1', ipMode: VIP}]}}}";
    let address = |text: &str| text.parse().expect("an address");
    let expected = Service {
        addresses: vec![address("10.96.0.1")],
        ports: vec![
            ServicePort { node_port: Some(30080), ..port("a", Protocol::Tcp, 80) },
            port("b", Protocol::Tcp, 81),
        ],
        balancer_addresses: vec![address("203.0.113.8"), address("2001:db8::1")],
        external_addresses: vec![address("203.0.113.7")],
        internal_policy: TrafficPolicy::Local,
        external_policy: TrafficPolicy::Local,
        affinity: Some(60),
        distribution: Some(Distribution::SameZone),
        source_ranges: ["192.0.2.0/24".parse().expect("a CIDR")].into(),
        health_port: Some(32000),
        algorithm: Some(Algorithm::Maglev),
        forwarding: Some(Forwarding::Dsr),
        ..Service::new(ObjectKey::new("shop", "web"))
    };
    let read = |yaml: &str| converted::<kinds::Service>(yaml).expect("it is taken").row.expect("a row");
    assert_eq!(*read(yaml), expected);
    // Of a ClusterIP Service what belongs to other types counts for nothing.
    let plain = read(&yaml.replace("type: LoadBalancer, ", ""));
    assert_eq!(plain.ports[0].node_port, None);
    assert!(
        plain.balancer_addresses.is_empty() && plain.source_ranges.is_empty() && plain.health_port.is_none()
    );
    // Ranges that are to be kept out and would be let in: nobody is.
    let denying = yaml.replace("weir.dev/forwarding: dsr", "service.cilium.io/src-ranges-policy: deny");
    assert!(read(&denying).balancer_addresses.is_empty());
    for nonsense in [
        "sessionAffinity: Cookie",
        "internalTrafficPolicy: Here",
        "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}",
    ] {
        let yaml = format!("{{metadata: {{name: web}}, spec: {{clusterIP: 10.96.0.1, {nonsense}}}}}");
        assert!(any(kinds::Service::KIND, &yaml).is_err(), "{nonsense}");
    }
}

#[test]
fn slices_say_where_a_backend_is_and_for_whom() {
    let yaml = "{metadata: {name: web-1, labels: {kubernetes.io/service-name: web}, annotations: {service.cilium.io/weight: '7'}},
        addressType: IPv4, ports: [{port: 80}], endpoints: [{addresses: [10.0.0.1], nodeName: a, zone: z,
        hints: {forZones: [{name: z}, {name: y}], forNodes: [{name: a}]}}, {addresses: [10.0.0.2], hints: {}}]}";
    let slice = object::<kinds::EndpointSlice>(yaml);
    let hints = Hints { zones: vec!["z".into(), "y".into()], nodes: vec!["a".into()] };
    let backend =
        |text: &str| SliceBackend { weight: 7, ..SliceBackend::ready(text.parse().expect("an address")) };
    let first = SliceBackend {
        node: Some("a".into()),
        zone: Some("z".into()),
        hints: Some(Arc::new(hints)),
        ..backend("10.0.0.1")
    };
    assert_eq!(slice.backends, [first, backend("10.0.0.2")]);
}

#[test]
fn slices_have_conditions_by_default_and_backends_that_may_be_reached() {
    let yaml = "{metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}, addressType: IPv4,
        ports: [{port: 80}, {name: all}, {name: dns, port: 53, protocol: UDP}], endpoints: [
        {addresses: [10.0.0.1, 10.0.0.8]}, {addresses: [10.0.0.2], conditions: {ready: false}, nodeName: a},
        {addresses: [10.0.0.3], conditions: {ready: false, serving: true, terminating: true}},
        {addresses: [127.0.0.1]}, {addresses: [169.254.169.254]}, {addresses: [224.0.0.1]}, {addresses: ['fd00::1']}]}";
    let backend = |address: &str, ready, serving, terminating| SliceBackend {
        ready,
        serving,
        terminating,
        ..SliceBackend::ready(address.parse().expect("an address"))
    };
    let expected = EndpointSlice {
        key: ObjectKey::new("shop", "web-1"),
        service: ObjectKey::new("shop", "web"),
        ports: vec![slice_port("", Protocol::Tcp, 80), slice_port("dns", Protocol::Udp, 53)],
        backends: vec![
            backend("10.0.0.1", true, true, false),
            SliceBackend { node: Some("a".into()), ..backend("10.0.0.2", false, false, false) },
            backend("10.0.0.3", false, true, true),
        ],
    };
    let converted = converted::<kinds::EndpointSlice>(yaml).expect("the slice is well formed");
    assert_eq!(converted.row, Some(Arc::new(expected)));
    let warnings: Vec<String> = converted.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "endpoints[3].addresses[0]: 127.0.0.1 is a loopback address; left out",
            "endpoints[4].addresses[0]: 169.254.169.254 is a link-local address; left out",
            "endpoints[5].addresses[0]: 224.0.0.1 is a multicast address; left out",
            "endpoints[6].addresses[0]: fd00::1 is not of the slice's addressType; left out",
        ]
    );
}
