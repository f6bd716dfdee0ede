//! Accepting connections, and which protocol each one must speak.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::model::Protocol;
use crate::model::l7::L7Message;

use super::http1::{Outcome, Relay};
use super::limits::Payer;
use super::session::{Entry, Session, Shared};
use super::store::Rules;
use super::{dns, http2, kafka, pipe, tls};

/// After an error of accept(2), which is mostly that descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts until `stopping` says so.
pub async fn accept(shared: Arc<Shared>, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stops| *stops) => return,
        };
        match accepted {
            Ok((stream, client)) => begin(&shared, stream, client),
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Closes what nobody knows or nobody pays for, and serves everything else.
fn begin(shared: &Arc<Shared>, stream: TcpStream, client: SocketAddr) {
    let Ok(server) = stream.local_addr() else { return };
    let Ok(session) = Session::new(shared, client, server, Protocol::Tcp) else {
        tracing::debug!("nobody judges the connection of {client} to {server}");
        return cut(&stream);
    };
    if session.is_by_envoy() {
        session.record(Entry::error(L7Message::Unknown, "no Envoy takes what it must judge"));
        return cut(&stream);
    }
    let payer = Payer::of(session.judges(), session.client.ip());
    let Some(share) = shared.shares.take(payer, &shared.limits) else {
        session.record(Entry::error(L7Message::Unknown, "too many connections"));
        return cut(&stream);
    };
    if stream.set_nodelay(true).is_err() {
        return;
    }
    tokio::spawn(async move {
        serve(session, stream).await;
        drop(share);
    });
}

/// The client gets a reset.
fn cut(stream: &TcpStream) {
    // It may be gone.
    let _ = stream.set_zero_linger();
}

async fn serve(session: Session, stream: TcpStream) {
    match spoken(&session) {
        Spoken::Anything => pipe::pipe(session, stream, Vec::new()).await,
        Spoken::Http => {
            if let Outcome::Http2(session, stream, bytes) = Relay::new(session, stream).await {
                http2::serve(*session, stream, bytes).await;
            }
        }
        Spoken::Dns => dns::tcp::serve(session, stream).await,
        Spoken::Kafka => kafka::serve(session, stream).await,
        Spoken::Tls => tls::serve(session, stream).await,
        Spoken::Nothing(why) => {
            session.record(Entry::denied(L7Message::Unknown, session.sets().err(), why));
            cut(&stream);
        }
    }
}

/// What a connection must speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoken {
    Anything,
    Http,
    Dns,
    Kafka,
    Tls,
    Nothing(&'static str),
}

/// The protocol of the rules that can deny; where none can, of those that only look.
fn spoken(session: &Session) -> Spoken {
    let Ok(sets) = session.sets() else { return Spoken::Nothing("rule set not known") };
    let denying = sets.iter().filter(|set| !set.is_visibility_only);
    let mut protocols: Vec<Spoken> = denying.map(|set| protocol(&set.rules)).collect();
    if protocols.is_empty() {
        protocols.extend(sets.first().map(|set| protocol(&set.rules)));
    }
    match protocols[..] {
        [] => Spoken::Anything,
        [one] => one,
        [one, ref others @ ..] if others.iter().all(|other| *other == one) => one,
        _ => Spoken::Nothing("the rules of the two ends are for different protocols"),
    }
}

fn protocol(rules: &Rules) -> Spoken {
    match rules {
        Rules::Http(_) => Spoken::Http,
        Rules::Dns(_) => Spoken::Dns,
        Rules::Kafka(_) => Spoken::Kafka,
        Rules::ServerNames(_) => Spoken::Tls,
    }
}
