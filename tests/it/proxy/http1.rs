//! HTTP/1.1: what is allowed passes verbatim, what is not is refused in order, what is doubtful is refused.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::Request;
use weir::model::l7::{HeaderRule, HttpRule, L7Message, L7Rules, L7Verdict, Mismatch, RecordKind, RuleSetId};
use weir::proxy::Limits;

use crate::lab::Space;

use super::world::{CLIENT, Recorded, SERVER, World, by_one, http, set};

/// A real server of HTTP/1.1: it answers with the method, the path, a header and the body's length.
fn serve(space: &Space, port: u16) -> Result<()> {
    let listeners = space.run(move || {
        SERVER.map(|address| {
            let address: SocketAddr = SocketAddr::new(address.parse()?, port);
            let listener = TcpListener::bind(address).with_context(|| format!("binding {address}"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
    });
    let listeners: Vec<TcpListener> = listeners.into_iter().collect::<Result<_>>()?;
    space.start(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            for listener in listeners {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                tokio::spawn(async move { axum::serve(listener, Router::new().fallback(echo)).await });
            }
            std::future::pending::<Result<()>>().await
        })
    });
    Ok(())
}

async fn echo(request: Request) -> String {
    let (parts, body) = request.into_parts();
    let body: Bytes = axum::body::to_bytes(body, 64 << 20).await.unwrap_or_default();
    let team = parts.headers.get_all("x-team").iter().filter_map(|value| value.to_str().ok());
    let team: Vec<&str> = team.collect();
    format!("{} {} team={} body={}", parts.method, parts.uri, team.join("|"), body.len())
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(SERVER[0].parse().expect("an address"), port)
}

#[test]
fn only_the_allowed_path_is_reached() -> Result<()> {
    let world = World::start(&[set(1, http(&[("GET", "/health"), ("POST", "/upload")]))], by_one)?;
    serve(&world.server, 80)?;
    for host in ["10.78.0.2", "[fd78::2]"] {
        let url = |path: &str| format!("http://{host}{path}");
        assert_eq!(world.curl(&[&url("/health")])?, "GET /health team= body=0");
        assert_eq!(world.curl(&[&url("/secret")])?, "Access denied\r\n");
        assert_eq!(world.status(&[&url("/secret")])?, "403");
        assert_eq!(world.status(&["--path-as-is", &url("/health/../secret")])?, "403");
        assert_eq!(world.status(&["--head", &url("/health")])?, "403", "HEAD is not GET");
        // One connection: allowed, denied, allowed.
        let three = world.curl(&[&url("/health"), &url("/secret"), &url("/health")])?;
        assert_eq!(three, "GET /health team= body=0Access denied\r\nGET /health team= body=0");
    }
    let data = "x".repeat(3_000_000);
    let upload = |arguments: &[&str]| {
        let mut command = std::process::Command::new("curl");
        command.args(["--silent", "--max-time", "10", "--data-binary", "@-"]).args(arguments);
        world.client.command(command, &data)
    };
    let length = format!("POST /upload team= body={}", data.len());
    assert_eq!(upload(&["http://10.78.0.2/upload"])?, length, "with Expect: 100-continue and a length");
    assert_eq!(
        upload(&["-H", "Transfer-Encoding: chunked", "http://10.78.0.2/upload"])?,
        length,
        "in chunks"
    );

    let request = world.agent.record("the request", |record| {
        record.kind == RecordKind::Request && record.verdict == L7Verdict::Forwarded
    })?;
    let L7Message::Http(message) = &request.message else { panic!("{request:?}") };
    assert_eq!((&*message.method, &*message.path, &*message.host), ("GET", "/health", "10.78.0.2"));
    assert_eq!((request.egress, request.client.ip().to_string()), (Some(RuleSetId(1)), CLIENT[0].to_owned()));
    let answer = world.agent.record("the answer", |record| record.kind == RecordKind::Response)?;
    assert!(answer.latency_us.is_some(), "{answer:?}");
    let denied = world.agent.record("the denial", |record| record.verdict == L7Verdict::Denied)?;
    assert_eq!(denied.denied_by, Some(RuleSetId(1)));
    Ok(())
}

#[test]
fn bytes_and_addresses_stay_as_they_were() -> Result<()> {
    let world = World::start(&[set(1, L7Rules::Http(vec![]))], by_one)?;
    let odd = b"POST /a%20b?q=%zz HTTP/1.1\r\nhost:  10.78.0.2 \r\nX-Odd:\t a  b\r\nTRANSFER-encoding: Chunked\r\n\r\n\
                3;ext=1\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n";
    let answer = b"HTTP/1.1 200 OK\r\nx-odd:  kept \r\nContent-Length: 2\r\n\r\nhi";
    let server = Recorded::start(&world.server, 80, b"X-Trailer: 1\r\n\r\n", answer)?;
    let mut stream = world.client.run(|| TcpStream::connect(at(80)))?;
    let local = stream.local_addr()?;
    // A byte in a segment: nothing hangs on where segments end.
    stream.set_nodelay(true)?;
    for byte in odd {
        stream.write_all(&[*byte])?;
    }
    let mut received = vec![0; answer.len()];
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.read_exact(&mut received)?;
    assert_eq!(received, answer);
    assert_eq!(server.received(), odd);
    assert_eq!(server.peers(), [local], "the server sees the client's address and port");
    Ok(())
}

#[test]
fn a_refusal_stands_in_order() -> Result<()> {
    let world = World::start(&[set(1, http(&[("GET", "/ok")]))], by_one)?;
    let server = Recorded::start(
        &world.server,
        80,
        b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n0\r\n\r\n",
    )?;
    let pipelined =
        b"GET /ok HTTP/1.1\r\nHost: a\r\n\r\nPOST /no HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody\
                      GET /no HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = String::from_utf8(world.send(at(80), pipelined)?)?;
    let parts: Vec<&str> = answer.split("HTTP/1.1 ").collect();
    assert_eq!(parts.len(), 4, "{answer}");
    assert!(parts[1].starts_with("200") && parts[1].ends_with("first\r\n0\r\n\r\n"), "{answer}");
    assert!(parts[2].starts_with("403") && parts[3].starts_with("403"), "{answer}");
    assert_eq!(
        server.received(),
        b"GET /ok HTTP/1.1\r\nHost: a\r\n\r\n",
        "nothing of the denied ones went on"
    );
    Ok(())
}

/// What two parsers could read in two ways; each comes behind an allowed request, and hides a denied one.
const DOUBTFUL: &[(&str, &str)] = &[
    (
        "both lengths",
        "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "both lengths, other order",
        "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    ("two lengths", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\nabcde"),
    (
        "one length twice",
        "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nabcde",
    ),
    ("a list of lengths", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nabcde"),
    ("a signed length", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nabcde"),
    ("a negative length", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nabcde"),
    ("a hexadecimal length", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nabcde"),
    ("an empty length", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\nabcde"),
    (
        "a length that overflows",
        "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551621\r\n\r\nabcde",
    ),
    ("a length with an underscore", "POST /ok HTTP/1.1\r\nHost: a\r\nContent_Length: 5\r\n\r\nabcde"),
    (
        "an encoding with an underscore",
        "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer_Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    ("another encoding", "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    ("two encodings", "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    (
        "an encoding twice",
        "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "identity beside chunked",
        "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "a vertical tab before chunked",
        "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    ),
    ("chunks in HTTP/1.0", "POST /ok HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("a space before the colon", "POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nabcde"),
    (
        "a tab before the colon",
        "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    ),
    ("a folded line", "POST /ok HTTP/1.1\r\nHost: a\r\nX-A: b\r\n Content-Length: 5\r\n\r\nabcde"),
    ("a folded first line", "POST /ok HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n"),
    ("a bare LF", "GET /ok HTTP/1.1\nHost: a\n\n"),
    ("a bare LF between headers", "GET /ok HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"),
    ("a bare CR", "GET /ok HTTP/1.1\r\nHost: a\r\nX: y\rContent-Length: 5\r\n\r\nabcde"),
    ("a NUL", "GET /ok HTTP/1.1\r\nHost: a\r\nX: y\0z\r\n\r\n"),
    ("an empty line first", "\r\nGET /ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("no colon", "GET /ok HTTP/1.1\r\nHost: a\r\nContent-Length 5\r\n\r\nabcde"),
    ("an empty name", "GET /ok HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n"),
    ("a name that is no token", "GET /ok HTTP/1.1\r\nHost: a\r\nX(Y): z\r\n\r\n"),
    ("HTTP/0.9", "GET /ok\r\n\r\n"),
    ("HTTP/1.2", "GET /ok HTTP/1.2\r\nHost: a\r\n\r\n"),
    ("HTTP/2.0 by name", "GET /ok HTTP/2.0\r\nHost: a\r\n\r\n"),
    ("two spaces", "GET  /ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("four words", "GET /ok /no HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a space at the end", "GET /ok HTTP/1.1 \r\nHost: a\r\n\r\n"),
    ("a tab between words", "GET\t/ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("two hosts", "GET /ok HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    ("one host twice", "GET /ok HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
    ("no host", "GET /ok HTTP/1.1\r\n\r\n"),
    ("a host with a slash", "GET /ok HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    ("a host with a user", "GET /ok HTTP/1.1\r\nHost: x@a\r\n\r\n"),
    ("another host in the URI", "GET http://b/ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("another scheme", "GET https://a/ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a URI without a path", "GET http://a?/ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a fragment", "GET /ok#/../no HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("a target without a slash", "GET ok HTTP/1.1\r\nHost: a\r\n\r\n"),
    (
        "Connection names the length",
        "POST /ok HTTP/1.1\r\nHost: a\r\nConnection: Content-Length\r\nContent-Length: 5\r\n\r\nabcde",
    ),
    ("Connection names the host", "GET /ok HTTP/1.1\r\nHost: a\r\nConnection: close, Host\r\n\r\n"),
    ("Upgrade that Connection does not name", "GET /ok HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n"),
    ("another Expect", "POST /ok HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 5\r\n\r\nabcde"),
    ("CONNECT to another host", "CONNECT b:80 HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("an encoded NUL", "GET /ok%00 HTTP/1.1\r\nHost: a\r\n\r\n"),
];

/// Framing of a body that is doubtful: the head went on, and the connection is cut.
const DOUBTFUL_BODIES: &[(&str, &str)] = &[
    ("a bare LF behind a size", "5\nabcde\r\n0\r\n\r\n"),
    ("a bare LF behind data", "5\r\nabcde\n0\r\n\r\n"),
    ("a space behind a size", "5 \r\nabcde\r\n0\r\n\r\n"),
    ("a size with a sign", "+5\r\nabcde\r\n0\r\n\r\n"),
    ("a size with a prefix", "0x5\r\nabcde\r\n0\r\n\r\n"),
    ("no size", "\r\nabcde\r\n0\r\n\r\n"),
    ("a size that overflows", "10000000000000005\r\nabcde\r\n0\r\n\r\n"),
    ("more data than the size", "5\r\nabcdef\r\n0\r\n\r\n"),
    ("an extension with a bare CR", "5;a\rb\r\nabcde\r\n0\r\n\r\n"),
    ("an extension with a bare LF", "5;\nabcde\r\n0\r\n\r\n"),
    ("a length in the trailer", "5\r\nabcde\r\n0\r\nContent-Length: 5\r\n\r\n"),
    ("a host in the trailer", "5\r\nabcde\r\n0\r\nHost: b\r\n\r\n"),
    ("a trailer without a colon", "5\r\nabcde\r\n0\r\nGET /no HTTP/1.1\r\n\r\n"),
    ("a trailer with a bare LF", "5\r\nabcde\r\n0\r\nX: y\n\r\n"),
];

#[test]
fn what_can_be_read_in_two_ways_is_refused() -> Result<()> {
    let rules = http(&[("GET|POST|CONNECT", "/ok|a:80|b:80"), ("GET", "/ok.*")]);
    let world = World::start(&[set(1, rules)], by_one)?;
    let server =
        Recorded::start(&world.server, 80, b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    let honest = "GET /ok HTTP/1.1\r\nHost: a\r\n\r\n";
    let hidden = "GET /no HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    for (what, doubtful) in DOUBTFUL {
        let answer = world.send(at(80), format!("{honest}{doubtful}{hidden}").as_bytes())?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let statuses: Vec<&str> = answer.split("HTTP/1.1 ").skip(1).map(|part| &part[..3]).collect();
        assert!(
            matches!(statuses[..], ["200", "400" | "403" | "417" | "505", ..])
                && !statuses[1..].contains(&"200"),
            "{what}: {answer}"
        );
    }
    let received = String::from_utf8(server.received())?;
    assert_eq!(received, honest.repeat(DOUBTFUL.len()), "nothing of it went on");
    for (what, body) in DOUBTFUL_BODIES {
        let head = "POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let answer = world.send(at(80), format!("{honest}{head}{body}{hidden}").as_bytes())?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        // It is cut where it is in doubt; the honest request may have no answer then.
        assert!(answer.matches("HTTP/1.1 ").count() <= 2, "{what}: {answer}");
    }
    let received = String::from_utf8(server.received())?;
    assert!(!received.contains("/no"), "{received}");
    Ok(())
}

#[test]
fn what_a_peer_chooses_has_bounds() -> Result<()> {
    let limits =
        Limits { head: Duration::from_millis(300), connections_per_endpoint: 3, ..Limits::default() };
    let world = World::with_limits(&[set(1, L7Rules::Http(vec![]))], by_one, limits)?;
    Recorded::start(&world.server, 80, b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    let status = |request: String| {
        let answer = world.send(at(80), request.as_bytes())?;
        anyhow::Ok(String::from_utf8_lossy(&answer).chars().skip(9).take(3).collect::<String>())
    };
    let with_headers = |count: usize| {
        let lines: String = (0..count).map(|number| format!("X-{number}: 1\r\n")).collect();
        format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n")
    };
    assert_eq!(status(with_headers(99))?, "431");
    assert_eq!(status(format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(17 << 10)))?, "431");
    assert_eq!(status(format!("GET /{}", "x".repeat(17 << 10)))?, "431");
    assert_eq!(status("GET / HTTP/1.1\r\nHos".to_owned())?, "408", "slowly");
    let held: Vec<TcpStream> =
        world.client.run(|| (0..3).map(|_| TcpStream::connect(at(80))).collect::<Result<_, _>>())?;
    super::world::wait("a connection too many", || {
        // It gets a reset, sooner or later than what it sends.
        let _ = world.send(at(80), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        world.agent.records().iter().any(|record| record.note == "too many connections").then_some(())
    })?;
    drop(held);
    Ok(())
}

#[test]
fn headers_are_changed_as_rules_say() -> Result<()> {
    let rule = |path: &str, mismatch| HttpRule {
        path: Some(path.to_owned()),
        headers: vec![HeaderRule { mismatch, ..HeaderRule::from_line("X-Team: red") }],
        ..HttpRule::default()
    };
    let rules = vec![
        rule("/deny", Mismatch::Deny),
        rule("/log", Mismatch::Log),
        rule("/add", Mismatch::Add),
        rule("/delete", Mismatch::Delete),
        rule("/replace", Mismatch::Replace),
    ];
    let world = World::start(&[set(1, L7Rules::Http(rules))], by_one)?;
    serve(&world.server, 80)?;
    let ask = |path: &str, team: &str| {
        let url = format!("http://10.78.0.2/{path}");
        let header = format!("x-team: {team}");
        world.curl(&["-H", &header, "-X", "GET", "--data", "body", &url])
    };
    assert_eq!(ask("deny", "red")?, "GET /deny team=red body=4");
    assert_eq!(ask("deny", "blue")?, "Access denied\r\n");
    assert_eq!(ask("log", "blue")?, "GET /log team=blue body=4");
    assert_eq!(ask("add", "blue")?, "GET /add team=blue|red body=4");
    assert_eq!(ask("delete", "blue")?, "GET /delete team= body=4");
    assert_eq!(ask("replace", "blue")?, "GET /replace team=red body=4");
    let logged = world.agent.record("the note of LOG", |record| !record.note.is_empty())?;
    assert_eq!(logged.note, "header X-Team has another value");
    Ok(())
}

#[test]
fn a_connection_goes_on_with_another_protocol_only_where_it_may() -> Result<()> {
    let world = World::start(&[set(1, http(&[("GET", "/ok")]))], by_one)?;
    let asks = "GET /ok HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let agrees =
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nframe";
    let server = Recorded::start(&world.server, 80, b"websocket\r\n\r\n", agrees)?;
    let declines =
        Recorded::start(&world.server, 8080, b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    let mut stream = world.client.run(|| TcpStream::connect(at(80)))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(asks.as_bytes())?;
    let mut answer = vec![0; agrees.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, agrees);
    stream.write_all(b"\x81\x00GET /no")?;
    super::world::wait("the frame", || server.received().ends_with(b"\x81\x00GET /no").then_some(()))?;
    // The server does not change the protocol: what comes next is a request.
    let answer = world.send(
        at(8080),
        format!("{asks}GET /no HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    assert!(String::from_utf8_lossy(&answer).contains("403 Forbidden"));
    assert_eq!(declines.received(), asks.as_bytes());
    for other in [
        asks.replace("websocket", "mystery"),
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\n\r\n".to_owned(),
    ] {
        let other = other.replace("Connection: Upgrade", "Connection: Upgrade, close");
        let answer = world.send(at(8080), other.as_bytes())?;
        assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 403"), "{other}");
    }
    assert_eq!(
        world.curl(&[
            "--http2",
            "--output",
            "/dev/null",
            "--write-out",
            "%{http_code}",
            "http://10.78.0.2:8080/ok"
        ])?,
        "200"
    );
    let received = String::from_utf8(declines.received())?;
    assert!(!received.to_lowercase().contains("h2c"), "the offer of HTTP/2 is withdrawn: {received}");
    Ok(())
}

#[test]
fn a_running_connection_loses_its_right_at_the_next_request() -> Result<()> {
    let world = World::start(&[set(1, http(&[("GET", "/a")]))], by_one)?;
    serve(&world.server, 80)?;
    let mut stream = world.client.run(|| TcpStream::connect(at(80)))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut ask = || {
        stream.write_all(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let mut buffer = [0; 1024];
        let count = stream.read(&mut buffer)?;
        anyhow::Ok(String::from_utf8_lossy(&buffer[..count]).chars().skip(9).take(3).collect::<String>())
    };
    assert_eq!(ask()?, "200");
    world.agent.change(&[set(1, http(&[("GET", "/b")]))], &[], false)?;
    assert_eq!(ask()?, "403");
    world.agent.change(&[], &[1], false)?;
    assert_eq!(ask()?, "403", "a rule set that is not known allows nothing");
    Ok(())
}

#[test]
fn both_ends_must_allow_and_looking_on_denies_nothing() -> Result<()> {
    let judge = |_: SocketAddr, server: SocketAddr, _| {
        let mut judges = by_one(server, server, weir::model::Protocol::Tcp)?;
        match server.port() {
            80 => judges.ingress = Some(RuleSetId(2)),
            8080 => judges.egress = Some(RuleSetId(3)),
            _ => return None,
        }
        Some(judges)
    };
    let mut looks_on = set(3, http(&[("GET", "/nothing")]));
    looks_on.visibility_only = true;
    let world = World::start(
        &[set(1, http(&[("GET", "/a|/b")])), set(2, http(&[("GET", "/b|/c")])), looks_on],
        judge,
    )?;
    serve(&world.server, 80)?;
    serve(&world.server, 8080)?;
    let status = |path: &str| world.status(&[&format!("http://10.78.0.2{path}")]);
    assert_eq!((status("/a")?, status("/b")?, status("/c")?), ("403".into(), "200".into(), "403".into()));
    assert_eq!(world.status(&["http://10.78.0.2:8080/any"])?, "200");
    // The reset may come before the request has left.
    let unknown = world.send(at(443), b"GET / HTTP/1.1\r\n\r\n");
    assert!(!unknown.is_ok_and(|answer| !answer.is_empty()), "a flow that nobody knows is closed");
    assert_eq!(world.status(&["http://10.78.0.2:8080/again"])?, "200");
    Ok(())
}

#[test]
fn a_server_that_is_not_there_is_said() -> Result<()> {
    let world = World::start(&[set(1, L7Rules::Http(vec![]))], by_one)?;
    assert_eq!(world.status(&["http://10.78.0.2/"])?, "503");
    let record = world.agent.record("the failure", |record| record.verdict == L7Verdict::Error)?;
    assert!(record.note.contains("refused"), "{record:?}");
    Ok(())
}
