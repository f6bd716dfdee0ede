//! What sockets are told of services: whom they talk to, and by which name.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Pod, ServicePort, Setup, Space, Via, socket_address, wait_for};
use crate::require::require_lab;

/// How long an answer may take on a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(5);

/// Both addresses of a service.
fn addresses(number: usize) -> [String; 2] {
    [format!("10.96.0.{number}"), format!("fd00:96::{number}")]
}

fn serve(lab: &Lab, number: usize, pods: &[&Pod]) -> Result<()> {
    let ports = [("query", "UDP", 53, 8080), ("web", "TCP", 80, 80), ("slow", "UDP", 54, 7777)]
        .map(ServicePort::from);
    let [ipv4, ipv6] = addresses(number);
    lab.service(&format!("shop/s{number}"), &[&ipv4, &ipv6], &ports, pods)
}

fn wait_served(pod: &Pod, number: usize) -> Result<()> {
    for address in addresses(number) {
        wait_for("the service", || Ok(pod.probe(Via::Udp, socket_address(&address, 53)).is_answered()))?;
    }
    Ok(())
}

/// A socket that is not connected, of the family of `like`.
fn unconnected(like: &str) -> Result<UdpSocket> {
    let any: IpAddr = if like.contains(':') { Ipv6Addr::UNSPECIFIED.into() } else { [0; 4].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(ANSWERED_WITHIN))?;
    Ok(socket)
}

/// Sends to each of these in turn before it reads any answer: (where it came from, whom it was sent to, the
/// answering pod's name).
fn ask_all(socket: &UdpSocket, targets: &[SocketAddr]) -> Result<Vec<(SocketAddr, SocketAddr, String)>> {
    for target in targets {
        socket.send_to(target.to_string().as_bytes(), target)?;
    }
    let mut answer = [0; 512];
    let read = |_: &SocketAddr| {
        let (length, from) = socket.recv_from(&mut answer).context("waiting for an answer")?;
        let text = String::from_utf8_lossy(&answer[..length]).into_owned();
        let (server, asked) = text.split_once('\n').context("an answer without a name")?;
        let name = server.split(' ').next().unwrap_or_default().to_owned();
        Ok((from, asked.parse()?, name))
    };
    targets.iter().map(read).collect()
}

#[test]
fn each_answer_has_the_name_that_was_asked() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (near, far) = (lab.pod(1, "shop/near").create()?, lab.pod(2, "shop/far").create()?);
    let client = lab.pod(1, "shop/client").create()?;
    // Of one backend, of another, of both; and more services than a socket remembers at once.
    let count = 20;
    for number in 10..10 + count {
        let pods: &[&Pod] = match number % 3 {
            0 => &[&near],
            1 => &[&far],
            _ => &[&near, &far],
        };
        serve(&lab, number, pods)?;
    }
    wait_served(&client, 10 + count - 1)?;
    for family in 0..2 {
        let target = move |number: usize| socket_address(&addresses(number)[family], 53);
        let first = target(10).ip().to_string();
        let answers = client.space().run(move || -> Result<_> {
            let socket = unconnected(&first)?;
            // Several services with one backend, before any of them answers; then one after the other.
            let mut answers = ask_all(&socket, &[12, 15, 12, 13, 15, 15, 12].map(target))?;
            for number in 10..10 + count {
                answers.extend(ask_all(&socket, &[target(number)])?);
            }
            for number in 10..26 {
                answers.extend(ask_all(&socket, &[target(number), target(number)])?);
            }
            Ok(answers)
        })?;
        for (from, asked, by) in answers {
            ensure!(from == asked, "asked {asked}, {by} answered as {from}");
        }
    }
    Ok(())
}

#[test]
fn a_socket_keeps_a_backend_that_lives() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let (c, client) = (lab.pod(1, "shop/c").create()?, lab.pod(1, "shop/client").create()?);
    serve(&lab, 10, &[&a, &b])?;
    wait_served(&client, 10)?;
    // Each of the sockets sends when it is told to, and says who has answered.
    let (tell, told) = mpsc::channel::<()>();
    let (say, said) = mpsc::channel::<Vec<String>>();
    let [ipv4, ipv6] = addresses(10);
    let running = client.space().start(move || -> Result<()> {
        let targets = [&ipv4, &ipv6].map(|address| socket_address(address, 53));
        let sockets = (0..20).map(|i| Ok((unconnected(if i % 2 == 0 { "" } else { ":" })?, targets[i % 2])));
        let sockets = sockets.collect::<Result<Vec<_>>>()?;
        while told.recv().is_ok() {
            let ask =
                |(socket, target): &(UdpSocket, SocketAddr)| Ok(ask_all(socket, &[*target])?.remove(0).2);
            say.send(sockets.iter().map(ask).collect::<Result<_>>()?)?;
        }
        Ok(())
    });
    let ask = || -> Result<Vec<String>> {
        tell.send(()).context("the client has ended")?;
        said.recv_timeout(Duration::from_secs(60)).context("no answer")
    };
    let before = ask()?;
    ensure!(before.iter().collect::<BTreeSet<_>>().len() == 2, "{before:?}");
    // Each family has rows of its own, which change one after the other.
    let targets = addresses(10).map(|address| socket_address(&address, 53));
    let serves =
        |name: &str, target| (0..40).any(|_| client.probe(Via::Udp, target).answered_by() == Some(name));
    // A backend is added: nobody moves.
    serve(&lab, 10, &[&a, &b, &c])?;
    wait_for("the new backend", || Ok(targets.iter().all(|target| serves("c", *target))))?;
    ensure!(ask()? == before, "{before:?}");
    // One goes: who was there gets another one, and the others stay.
    serve(&lab, 10, &[&b, &c])?;
    wait_for("the old backend to go", || Ok(!targets.iter().any(|target| serves("a", *target))))?;
    let after = ask()?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(if before == "a" { after != "a" } else { after == before }, "{before} {after}");
    }
    drop(tell);
    running.wait()
}

