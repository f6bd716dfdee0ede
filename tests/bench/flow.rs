//! What flows cost: keeping, naming, filtering and counting them, and whether every record is accounted for.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use weir::flow::{Event, NameSource, NameTables, Names, Recorder};
use weir::hubble::convert::Converter;
use weir::hubble::metrics::{Context as Labels, FlowMetrics};
use weir::hubble::proto::flow::FlowFilter;
use weir::hubble::proto::observer::GetFlowsRequest;
use weir::hubble::proto::observer::get_flows_response::ResponseTypes;
use weir::hubble::stream::{FlowStream, Source};
use weir::model::{
    IdentityId, IdentityLabels, LocalIdentity, NodeEndpoints, ObjectKey, Origins, PolicyRef,
    PublishedEndpoint,
};

use crate::lab::{Lab, Setup};
use crate::row::Row;

/// Records of one measurement.
const RECORDS: u32 = 200_000;
/// Pods that the records are of.
const PODS: u32 = 250;

const SECTIONS: [crate::Section; 5] = [
    ("records", "flow/records", records),
    ("kernel", "flow/conservation", crate::flow_kernel::rows),
    ("paths", "flow/tcp_rr/on_vs_off", crate::datapath::flows_on_and_off),
    ("agent", "flow/agent/resident", resident),
    ("page", "flow/page", crate::flow_page::rows),
];

/// The rows of the suite, or of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::load::pin()?;
    crate::measure_sections("flow", &SECTIONS)
}

/// The memory of an agent without pods that serves all of it.
fn resident() -> Result<Vec<Row>> {
    let directory = tempfile::tempdir()?;
    let exporters = directory.path().join("exporters.yaml");
    let out = directory.path().join("flows.json");
    std::fs::write(&exporters, format!("exporters:\n- {{name: file, file: {{path: {}}}}}\n", out.display()))?;
    let all = [
        "--hubble-listen",
        "[::]:4244",
        "--hubble-plain-text",
        "true",
        "--hubble-page-address",
        "127.0.0.1:4246",
        "--flow-history-disk",
        "64MiB",
        "--hubble-exporters",
        &exporters.display().to_string(),
    ];
    let agent_arguments = all.map(str::to_owned).into();
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    // What a start took and gives back is gone by then.
    std::thread::sleep(std::time::Duration::from_secs(20));
    let pid = lab.node(1).agent_pid().context("the agent runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: f64 = resident.trim().trim_end_matches(" kB").parse()?;
    Ok(vec![Row::new("flow/agent/resident", "MiB", kib / 1024.0).at_most(40.0)])
}

/// What a record costs behind the kernel.
fn records() -> Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    let recorder = Arc::new(Recorder::new(RECORDS as usize));
    recorder.append(&(0..RECORDS).map(event).collect::<Vec<_>>());
    let source = source(recorder);
    let everything = GetFlowsRequest { number: u64::MAX, ..GetFlowsRequest::default() };
    let narrow = GetFlowsRequest {
        whitelist: vec![FlowFilter { source_port: vec!["7".to_owned()], ..FlowFilter::default() }],
        ..everything.clone()
    };
    let all = median(|| runtime.block_on(seconds(&source, &everything)))?;
    let few = median(|| runtime.block_on(seconds(&source, &narrow)))?;
    let metrics = FlowMetrics::new(Labels::None);
    let counting = median(|| {
        let start = Instant::now();
        (0..RECORDS).for_each(|number| metrics.count(&event(number), &source.names));
        Ok(start.elapsed().as_secs_f64())
    })?;
    let each = |seconds: f64| seconds / f64::from(RECORDS);
    Ok(vec![
        Row::new("flow/bytes_per_record", "bytes", size_of::<Event>() as f64).at_most(128.0),
        Row::new("flow/decoded_and_named", "flows/s", f64::from(RECORDS) / all).at_least(200_000.0),
        Row::new("flow/narrow_filter", "records/s", 1.0 / each(few)),
        Row::new("flow/counted", "records/s", 1.0 / each(counting)),
        Row::new("flow/follower_behind/not_accounted_for", "records", runtime.block_on(not_accounted_for())?)
            .at_most(0.0),
    ])
}

