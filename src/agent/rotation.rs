//! Takes the steps of a change of keys, one after the other, while the other nodes take theirs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::encryption::Device;
use crate::telemetry::Parts;

/// How often it is looked whether keys are to change.
const LOOK: Duration = Duration::from_secs(1);
/// The same while they change.
const LOOK_WHILE_CHANGING: Duration = Duration::from_millis(100);
/// The part of the agent that changes keys.
const PART: &str = "encryption keys";

/// Never returns. `news` is told when the programs are to send by another device.
pub async fn run(device: Option<Arc<Device>>, news: watch::Sender<u64>, parts: Parts) {
    let Some(device) = device else { return news.closed().await };
    parts.add(PART);
    loop {
        match tokio::task::block_in_place(|| device.step()) {
            Ok(is_news) => {
                parts.works(PART);
                if is_news {
                    news.send_modify(|count| *count += 1);
                }
            }
            Err(error) => drop(parts.fails(PART, vec![crate::error::chain(&error)], false, true)),
        }
        sleep(if device.generations().other.is_some() { LOOK_WHILE_CHANGING } else { LOOK }).await;
    }
}
