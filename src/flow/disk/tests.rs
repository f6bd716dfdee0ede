//! What is on disk, read back.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::flow::tests::{record, recorded, request};
use crate::model::l7;

fn ports(recorder: &Recorder) -> Vec<u16> {
    let mut records = Vec::new();
    recorder.copy(0, usize::MAX, &mut records);
    let port = |record: &Record| record.event().map(|event| u16::from_be(event.source_port));
    records.iter().filter_map(port).collect()
}

fn restored(directory: &Path, boot: &str) -> Vec<u16> {
    let recorder = Recorder::new(65_536);
    let segments = Segments::of_boot(directory, 1 << 20, boot).expect("segments");
    segments.restore(&recorder).expect("readable");
    ports(&recorder)
}

#[test]
fn segments_are_bounded_and_read_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let size = |path: &Path| -> u64 {
        let files = fs::read_dir(path).expect("the test's own");
        files.map(|file| file.expect("an entry").metadata().expect("there").len()).sum()
    };
    let packets = |ports: std::ops::Range<u16>| -> Vec<Record> {
        let recorder = recorded(1024, ports);
        let mut records = Vec::new();
        recorder.copy(0, 1024, &mut records);
        records
    };
    // Of 16 KiB each: 127 records.
    let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
    for round in 0..20_u16 {
        segments.write(&packets(round * 100..(round + 1) * 100)).expect("room");
    }
    assert!(size(directory.path()) <= 128 * 1024, "{}", size(directory.path()));
    let back = restored(directory.path(), "one");
    assert_eq!(back.last(), Some(&1999));
    assert!(back.len() > 800 && back.windows(2).all(|two| two[0] + 1 == two[1]), "{}", back.len());
    // A smaller memory gets the newest.
    let small = Recorder::new(150);
    segments.restore(&small).expect("readable");
    assert_eq!(ports(&small), (1850..2000).collect::<Vec<_>>());
    // One write that is larger than a segment keeps the bound, too.
    segments.write(&packets(2000..3000)).expect("room");
    assert!(size(directory.path()) <= 128 * 1024, "{}", size(directory.path()));
    assert_eq!(restored(directory.path(), "one").last(), Some(&2999));
    // The next agent goes on behind; a record that was cut off is left out.
    drop(segments);
    let newest = numbers(directory.path()).expect("listed").pop().expect("there is one");
    let newest = path(directory.path(), newest);
    let mut cut = fs::OpenOptions::new().append(true).open(newest).expect("there");
    cut.write_all(&[7; 50]).expect("room");
    let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
    segments.write(&packets(3000..3001)).expect("room");
    assert_eq!(restored(directory.path(), "one").last(), Some(&3000));
    // After the machine has started again its clock is another.
    assert!(restored(directory.path(), "two").is_empty());
    assert_eq!(size(directory.path()), 0);
}

/// A view has what memory has no more, exactly: with gaps on either side, after a restart, while segments go.
#[test]
fn a_view_ends_where_memory_begins() {
    let directory = tempfile::tempdir().expect("a directory");
    let recorder = recorded(150, 0..0);
    let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
    let history = segments.history();
    assert!(history.before(&recorder).expect("readable").0.is_empty());
    for round in 0..12_u16 {
        record(&recorder, round * 50..(round + 1) * 50);
        let mut records = Vec::new();
        recorder.copy(recorder.range().end - 50, 50, &mut records);
        segments.write(&records).expect("room");
    }
    let ports_of = |records: &[Record]| {
        let events = records.iter().filter_map(Record::event);
        events.map(|event| u16::from_be(event.source_port)).collect::<Vec<_>>()
    };
    let (view, _) = history.before(&recorder).expect("readable");
    assert_eq!(ports_of(&view.read(0, 1000).expect("readable")), (0..450).collect::<Vec<_>>());
    assert_eq!(ports_of(&view.read(120, 10).expect("readable")), (120..130).collect::<Vec<_>>());
    assert!(view.read(450, 10).expect("readable").is_empty());
    // What is removed meanwhile can still be read.
    for number in numbers(directory.path()).expect("listed") {
        fs::remove_file(path(directory.path(), number)).expect("there");
        fs::remove_file(requests::path(directory.path(), number)).expect("there");
    }
    assert_eq!(view.read(0, 1000).expect("readable").len(), 450);
    assert!(history.before(&recorder).expect("readable").0.is_empty());
}

#[test]
fn a_place_is_found_by_its_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut segments = Segments::of_boot(directory.path(), 128 * 1024, "one").expect("segments");
    let second = |number: u64| Event { timestamp_ns: number * 2_000_000_000, ..Event::default() };
    let records: Vec<Record> = (0..300).map(|number| Record::Packet(second(number))).collect();
    segments.write(&records).expect("room");
    let view = segments.history().before(&Recorder::new(16)).expect("readable").0;
    for (time, place) in [(0, 0), (1, 0), (100 * 2_000_000_000, 100), (u64::MAX, 300)] {
        assert_eq!(view.place_of(time).expect("readable"), place, "{time}");
    }
}

#[tokio::test]
async fn what_is_recorded_is_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let recorder = recorded(1024, 0..10);
    let segments = Segments::of_boot(directory.path(), 1 << 20, "one").expect("segments");
    let keeping = tokio::spawn(keep(segments, recorder.clone()));
    tokio::task::yield_now().await;
    record(&recorder, 10..15);
    while restored(directory.path(), "one").len() < 5 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    keeping.abort();
    assert_eq!(restored(directory.path(), "one"), (10..15).collect::<Vec<_>>());
}

