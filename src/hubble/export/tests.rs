//! Exporters against a real file system and a real receiver of OTLP.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::settings::{FileSettings, OtlpSettings, read};
use super::*;
use crate::flow::tests::{names, record, recorded, request};
use crate::flow::{Event, Recorder};
use crate::hubble::json;
use crate::hubble::proto::flow::{FlowFilter, Verdict};
use crate::hubble::proto::otlp::any_value::Value as Any;
use crate::hubble::proto::otlp::logs_service_server::{LogsService, LogsServiceServer};
use crate::hubble::proto::otlp::{
    ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse, LogRecord,
};
use crate::hubble::tests::converter;

fn source(recorder: &Arc<Recorder>) -> Source {
    Source {
        recorder: recorder.clone(),
        names: Arc::new(names()),
        converter: Arc::new(converter()),
        history: None,
    }
}

fn exporter(target: Target) -> Exporter {
    let (allow, deny, fields) = (Vec::new(), Vec::new(), Vec::new());
    Exporter { name: "test".to_owned(), allow, deny, fields, target }
}

/// Starts an exporter, and waits until it follows.
async fn started(exporter: Exporter, recorder: &Arc<Recorder>, counts: &Counts) -> JoinHandle<()> {
    let exporting = tokio::spawn(export(exporter, source(recorder), counts.clone()));
    // The first turn of the task subscribes and asks for what comes.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    exporting
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("{what}"));
}

fn lines(path: &Path) -> Vec<GetFlowsResponse> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| json::from_str(line).expect("a line is a flow")).collect()
}

#[tokio::test]
async fn a_file_is_turned_over_and_no_line_is_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("flows/all.jsonl");
    let settings = FileSettings { path: path.clone(), bytes_max: 1_500_000, files_max: 2 };
    let recorder = recorded(65_536, 0..0);
    let counts = Counts::default();
    let exporting = started(exporter(Target::File(settings)), &recorder, &counts).await;
    for round in 0..4_u16 {
        record(&recorder, round * 500..(round + 1) * 500);
        let written = u64::from(round + 1) * 500;
        until("all are written", || counts.of("test", "written") == written).await;
    }
    exporting.abort();
    let numbered = |number: u32| directory.path().join(format!("flows/all.jsonl.{number}"));
    let all: Vec<_> = [numbered(2), numbered(1), path.clone()].iter().flat_map(|path| lines(path)).collect();
    let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    assert!(size(&numbered(1)) > 0, "it was turned over");
    assert!(!numbered(3).exists(), "and no more files are kept than asked for");
    assert!(size(&path) <= 1_500_000 && size(&numbered(1)) <= 1_500_000);
    let port = |answer: &GetFlowsResponse| {
        json::to_value(answer)["flow"]["l4"]["TCP"]["source_port"].as_u64().unwrap_or(0)
    };
    let ports: Vec<u64> = all.iter().map(port).collect();
    let newest = *ports.last().expect("flows");
    assert_eq!(newest, 1999);
    let first = newest + 1 - ports.len() as u64;
    assert_eq!(ports, (first..2000).collect::<Vec<_>>(), "in order, each once");
    assert_eq!((counts.of("test", "missed"), counts.of("test", "failed")), (0, 0));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn filters_and_fields_say_what_is_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("drops.jsonl");
    let settings = FileSettings { path: path.clone(), bytes_max: 1_000_000, files_max: 0 };
    let recorder = recorded(1024, 0..0);
    let counts = Counts::default();
    let wanted = Exporter {
        allow: vec![FlowFilter { verdict: vec![Verdict::Dropped.into()], ..FlowFilter::default() }],
        deny: vec![FlowFilter { source_port: vec!["7".to_owned()], ..FlowFilter::default() }],
        fields: vec!["verdict".to_owned(), "destination.pod_name".to_owned()],
        ..exporter(Target::File(settings))
    };
    let exporting = started(wanted, &recorder, &counts).await;
    record(&recorder, 0..100);
    let dropped = crate::flow::tests::dropped();
    recorder.append(&[Event { source_port: 7_u16.to_be(), ..dropped }, dropped]);
    until("the drop is written", || counts.of("test", "written") == 1).await;
    exporting.abort();
    let flow = json::to_value(&lines(&path)[0])["flow"].clone();
    let expected = serde_json::json!({ "verdict": "DROPPED", "destination": { "pod_name": "backend-1" } });
    assert_eq!(flow, expected);
}

