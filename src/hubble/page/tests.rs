//! The page's server over a real socket.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::{Hosts, routes, serve_on};
use crate::flow::tests::{record, recorded};
use crate::hubble::tests::observer;

/// A page's server; dropping the sender ends it.
async fn served(recorder: Arc<crate::flow::Recorder>) -> (std::net::SocketAddr, watch::Sender<bool>) {
    let (observer, _) = observer(recorder);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let (stop, stopping) = watch::channel(false);
    let hosts = Hosts(vec!["flows.example.org".to_owned()]);
    tokio::spawn(serve_on(listener, routes(Arc::new(observer), hosts), stopping));
    (address, stop)
}

async fn open(address: std::net::SocketAddr, path: &str, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let has_host = headers.to_ascii_lowercase().contains("host:");
    let host = if has_host { String::new() } else { format!("Host: {address}\r\n") };
    let request = format!("GET {path} HTTP/1.1\r\n{host}{headers}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    stream
}

async fn asked(address: std::net::SocketAddr, path: &str, headers: &str) -> String {
    let mut stream = open(address, path, headers).await;
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    tokio::time::timeout(Duration::from_secs(20), reading).await.expect("an end").expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

fn data(text: &str) -> Vec<Value> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("data: "));
    lines
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .filter(|value: &Value| value.get("flow").is_some())
        .collect()
}

#[tokio::test]
async fn flows_are_events_with_the_flags_of_the_command_line() {
    let (address, _stop) = served(recorded(64, 0..10)).await;
    let answer = asked(address, "/api/flows?last=3", "").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("text/event-stream") && answer.contains("event: end"), "{answer}");
    let flows = data(&answer);
    assert_eq!(flows.len(), 3);
    assert_eq!(flows[2]["flow"]["l4"]["TCP"]["source_port"], 9);
    assert_eq!((&flows[2]["node_name"], &flows[2]["flow"]["verdict"]), (&"a".into(), &"FORWARDED".into()));
    let one =
        data(&asked(address, "/api/flows?from-port=7&from-port=8&not.from-port=8&namespace=shop", "").await);
    assert_eq!(one.len(), 1);
    assert!(data(&asked(address, "/api/flows?verdict=DROPPED", "").await).is_empty());
    let refused = asked(address, "/api/flows?verdict=perhaps%3F", "").await;
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("perhaps?"), "{refused}");
    let bad_filter = asked(address, "/api/flows?ip=nowhere", "").await;
    assert!(bad_filter.starts_with("HTTP/1.1 400"), "{bad_filter}");
    assert!(asked(address, "/api/nothing", "").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn a_follower_gets_what_comes() {
    let recorder = recorded(64, 0..3);
    let (address, _stop) = served(recorder.clone()).await;
    let mut stream = open(address, "/api/flows?follow=1&last=1", "").await;
    let mut text = String::new();
    let mut buffer = [0; 4096];
    for expected in [1, 3] {
        while data_so_far(&text) < expected {
            let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut buffer));
            let read = read.await.expect("something").expect("an answer");
            assert!(read > 0, "it ended: {text}");
            text += &String::from_utf8_lossy(&buffer[..read]);
        }
        record(&recorder, 3..5);
    }
    assert!(text.contains("\nid: "), "{text}");
}

fn data_so_far(text: &str) -> usize {
    text.matches("data: {\"flow\"").count()
}

#[tokio::test]
async fn the_status_names_the_nodes() {
    let (address, _stop) = served(recorded(64, 0..10)).await;
    let answer = asked(address, "/api/status", "").await;
    let body = answer.split("\r\n\r\n").nth(1).expect("a body");
    let value: Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(value["num_flows"], "10");
    assert_eq!(
        (&value["nodes"][0]["name"], &value["nodes"][0]["state"]),
        (&"a".into(), &"NODE_CONNECTED".into())
    );
}

/// The page sends a message as it came, and gets the policy.
#[tokio::test]
async fn a_denied_flow_is_answered_with_the_rule_that_would_allow_it() {
    let (address, _stop) = served(recorded(64, 0..1)).await;
    let post = async |body: &str, headers: &str| {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let length = body.len();
        let head = format!(
            "POST /api/allow HTTP/1.1\r\nHost: {address}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all((head + body).as_bytes()).await.expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        String::from_utf8_lossy(&answer).into_owned()
    };
    let flow = crate::hubble::json::to_string(&crate::hubble::tests::flow(&crate::flow::tests::dropped()));
    let answer = post(&format!("{{\"flow\":{flow},\"node_name\":\"a\"}}"), "").await;
    let body = answer.split("\r\n\r\n").nth(1).expect("a body");
    let value: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
    let policy: Value = crate::yaml::read(value["yaml"].as_str().expect("a policy")).expect("YAML");
    assert_eq!(
        (&policy["kind"], &policy["metadata"]["namespace"]),
        (&"NetworkPolicy".into(), &"shop".into())
    );
    assert!(post("{}", "").await.starts_with("HTTP/1.1 400"));
    assert!(post("nonsense", "").await.starts_with("HTTP/1.1 400"));
    assert!(post("{}", "Origin: http://evil.example\r\n").await.starts_with("HTTP/1.1 403"));
}

#[tokio::test]
async fn other_sites_and_other_names_are_refused() {
    let (address, _stop) = served(recorded(64, 0..10)).await;
    for (headers, is_allowed) in [
        (String::new(), true),
        ("Host: localhost:1234\r\n".to_owned(), true),
        ("Host: [::1]:1234\r\n".to_owned(), true),
        ("Host: hubble-relay\r\n".to_owned(), true),
        ("Host: hubble-relay.weir-system.svc:80\r\n".to_owned(), true),
        ("Host: flows.example.org\r\n".to_owned(), true),
        ("Host: rebound.example.com\r\n".to_owned(), false),
        (format!("Host: {address}\r\nOrigin: http://{address}\r\n"), true),
        (format!("Host: {address}\r\nOrigin: http://evil.example\r\n"), false),
        (format!("Host: {address}\r\nOrigin: null\r\n"), false),
        (format!("Host: {address}\r\nSec-Fetch-Site: cross-site\r\n"), false),
        (format!("Host: {address}\r\nSec-Fetch-Site: same-origin\r\n"), true),
        (format!("Host: {address}\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n"), true),
    ] {
        let answer = asked(address, "/api/status", &headers).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), is_allowed, "{headers}{answer}");
        let lower = answer.to_ascii_lowercase();
        assert!(lower.contains("content-security-policy: default-src 'none'"), "{answer}");
        assert!(lower.contains("x-content-type-options: nosniff") && !lower.contains("access-control"));
    }
}
