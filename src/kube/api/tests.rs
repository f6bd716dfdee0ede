//! How a watch behaves over a connection that breaks.
//!
//! The server here is the test's own and knows nothing of Kubernetes: the test answers
//! every request by hand. It shows what the watch does about partial lists, ends,
//! errors and silence; that a real API server answers like this is shown by
//! `tests/it/api_server.rs`, which wants one.

use std::collections::HashMap;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::*;
use crate::kube::KindHealth;

/// A request that waits for the test's answer.
struct Request {
    path: String,
    query: HashMap<String, String>,
    answer: oneshot::Sender<Response>,
}

type Requests = mpsc::UnboundedSender<Request>;

impl Request {
    fn query(&self, key: &str) -> Option<&str> {
        self.query.get(key).map(String::as_str)
    }

    fn json(self, code: u16, body: &Value) {
        let code = StatusCode::from_u16(code).expect("a status code");
        self.send((code, body.to_string()).into_response());
    }

    fn refuse(self, code: u16) {
        self.json(code, &status(code));
    }

    /// Answers with a stream of events that lasts as long as what is returned.
    fn stream(self) -> Events {
        let (events, received) = mpsc::unbounded_channel();
        let received = futures::stream::unfold(received, |mut received| async {
            received.recv().await.map(|line| (Ok::<Bytes, Infallible>(line), received))
        });
        self.send(Body::from_stream(received).into_response());
        Events(events)
    }

    fn send(self, response: Response) {
        assert!(self.answer.send(response).is_ok(), "the client waits for the answer");
    }
}

/// An open watch.
struct Events(mpsc::UnboundedSender<Bytes>);

impl Events {
    fn line(&self, line: &str) {
        self.0.send(format!("{line}\n").into()).expect("the connection is open");
    }

    fn event(&self, kind: &str, object: &Value) {
        self.line(&json!({"type": kind, "object": object}).to_string());
    }

    fn bookmark(&self, version: &str, is_end: bool) {
        let annotations = if is_end { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
        let metadata = json!({"resourceVersion": version, "annotations": annotations});
        self.event("BOOKMARK", &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}));
    }
}

fn namespace(name: &str, version: &str) -> Value {
    json!({"metadata": {"name": name, "resourceVersion": version, "labels": {"v": version}, "managedFields": [{}]}})
}

fn status(code: u16) -> Value {
    json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "message": "no", "reason": "No", "code": code})
}