/// What was asked for by the requests among the records; `None` where nothing is known of one.
fn paths(records: &[Record]) -> Vec<Option<String>> {
    let path = |record: &Record| match record {
        Record::Request(_, request) => match &request.message {
            l7::L7Message::Http(http) => Some(Some(http.path.clone())),
            other => panic!("{other:?}"),
        },
        Record::Forgotten => Some(None),
        Record::Packet(_) | Record::Lost(_) => None,
    };
    records.iter().filter_map(path).collect()
}

/// At the time of the packets, by a port of its own.
fn asked(number: u16) -> l7::Record {
    let packet = recorded(1, 0..1);
    let mut records = Vec::new();
    packet.copy(0, 1, &mut records);
    let time = records[0].event().expect("a packet").timestamp_ns;
    let client = std::net::SocketAddr::from(([10, 0, 0, 3], 1000 + number));
    l7::Record { time: crate::flow::Clock::now().wall(time), client, ..request(&format!("/{number}")) }
}

/// Requests are kept with the packets between them, in the same bound, and are there after a restart.
#[test]
fn requests_are_kept_as_packets_are() {
    let directory = tempfile::tempdir().expect("a directory");
    let recorder = recorded(64, 0..0);
    let mut segments = Segments::of_boot(directory.path(), 512 * 1024, "one").expect("segments");
    let history = segments.history();
    let names = |range: std::ops::Range<u16>| range.map(|it| Some(format!("/{it}"))).collect::<Vec<_>>();
    for number in 0..100 {
        recorder.append_requests(vec![asked(number)]);
        record(&recorder, number..number + 1);
        let mut records = Vec::new();
        recorder.copy(recorder.range().end - 2, 2, &mut records);
        segments.write(&records).expect("room");
    }
    // Memory has room for few of the requests; the view has all that memory does not know.
    let (view, cursor) = history.before(&recorder).expect("readable");
    let on_disk = view.read(0, 1000).expect("readable");
    let mut in_memory = Vec::new();
    recorder.copy(cursor.place(), 1000, &mut in_memory);
    let mut all = paths(&on_disk);
    all.extend(paths(&in_memory));
    assert_eq!(all, names(0..100));
    assert_eq!(on_disk.len() + in_memory.len(), 200, "nothing twice, packets neither");
    assert!(paths(&on_disk).iter().all(Option::is_some), "the disk has all of them");
    // The next agent has them, in order with the packets.
    let next = Recorder::new(4096);
    drop(segments);
    let segments = Segments::of_boot(directory.path(), 512 * 1024, "one").expect("segments");
    assert_eq!(segments.restore(&next).expect("readable"), 200);
    let mut records = Vec::new();
    next.copy(0, 1000, &mut records);
    assert_eq!(paths(&records), names(0..100));
    let is_request = |record: &Record| matches!(record, Record::Request(..));
    assert!(records.chunks(2).all(|pair| is_request(&pair[0]) && !is_request(&pair[1])));
    assert!(history.before(&next).expect("readable").0.is_empty(), "memory has all of it");
    // A request that memory forgot before it was written is missing, and that is said.
    let mut segments = Segments::of_boot(directory.path(), 512 * 1024, "two").expect("segments");
    segments.write(&[records[1].clone(), Record::Forgotten, records[0].clone()]).expect("room");
    let view = segments.history().before(&Recorder::new(16)).expect("readable").0;
    assert_eq!(paths(&view.read(0, 10).expect("readable")), [None, Some("/0".to_owned())]);
}

#[test]
fn requests_have_the_same_bound_and_what_is_cut_off_is_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut segments = Segments::of_boot(directory.path(), 256 * 1024, "one").expect("segments");
    let long = "x".repeat(900);
    for round in 0..20 {
        let recorder = recorded(64, 0..0);
        let requests = (0..40).map(|number| request(&format!("/{round}/{number}/{long}")));
        // One by one: memory has room for few of this size.
        for one in requests {
            recorder.append_requests(vec![one]);
            let mut records = Vec::new();
            recorder.copy(recorder.range().end - 1, 1, &mut records);
            segments.write(&records).expect("room");
        }
    }
    let files = fs::read_dir(directory.path()).expect("the test's own");
    let size: u64 = files.map(|file| file.expect("an entry").metadata().expect("there").len()).sum();
    assert!(size <= 256 * 1024, "{size}");
    let view = segments.history().before(&Recorder::new(16)).expect("readable").0;
    let kept = paths(&view.read(0, usize::MAX).expect("readable"));
    assert!(kept.len() > 100 && kept.iter().all(Option::is_some), "{}", kept.len());
    assert_eq!(kept.last(), Some(&Some(format!("/19/39/{long}"))));
    // Half of a text, or none, is nothing.
    let newest = numbers(directory.path()).expect("listed").pop().expect("there is one");
    let texts = requests::path(directory.path(), newest);
    let file = File::options().write(true).open(&texts).expect("there");
    let length = file.metadata().expect("there").len();
    file.set_len(length - 10).expect("the test's own");
    assert_eq!(paths(&view.read(0, usize::MAX).expect("readable")).last(), Some(&None));
    fs::remove_file(&texts).expect("there");
    let view = segments.history().before(&Recorder::new(16)).expect("readable").0;
    assert_eq!(paths(&view.read(0, usize::MAX).expect("readable")).last(), Some(&None));
}
