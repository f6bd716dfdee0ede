//! What the programs report and count, and what garbage collection deletes.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::ProgramInput;
use tokio::sync::watch;
use weir::datapath::abi::{
    Addr, Address, CollectRequest, Connection, ConnectionKey, Nat, NatKey, Plain, addr_of,
};
use weir::datapath::{Bytes, Changes, Datapath, EventCounts, MetricRow, types};
use weir::flow::reader::{self, KernelEvents};
use weir::flow::{NameSource, NameTables, Names, Recorder, RecorderCounts};
use weir::model::{IdentityId, IdentityLabels, LocalIdentity};

use super::{private, small_maps};
use crate::lab::wait_for;
use crate::require::require_lab;

/// A frame to the endpoint with this id, which does not exist.
fn drop_a_frame(datapath: &Datapath, endpoint: u16) -> Result<()> {
    drop_frames(datapath, endpoint, 1)
}

fn drop_frames(datapath: &Datapath, endpoint: u16, repeat: u32) -> Result<()> {
    let [high, low] = endpoint.to_be_bytes();
    let mut frame = vec![0x02, 0x57, 0x65, 0x69, high, low, 2, 0, 0, 0, 0, 1, 0x08, 0x00];
    frame.extend([0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.resize(64, 0);
    let input = ProgramInput { data_in: Some(&frame), repeat, ..ProgramInput::default() };
    datapath.program("from_pod")?.test_run(input)?;
    Ok(())
}

#[test]
fn every_event_is_delivered_or_counted_as_lost() -> Result<()> {
    require_lab!();
    // The smallest ring that the kernel makes: 32 events with their headers fill most of it.
    let datapath = private(small_maps().with("events", 4096))?;
    let mut reader = datapath.events()?;
    assert_eq!(reader.consume(|_| {})?, 0, "nothing is there, and nobody waits");
    let mut delivered = Vec::new();
    for round in 0..7_u64 {
        for _ in 0..10 * round {
            drop_a_frame(&datapath, 77)?;
        }
        reader.consume(|event| delivered.push(*event))?;
    }
    let EventCounts { offered, lost, suppressed } = datapath.event_counts()?;
    assert_eq!(offered, 210);
    assert!(lost > 0, "the ring was never full");
    assert_eq!(delivered.len() as u64 + lost + suppressed, offered);
    assert_eq!((reader.malformed(), reader.backlog_bytes()), (0, 0));
    assert!(delivered.iter().all(|event| event.r#type == types::event_type::EVENT_DROP.0 as u8));
    assert!(delivered.is_sorted_by_key(|event| event.timestamp_ns));
    let reason = delivered.first().context("an event")?.reason;
    let metrics = datapath.metrics()?;
    let egress = types::direction::DIRECTION_EGRESS.0 as u8;
    assert_eq!(metrics, [MetricRow { reason, direction: egress, packets: 210, bytes: 210 * 64 }]);
    Ok(())
}

/// A node without pods.
struct Nobody;

impl NameSource for Nobody {
    fn tables(&self) -> NameTables {
        NameTables::default()
    }

    fn identity(&self, _: IdentityId) -> Option<Arc<IdentityLabels>> {
        None
    }

    fn local_identity(&self, _: IdentityId) -> Option<LocalIdentity> {
        None
    }

    fn rule_origin(&self, _: u32) -> Option<weir::model::Origins> {
        None
    }
}

#[test]
fn the_reader_accounts_for_a_flood_and_ends_when_told() -> Result<()> {
    require_lab!();
    // Room for 900 records of the 100,000.
    let datapath = Arc::new(private(small_maps().with("events", 128 * 1024))?);
    let recorder = Arc::new(Recorder::new(1000));
    let names = Arc::new(Names::new("node1", Arc::new(Nobody)));
    let (stop, stopping) = watch::channel(false);
    reader::start(KernelEvents::open(datapath.clone())?, recorder.clone(), names, stopping)?;
    for _ in 0..1000 {
        drop_frames(&datapath, 77, 100)?;
    }
    wait_for("every event to be seen or counted as lost", || {
        let counts = recorder.counts();
        Ok(counts.seen > 0 && counts.seen + counts.lost_in_kernel + counts.suppressed == 100_000)
    })?;
    let RecorderCounts { lost_in_kernel: lost, suppressed, .. } = recorder.counts();
    assert_eq!(datapath.event_counts()?, EventCounts { offered: 100_000, lost, suppressed });
    stop.send(true)?;
    wait_for("the reader to let go of the ring buffer", || Ok(Arc::strong_count(&datapath) == 1))?;
    // And nobody else reads in its place.
    let seen = recorder.counts().seen;
    drop_frames(&datapath, 77, 100)?;
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(recorder.counts().seen, seen);
    Ok(())
}

#[test]
fn collectors_say_when_they_cannot_read_the_keys() -> Result<()> {
    require_lab!();
    let datapath = private(small_maps())?;
    let connections = datapath.typed::<ConnectionKey, Connection>("connections")?;
    connections.insert(&ConnectionKey::default(), &Connection::default())?;
    for program in ["collect_connections", "collect_nat"] {
        // Nobody has memory there.
        let request = CollectRequest { keys: 8, count: 3, deleted: 0 };
        let mut context = request.as_bytes().to_vec();
        let input = ProgramInput { context_in: Some(&mut context), ..ProgramInput::default() };
        assert_eq!(datapath.program(program)?.test_run(input)?.return_value, 1, "{program}");
        assert_eq!(CollectRequest::from_bytes(&context).context("its answer")?.deleted, 0, "{program}");
    }
    assert_eq!(connections.rows()?.len(), 1);
    Ok(())
}

#[test]
fn garbage_collection_deletes_what_has_expired() -> Result<()> {
    require_lab!();
    let datapath = private(small_maps())?;
    let connections = datapath.typed::<ConnectionKey, Connection>("connections")?;
    let nat = datapath.typed::<NatKey, Nat>("nat")?;
    let key = |port: u16| ConnectionKey {
        addr: [addr_of([10, 0, 0, 1].into()), addr_of([10, 0, 0, 2].into())],
        port: [port.to_be(), 80_u16.to_be()],
        protocol: 6,
        ..ConnectionKey::default()
    };
    for port in 1..=2000 {
        // Even ports were last seen when the machine started, odd ones will be in 500 million years.
        let last_seen_jiffies = if port % 2 == 0 { 0 } else { u64::MAX / 2 };
        connections.insert(&key(port), &Connection { last_seen_jiffies, ..Connection::default() })?;
    }
    nat.insert(&NatKey { direction: 2, protocol: 6, ..NatKey::default() }, &Nat::default())?;
    let report = datapath.collect_garbage()?;
    assert_eq!((report.connections, report.nat), (1000, 1));
    let left = connections.rows()?;
    assert_eq!(left.len(), 1000);
    assert!(left.keys().all(|key| u16::from_be(key.0.port[0]) % 2 == 1));
    assert!(nat.rows()?.is_empty());
    let fill = datapath.map_fill()?;
    let connections = fill.iter().find(|fill| fill.map == "connections").context("a row of connections")?;
    assert_eq!((connections.used, connections.capacity), (1000, 4096));
    Ok(())
}

#[test]
fn walking_a_map_misses_nothing_and_sync_writes_the_difference() -> Result<()> {
    require_lab!();
    let datapath = private(small_maps())?;
    let addresses = datapath.typed::<Addr, Address>("addresses")?;
    for number in 0..50_000_u32 {
        addresses.insert(&addr_of(std::net::Ipv4Addr::from(number).into()), &Default::default())?;
    }
    let mut rows = addresses.rows()?;
    assert_eq!(rows.len(), 50_000);
    // A sync of the same rows less one, with one changed and one added.
    rows.pop_first();
    rows.values_mut().for_each(|row| row.identity = 0);
    if let Some(mut first) = rows.first_entry() {
        first.get_mut().identity = 7;
    }
    rows.insert(Bytes(addr_of([192, 0, 2, 1].into())), Address::default());
    assert_eq!(addresses.sync(&rows)?, Changes { written: 2, deleted: 1 });
    assert_eq!(addresses.sync(&rows)?, Changes::default());
    Ok(())
}