#[tokio::test]
async fn what_cannot_be_written_is_counted() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("taken");
    fs::create_dir(&path).expect("the test's own");
    let settings = FileSettings { path: path.clone(), bytes_max: 1_000_000, files_max: 0 };
    let recorder = recorded(1024, 0..0);
    let counts = Counts::default();
    let exporting = started(exporter(Target::File(settings)), &recorder, &counts).await;
    record(&recorder, 0..10);
    until("they failed", || counts.of("test", "failed") == 10).await;
    fs::remove_dir(&path).expect("the test's own");
    record(&recorder, 10..13);
    until("and go on", || counts.of("test", "written") == 3).await;
    exporting.abort();
    assert_eq!(lines(&path).len(), 3);
}

/// A collector that is away at first and then rejects one record of each batch.
#[derive(Clone, Default)]
struct Collector {
    received: Arc<Mutex<Vec<ExportLogsServiceRequest>>>,
    refusals: Arc<Mutex<Vec<Status>>>,
    rejected: i64,
}

#[tonic::async_trait]
impl LogsService for Collector {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        if let Some(refusal) = self.refusals.lock().expect("the test's own").pop() {
            return Err(refusal);
        }
        self.received.lock().expect("the test's own").push(request.into_inner());
        let partial_success = ExportLogsPartialSuccess {
            rejected_log_records: self.rejected,
            error_message: "full".to_owned(),
        };
        Ok(Response::new(ExportLogsServiceResponse { partial_success: Some(partial_success) }))
    }
}

impl Collector {
    async fn serve(&self) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let service = LogsServiceServer::new(self.clone());
        let serving = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let _ = Server::builder().add_service(service).serve_with_incoming(incoming).await;
        });
        (address, serving)
    }

    fn records(&self) -> Vec<LogRecord> {
        let received = self.received.lock().expect("the test's own");
        let scopes = received.iter().flat_map(|request| &request.resource_logs);
        scopes.flat_map(|logs| &logs.scope_logs).flat_map(|scope| scope.log_records.clone()).collect()
    }
}