/// A server that the test answers for, a watch of namespaces, and their table.
struct Lab {
    requests: mpsc::UnboundedReceiver<Request>,
    client: Client,
    tables: Arc<Tables>,
    health: Arc<Health>,
    answered: Arc<Notify>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn forward(State(requests): State<Requests>, uri: Uri) -> Response {
    let (answer, answered) = oneshot::channel();
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let query = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let request = Request { path: uri.path().to_owned(), query, answer };
    requests.send(request).expect("the test is running");
    answered.await.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

impl Lab {
    async fn start() -> Self {
        let (sender, requests) = mpsc::unbounded_channel();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binding");
        let address = listener.local_addr().expect("an address");
        let router = axum::Router::new().fallback(forward).with_state(sender);
        let server = tokio::spawn(async move { axum::serve(listener, router).await.expect("serving") });
        let uri: Uri = format!("http://{address}").parse().expect("a URI");
        let mut config = kube::Config::new(uri);
        config.default_retry = false;
        let client = Client::try_from(config).expect("a client");
        let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
        let answered = Arc::default();
        let watch =
            tokio::spawn(Watch::<kinds::Namespace>::new(&client, None, &tables, &health, &answered).run());
        Self { requests, client, tables, health, answered, tasks: vec![server, watch] }
    }

    /// One that has listed these namespaces by a stream that is still open.
    async fn listed(names: &[&str]) -> (Self, Events) {
        let mut lab = Self::start().await;
        let events = lab.request().await.stream();
        names.iter().for_each(|name| events.event("ADDED", &namespace(name, "1")));
        events.bookmark("5", true);
        lab.wait_for(&names.iter().map(|name| format!("{name}=1")).collect::<Vec<_>>()).await;
        (lab, events)
    }

    async fn request(&mut self) -> Request {
        let request = self.any_request().await;
        assert_eq!(request.path, "/api/v1/namespaces");
        request
    }

    async fn any_request(&mut self) -> Request {
        let request = tokio::time::timeout(Duration::from_secs(20), self.requests.recv()).await;
        request.expect("a request comes").expect("the server is running")
    }

    /// Every namespace with its version.
    fn rows(&self) -> Vec<String> {
        let rows = self.tables.namespaces.snapshot();
        rows.iter().map(|(name, row)| format!("{name}={}", row.labels.get("v").map_or("", |v| v))).collect()
    }

    async fn wait_for(&self, expected: &[impl AsRef<str>]) {
        let expected: Vec<&str> = expected.iter().map(AsRef::as_ref).collect();
        let mut changes = self.tables.namespaces.subscribe();
        let equal = tokio::time::timeout(Duration::from_secs(20), async {
            while self.rows() != expected || !self.tables.namespaces.is_synced() {
                changes.changed().await.expect("the table lives");
            }
        });
        assert!(equal.await.is_ok(), "{:?} never became {expected:?}", self.rows());
    }

    fn health(&self) -> KindHealth {
        let kinds = self.health.kinds();
        kinds.into_iter().find(|(kind, _)| kind.name() == "Namespace").expect("every kind has health").1
    }

    fn reports(&self) -> Vec<String> {
        self.health.reports().into_iter().map(|report| report.reason).collect()
    }
}

#[tokio::test]
async fn the_first_list_is_a_consistent_stream() {
    let mut lab = Lab::start().await;
    let request = lab.request().await;
    for (key, value) in [
        ("watch", "true"),
        ("sendInitialEvents", "true"),
        ("resourceVersionMatch", "NotOlderThan"),
        ("resourceVersion", ""),
        ("allowWatchBookmarks", "true"),
    ] {
        assert_eq!(request.query(key), Some(value), "{key}");
    }
    let timeout: u32 = request.query("timeoutSeconds").expect("a limit").parse().expect("a number");
    assert!((230..=290).contains(&timeout), "{timeout}");
    let events = request.stream();
    events.event("ADDED", &namespace("a", "1"));
    events.bookmark("2", false);
    events.event("ADDED", &namespace("b", "3"));
    events.bookmark("4", true);
    lab.wait_for(&["a=1", "b=3"]).await;
    events.event("MODIFIED", &namespace("a", "5"));
    events.event("DELETED", &namespace("b", "6"));
    lab.wait_for(&["a=5"]).await;
    let health = lab.health();
    assert!(health.is_synced && health.is_connected && health.last_event.is_some());
    assert_eq!(health.errors_total, 0);
}

#[tokio::test]
async fn a_partial_list_is_not_a_list() {
    let mut lab = Lab::start().await;
    let events = lab.request().await.stream();
    events.event("ADDED", &namespace("a", "1"));
    events.bookmark("2", false);
    drop(events);
    let request = lab.request().await;
    assert_eq!((lab.rows(), lab.tables.namespaces.is_synced()), (vec![], false));
    assert_eq!(request.query("sendInitialEvents"), Some("true"), "it begins again");
    let events = request.stream();
    events.event("ADDED", &namespace("b", "3"));
    events.bookmark("4", true);
    lab.wait_for(&["b=3"]).await;
}

#[tokio::test]
async fn a_broken_connection_goes_on_from_the_last_version() {
    let (mut lab, events) = Lab::listed(&["a"]).await;
    events.event("MODIFIED", &namespace("a", "7"));
    lab.wait_for(&["a=7"]).await;
    drop(events);
    let request = lab.request().await;
    assert_eq!((request.query("resourceVersion"), request.query("sendInitialEvents")), (Some("7"), None));
    let events = request.stream();
    events.bookmark("9", false);
    drop(events);
    let request = lab.request().await;
    assert_eq!(request.query("resourceVersion"), Some("9"), "bookmarks count");
    let events = request.stream();
    events.event("ADDED", &namespace("b", "10"));
    lab.wait_for(&["a=7", "b=10"]).await;
}

#[tokio::test]
async fn a_forgotten_version_means_a_new_list_and_the_rows_stand_until_it_is_there() {
    for in_stream in [true, false] {
        let (mut lab, events) = Lab::listed(&["a", "b"]).await;
        if in_stream {
            events.event("ERROR", &status(410));
        } else {
            drop(events);
            lab.request().await.refuse(410);
        }
        let request = lab.request().await;
        assert_eq!(
            (request.query("resourceVersion"), request.query("sendInitialEvents")),
            (Some(""), Some("true"))
        );
        let events = request.stream();
        events.event("ADDED", &namespace("c", "20"));
        drop(events);
        let events = lab.request().await.stream();
        assert_eq!(lab.rows(), ["a=1", "b=1"], "half a list is none");
        events.event("ADDED", &namespace("b", "21"));
        events.bookmark("22", true);
        lab.wait_for(&["b=21"]).await;
    }
}

#[tokio::test]
async fn a_server_that_does_not_stream_is_listed_in_pages() {
    let mut lab = Lab::start().await;
    let events = lab.request().await.stream();
    events.event("ERROR", &status(500));
    let page = |names: &[&str], token: &str| {
        let items: Vec<_> = names.iter().map(|name| namespace(name, "1")).collect();
        json!({"apiVersion": "v1", "kind": "NamespaceList", "items": items,
               "metadata": {"resourceVersion": "8", "continue": token}})
    };
    for is_second_time in [false, true] {
        let request = lab.request().await;
        assert_eq!((request.query("limit"), request.query("continue")), (Some("250"), None));
        request.json(200, &page(&["a", "b"], "more"));
        let request = lab.request().await;
        assert_eq!(request.query("continue"), Some("more"));
        assert!(!lab.tables.namespaces.is_synced());
        if is_second_time {
            request.json(200, &page(&["c"], ""));
        } else {
            request.refuse(410);
        }
    }
    let request = lab.request().await;
    assert_eq!((request.query("watch"), request.query("resourceVersion")), (Some("true"), Some("8")));
    let events = request.stream();
    lab.wait_for(&["a=1", "b=1", "c=1"]).await;
    events.event("DELETED", &namespace("a", "9"));
    lab.wait_for(&["b=1", "c=1"]).await;
}

#[tokio::test]
async fn whoever_refuses_to_stream_is_asked_for_pages() {
    for code in [400, 422, 403, 500] {
        let mut lab = Lab::start().await;
        lab.request().await.refuse(code);
        assert_eq!(lab.request().await.query("limit"), Some("250"), "{code}");
    }
    for code in [429, 503] {
        let mut lab = Lab::start().await;
        lab.request().await.refuse(code);
        assert_eq!(lab.request().await.query("sendInitialEvents"), Some("true"), "{code}");
    }
}

#[tokio::test]
async fn an_api_that_is_away_changes_nothing() {
    let (mut lab, events) = Lab::listed(&["a", "b"]).await;
    drop(events);
    for code in [500, 503, 429] {
        let request = lab.request().await;
        assert_eq!(request.query("resourceVersion"), Some("5"));
        request.refuse(code);
    }
    let request = lab.request().await;
    let health = lab.health();
    assert_eq!(
        (lab.rows(), health.is_connected, health.errors_total),
        (vec!["a=1".into(), "b=1".into()], false, 3)
    );
    assert_eq!(request.query("resourceVersion"), Some("5"));
    let events = request.stream();
    events.event("DELETED", &namespace("b", "30"));
    lab.wait_for(&["a=1"]).await;
    assert!(lab.health().is_connected);
}

#[tokio::test]
async fn a_server_that_is_back_is_found_by_one_watch_for_all() {
    let mut lab = Lab::start().await;
    lab.request().await.refuse(503);
    let first = lab.request().await;
    let other =
        Watch::<kinds::NetworkPolicy>::new(&lab.client, None, &lab.tables, &lab.health, &lab.answered);
    lab.tasks.push(tokio::spawn(other.run()));
    for _ in 0..5 {
        lab.any_request().await.refuse(503);
    }
    // It begins its fifth pause, of 1.6 s at least.
    sleep(Duration::from_millis(100)).await;
    let started = Instant::now();
    let _events = first.stream();
    let other = lab.any_request().await;
    assert!(other.path.ends_with("/networkpolicies"), "{}", other.path);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_server_that_forgot_is_listed_soon_however_long_it_was_away() {
    let (mut lab, events) = Lab::listed(&["a"]).await;
    drop(events);
    for _ in 0..4 {
        lab.request().await.refuse(503);
    }
    lab.request().await.refuse(410);
    let started = Instant::now();
    assert_eq!(lab.request().await.query("sendInitialEvents"), Some("true"));
    assert!(started.elapsed() < Duration::from_millis(700), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_version_that_is_refused_again_and_again_means_a_new_list() {
    let (mut lab, events) = Lab::listed(&["a"]).await;
    drop(events);
    for code in [400, 504, 400] {
        let request = lab.request().await;
        assert_eq!(request.query("resourceVersion"), Some("5"));
        request.refuse(code);
    }
    let request = lab.request().await;
    assert_eq!(request.query("sendInitialEvents"), Some("true"));
    assert_eq!(lab.rows(), ["a=1"]);
}

#[tokio::test]
async fn words_that_are_no_event_interrupt_and_change_nothing() {
    let (mut lab, events) = Lab::listed(&["a"]).await;
    events.line("<html>welcome to the proxy</html>");
    let request = lab.request().await;
    assert_eq!(request.query("resourceVersion"), Some("5"));
    let _events = request.stream();
    assert_eq!(lab.rows(), ["a=1"]);
}

#[tokio::test]
async fn a_stream_that_ends_at_once_is_asked_for_more_slowly() {
    let (mut lab, events) = Lab::listed(&["a"]).await;
    drop(events);
    let started = Instant::now();
    for _ in 0..4 {
        drop(lab.request().await.stream());
    }
    lab.request().await.refuse(500);
    assert!(started.elapsed() > Duration::from_millis(700), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_broken_object_costs_only_itself() {
    let (mut lab, events) = Lab::listed(&["a", "b"]).await;
    let broken = |version: &str| json!({"metadata": {"name": "a", "resourceVersion": version, "labels": 7}});
    events.event("MODIFIED", &broken("6"));
    events.event("MODIFIED", &namespace("b", "7"));
    lab.wait_for(&["a=", "b=7"]).await;
    let reports = lab.reports();
    assert!(
        reports[0].starts_with("metadata.labels: is a number, must be an object; closed: "),
        "{reports:?}"
    );
    // In a list too.
    events.event("ERROR", &status(410));
    let events = lab.request().await.stream();
    events.event("ADDED", &broken("6"));
    events.event("ADDED", &namespace("c", "8"));
    events.bookmark("9", true);
    lab.wait_for(&["a=", "c=8"]).await;
    events.event("MODIFIED", &namespace("a", "10"));
    lab.wait_for(&["a=10", "c=8"]).await;
    assert_eq!(lab.reports(), [""; 0]);
}
