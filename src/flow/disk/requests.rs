//! What requests say, on disk: JSON, one behind the other, and events that say where each is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::recorder::REQUEST;
use super::{Event, Record};
use crate::datapath::types::addr;
use crate::model::l7;

/// A longer one is not written. Its texts are cut at a kilobyte each, so there is none.
pub(super) const LENGTH_MAX: usize = 64 << 10;

/// The requests of a segment.
pub(super) fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:020}.requests"))
}

/// What is written of a request; nothing if it is too long.
pub(super) fn text(request: &l7::Record) -> Vec<u8> {
    let text = serde_json::to_vec(request).unwrap_or_default();
    if text.len() > LENGTH_MAX { Vec::new() } else { text }
}

/// The event of a request whose text is at `offset`.
pub(super) fn placed(event: &Event, offset: u64, length: usize) -> Event {
    let service = addr { w: [offset as u32, (offset >> 32) as u32, length as u32, 0] };
    Event { r#type: REQUEST, service, ..*event }
}

/// The record that an event stands for, with what a request says.
pub(super) fn record(event: Event, requests: Option<&File>) -> Record {
    if event.r#type != REQUEST {
        return Record::Packet(event);
    }
    let request = requests.and_then(|file| read(&event, file));
    request.map_or(Record::Forgotten, |request| Record::Request(event, Arc::new(request)))
}

fn read(event: &Event, file: &File) -> Option<l7::Record> {
    let [low, high, length, _] = event.service.w;
    let length = usize::try_from(length).ok().filter(|length| (1..=LENGTH_MAX).contains(length))?;
    let mut text = vec![0; length];
    file.read_exact_at(&mut text, u64::from(low) | u64::from(high) << 32).ok()?;
    serde_json::from_slice(&text).ok()
}
