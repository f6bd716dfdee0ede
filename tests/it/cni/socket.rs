//! The agent's socket against clients that are not `weir-cni`.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use weir::api::{self, Client, Error, Reply, Request};

use super::netns::skip_without_root;

/// Answers STATUS, streams three numbers for ENDPOINTS, and nothing else.
struct Handler;

impl api::Handler for Handler {
    async fn handle(&self, request: Request, mut reply: Reply) {
        match request {
            Request::Status | Request::CniStatus => {
                let _ = reply.send(&"well").await;
            }
            Request::Endpoints => {
                for number in 0..3 {
                    let _ = reply.send(&number).await;
                }
            }
            Request::Nodes => reply.closed().await,
            _ => {}
        }
    }
}

fn with_server(test: impl FnOnce(&std::path::Path)) {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("run/agent.sock");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime of tasks");
    let (shutdown, stop) = watch::channel(false);
    let listener = runtime.block_on(async { api::bind(&socket) }).expect("binding");
    let serving = runtime.spawn({
        let socket = socket.clone();
        async move { api::serve_on(listener, &socket, Arc::new(Handler), stop).await }
    });
    test(&socket);
    shutdown.send_replace(true);
    runtime.block_on(serving).expect("it does not panic").expect("serving");
    assert!(!socket.exists(), "the socket goes with the server");
}

fn answer_to(socket: &std::path::Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).expect("connecting");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // The server may hang up before it has read all of it.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn root_answers_come_as_lines() {
    if skip_without_root("root_answers_come_as_lines") {
        return;
    }
    with_server(|socket| {
        let mode =
            |path: &std::path::Path| std::fs::metadata(path).expect("it is there").permissions().mode();
        assert_eq!(mode(socket) & 0o777, 0o600);
        assert_eq!(mode(socket.parent().expect("a directory")) & 0o777, 0o700);
        let client = || Client::connect(socket).expect("connecting");
        assert_eq!(client().call::<String>(&Request::Status).expect("an answer"), "well");
        let numbers: Vec<u32> = client()
            .stream(&Request::Endpoints)
            .expect("asking")
            .map(|number| number.expect("a number"))
            .collect();
        assert_eq!(numbers, [0, 1, 2]);
        // A handler that answers nothing is seen as one.
        assert!(matches!(client().call::<Value>(&Request::Policies), Err(Error::Io(_))));
        // One that never answers, likewise, when the client has had enough.
        let patient = client().with_timeout(Duration::from_millis(50)).expect("a timeout");
        assert!(matches!(patient.call::<Value>(&Request::Nodes), Err(Error::Io(_))));
    });
}

#[test]
fn root_nonsense_is_refused() {
    if skip_without_root("root_nonsense_is_refused") {
        return;
    }
    with_server(|socket| {
        let long = vec![b'x'; 3 * 1024 * 1024];
        let rows: [&[u8]; 7] = [
            b"nonsense\n",
            b"\xff\xfe\n",
            b"{\"method\":\"no_such\"}\n",
            b"{\"method\":\"cni_add\"}\n",
            b"{\"method\":\"cni_add\",\"params\":{\"container_id\":7}}\n",
            b"{\"method\":\"status\"}",
            b"[1,2]\n",
        ];
        for bytes in rows {
            let answer: Value = serde_json::from_str(&answer_to(socket, bytes)).expect("a line of JSON");
            assert_eq!(answer["error"]["code"], 6, "{}", String::from_utf8_lossy(bytes));
        }
        // What is too long is cut off; whether the refusal gets through depends on who hangs up first.
        let answer = answer_to(socket, &long);
        assert!(answer.is_empty() || answer.contains("\"code\":6"), "{answer}");
        assert_eq!(answer_to(socket, b""), "");
        assert_eq!(
            answer_to(socket, b"{\"method\":\"status\"}\n"),
            json!({"result": "well"}).to_string() + "\n"
        );
    });
}

#[test]
fn root_only_root_is_answered() {
    if skip_without_root("root_only_root_is_answered") {
        return;
    }
    with_server(|socket| {
        // Even where the modes would let it: they are opened for this.
        for (path, mode) in [(socket, 0o666), (socket.parent().expect("a directory"), 0o755)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("changing a mode");
        }
        let above = socket.parent().and_then(|directory| directory.parent()).expect("a directory above");
        std::fs::set_permissions(above, std::fs::Permissions::from_mode(0o755)).expect("changing a mode");
        let plugin = above.join("weir-cni");
        std::fs::copy(super::agent::plugin(), &plugin).expect("a plugin that anybody may run");
        let mut child = Command::new(&plugin)
            .env_clear()
            .env("CNI_COMMAND", "STATUS")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .uid(65534)
            .gid(65534)
            .spawn()
            .expect("starting weir-cni");
        let config = json!({"cniVersion": "1.1.0", "name": "weir", "type": "weir-cni", "socket": socket});
        child.stdin.take().expect("it is piped").write_all(config.to_string().as_bytes()).expect("writing");
        let output = child.wait_with_output().expect("waiting");
        let error: Value = serde_json::from_slice(&output.stdout).expect("an error object");
        assert_eq!((&error["code"], &error["msg"]), (&json!(4), &json!("only root may talk to the agent")));
    });
}

#[test]
fn root_a14_waiting_requests_cannot_keep_a_pod_from_starting() {
    if skip_without_root("root_a14_waiting_requests_cannot_keep_a_pod_from_starting") {
        return;
    }
    with_server(|socket| {
        let client = || Client::connect(socket).expect("connecting");
        let follow = || client().stream::<Value>(&Request::Nodes).expect("asking");
        let mut followers: Vec<_> = (0..api::OTHERS_MAX).map(|_| follow()).collect();
        // The server works on requests in an order of its own: a question that comes before a follower
        // may have the follower refused. Another follower takes that place.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let refusal = loop {
            match client().call::<String>(&Request::Status) {
                Err(Error::Refused(refusal)) => break refusal,
                answered => assert!(std::time::Instant::now() < deadline, "{answered:?}"),
            }
            followers.push(follow());
        };
        assert_eq!((refusal.code, refusal.message.as_str()), (11, "the agent has too many requests at once"));
        assert_eq!(client().call::<String>(&Request::CniStatus).expect("the runtime is answered"), "well");
    });
}

#[test]
fn root_a_stale_socket_is_replaced_and_a_live_one_is_not() {
    if skip_without_root("root_a_stale_socket_is_replaced_and_a_live_one_is_not") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("agent.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("a socket that nobody listens at"));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime of tasks");
    runtime.block_on(async {
        let listener = api::bind(&socket).expect("replacing a stale socket");
        let error = api::bind(&socket).expect_err("somebody listens");
        assert!(error.to_string().contains("another agent listens"), "{error}");
        drop(listener);
        api::bind(&socket).expect("replacing it again");
    });
    assert_eq!(std::fs::read_dir(directory.path()).expect("listing").count(), 1);
}
