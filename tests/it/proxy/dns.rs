//! DNS: questions are judged, answers wait for the agent's word, forged ones do not pass.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use weir::model::l7::{DnsRule, L7Message, L7Rules, L7Verdict, RecordKind, RuleSetId};

use crate::lab::Space;

use super::world::{CLIENT, SERVER, World, by_one, set};

/// What a resolver needs to know of a question: where it ends, its name and its type.
fn parse(query: &[u8]) -> (usize, String, u16) {
    let (mut at, mut labels) = (12, Vec::new());
    while query[at] != 0 {
        let length = usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..=at + length]).into_owned());
        at += length + 1;
    }
    (at + 5, labels.join("."), u16::from_be_bytes([query[at + 1], query[at + 2]]))
}

/// The answer of the test's zone: a CNAME to `alias.test`, which has an address of each family.
fn answer(query: &[u8]) -> Vec<u8> {
    let (end, _, kind) = parse(query);
    let mut answer = query[..end].to_vec();
    answer[2] |= 0x80;
    answer[3] = 0x80;
    answer[4..12].copy_from_slice(&[0, 1, 0, 2, 0, 0, 0, 0]);
    let alias = b"\x05alias\x04test\x00";
    answer.extend_from_slice(&[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 12]);
    let target = answer.len();
    answer.extend_from_slice(alias);
    let address: &[u8] =
        if kind == 28 { &[0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9] } else { &[203, 0, 113, 9] };
    let pointer = 0xc000 | u16::try_from(target).expect("a short message");
    answer.extend_from_slice(&pointer.to_be_bytes());
    answer.extend_from_slice(&kind.to_be_bytes());
    answer.extend_from_slice(&[0, 1, 0, 0, 0, 30]);
    answer.extend_from_slice(&u16::try_from(address.len()).expect("short").to_be_bytes());
    answer.extend_from_slice(address);
    answer
}

/// The names that were asked for, and by whom.
type Questions = Arc<Mutex<Vec<(String, SocketAddr)>>>;

/// A server of DNS over UDP; it keeps the names that it was asked for, and by whom.
fn serve(space: &Space, address: SocketAddr, forge: bool) -> Result<Questions> {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let socket = space.run(move || UdpSocket::bind(address))?;
    let seen = asked.clone();
    space.start(move || {
        let mut buffer = [0; 4096];
        while let Ok((count, client)) = socket.recv_from(&mut buffer) {
            let query = &buffer[..count];
            seen.lock().expect("no panic inside").push((parse(query).1, client));
            if forge {
                // Another id, and another name.
                let mut forged = answer(query);
                forged[0] ^= 1;
                let _ = socket.send_to(&forged, client);
                forged[0] ^= 1;
                forged[13] ^= 1;
                let _ = socket.send_to(&forged, client);
            }
            let _ = socket.send_to(&answer(query), client);
        }
    });
    Ok(asked)
}

/// A query by hand.
fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut query = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).expect("a short label"));
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0]);
    query.extend_from_slice(&kind.to_be_bytes());
    query.extend_from_slice(&[0, 1]);
    query
}

fn rules() -> L7Rules {
    L7Rules::Dns(vec![
        DnsRule::MatchName("allowed.test".into()),
        DnsRule::MatchPattern("*.sub.test".into()),
        DnsRule::MatchPattern("**.deep.test".into()),
    ])
}