/// How long a request takes.
async fn seconds(source: &Source, request: &GetFlowsRequest) -> Result<f64> {
    let start = Instant::now();
    let mut stream = FlowStream::new(source.clone(), request.clone())?;
    while stream.next().await.is_some() {}
    Ok(start.elapsed().as_secs_f64())
}

/// A follower behind a writer that is much too fast: offered, less delivered, less told as lost.
async fn not_accounted_for() -> Result<f64> {
    let source = source(Arc::new(Recorder::new(16_384)));
    let mut stream =
        FlowStream::new(source.clone(), GetFlowsRequest { follow: true, ..GetFlowsRequest::default() })?;
    let recorder = source.recorder.clone();
    let offered = 10 * u64::from(RECORDS);
    let writing = std::thread::spawn(move || {
        for round in 0..10 * RECORDS / 1000 {
            recorder.append(&(0..1000).map(|number| event(round * 1000 + number)).collect::<Vec<_>>());
        }
    });
    let mut accounted = 0;
    let start = Instant::now();
    while accounted < offered && start.elapsed().as_secs() < 60 {
        for answer in stream.next().await.context("a follower does not end")? {
            accounted += match answer.response_types {
                Some(ResponseTypes::Flow(_)) => 1,
                Some(ResponseTypes::LostEvents(lost)) => lost.num_events_lost,
                _ => 0,
            };
        }
    }
    writing.join().ok().context("the writer panicked")?;
    Ok((offered as f64 - accounted as f64).abs())
}

fn median(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut values = (0..5).map(|_| measure()).collect::<Result<Vec<_>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[2])
}

/// A connection between two of the pods.
fn event(number: u32) -> Event {
    let pod = |number: u32| weir::datapath::abi::addr_of([10, 0, 0, (number % PODS) as u8].into());
    Event {
        timestamp_ns: weir::flow::monotonic_ns(),
        packets: [10, 10],
        bytes: [1000, 9000],
        source: pod(number),
        destination: pod(number / 7 + 1),
        source_identity: 256 + number % PODS,
        destination_identity: 256 + (number / 7 + 1) % PODS,
        rule_id: 1,
        source_port: ((number % 60_000) as u16).to_be(),
        destination_port: 8080_u16.to_be(),
        protocol: 6,
        r#type: 1 + (number % 3) as u8,
        direction: 1,
        tcp_flags: 0x12,
        ..Event::default()
    }
}

/// Records with the names of a cluster.
pub fn source(recorder: Arc<Recorder>) -> Source {
    let names = Names::new("bench", Arc::new(Cluster));
    names.refresh();
    Source {
        recorder,
        names: Arc::new(names),
        converter: Arc::new(Converter::new("default", "bench", Vec::new(), true)),
        history: None,
    }
}

struct Cluster;

impl NameSource for Cluster {
    fn tables(&self) -> NameTables {
        let pod = |number: u32| PublishedEndpoint {
            host_ports: Vec::new(),
            pod: ObjectKey::new("shop", format!("pod-{number}")),
            addresses: vec![[10, 0, 0, number as u8].into()],
            identity: IdentityId(256 + number),
            workload: None,
        };
        let node = NodeEndpoints {
            node: "bench".to_owned(),
            internal_addresses: Vec::new(),
            endpoints: (0..PODS).map(pod).collect(),
        };
        NameTables {
            node_endpoints: [(Arc::from("bench"), Arc::new(node))].into_iter().collect(),
            ..NameTables::default()
        }
    }

    fn identity(&self, id: IdentityId) -> Option<Arc<IdentityLabels>> {
        Some(Arc::new(IdentityLabels {
            namespace: "shop".into(),
            service_account: "default".into(),
            pod_labels: [("app".to_owned(), id.to_string())].into(),
            ..IdentityLabels::default()
        }))
    }

    fn local_identity(&self, _: IdentityId) -> Option<LocalIdentity> {
        None
    }

    fn rule_origin(&self, _: u32) -> Option<Origins> {
        Some(Arc::from([PolicyRef::network_policy(&ObjectKey::new("shop", "all"))]))
    }
}
