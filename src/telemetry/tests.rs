//! What monitoring reads, as whole texts.

mod dashboards;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::datapath::{MapFill, MetricRow, NatSearches, UsageKind};

struct Counters;

impl KernelCounters for Counters {
    fn packets(&self) -> Result<Vec<MetricRow>> {
        let row = |reason, direction, packets| MetricRow { reason, direction, packets, bytes: packets * 100 };
        Ok(vec![row(0, 1, 7), row(0, 2, 8), row(133, 1, 2)])
    }

    fn maps(&self) -> Result<Vec<MapFill>> {
        Ok(vec![MapFill { map: "connections".into(), used: 3, capacity: 262_144 }])
    }

    fn nat_searches(&self) -> Result<Vec<NatSearches>> {
        let row = |most_tries, searches, tries| NatSearches { most_tries, searches, tries };
        Ok(vec![row(Some(1), 7, 7), row(Some(2), 3, 6), row(None, 1, 512)])
    }

    fn refused(&self) -> Result<Vec<(UsageKind, u64)>> {
        Ok(UsageKind::ALL.into_iter().zip([3, 0, 1]).collect())
    }
}

fn telemetry() -> Arc<Telemetry> {
    let telemetry = Telemetry::new();
    telemetry.show_kernel(Arc::new(Counters));
    telemetry.show_flows(Arc::new(Recorder::new(16)));
    telemetry.show_objects(|| ObjectCounts {
        endpoints: 2,
        endpoints_enforced: 1,
        ..ObjectCounts::default()
    });
    telemetry.show_watches(|| {
        vec![WatchHealth {
            kind: "Pod".into(),
            is_synced: true,
            is_connected: false,
            last_event: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            errors_total: 4,
        }]
    });
    telemetry.round_done(Duration::from_millis(1), Duration::from_millis(2));
    telemetry.cni_request("ADD", 0, Duration::from_millis(30));
    telemetry.cni_request("ADD", 11, Duration::from_millis(30));
    Arc::new(telemetry)
}

#[test]
fn metrics_are_classic_text() {
    let text = http::classic(&telemetry().open_metrics().expect("text"));
    let lines: Vec<_> = text.lines().collect();
    for line in [
        "# TYPE weir_build_info gauge",
        "weir_build_info{version=\"0.1.0\"} 1",
        "# HELP weir_forwarded_packets_total Packets delivered",
        "# TYPE weir_forwarded_packets_total counter",
        "weir_forwarded_packets_total{direction=\"EGRESS\"} 8",
        "weir_forwarded_bytes_total{direction=\"INGRESS\"} 700",
        "weir_dropped_packets_total{reason=\"POLICY_DENIED\",direction=\"INGRESS\"} 2",
        "weir_dropped_bytes_total{reason=\"POLICY_DENIED\",direction=\"INGRESS\"} 200",
        "weir_map_entries{map=\"connections\"} 3.0",
        "weir_map_max_entries{map=\"connections\"} 262144.0",
        "weir_endpoint_quota_exceeded_total{kind=\"connections\"} 3",
        "weir_nat_port_tries_sum 525.0",
        "weir_nat_port_tries_count 11",
        "weir_nat_port_tries_bucket{le=\"1.0\"} 7",
        "weir_nat_port_tries_bucket{le=\"2.0\"} 10",
        "weir_nat_port_tries_bucket{le=\"+Inf\"} 11",
        "weir_flow_events_lost_total{where=\"quota\"} 0",
        "weir_endpoints 2.0",
        "weir_endpoints_enforced 1.0",
        "weir_flow_events_seen_total 0",
        "weir_flow_events_lost_total{where=\"kernel\"} 0",
        "weir_watch_synced{kind=\"Pod\"} 1.0",
        "weir_watch_connected{kind=\"Pod\"} 0.0",
        "weir_watch_errors_total{kind=\"Pod\"} 4",
        "weir_watch_last_event_timestamp_seconds{kind=\"Pod\"} 1700000000.0",
        "weir_policy_computations_total 1",
        "weir_policy_computation_duration_seconds_count 1",
        "weir_cni_requests_total{command=\"ADD\",code=\"11\"} 1",
        "weir_cni_request_duration_seconds_count{command=\"ADD\"} 2",
    ] {
        assert!(lines.contains(&line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("EOF") && !text.contains("UNIT"));
    assert!(lines.iter().any(|line| line.starts_with("process_resident_memory_bytes ")));
}

/// What Prometheus' own linter says, where it is installed.
#[test]
fn promtool_has_nothing_to_say() {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("SKIPPED promtool_has_nothing_to_say: promtool is not installed");
        return;
    };
    let text = http::classic(&telemetry().open_metrics().expect("text"));
    promtool.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
    let output = promtool.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn get(address: std::net::SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: weir\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.split(' ').nth(1).expect("a status").parse().expect("a number"), body.to_owned())
}

#[tokio::test]
async fn ready_when_every_task_is_done() {
    let telemetry = telemetry();
    let (stop, stopped) = watch::channel(false);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = tokio::spawn(serve_on(listener, telemetry.clone(), stopped));

    assert_eq!(get(address, "/readyz").await, (200, "ok\n".to_owned()));
    let first = telemetry.ready().register("the sources");
    let second = telemetry.ready().register("the first round");
    let expected = "waiting for: the sources, the first round\n".to_owned();
    assert_eq!(get(address, "/readyz").await, (503, expected));
    drop(first);
    assert_eq!(get(address, "/readyz").await, (503, "waiting for: the first round\n".to_owned()));
    drop(second);
    telemetry.ready().wait().await;
    assert_eq!(get(address, "/readyz").await, (200, "ok\n".to_owned()));

    assert_eq!(get(address, "/healthz").await, (200, "ok\n".to_owned()));
    assert!(get(address, "/metrics").await.1.contains("weir_build_info"));
    assert_eq!(get(address, "/nothing").await.0, 404);
    stop.send(true).expect("the server listens for it");
    server.await.expect("no panic").expect("no error");
}
