//! DNS over UDP.
use std::sync::Arc;

use tokio::net::UdpSocket;
use tokio::sync::watch;

use crate::proxy::session::Shared;

/// Serves a socket.
pub async fn serve(_shared: Arc<Shared>, _socket: UdpSocket, _stopping: watch::Receiver<bool>) {}
