//! ClusterIP services: at the socket, and per packet for pods that the hooks do not see.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::lab::{Lab, Pod, ServicePort, Setup, Traffic, Via, backend, socket_address, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const ADDRESSES: [&str; 2] = ["10.96.0.10", "fd00:96::10"];

fn ports() -> [ServicePort; 3] {
    [("web", "TCP", 1080, 80), ("admin", "TCP", 1081, 81), ("query", "UDP", 1080, 8080)]
        .map(ServicePort::from)
}

struct Shop {
    near: Pod,
    far: Pod,
    client: Pod,
    /// Its sockets are outside the node's cgroup.
    packets: Pod,
    lab: Lab,
}

impl Shop {
    fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    fn start_with(arguments: &[&str]) -> Result<Self> {
        let agent_arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let lab = Lab::start(Setup { nodes: 2, agent_arguments, ..Setup::default() })?;
        let near = lab.pod(1, "shop/near").label("app", "server").create()?;
        let far = lab.pod(2, "shop/far").label("app", "server").create()?;
        let client = lab.pod(1, "shop/client").create()?;
        let packets = lab.pod(1, "shop/packets").outside_cgroup().create()?;
        Ok(Self { near, far, client, packets, lab })
    }

    fn serve(&self, pods: &[&Pod]) -> Result<()> {
        self.lab.service("shop/server", &ADDRESSES, &ports(), pods)
    }

    fn clients(&self) -> [&Pod; 2] {
        [&self.client, &self.packets]
    }
}

/// Every port of the service in both families.
fn frontends() -> impl Iterator<Item = (Via, SocketAddr)> {
    ADDRESSES.into_iter().flat_map(|address| {
        [(Via::Tcp, 1080), (Via::Tcp, 1081), (Via::Udp, 1080)]
            .map(|(via, port)| (via, socket_address(address, port)))
    })
}

fn expect_everywhere(clients: &[&Pod], expected: Expected) -> Result<()> {
    let rows: Vec<Row<'_>> = clients
        .iter()
        .flat_map(|client| frontends().map(move |(via, target)| Row::new(client, via, target, expected)))
        .collect();
    expect_all(&rows)
}

#[test]
fn a_service_reaches_all_its_backends_on_all_its_ports() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.near, &shop.far])?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    for client in shop.clients() {
        for (via, target) in frontends() {
            let mut answered = BTreeSet::new();
            wait_for(&format!("both backends of {target}"), || {
                answered.extend(client.probe(via, target).answered_by().map(str::to_owned));
                Ok(answered.len() == 2)
            })?;
        }
    }
    Ok(())
}

#[test]
fn backends_see_the_client_itself() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.near, &shop.far])?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    for client in shop.clients() {
        for (via, target) in frontends() {
            let outcome = client.probe(via, target);
            assert_eq!(outcome.seen_as(), Some(client.address(target.is_ipv4())), "{target}: {outcome}");
        }
    }
    Ok(())
}

/// A policy that leads an address to the node's pods with `app: guard`.
fn redirection(address: &str) -> serde_json::Value {
    let port = |number: &str, protocol: &str, name: &str| serde_json::json!({ "port": number, "protocol": protocol, "name": name });
    serde_json::json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumLocalRedirectPolicy",
        "metadata": { "name": "guard", "namespace": "shop" },
        "spec": {
            "redirectFrontend": { "addressMatcher": {
                "ip": address, "toPorts": [port("90", "TCP", "web"), port("90", "UDP", "query")],
            } },
            "redirectBackend": {
                "localEndpointSelector": { "matchLabels": { "app": "guard" } },
                "toPorts": [port("80", "TCP", "web"), port("8080", "UDP", "query")],
            },
        },
    })
}

