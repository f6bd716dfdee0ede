//! The connection to the agent: it brings listeners and rules, and takes records and names away.

use std::io::Cursor;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Chain};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use crate::model::l7::{Descriptor, FromProxy, Hello, MESSAGE_MAX, ToProxy};
use crate::netlink::receive_with_descriptors;

use super::names::Announcements;
use super::records::Records;
use super::session::Shared;

/// How long the agent may take to say its first word.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// The longest first message.
const HELLO_MAX: usize = 4096;
/// How often the agent hears how the proxy is.
const STATE_EVERY: Duration = Duration::from_secs(2);
/// Answers to the agent that wait to be written.
const REPLIES: usize = 64;

/// A connection to an agent.
pub struct Control {
    reads: BufReader<Chain<Cursor<Vec<u8>>, OwnedReadHalf>>,
    writes: OwnedWriteHalf,
    deny_with_nxdomain: bool,
}

/// What goes to the agent, kept from one connection to the next.
pub struct Outbox {
    /// Records of what was seen.
    pub records: Records,
    /// Addresses of names.
    pub announcements: Announcements,
}

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The agent has closed it.
    Closed,
    /// The proxy shall end within this time.
    Drain(Duration),
}

impl Control {
    /// Connects, and takes what the agent hands over.
    pub async fn connect(path: &Path) -> Result<(Self, Vec<(Descriptor, OwnedFd)>)> {
        let path = path.to_owned();
        let (stream, hello, descriptors, rest) = tokio::task::spawn_blocking(move || take_hello(&path))
            .await
            .context("waiting for the agent's first message")??;
        stream.set_nonblocking(true)?;
        let (reads, writes) = UnixStream::from_std(stream)?.into_split();
        let reads = BufReader::new(Cursor::new(rest).chain(reads));
        ensure!(
            hello.descriptors.len() == descriptors.len(),
            "the agent names {} descriptors and sends {}",
            hello.descriptors.len(),
            descriptors.len()
        );
        let deny_with_nxdomain = hello.deny_with_nxdomain;
        Ok((
            Self { reads, writes, deny_with_nxdomain },
            hello.descriptors.into_iter().zip(descriptors).collect(),
        ))
    }

    /// Does what the agent says, and tells it what was seen, until the connection ends.
    pub async fn serve(self, shared: &Arc<Shared>, outbox: &mut Outbox) -> Result<Ended> {
        let Self { reads, mut writes, deny_with_nxdomain } = self;
        shared.denies_with_nxdomain.store(deny_with_nxdomain, Ordering::Relaxed);
        let (replies, mut replied) = mpsc::channel(REPLIES);
        let reader = hear(reads, shared, replies);
        tokio::pin!(reader);
        let _heard = Heard::begin(shared);
        let mut state = tokio::time::interval(STATE_EVERY);
        loop {
            let message = tokio::select! {
                ended = &mut reader => return ended,
                Some(reply) = replied.recv() => reply,
                _ = state.tick() => FromProxy::State(shared.state()),
                Some(names) = outbox.announcements.recv() => FromProxy::Names(names),
                Some(records) = outbox.records.next() => {
                    FromProxy::Records { records, lost: shared.recorder.take_lost() }
                }
            };
            let mut line = serde_json::to_vec(&message).context("writing a message to the agent")?;
            line.push(b'\n');
            // The agent may be slow: what it says is heard all the same.
            let written = tokio::select! {
                ended = &mut reader => return ended,
                written = writes.write_all(&line) => written,
            };
            written.context("writing to the agent")?;
        }
    }
}

/// An agent listens as long as this value lives.
struct Heard<'a>(&'a Shared);

impl<'a> Heard<'a> {
    fn begin(shared: &'a Shared) -> Self {
        shared.announcer.set_heard(true);
        Self(shared)
    }
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        self.0.announcer.set_heard(false);
    }
}

type FirstWord = (StdUnixStream, Hello, Vec<OwnedFd>, Vec<u8>);

/// Reads the first line and the descriptors that came with it. What came behind the line is given, too.
fn take_hello(path: &Path) -> Result<FirstWord> {
    let stream = StdUnixStream::connect(path)
        .with_context(|| format!("connecting to the agent at {}", path.display()))?;
    stream.set_read_timeout(Some(HELLO_WITHIN))?;
    let mut descriptors = Vec::new();
    let mut bytes = Vec::new();
    loop {
        let mut buffer = [0; HELLO_MAX];
        let count = receive_with_descriptors(&stream, &mut buffer, &mut descriptors)
            .context("reading the agent's first message")?;
        bytes.extend_from_slice(&buffer[..count]);
        if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let rest = bytes.split_off(end + 1);
            let hello = serde_json::from_slice(&bytes).context("reading the agent's first message")?;
            return Ok((stream, hello, descriptors, rest));
        }
        ensure!(count > 0, "the agent closed the connection before its first message");
        ensure!(bytes.len() < HELLO_MAX, "the agent's first message is too long");
    }
}

async fn hear(
    mut reads: BufReader<Chain<Cursor<Vec<u8>>, OwnedReadHalf>>,
    shared: &Arc<Shared>,
    replies: mpsc::Sender<FromProxy>,
) -> Result<Ended> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = (&mut reads)
            .take(MESSAGE_MAX as u64)
            .read_until(b'\n', &mut line)
            .await
            .context("reading from the agent")?;
        if count == 0 {
            return Ok(Ended::Closed);
        }
        ensure!(line.ends_with(b"\n"), "a message of the agent has no end within {MESSAGE_MAX} bytes");
        match serde_json::from_slice(&line).context("reading a message of the agent")? {
            ToProxy::RuleSets { set, remove, replace, seq } => {
                for (id, why) in shared.store.change(&set, &remove, replace) {
                    tracing::warn!("rule set {id} cannot be enforced, so it allows nothing: {why}");
                    replies.send(FromProxy::Refused { id, why }).await?;
                }
                replies.send(FromProxy::Ack(seq)).await?;
            }
            ToProxy::NamesAck(seq) => shared.announcer.acknowledge(seq),
            ToProxy::Drain { within_s } => return Ok(Ended::Drain(Duration::from_secs(within_s))),
        }
        if line.capacity() > 1 << 20 {
            line = Vec::new();
        }
    }
}
