//! What `netlink` makes, looked at through the kernel's own eyes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use weir::model::{EndpointId, MacAddress};
use weir::netlink::{self, PodLinkSpec, Route};

use super::netns::{Namespace, add_node_address, on_a_node, skip_without_root};

fn spec(namespace: &Namespace) -> PodLinkSpec {
    PodLinkSpec {
        netns: namespace.path().to_owned(),
        interface: "eth0".to_owned(),
        host_interface: "weir0123456789".to_owned(),
        host_mac: MacAddress::of_host_side(EndpointId(7)),
        pod_mac: MacAddress([0x0a, 1, 2, 3, 4, 5]),
        ipv4: Some(Ipv4Addr::new(10, 0, 1, 7)),
        ipv6: Some("fd00:1::7".parse().expect("an address")),
        mtu: 1450,
    }
}

#[test]
fn root_pod_link_carries_packets_as_soon_as_it_is_raised() {
    if skip_without_root("root_pod_link_carries_packets_as_soon_as_it_is_raised") {
        return;
    }
    on_a_node(|| {
        let pod = Namespace::new();
        let spec = spec(&pod);
        add_node_address("192.0.2.1".parse().expect("an address"));
        add_node_address("2001:db8::1".parse().expect("an address"));

        let started = Instant::now();
        let link = netlink::create_pod_link(&spec).expect("making the link");
        let created = started.elapsed();
        let host = netlink::link(&spec.host_interface).expect("looking").expect("the host side");
        assert!(!host.is_up, "no packet may pass before policy is enforced");
        assert_eq!((host.mac, host.mtu), (spec.host_mac, 1450));

        let raising = Instant::now();
        netlink::raise_pod_link(&spec, link.host_ifindex).expect("raising the link");
        eprintln!("created in {created:?}, raised in {:?}", raising.elapsed());
        netlink::verify_pod_link(&spec, link.host_ifindex).expect("all as made");

        for (node, address) in [
            (IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::from(spec.ipv4.expect("it has"))),
            (
                IpAddr::V6("2001:db8::1".parse::<Ipv6Addr>().expect("an address")),
                IpAddr::from(spec.ipv6.expect("it has")),
            ),
        ] {
            let on_node = UdpSocket::bind((node, 0)).expect("binding on the node");
            on_node.set_read_timeout(Some(std::time::Duration::from_secs(10))).expect("a timeout");
            let to = on_node.local_addr().expect("its address");
            pod.run(|| {
                let in_pod = UdpSocket::bind((address, 0)).expect("binding in the pod");
                in_pod.send_to(b"first", to).expect("sending from the pod");
            });
            let mut buffer = [0; 16];
            let (length, from) = on_node.recv_from(&mut buffer).expect("the pod's very first packet");
            assert_eq!((&buffer[..length], from.ip()), (&b"first"[..], address));
        }

        assert!(netlink::delete_link(&spec.host_interface).expect("deleting"));
        assert!(!netlink::delete_link(&spec.host_interface).expect("deleting again"));
        let names = pod.run(|| netlink::links().expect("listing"));
        assert_eq!(names.iter().map(|link| link.name.as_str()).collect::<Vec<_>>(), ["lo"]);
    });
}

#[test]
fn root_a_namespace_that_is_none_is_refused() {
    if skip_without_root("root_a_namespace_that_is_none_is_refused") {
        return;
    }
    on_a_node(|| {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for path in ["/", "/proc/self/ns/mnt", "/nonexistent", "/proc/thread-self/ns/net", "/dev/null"]
            .map(std::path::Path::new)
            .into_iter()
            .chain([file.path()])
        {
            let mut spec = spec(&Namespace::new());
            spec.netns = path.to_owned();
            netlink::create_pod_link(&spec).expect_err(&path.display().to_string());
            assert_eq!(netlink::link_index(&spec.host_interface).expect("looking"), None);
        }
    });
}

