//! HTTP/2 by prior knowledge, and gRPC: streams are judged one by one, and pass between two connections.
//!
//! Pushes are refused, headers are bounded, and what waits of a stream is bounded by its window.

mod rewind;
mod stream;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::{Notify, OnceCell};

use super::session::Session;
use super::upstream;
use rewind::Rewind;

/// What may be on the way in a stream and in a connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// The longest header list.
const HEADERS_MAX: u32 = 16 << 10;
/// The longest frame.
const FRAME_MAX: u32 = 16 << 10;

/// What the streams of a connection share.
struct Connection {
    session: Arc<Session>,
    server: OnceCell<h2::client::SendRequest<Bytes>>,
    running: AtomicUsize,
    /// The server's connection takes no further stream.
    broken: Notify,
}

/// Serves a connection whose first bytes were read already.
pub async fn serve(session: Session, client: TcpStream, first: Vec<u8>) {
    if let Err(error) = run(session, client, first).await {
        tracing::debug!("HTTP/2: {error}");
    }
}

async fn run(session: Session, client: TcpStream, first: Vec<u8>) -> Result<(), h2::Error> {
    let limits = session.shared.limits;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(HEADERS_MAX)
        .max_frame_size(FRAME_MAX);
    let handshake = builder.handshake(Rewind::new(first, client));
    let handshake = tokio::time::timeout(limits.head, handshake).await;
    let mut streams = handshake.map_err(|_| io::Error::from(io::ErrorKind::TimedOut)).map_err(from_io)??;
    let connection = Arc::new(Connection {
        session: Arc::new(session),
        server: OnceCell::new(),
        running: AtomicUsize::new(0),
        broken: Notify::new(),
    });
    let mut is_told = false;
    loop {
        let accepted = tokio::select! {
            accepted = streams.accept() => accepted,
            () = connection.broken.notified() => {
                streams.graceful_shutdown();
                continue;
            }
            () = tokio::time::sleep(limits.idle) => {
                if connection.running.load(Ordering::Relaxed) == 0 {
                    // A client that does not end the connection when it is told to is cut off.
                    if std::mem::replace(&mut is_told, true) {
                        return Ok(());
                    }
                    streams.graceful_shutdown();
                }
                continue;
            }
        };
        let Some(accepted) = accepted else { return Ok(()) };
        let (request, respond) = accepted?;
        let connection = connection.clone();
        tokio::spawn(async move {
            connection.running.fetch_add(1, Ordering::Relaxed);
            stream::serve(&connection, request, respond).await;
            connection.running.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn from_io(error: io::Error) -> h2::Error {
    tracing::debug!("HTTP/2: {error}");
    h2::Reason::SETTINGS_TIMEOUT.into()
}

impl Connection {
    /// The one connection to the server; made for the first stream that may pass.
    async fn server(&self) -> Result<h2::client::SendRequest<Bytes>, String> {
        let connect = || async {
            let Session { client, server, shared, .. } = &*self.session;
            let within = shared.limits.connect;
            let stream =
                upstream::connect(*client, *server, within).await.map_err(|error| error.to_string())?;
            greet(stream, within).await
        };
        self.server.get_or_try_init(connect).await.cloned()
    }
}

async fn greet(stream: TcpStream, within: Duration) -> Result<h2::client::SendRequest<Bytes>, String> {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEADERS_MAX)
        .max_frame_size(FRAME_MAX);
    let handshake = tokio::time::timeout(within, builder.handshake(stream));
    let (requests, connection) =
        handshake.await.map_err(|_| "no answer in time".to_owned())?.map_err(|error| error.to_string())?;
    // It ends when the last stream and the last handle have ended.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("HTTP/2 of a server: {error}");
        }
    });
    Ok(requests)
}
