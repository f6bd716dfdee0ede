//! The connection to the server: from the client's address and port, so that both legs are one flow.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpTransparent;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

/// Connects to `server` as `client`.
pub async fn connect(client: SocketAddr, server: SocketAddr, within: Duration) -> io::Result<TcpStream> {
    let socket = match server {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    setsockopt(&socket, IpTransparent, &true)?;
    socket.set_reuseaddr(true)?;
    socket.bind(client)?;
    let connecting = tokio::time::timeout(within, socket.connect(server));
    let stream = connecting.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A UDP socket that speaks as `client` to `server`, and hears nobody else.
pub async fn datagrams(client: SocketAddr, server: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bound_datagrams(client)?;
    socket.connect(&server.into())?;
    UdpSocket::from_std(socket.into())
}

/// A UDP socket with somebody else's address and port.
pub fn bound_datagrams(address: SocketAddr) -> io::Result<socket2::Socket> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, IpTransparent, &true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