#[test]
fn root_routes_and_neighbours_become_what_is_wanted() {
    if skip_without_root("root_routes_and_neighbours_become_what_is_wanted") {
        return;
    }
    on_a_node(|| {
        let device = netlink::ensure_vxlan("weir_vxlan", 8472, 1400, None).expect("a VXLAN device");
        assert_eq!(netlink::ensure_vxlan("weir_vxlan", 8472, 1350, None).expect("the same"), device);
        let link = netlink::link("weir_vxlan").expect("looking").expect("the device");
        assert_eq!((link.mtu, link.is_up, link.kind.as_str()), (1350, true, "vxlan"));
        assert_ne!(netlink::ensure_vxlan("weir_vxlan", 8473, 1350, None).expect("another port"), device);
        let device = netlink::link_index("weir_vxlan").expect("looking").expect("the device");

        let prefix = |text: &str| text.parse::<IpNet>().expect("a prefix");
        netlink::add_address(device, prefix("10.9.0.1/24")).expect("an address");
        netlink::add_address(device, prefix("fd09::1/64")).expect("an address");
        netlink::add_address(device, prefix("fd09::1/64")).expect("the same again");
        let with = netlink::devices_with(&["10.9.0.1".parse().expect("an address")]).expect("looking");
        assert_eq!(with.iter().map(|link| link.index).collect::<Vec<_>>(), [device]);

        let route = |to: &str, via: Option<&str>, mtu| Route {
            prefix: prefix(to),
            gateway: via.map(|via| via.parse().expect("an address")),
            device_ifindex: device,
            source: None,
            mtu,
        };
        for wanted in [
            vec![route("10.1.0.0/24", Some("10.9.0.2"), 0), route("fd01::/64", Some("fd09::2"), 1300)],
            vec![route("10.1.0.0/24", Some("10.9.0.3"), 0), route("fd01::/64", Some("fd09::3"), 0)],
            vec![route("10.2.0.0/24", None, 1300), route("fd02::/64", None, 0)],
            vec![],
        ] {
            for _ in 0..2 {
                let failed = netlink::sync_routes(&wanted).expect("syncing");
                assert!(failed.is_empty(), "{failed:?}");
            }
            assert_eq!(netlink::node_routes().expect("listing"), wanted);
        }

        let mac = MacAddress([2, 0, 0, 0, 0, 9]);
        let mut wanted: BTreeMap<IpAddr, MacAddress> = [("10.9.0.2", mac), ("fd09::2", mac)]
            .map(|(ip, mac)| (ip.parse().expect("an address"), mac))
            .into();
        netlink::sync_neighbours(device, &wanted).expect("syncing");
        assert_eq!(netlink::neighbours(device).expect("listing"), wanted);
        wanted.pop_first();
        netlink::sync_neighbours(device, &wanted).expect("syncing");
        assert_eq!(netlink::neighbours(device).expect("listing"), wanted);
    });
}

#[test]
fn root_only_the_socket_that_is_named_ends() {
    if skip_without_root("root_only_the_socket_that_is_named_ends") {
        return;
    }
    on_a_node(|| {
        // The last is an IPv6 socket that speaks IPv4.
        for (local, remote) in [("127.0.0.1", "127.0.0.2"), ("::1", "::1"), ("::", "::ffff:127.0.0.2")] {
            let address = |text: &str, port| SocketAddr::new(text.parse().expect("an address"), port);
            let socket = UdpSocket::bind(address(local, 0)).expect("binding");
            let remote = address(remote, 4000);
            socket.connect(remote).expect("connecting");
            socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
            const UDP: u8 = 17;
            let canonical =
                |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            let local = canonical(socket.local_addr().expect("its address"));
            let remote = canonical(remote);
            let cookie = socket2::SockRef::from(&socket).cookie().expect("its cookie");

            // Another port, another's number: nobody is ended, which is no error.
            let another = SocketAddr::new(local.ip(), local.port() ^ 1);
            netlink::destroy_socket(UDP, another, remote, 0, cookie).expect("nobody has this name");
            netlink::destroy_socket(UDP, local, remote, 0, cookie + 1).expect("nobody has this number");
            assert!(socket.take_error().expect("asking").is_none());

            netlink::destroy_socket(UDP, local, remote, 0, cookie).expect("ending it");
            let ended = socket.recv(&mut [0]).expect_err("nothing is received by what has ended");
            assert_eq!(ended.kind(), std::io::ErrorKind::ConnectionAborted, "{local}");
        }
    });
}

/// The kernel finds a listener where there is no connection.
#[test]
fn root_only_a_connection_ends_and_no_listener() {
    if skip_without_root("root_only_a_connection_ends_and_no_listener") {
        return;
    }
    on_a_node(|| {
        for address in ["127.0.0.1", "::1"] {
            let ip: IpAddr = address.parse().expect("an address");
            let listener = TcpListener::bind(SocketAddr::new(ip, 0)).expect("listening");
            let server = listener.local_addr().expect("its address");
            let nobody = SocketAddr::new(ip, server.port() ^ 1);
            netlink::destroy_connection(server, nobody).expect("there is no such connection");
            netlink::destroy_connection(nobody, server).expect("nobody has this name");

            let client = TcpStream::connect(server).expect("it listens yet");
            let (accepted, from) = listener.accept().expect("accepting");
            netlink::destroy_connection(server, from).expect("ending it");
            let ended = accepted.take_error().expect("asking").expect("it has ended");
            assert_eq!(ended.kind(), std::io::ErrorKind::ConnectionAborted, "{address}");
            drop(client);
            netlink::destroy_connection(server, from).expect("it is gone");
            TcpStream::connect(server).expect("it listens yet");
        }
    });
}