#[test]
fn a_redirected_address_leads_to_pods_of_the_clients_node() -> Result<()> {
    require_lab!();
    let shop = Shop::start_with(&["--redirect-addresses=169.254.0.0/16,fd00:ec2::/32"])?;
    let _guard = shop.lab.pod(1, "shop/guard").label("app", "guard").create()?;
    for address in ["169.254.169.254", "fd00:ec2::254"] {
        shop.lab.manifests().write(&redirection(address))?;
        let at = |port| socket_address(address, port);
        let node = shop.lab.node(1).space();
        let mut rows = Vec::new();
        for via in [Via::Tcp, Via::Udp] {
            rows.extend(shop.clients().map(|client| Row::new(client, via, at(90), Expected::Answered)));
            rows.push(Row::from_space(node, "node1", via, at(90), Expected::Answered));
        }
        expect_all(&rows)?;
        for via in [Via::Tcp, Via::Udp] {
            for client in shop.clients() {
                assert_eq!(client.probe(via, at(90)).answered_by(), Some("guard"));
                // Another port goes its ordinary way, and so does all of another node.
                ensure!(!client.probe(via, at(80)).is_answered());
            }
            ensure!(!shop.far.probe(via, at(90)).is_answered());
        }
    }
    // Whose address is not left to policies, that they do not get, and it is said.
    shop.lab.manifests().write(&redirection("203.0.113.9"))?;
    wait_for("the refusal", || {
        let status = shop.lab.node(1).status()?.to_string();
        Ok(status.contains("203.0.113.9 is not within WEIR_REDIRECT_ADDRESSES"))
    })?;
    ensure!(!shop.client.probe(Via::Tcp, socket_address("203.0.113.9", 90)).is_answered());
    ensure!(!shop.client.probe(Via::Tcp, socket_address("fd00:ec2::254", 90)).is_answered());
    Ok(())
}

#[test]
fn unready_backends_get_nothing() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    let backends = [backend(&shop.near, true), backend(&shop.far, false)];
    shop.lab.manifests().service(("shop", "server"), &ADDRESSES, &ports(), &backends)?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    for client in shop.clients() {
        for (via, target) in frontends() {
            for _ in 0..8 {
                assert_eq!(client.probe(via, target).answered_by(), Some("near"), "{target}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_service_without_backends_refuses_at_once() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[])?;
    expect_everywhere(&shop.clients(), Expected::Refused)?;
    for client in shop.clients() {
        for (via, target) in frontends() {
            let began = Instant::now();
            assert!(client.probe(via, target).is_refused(), "{target}");
            assert!(began.elapsed() < Duration::from_millis(100), "{target}: {:?}", began.elapsed());
        }
    }
    Ok(())
}

#[test]
fn ports_that_a_service_does_not_have_are_refused() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.near])?;
    let rows: Vec<Row<'_>> = shop
        .clients()
        .into_iter()
        .flat_map(|client| {
            ADDRESSES.into_iter().flat_map(move |address| {
                [(Via::Tcp, 80), (Via::Udp, 1081)].map(|(via, port)| {
                    Row::new(client, via, socket_address(address, port), Expected::Refused)
                })
            })
        })
        .collect();
    expect_all(&rows)
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.packets])?;
    expect_everywhere(&[&shop.packets], Expected::Answered)?;
    shop.serve(&[&shop.near])?;
    expect_everywhere(&[&shop.near], Expected::Answered)
}

#[test]
fn a_removed_backend_gets_no_new_connection_and_stale_udp_ends() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.far])?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    let udp = socket_address(ADDRESSES[0], 1080);
    let streams =
        shop.clients().map(|client| Traffic::tcp(client.space(), socket_address(ADDRESSES[1], 1080)));
    let datagrams = shop.clients().map(|client| Traffic::udp(client.space(), udp));
    for traffic in streams.iter().chain(&datagrams) {
        traffic.wait_for_answers(20)?;
    }
    shop.serve(&[&shop.near])?;
    for client in shop.clients() {
        for (via, target) in frontends() {
            wait_for(&format!("{target} to be served by the other backend"), || {
                Ok((0..8).all(|_| client.probe(via, target).answered_by() == Some("near")))
            })?;
        }
    }
    // TCP that is established stays with its backend until that ends it.
    for traffic in streams {
        traffic.wait_for_answers(20)?;
        traffic.stop()?;
    }
    for traffic in datagrams {
        traffic.stop().map(drop).or_else(|error| {
            // A destroyed socket reports it to its owner.
            if error.to_string().contains("abort") { Ok(()) } else { Err(error) }
        })?;
    }
    Ok(())
}