fn text(record: &LogRecord, key: &str) -> Option<String> {
    let pair = record.attributes.iter().find(|pair| pair.key == key)?;
    match pair.value.clone()?.value? {
        Any::StringValue(text) => Some(text),
        Any::IntValue(number) => Some(number.to_string()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_collector_of_opentelemetry_gets_flows_as_logs() {
    let refusals = vec![Status::unavailable("starting"), Status::resource_exhausted("busy")];
    let collector = Collector { refusals: Arc::new(Mutex::new(refusals)), ..Collector::default() };
    let (address, serving) = collector.serve().await;
    let settings = OtlpSettings { endpoint: address.to_string(), tls_dir: None, server_name: None };
    let recorder = recorded(1024, 0..0);
    let counts = Counts::default();
    let exporting = started(exporter(Target::Otlp(settings)), &recorder, &counts).await;
    recorder.append(&[crate::flow::tests::dropped()]);
    recorder.append_requests(vec![request("/pay")]);
    until("both were taken, after two refusals", || counts.of("test", "written") == 2).await;
    exporting.abort();
    serving.abort();
    let records = collector.records();
    let [dropped, asked] = &records[..] else { panic!("{records:?}") };
    assert_eq!((dropped.severity_text.as_str(), dropped.time_unix_nano > 0), ("WARN", true));
    assert_eq!(text(dropped, "weir.drop_reason").as_deref(), Some("POLICY_DENIED"));
    assert_eq!(text(dropped, "destination.port").as_deref(), Some("8080"));
    assert_eq!(text(asked, "url.full").as_deref(), Some("http://backend/pay"));
    assert_eq!(text(asked, "weir.source.pod").as_deref(), Some("frontend-1"));
    assert_eq!(
        asked.trace_id,
        u128::from_str_radix("4bf92f3577b34da6a3ce929d0e0e4736", 16).expect("hex").to_be_bytes()
    );
    assert!(matches!(asked.body.as_ref().and_then(|body| body.value.as_ref()), Some(Any::KvlistValue(_))));
    let resource = collector.received.lock().expect("the test's own")[0].resource_logs[0].resource.clone();
    let resource = resource.expect("who sends it").attributes;
    assert!(resource.iter().any(|pair| pair.key == "k8s.node.name"), "{resource:?}");
}

#[tokio::test]
async fn every_flow_for_a_collector_is_written_failed_or_missed() {
    let refusals = vec![Status::invalid_argument("never")];
    let collector =
        Collector { refusals: Arc::new(Mutex::new(refusals)), rejected: 1, ..Collector::default() };
    let (address, serving) = collector.serve().await;
    let settings = OtlpSettings { endpoint: address.to_string(), tls_dir: None, server_name: None };
    // A history so small that the exporter must miss some.
    let recorder = recorded(600, 0..0);
    let counts = Counts::default();
    let exporting = started(exporter(Target::Otlp(settings)), &recorder, &counts).await;
    for round in 0..5_u16 {
        record(&recorder, round * 1000..(round + 1) * 1000);
        tokio::task::yield_now().await;
    }
    let all = ["written", "failed", "missed"];
    until("every flow is accounted for", || {
        all.iter().map(|outcome| counts.of("test", outcome)).sum::<u64>() == 5000
    })
    .await;
    exporting.abort();
    serving.abort();
    let [written, failed, missed] = all.map(|outcome| counts.of("test", outcome));
    let batches = collector.received.lock().expect("the test's own").len() as u64;
    assert_eq!(written + batches, collector.records().len() as u64, "one of each batch was rejected");
    assert!(failed > batches && missed > 0, "written {written}, failed {failed}, missed {missed}");
}

#[test]
fn settings_are_read_or_refused_whole() {
    let good = "
exporters:
- name: drops
  file: {path: /var/lib/weir/flows/drops.jsonl, maxSizeMB: 50, maxFiles: 3}
  allow:
  - verdict: [DROPPED]
  - '{\"verdict\":[\"ERROR\"]}'
  deny:
  - {source_pod: [kube-system/]}
  fields: [time, source.pod_name]
- name: collector
  otlp: {endpoint: 'otel-collector.monitoring:4317'}
";
    let exporters = read(good).expect("good settings");
    assert_eq!(exporters.len(), 2);
    assert_eq!((exporters[0].allow.len(), exporters[0].deny.len()), (2, 1));
    for bad in [
        "exporters: [{name: a}]",
        "exporters: [{name: a, file: {path: relative}}]",
        "exporters: [{name: a, file: {path: /a}, otlp: {endpoint: 'a:1'}}]",
        "exporters: [{name: A, file: {path: /a}}]",
        "exporters: [{name: a, file: {path: /a}}, {name: a, file: {path: /b}}]",
        "exporters: [{name: a, file: {path: /a}}, {name: b, file: {path: /a}}]",
        "exporters: [{name: a, file: {path: /a}, allow: [{colour: [red]}]}]",
        "exporters: [{name: a, file: {path: /a}, fields: [colour]}]",
        "exporters: [{name: a, file: {path: /a, maxSizeMB: 0}}]",
        "exporters: [{name: a, otlp: {endpoint: nowhere}}]",
        "exporters: [{name: a, colour: red, file: {path: /a}}]",
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
}
