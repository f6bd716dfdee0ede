//! DNS over TCP.
use tokio::net::TcpStream;

use crate::proxy::session::Session;

/// Serves a connection.
pub async fn serve(_session: Session, _stream: TcpStream) {}
