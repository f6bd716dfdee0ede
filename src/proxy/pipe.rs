//! Bytes that pass as they are, in both directions.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use crate::model::l7::L7Message;

use super::session::{Entry, Session};
use super::upstream;

/// How much is read at once.
const READ: usize = 64 << 10;

/// Connects to the server, sends it what the client has sent already, and passes everything on.
pub async fn pipe(session: Session, client: TcpStream, first: Vec<u8>) {
    let limits = session.shared.limits;
    let mut server = match upstream::connect(session.client, session.server, limits.connect).await {
        Ok(server) => server,
        Err(error) => {
            session.record(Entry::error(L7Message::Unknown, format!("connecting to the server: {error}")));
            // It may be gone.
            let _ = client.set_zero_linger();
            return;
        }
    };
    if write(&mut server, &first, limits.silence).await.is_err() {
        return;
    }
    drop((session, first));
    join(client, server, limits.silence).await;
}

/// Passes everything on between two streams until both directions have ended, or nothing came for long.
pub async fn join(mut client: TcpStream, mut server: TcpStream, silence: Duration) {
    let outcome = {
        let (client_reads, client_writes) = client.split();
        let (server_reads, server_writes) = server.split();
        let up = one_way(client_reads, server_writes, silence);
        let down = one_way(server_reads, client_writes, silence);
        tokio::try_join!(up, down)
    };
    if outcome.is_err() {
        // What broke on one side breaks on the other.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// Writes all of `bytes`; fails where the peer has not taken them within this time.
pub async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8], within: Duration) -> io::Result<()> {
    tokio::time::timeout(within, to.write_all(bytes)).await.map_err(|_| io::ErrorKind::TimedOut)?
}

async fn one_way(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, silence: Duration) -> io::Result<()> {
    loop {
        // No memory is held while nothing comes.
        tokio::time::timeout(silence, from.readable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
        let mut bytes = Vec::with_capacity(READ);
        match from.read_buf(&mut bytes).await? {
            0 => return to.shutdown().await,
            _ => write(&mut to, &bytes, silence).await?,
        }
    }
}
