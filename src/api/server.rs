//! The answering side: accepts root's connections, reads one request of each.

use std::fs::{self, DirBuilder, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Line, REQUEST_BYTES_MAX, Refusal, Request, directory_of};
use crate::model::cni;

/// Requests of the container runtime that are worked on at once; a full node starts its pods with fewer.
const RUNTIMES_MAX: usize = 512;
/// Requests of people and their tools. They take nothing from the runtime's.
pub const OTHERS_MAX: usize = 128;
/// A client that has connected and says nothing for so long is cut off.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// A client that takes no answer for so long is cut off.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Requests in progress at shutdown have so long to end.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);

/// What answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request; what it does not answer, the client sees as a closed connection.
    fn handle(&self, request: Request, reply: Reply) -> impl Future<Output = ()> + Send;
}

/// The client went away: there is nobody to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client is gone")]
pub struct Gone;

/// The way back to the client of one request.
pub struct Reply {
    stream: UnixStream,
}

impl Reply {
    /// Sends one result; streaming methods send as many as they like.
    pub async fn send(&mut self, result: &impl Serialize) -> Result<(), Gone> {
        self.write([Line::Result(result)]).await
    }

    /// Refuses; the last line of an answer.
    pub async fn refuse(mut self, refusal: Refusal) -> Result<(), Gone> {
        self.write([Line::<()>::Error(refusal)]).await
    }

    /// Sends the result, or the refusal.
    pub async fn finish<T: Serialize>(mut self, outcome: Result<T, impl Into<Refusal>>) -> Result<(), Gone> {
        match outcome {
            Ok(result) => self.send(&result).await,
            Err(refusal) => self.refuse(refusal.into()).await,
        }
    }

    /// Waits until the client closes its end: for streams that may have nothing to send for long.
    pub async fn closed(&self) {
        let mut ignored = [0; 64];
        loop {
            if self.stream.readable().await.is_err() {
                return;
            }
            match self.stream.try_read(&mut ignored) {
                Ok(0) => return,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                _ => {}
            }
        }
    }

    async fn write<T: Serialize>(&mut self, lines: impl IntoIterator<Item = Line<T>>) -> Result<(), Gone> {
        let mut bytes = Vec::with_capacity(1024);
        for line in lines {
            serde_json::to_writer(&mut bytes, &line).map_err(|error| {
                warn!(%error, "an answer cannot be written as JSON");
                Gone
            })?;
            bytes.push(b'\n');
        }
        match timeout(ANSWER_WITHIN, self.stream.write_all(&bytes)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }
}

/// Makes the socket: mode 0600, in a directory that is made with mode 0700 where there is none.
/// Takes the place of a socket that nobody listens at, of nothing else.
pub fn bind(path: &Path) -> Result<UnixListener> {
    let directory = directory_of(path);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("making {}", directory.display()))?;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("another agent listens at {}", path.display());
    }
    // Made aside and moved in, so that nobody ever meets a socket of a wider mode.
    let aside = path.with_extension(format!("new-{}", std::process::id()));
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", aside.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&aside).with_context(|| format!("binding {}", aside.display()))?;
    fs::set_permissions(&aside, Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&aside, path))
        .with_context(|| format!("making socket {}", path.display()))?;
    Ok(listener)
}

/// Listens at `path` until `shutdown` turns true, then removes the socket.
pub async fn serve(path: &Path, handler: Arc<impl Handler>, shutdown: watch::Receiver<bool>) -> Result<()> {
    serve_on(bind(path)?, path, handler, shutdown).await
}

/// As `serve`, on a socket that `bind` made: clients can connect before the agent is ready to answer.
pub async fn serve_on(
    listener: UnixListener,
    path: &Path,
    handler: Arc<impl Handler>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let ours = fs::metadata(path).with_context(|| format!("reading {}", path.display()))?.ino();
    let slots = Arc::new(Slots { runtime: Semaphore::new(RUNTIMES_MAX), others: Semaphore::new(OTHERS_MAX) });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stopped(&mut shutdown) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, Arc::clone(&handler), Arc::clone(&slots)));
                }
                Err(error) => {
                    // Out of file descriptors, most likely: others must end first.
                    warn!(%error, "accepting a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
    drop(listener);
    if fs::metadata(path).is_ok_and(|metadata| metadata.ino() == ours) {
        let _ = fs::remove_file(path);
    }
    let _ = timeout(DRAIN_WITHIN, async { while connections.join_next().await.is_some() {} }).await;
    connections.shutdown().await;
    Ok(())
}

/// Room for requests, so that many followers of flows cannot keep a pod from starting.
struct Slots {
    runtime: Semaphore,
    others: Semaphore,
}

impl Slots {
    fn of(&self, request: &Request) -> &Semaphore {
        if request.is_runtimes() { &self.runtime } else { &self.others }
    }
}

async fn connection(mut stream: UnixStream, handler: Arc<impl Handler>, slots: Arc<Slots>) {
    let is_root = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0);
    // Read in any case: to hang up on what was not read would take our answer from the client.
    let request = match timeout(REQUEST_WITHIN, read_request(&mut stream)).await {
        // Connected and hung up: somebody who looked whether we are there.
        Ok(Ok(None)) | Err(_) => return,
        Ok(Ok(Some(line))) => line,
        Ok(Err(error)) => return refuse(stream, not_understood(&error)).await,
    };
    if !is_root {
        let refusal = Refusal::new(cni::ErrorCode::InvalidEnvironment, "only root may talk to the agent");
        return refuse(stream, refusal).await;
    }
    let request: Request = match serde_json::from_slice(&request) {
        Ok(request) => request,
        Err(error) => return refuse(stream, not_understood(&error)).await,
    };
    let Ok(_slot) = slots.of(&request).try_acquire() else {
        let refusal = Refusal::new(cni::ErrorCode::TryAgainLater, "the agent has too many requests at once");
        return refuse(stream, refusal).await;
    };
    handler.handle(request, Reply { stream }).await;
}

fn not_understood(error: &dyn std::error::Error) -> Refusal {
    debug!(%error, "refusing a request");
    Refusal::new(cni::ErrorCode::Decode, "the request is not understood").with_details(error.to_string())
}

async fn refuse(stream: UnixStream, refusal: Refusal) {
    // A client that does not stay for its refusal does not need it.
    let _ = Reply { stream }.refuse(refusal).await;
}

/// One line; `None` from a client that hangs up without a word.
async fn read_request(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::with_capacity(1024);
    loop {
        // The client sends nothing behind its only line.
        let before = line.len();
        if stream.read_buf(&mut line).await? == 0 {
            return if line.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        if line[before..].contains(&b'\n') {
            return Ok(Some(line));
        }
        if line.len() > REQUEST_BYTES_MAX {
            return Err(io::Error::other("it is longer than any request may be"));
        }
    }
}

async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error: nobody can ask for a shutdown any more, which is one.
    let _ = shutdown.wait_for(|stop| *stop).await.map(drop);
}