/// A server that says when it has a question, and answers when it is told to.
fn slow_server(space: &Space, address: IpAddr) -> Result<(mpsc::Receiver<()>, mpsc::Sender<()>)> {
    let (heard, hears) = mpsc::channel();
    let (answer, answers) = mpsc::channel::<()>();
    let socket = space.run(move || UdpSocket::bind((address, 7777)))?;
    space.start(move || -> Result<()> {
        let mut question = [0; 16];
        let (_, from) = socket.recv_from(&mut question)?;
        heard.send(())?;
        answers.recv()?;
        socket.send_to(b"late", from)?;
        Ok(())
    });
    Ok((hears, answer))
}

#[test]
fn a_flood_of_sockets_takes_nobodys_name() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let (server, victim) = (lab.pod(1, "shop/server").create()?, lab.pod(1, "shop/victim").create()?);
    let evil = lab.pod(1, "shop/evil").create()?;
    serve(&lab, 10, &[&server])?;
    wait_served(&victim, 10)?;
    let (hears, answer) = slow_server(server.space(), server.address(true))?;
    let target = socket_address("10.96.0.10", 54);
    let waiting = victim.space().start(move || -> Result<SocketAddr> {
        let socket = unconnected("")?;
        socket.set_read_timeout(Some(Duration::from_secs(120)))?;
        socket.send_to(b"?", target)?;
        Ok(socket.recv_from(&mut [0; 16])?.1)
    });
    hears.recv_timeout(Duration::from_secs(60)).context("the question has not come")?;
    // More sockets than a map for all of them would have rows.
    evil.space().run(move || -> Result<()> {
        for _ in 0..80_000 {
            // What is dropped on its way was asked all the same.
            let _sent = UdpSocket::bind(("0.0.0.0", 0))?.send_to(b"!", target);
        }
        Ok(())
    })?;
    answer.send(())?;
    let from = waiting.wait()?;
    ensure!(from == target, "the answer came from {from}");
    Ok(())
}

#[test]
fn tcp_ends_at_once_when_its_backend_exists_no_more() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (near, far) = (lab.pod(1, "shop/near").create()?, lab.pod(2, "shop/far").create()?);
    let client = lab.pod(1, "shop/client").create()?;
    serve(&lab, 10, &[&far])?;
    wait_served(&client, 10)?;
    // What the connection ends with comes out of the channel.
    let connect = |target: SocketAddr| {
        let (connected, is_connected) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        client.space().start(move || -> Result<()> {
            let mut stream = TcpStream::connect(target)?;
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            connected.send(stream.read(&mut [0; 256])?)?;
            Ok(end.send(stream.read(&mut [0; 256]))?)
        });
        is_connected.recv_timeout(Duration::from_secs(30)).context("not connected")?;
        anyhow::Ok(ended)
    };
    let by_service: Vec<_> =
        addresses(10).iter().map(|address| connect(socket_address(address, 80))).collect::<Result<_>>()?;
    // No service has led here: it is the application's own affair.
    let by_address = connect(SocketAddr::new(far.address(true), 80))?;
    serve(&lab, 10, &[&near])?;
    wait_for("the other backend", || {
        Ok(client.probe(Via::Tcp, socket_address("10.96.0.10", 80)).answered_by() == Some("near"))
    })?;
    // The pod is there: running connections are its own to end.
    ensure!(by_service.iter().all(|ended| ended.try_recv().is_err()));
    far.delete(lab.node(2))?;
    lab.manifests().delete("{apiVersion: v1, kind: Pod, metadata: {name: far, namespace: shop}}")?;
    for ended in by_service {
        let end = ended.recv_timeout(Duration::from_secs(30)).context("the connection goes on")?;
        let error = end.err().context("the connection has ended in good order")?;
        ensure!(error.kind() == ErrorKind::ConnectionAborted, "{error}");
    }
    ensure!(by_address.try_recv().is_err());
    Ok(())
}
