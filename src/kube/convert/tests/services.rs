use super::*;

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
    let service = "{metadata: {name: web}, spec: {clusterIP: 10.96.0.1, type: LoadBalancer, sessionAffinity: ClientIP, \
                   internalTrafficPolicy: Local, ports: [{port: 80, protocol: SCTP}]}}";
    let slice = "{metadata: {name: a, labels: {kubernetes.io/service-name: b}}, addressType: FQDN}";
    let said = |kind, yaml| {
        let converted = any(kind, yaml).expect("it is taken");
        let warnings: Vec<String> = converted.warnings.iter().map(ToString::to_string).collect();
        (converted.row.is_some(), warnings)
    };
    let expected = [
        "spec.type: of a LoadBalancer Service Weir serves the cluster IPs only",
        "spec.sessionAffinity: ClientIP is not kept: each connection may reach another backend",
        "spec.internalTrafficPolicy: Local is not kept: backends of all nodes are reached",
        "spec.ports[0].protocol: Weir serves TCP and UDP only",
    ];
    assert_eq!(said(kinds::Service::KIND, service), (true, expected.map(str::to_owned).to_vec()));
    let expected = "addressType: FQDN names no addresses, so this slice has no backends".to_owned();
    assert_eq!(said(kinds::EndpointSlice::KIND, slice), (false, vec![expected]));
}

#[test]
fn a18_external_ips_that_are_not_served_are_warned_of() {
    let yaml = "{metadata: {name: web}, spec: {clusterIP: 10.96.0.1, externalIPs: [203.0.113.7]}}";
    let warnings = converted::<kinds::Service>(yaml).expect("it is taken").warnings;
    let said: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["spec.externalIPs: are not served: of these addresses Weir takes no packets"]);
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
            backend("10.0.0.2", false, false, false),
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
