//! What the test's pods answer with: HTTP on a TCP port, datagrams on the UDP port of the same
//! number. Both say who answers and give back what was sent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use clap::Args;
use tokio::net::{TcpListener, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Args)]
pub struct ServeArgs {
    /// TCP and UDP.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Who answers.
    #[arg(long)]
    name: String,
}

/// Answers until SIGTERM.
pub async fn run(args: ServeArgs) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let (listener, socket) = bind(args.port).await?;
    let name: std::sync::Arc<str> = args.name.into();
    let routes = Router::new().fallback(answer).with_state(name.clone());
    tokio::select! {
        served = async { axum::serve(listener, routes).await } => served.context("serving TCP"),
        served = echo(&socket, &name) => served.context("serving UDP"),
        _ = terminate.recv() => Ok(()),
    }
}

/// Both families, or IPv4 where the kernel has no IPv6.
async fn bind(port: u16) -> Result<(TcpListener, UdpSocket)> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let addresses = any.map(|ip| SocketAddr::new(ip, port));
    let listener = TcpListener::bind(addresses.as_slice()).await;
    let listener = listener.with_context(|| format!("listening at TCP port {port}"))?;
    let socket = UdpSocket::bind(addresses.as_slice()).await;
    Ok((listener, socket.with_context(|| format!("listening at UDP port {port}"))?))
}

async fn answer(State(name): State<std::sync::Arc<str>>, body: Bytes) -> Vec<u8> {
    answer_to(&name, &body)
}

/// The server's name on a line, then what it was sent.
pub(super) fn answer_to(name: &str, body: &[u8]) -> Vec<u8> {
    [name.as_bytes(), b"\n", body].concat()
}

async fn echo(socket: &UdpSocket, name: &str) -> std::io::Result<()> {
    let mut datagram = vec![0; 65_536];
    loop {
        // An ICMP error about an answer comes back as an error of the socket: no reason to stop.
        let Ok((length, from)) = socket.recv_from(&mut datagram).await else { continue };
        let _ = socket.send_to(&answer_to(name, &datagram[..length]), from).await;
    }
}