#[test]
fn udp_to_a_service_ends_with_the_service() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.far])?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    let datagrams =
        shop.clients().map(|client| Traffic::udp(client.space(), socket_address(ADDRESSES[0], 1080)));
    for traffic in &datagrams {
        traffic.wait_for_answers(20)?;
    }
    // The backend is there and would go on answering.
    shop.lab
        .manifests()
        .delete("{apiVersion: v1, kind: Service, metadata: {name: server, namespace: shop}}")?;
    datagrams.iter().try_for_each(Traffic::wait_for_silence)
}

#[test]
fn policy_judges_the_backend_and_not_the_service_address() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.near, &shop.far])?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    shop.lab.manifests().apply(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: egress, namespace: shop}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: server}}}], ports: [{port: 80}, {protocol: UDP, port: 8080}]}]
",
    )?;
    let rows: Vec<Row<'_>> = shop
        .clients()
        .into_iter()
        .flat_map(|client| {
            frontends().map(move |(via, target)| {
                let is_allowed = target.port() == 1080;
                Row::new(client, via, target, if is_allowed { Expected::Answered } else { Expected::Denied })
            })
        })
        .collect();
    expect_all(&rows)
}

/// A connection from a source port of the caller's choice.
fn connect_from(pod: &Pod, port: u16, target: SocketAddr) -> Result<TcpStream> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    pod.space().run(move || {
        let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::milliseconds(900))?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, port)))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_millis(900)))?;
        // The server says its name first.
        let length = stream.read(&mut [0; 128])?;
        ensure!(length > 0, "{target} closed the connection");
        Ok(stream)
    })
}

#[test]
fn one_source_port_serves_a_service_and_its_backend_at_once() -> Result<()> {
    require_lab!();
    let shop = Shop::start()?;
    shop.serve(&[&shop.near])?;
    shop.lab.service("shop/again", &["10.96.0.11", "fd00:96::11"], &ports(), &[&shop.near])?;
    expect_everywhere(&shop.clients(), Expected::Answered)?;
    let again = ["10.96.0.11", "fd00:96::11"].map(|address| socket_address(address, 1080));
    let rows = again.map(|target| Row::new(&shop.packets, Via::Tcp, target, Expected::Answered));
    expect_all(&rows)?;
    let mut port = 20000;
    // Often, as a SYN that meets the socket of the flow before it is lost only if two CPUs are that close.
    let families = ADDRESSES.map(|address| socket_address(address, 1080)).into_iter().zip(again);
    for (service, again) in families.cycle().take(20) {
        let backend = SocketAddr::new(shop.near.address(service.is_ipv4()), 80);
        for targets in [[service, backend, again], [backend, again, service], [again, service, backend]] {
            for is_closed_first in [false, true] {
                port += 1;
                let mut open = Vec::new();
                for target in targets {
                    let stream = connect_from(&shop.packets, port, target).with_context(|| {
                        format!("{target} of {targets:?}, closed first: {is_closed_first}")
                    })?;
                    if is_closed_first {
                        stream.shutdown(Shutdown::Both)?;
                    }
                    open.push(stream);
                }
                // Those that are open still lead to whom they were opened to.
                for mut stream in open.into_iter().filter(|_| !is_closed_first) {
                    stream.write_all(b"more")?;
                    ensure!(stream.read(&mut [0; 16])? == 4, "the echo of {:?}", stream.peer_addr());
                }
            }
        }
    }
    Ok(())
}