/// Asks from a socket in the client's namespace; `None`: no answer came in time.
fn ask(world: &World, server: SocketAddr, query: Vec<u8>, within: Duration) -> Result<Option<Vec<u8>>> {
    world.client.run(move || {
        let local: SocketAddr = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
        let socket = UdpSocket::bind(local)?;
        socket.connect(server)?;
        socket.send(&query)?;
        socket.set_read_timeout(Some(within))?;
        let mut buffer = [0; 4096];
        match socket.recv(&mut buffer) {
            Ok(count) => Ok(Some(buffer[..count].to_vec())),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
}

const LONG: Duration = Duration::from_secs(10);

#[test]
fn only_allowed_names_are_asked_for() -> Result<()> {
    let world = World::start(&[set(1, rules())], by_one)?;
    for (address, port) in [(SERVER[0], 53), (SERVER[1], 53), (SERVER[0], 5353)] {
        let server = SocketAddr::new(address.parse()?, port);
        let asked = serve(&world.server, server, false)?;
        for (name, is_allowed) in [
            ("allowed.test", true),
            ("ALLOWED.test", true),
            ("a.sub.test", true),
            ("a.b.sub.test", false),
            ("a.b.deep.test", true),
            ("deep.test", false),
            ("denied.test", false),
            ("allowed.test.evil", false),
        ] {
            let said = ask(&world, server, query(7, name, 1), LONG)?
                .with_context(|| format!("{name} at {server}"))?;
            let code = said[3] & 15;
            assert_eq!(code, if is_allowed { 0 } else { 5 }, "{name} at {server}");
            assert_eq!(said[..2], [0, 7]);
        }
        let asked: Vec<_> = asked.lock().expect("no panic inside").clone();
        assert_eq!(asked.len(), 4, "{asked:?}");
        let ip = asked[0].1.ip().to_string();
        assert_eq!(ip, if server.is_ipv4() { CLIENT[0] } else { CLIENT[1] });
    }
    let names = world.agent.names();
    assert_eq!((&*names[0].name, names[0].set, names[0].ttl_s), ("allowed.test", RuleSetId(1), 30));
    assert_eq!(names[0].addresses, ["203.0.113.9".parse::<std::net::IpAddr>()?]);
    let record = world.agent.record("the answer", |record| record.kind == RecordKind::Response)?;
    let L7Message::Dns(said) = record.message else { panic!("{record:?}") };
    assert_eq!((said.cnames, said.code), (vec!["alias.test".to_owned()], Some(0)));
    world.agent.record("a denial", |record| record.verdict == L7Verdict::Denied)?;
    Ok(())
}

#[test]
fn an_answer_waits_for_the_agents_word() -> Result<()> {
    let world = World::start(&[set(1, rules())], by_one)?;
    let server = SocketAddr::new(SERVER[0].parse()?, 53);
    serve(&world.server, server, false)?;
    world.agent.acknowledges.store(false, Ordering::SeqCst);
    let began = Instant::now();
    assert!(ask(&world, server, query(8, "allowed.test", 1), LONG)?.is_some(), "but not for ever");
    assert!(began.elapsed() > Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(world.agent.names().len(), 1, "it was announced");
    world.agent.acknowledges.store(true, Ordering::SeqCst);
    assert!(ask(&world, server, query(9, "allowed.test", 1), LONG)?.is_some());
    Ok(())
}

#[test]
fn forged_answers_do_not_pass() -> Result<()> {
    let world = World::start(&[set(1, rules())], by_one)?;
    let server = SocketAddr::new(SERVER[0].parse()?, 53);
    serve(&world.server, server, true)?;
    let said = ask(&world, server, query(10, "allowed.test", 1), LONG)?.context("an answer")?;
    assert_eq!(said, answer(&query(10, "allowed.test", 1)));
    world.agent.record("the forgeries", |record| record.note.contains("not asked"))?;
    assert!(world.agent.names().iter().all(|names| names.name == "allowed.test"));
    Ok(())
}

#[test]
fn glibc_asks_for_both_families_from_one_socket() -> Result<()> {
    let world = World::start(&[set(1, rules())], by_one)?;
    serve(&world.server, SocketAddr::new(SERVER[0].parse()?, 53), false)?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("resolv.conf");
    std::fs::write(&path, format!("nameserver {}\n", SERVER[0]))?;
    let look_up = |name: &str| {
        // A mount namespace of its own: the machine's resolv.conf stays as it is.
        let mut command = Command::new("unshare");
        let script =
            format!("mount --bind {} /etc/resolv.conf && getent ahosts {name}; echo end", path.display());
        command.args(["--mount", "sh", "-c", &script]);
        world.client.command(command, "")
    };
    let found = look_up("allowed.test")?;
    assert!(found.contains("203.0.113.9") && found.contains("fd99::9"), "{found}");
    assert_eq!(look_up("denied.test")?, "end\n");
    Ok(())
}

#[test]
fn questions_over_tcp_are_judged_too() -> Result<()> {
    use std::io::{Read, Write};
    let world = World::start(&[set(1, rules())], by_one)?;
    let listener = world.server.run(|| std::net::TcpListener::bind((SERVER[0], 53)))?;
    world.server.start(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
                    stream.read_exact(&mut message).expect("a whole query");
                    let said = answer(&message);
                    let length = u16::try_from(said.len()).expect("short");
                    stream.write_all(&[&length.to_be_bytes()[..], &said].concat()).expect("the proxy reads");
                }
            });
        }
    });
    let framed =
        |message: &[u8]| [&u16::try_from(message.len()).expect("short").to_be_bytes()[..], message].concat();
    // Three queries at once, and the end: each is answered.
    let asks = ["allowed.test", "denied.test", "a.sub.test"].map(|name| framed(&query(3, name, 28)));
    let answers = world.client.run(move || {
        let mut stream = std::net::TcpStream::connect((SERVER[0], 53))?;
        stream.write_all(&asks.concat())?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answers = Vec::new();
        stream.read_to_end(&mut answers)?;
        anyhow::Ok(answers)
    })?;
    let (mut rest, mut codes) = (&answers[..], Vec::new());
    while rest.len() > 2 {
        let length = usize::from(u16::from_be_bytes([rest[0], rest[1]]));
        codes.push(rest[5] & 15);
        rest = &rest[2 + length..];
    }
    codes.sort_unstable();
    assert_eq!(codes, [0, 0, 5]);
    Ok(())
}
