//! HTTP/2.
use tokio::net::TcpStream;

use super::session::Session;

/// Serves a connection whose first bytes were read already.
pub async fn serve(_session: Session, _stream: TcpStream, _first: Vec<u8>) {}
