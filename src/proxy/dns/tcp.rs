//! DNS over TCP.

use std::io;

use tokio::net::TcpStream;

use crate::model::l7::{DnsMessage, L7Message};
use crate::proxy::frames::Frames;
use crate::proxy::pipe;
use crate::proxy::session::{Entry, Session};
use crate::proxy::upstream;

use super::{Asked, Pending, answered, ask};
use crate::model::l7::dns_message::MESSAGE_MAX;

/// Serves a connection until one side ends it.
pub async fn serve(session: Session, client: TcpStream) {
    if let Err(error) = Connection::new(session, client).run().await {
        tracing::debug!("DNS over TCP: {error}");
    }
}

struct Connection {
    session: Session,
    client: TcpStream,
    server: Option<TcpStream>,
    queries: Frames,
    answers: Frames,
    pending: Pending,
}

enum Came {
    Query(Option<Vec<u8>>),
    Answer(Option<Vec<u8>>),
}

impl Connection {
    fn new(session: Session, client: TcpStream) -> Self {
        let frames = || Frames::new(2, MESSAGE_MAX);
        Self {
            session,
            client,
            server: None,
            queries: frames(),
            answers: frames(),
            pending: Pending::default(),
        }
    }

    async fn run(mut self) -> io::Result<()> {
        let limits = self.session.shared.limits;
        let mut has_ended = false;
        loop {
            let within = if self.queries.is_inside() { limits.head } else { limits.idle };
            let came = tokio::time::timeout(within, self.next(has_ended));
            match came.await.map_err(|_| io::ErrorKind::TimedOut)?? {
                Came::Query(Some(frame)) => self.query(&frame).await?,
                Came::Query(None) if self.pending.is_empty() => return Ok(()),
                // The client has asked everything and waits for the rest.
                Came::Query(None) => has_ended = true,
                Came::Answer(Some(frame)) => {
                    self.answer(&frame).await?;
                    if has_ended && self.pending.is_empty() {
                        return Ok(());
                    }
                }
                Came::Answer(None) => return Ok(()),
            }
        }
    }

    async fn next(&mut self, has_ended: bool) -> io::Result<Came> {
        let Self { client, server, queries, answers, .. } = self;
        let answer = async {
            match server {
                Some(server) => answers.next(server).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            query = queries.next(client), if !has_ended => Ok(Came::Query(query?)),
            answer = answer => Ok(Came::Answer(answer?)),
        }
    }

    async fn query(&mut self, frame: &[u8]) -> io::Result<()> {
        self.session.refresh().map_err(|_| io::ErrorKind::ConnectionAborted)?;
        match ask(&self.session, &frame[2..]) {
            Asked::Forward(question) => self.pending.push(question),
            Asked::Unread => {}
            Asked::Answer(answer) => {
                return pipe::write(&mut self.client, &framed(&answer), self.session.shared.limits.idle)
                    .await;
            }
            Asked::Drop => return Err(io::ErrorKind::InvalidData.into()),
        }
        if self.server.is_none() {
            let Session { client, server, shared, .. } = &self.session;
            let connected = upstream::connect(*client, *server, shared.limits.connect).await;
            let server = connected.inspect_err(|error| {
                let message = L7Message::Dns(DnsMessage::default());
                self.session.record(Entry::error(message, format!("connecting to the server: {error}")));
            })?;
            self.server = Some(server);
        }
        match &mut self.server {
            Some(server) => pipe::write(server, frame, self.session.shared.limits.idle).await,
            None => Ok(()),
        }
    }

    async fn answer(&mut self, frame: &[u8]) -> io::Result<()> {
        let Some(answered) = answered(&self.session, &mut self.pending, &frame[2..]) else { return Ok(()) };
        answered.announced(&self.session).await;
        pipe::write(&mut self.client, frame, self.session.shared.limits.idle).await
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    // A refusal is no longer than its query.
    let length = u16::try_from(message.len()).unwrap_or(0);
    [&length.to_be_bytes()[..], message].concat()
}
