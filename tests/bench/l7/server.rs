//! What is asked: HTTP/1.1, HTTP/2 and gRPC on one port, as little of each as a client can be content with.

use std::io::{BufRead, BufReader};
use std::net::Ipv6Addr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::lab::Space;

/// The port that rules of layer 7 are for.
pub const PORT: u16 = 18080;
/// The one that is let through.
pub const PLAIN_PORT: u16 = 18081;
/// The word that makes this program the server.
pub const WORD: &str = "serve-http";

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nHello, world\n";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A message of gRPC: not compressed, five bytes long.
const MESSAGE: &[u8] = b"\0\0\0\0\x05hello";

/// A server process, ended when dropped.
pub struct Server(Child);

impl Server {
    /// Starts it in `space`.
    pub fn start(space: &Space) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(WORD).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = space.run(move || command.spawn()).context("starting a server of HTTP")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(line == "listening\n", "the server of HTTP in {} did not start", space.name());
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended by itself is no matter.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves until it is killed.
pub fn serve() -> Result<()> {
    weir::netlink::raise_descriptor_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut listeners = Vec::new();
        for port in [PORT, PLAIN_PORT] {
            let socket = tokio::net::TcpSocket::new_v6()?;
            socket.set_reuseaddr(true)?;
            socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
            listeners.push(socket.listen(4096)?);
        }
        println!("listening");
        let [judged, plain] = &listeners[..] else { unreachable!("two ports") };
        tokio::join!(accept(judged), accept(plain));
        Ok(())
    })
}

async fn accept(listener: &TcpListener) {
    loop {
        // Descriptors may have run out for a moment.
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(async move {
            // A client that goes away ends its own connection.
            let _ = answer(stream).await;
        });
    }
}

async fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut start = [0; 4];
    stream.peek(&mut start).await?;
    if PREFACE.starts_with(&start) {
        return answer_http2(stream).await;
    }
    let mut buffer = vec![0; 4096];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..]).await?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let mut answers = Vec::new();
        let mut begin = 0;
        while let Some(end) = buffer[begin..filled].windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            begin += end + 4;
            answers.extend_from_slice(ANSWER);
        }
        buffer.copy_within(begin..filled, 0);
        filled -= begin;
        ensure!(filled < buffer.len(), "a head that is too long");
        stream.write_all(&answers).await?;
    }
}

async fn answer_http2(stream: TcpStream) -> Result<()> {
    let mut connection = h2::server::Builder::new().max_concurrent_streams(1000).handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        tokio::spawn(async move {
            let _ = answer_stream(request, respond).await;
        });
    }
    Ok(())
}

async fn answer_stream(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<()> {
    let is_grpc = request.headers().get("content-type").is_some_and(|kind| kind == "application/grpc");
    let mut body = request.into_body();
    while let Some(chunk) = body.data().await {
        let length = chunk?.len();
        body.flow_control().release_capacity(length)?;
    }
    let kind = if is_grpc { "application/grpc" } else { "text/plain" };
    let response = Response::builder().header("content-type", kind).body(())?;
    let mut send = respond.send_response(response, false)?;
    if !is_grpc {
        send.send_data(Bytes::from_static(b"Hello, world\n"), true)?;
        return Ok(());
    }
    send.send_data(Bytes::from_static(MESSAGE), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    send.send_trailers(trailers)?;
    Ok(())
}
