use super::*;
use crate::model::{Protocol, SliceBackend};

fn service(name: &str, addresses: &[&str], ports: &[(&str, Protocol, u16)]) -> (ObjectKey, Arc<Service>) {
    let key = ObjectKey::new("shop", name);
    let addresses = addresses.iter().map(|text| ip(text)).collect();
    (key.clone(), Arc::new(Service { addresses, ports: ports_of(ports), ..Service::new(key) }))
}

fn slice(
    name: &str,
    service: &str,
    ports: &[(&str, Protocol, u16)],
    backends: &[SliceBackend],
) -> (ObjectKey, Arc<EndpointSlice>) {
    let key = ObjectKey::new("shop", name);
    let service = ObjectKey::new("shop", service);
    let (ports, backends) = (slice_ports(ports), backends.to_vec());
    (key.clone(), Arc::new(EndpointSlice { key, service, ports, backends }))
}

fn slice_ports(ports: &[(&str, Protocol, u16)]) -> Vec<SlicePort> {
    let port = |(name, protocol, port): &(&str, Protocol, u16)| SlicePort {
        name: name.to_string(),
        protocol: *protocol,
        port: *port,
    };
    ports.iter().map(port).collect()
}

fn ports_of(ports: &[(&str, Protocol, u16)]) -> Vec<ServicePort> {
    let port = |(name, protocol, port): &(&str, Protocol, u16)| ServicePort {
        name: name.to_string(),
        protocol: *protocol,
        port: *port,
        node_port: None,
    };
    ports.iter().map(port).collect()
}

fn ready(address: &str) -> SliceBackend {
    SliceBackend::ready(ip(address))
}

fn ending(address: &str, serving: bool) -> SliceBackend {
    SliceBackend { ready: false, serving, terminating: true, ..ready(address) }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Frontends as `address:port/protocol -> backends`.
fn shown(output: &Output) -> Vec<String> {
    let show = |(key, frontend): (&FrontendKey, &Frontend)| {
        let backends: Vec<String> = frontend.addresses().map(|address| address.to_string()).collect();
        format!("{key} {} [{}]", frontend.service, backends.join(" "))
    };
    output.frontends.iter().map(show).collect()
}

const TCP: Protocol = Protocol::Tcp;
const UDP: Protocol = Protocol::Udp;

#[test]
fn ports_meet_by_name_and_protocol_in_each_family() {
    let services = [service("dns", &["10.96.0.10", "fd96::a"], &[("dns", UDP, 53), ("dns-tcp", TCP, 53)])];
    let ports = [("dns", UDP, 5353), ("dns-tcp", TCP, 5354), ("dns", TCP, 1)];
    let slices = [
        slice("dns-b", "dns", &ports, &[ready("10.0.0.3")]),
        slice("dns-a", "dns", &ports, &[ready("10.0.0.9"), ready("10.0.0.3")]),
        slice("dns-6", "dns", &ports, &[ready("fd00::3")]),
        slice("other", "web", &ports, &[ready("10.0.0.77")]),
    ];
    let output = frontends(&services.into_iter().collect(), &slices.into_iter().collect());
    assert_eq!(
        shown(&output),
        [
            "10.96.0.10:0/any shop/dns []",
            "10.96.0.10:53/TCP shop/dns [10.0.0.3:5354 10.0.0.9:5354]",
            "10.96.0.10:53/UDP shop/dns [10.0.0.3:5353 10.0.0.9:5353]",
            "[fd96::a]:0/any shop/dns []",
            "[fd96::a]:53/TCP shop/dns [[fd00::3]:5354]",
            "[fd96::a]:53/UDP shop/dns [[fd00::3]:5353]",
        ]
    );
    assert_eq!(output.conflicts, []);
}

#[test]
fn ending_backends_serve_only_where_none_is_ready() {
    let web = || service("web", &["10.96.0.1"], &[("", TCP, 80)]);
    let of = |backends: &[SliceBackend]| {
        let slices = [slice("web", "web", &[("", TCP, 8080)], backends)];
        shown(&frontends(&[web()].into_iter().collect(), &slices.into_iter().collect())).remove(1)
    };
    let not_ready = SliceBackend { ready: false, serving: false, ..ready("10.0.0.1") };
    let all = [not_ready.clone(), ending("10.0.0.2", true), ending("10.0.0.3", false), ready("10.0.0.4")];
    assert_eq!(of(&all), "10.96.0.1:80/TCP shop/web [10.0.0.4:8080]");
    assert_eq!(of(&all[..3]), "10.96.0.1:80/TCP shop/web [10.0.0.2:8080]");
    assert_eq!(of(&[not_ready]), "10.96.0.1:80/TCP shop/web []");
}

#[test]
fn headless_services_and_unusable_addresses_have_no_rows() {
    let services = [
        service("headless", &[], &[("", TCP, 80)]),
        service("loop", &["127.0.0.1"], &[("", TCP, 80)]),
        service("web", &["10.96.0.1"], &[("", TCP, 80)]),
    ];
    let hostile = ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"].map(ready);
    let slices = [slice("web", "web", &[("", TCP, 8080)], &hostile)];
    let output = frontends(&services.into_iter().collect(), &slices.into_iter().collect());
    assert_eq!(shown(&output), ["10.96.0.1:0/any shop/web []", "10.96.0.1:80/TCP shop/web []"]);
}

#[test]
fn an_address_in_two_services_is_the_first_ones() {
    let services = [
        service("b", &["10.96.0.1", "10.96.0.2"], &[("", TCP, 80)]),
        service("a", &["10.96.0.1"], &[("", UDP, 53)]),
    ];
    let output = frontends(&services.into_iter().collect(), &Snapshot::new());
    assert_eq!(
        shown(&output),
        [
            "10.96.0.1:0/any shop/a []",
            "10.96.0.1:53/UDP shop/a []",
            "10.96.0.2:0/any shop/b []",
            "10.96.0.2:80/TCP shop/b []",
        ]
    );
    let conflict = Conflict {
        service: ObjectKey::new("shop", "b"),
        address: ip("10.96.0.1"),
        owner: ObjectKey::new("shop", "a"),
    };
    assert_eq!(output.conflicts, [conflict]);
}

proptest::proptest! {
    #[test]
    fn differences_add_up_to_the_whole(
        steps in proptest::collection::vec((proptest::bool::ANY, 0..4_usize, 0..4_usize, 0..3_u8, 0..3_u16), 1..30)
    ) {
        let (mut services, mut slices) = (Snapshot::new(), Snapshot::new());
        let mut following = Frontends::default();
        for (is_service, number, of, address, port) in steps {
            let name = format!("s{number}");
            // Few addresses, so that Services meet now and then; port 0 means that it goes.
            if is_service {
                let addresses = [format!("10.96.0.{}", number as u8 + address / 2), format!("fd96::{number}")];
                let (key, row) = service(&name, &addresses.each_ref().map(String::as_str), &[("http", TCP, 80 + port)]);
                if port == 0 { services.remove(&key); } else { services.insert(key, row); }
            } else {
                let backends = [ready(&format!("10.0.0.{address}")), ready(&format!("10.0.1.{address}"))];
                let (key, row) = slice(&name, &format!("s{of}"), &[("http", TCP, 8080)], &backends);
                if port == 0 { slices.remove(&key); } else { slices.insert(key, row); }
            }
            proptest::prop_assert_eq!(following.update(&services, &slices), &frontends(&services, &slices));
        }
    }
}
