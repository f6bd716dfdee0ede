//! `weir proxy`: judges what is said inside of connections that rules of layer 7 are for.
//!
//! ```text
//! agent -> control -> store: rule sets        connections -> recorder -> control -> agent
//!              +----> accept -> session: who judges? -> http1, http2, dns, kafka, tls -> upstream
//! ```
//!
//! The proxy runs in a network namespace of its own, where the kernel brings it the connections. It connects to the
//! server from the client's own address and port. It owns nothing that must survive: listeners and rules are the
//! agent's, and without an agent the proxy goes on with what it has. What nobody knows is closed.

mod accept;
mod args;
mod control;
mod dns;
mod frames;
mod http;
mod http1;
mod http2;
mod kafka;
mod limits;
mod names;
mod pipe;
mod records;
mod session;
mod store;
mod tls;
mod upstream;

use std::net::{TcpListener as StdListener, UdpSocket as StdUdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio::time::Instant;

pub use args::{ProxyArgs, ProxyConfig};
pub use limits::Limits;

use crate::model::Protocol;
use crate::model::l7::{Descriptor, Judges, Lookup};
use control::{Control, Ended, Outbox};
use limits::Shares;
use names::Announcer;
use records::Recorder;
use session::Shared;
use store::Store;

/// After a failed connection to the agent, and how often the end of connections is looked for.
const PAUSE: Duration = Duration::from_millis(200);
/// How long connections may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(300);

/// Makes a lookup of the descriptor of the map that says who judges a flow.
pub type OpenLookup = Box<dyn Fn(OwnedFd) -> Result<Box<dyn Lookup>> + Send + Sync>;

/// Nobody judges any flow, so all are closed.
struct Nobody;

impl Lookup for Nobody {
    fn of(&self, _: std::net::SocketAddr, _: std::net::SocketAddr, _: Protocol) -> Option<Judges> {
        None
    }
}

/// Runs until the agent or `stop` says to end, and connections have ended.
pub async fn run(config: ProxyConfig, open_lookup: OpenLookup, stop: watch::Sender<bool>) -> Result<()> {
    let mut stopping = stop.subscribe();
    let (recorder, records) = Recorder::new();
    let (announcer, announcements) = Announcer::new();
    let shared = Arc::new(Shared {
        store: Store::default(),
        lookup: ArcSwap::from_pointee(Box::new(Nobody) as Box<dyn Lookup>),
        recorder,
        limits: config.limits,
        shares: Arc::new(Shares::default()),
        announcer,
        denies_with_nxdomain: AtomicBool::new(false),
    });
    let outbox = Outbox { records, announcements };
    let within = tokio::select! {
        within = follow(&config, &shared, outbox, &open_lookup) => within,
        _ = stopping.wait_for(|stops| *stops) => DRAIN,
    };
    drain(&shared, within).await;
    Ok(())
}

/// Follows one agent after the other; gives the time for connections to end when one says so.
async fn follow(
    config: &ProxyConfig,
    shared: &Arc<Shared>,
    mut outbox: Outbox,
    open_lookup: &OpenLookup,
) -> Duration {
    let mut accepting: Option<watch::Sender<bool>> = None;
    let mut is_said = false;
    loop {
        match Control::connect(&config.args.control).await {
            Ok((control, handed)) => {
                is_said = false;
                // The listeners of the last agent stay open until the new ones are there.
                match listen(shared, handed, open_lookup) {
                    Ok(stop) => {
                        if let Some(old) = accepting.replace(stop) {
                            old.send_replace(true);
                        }
                    }
                    Err(error) => tracing::error!("taking the agent's listeners: {error:#}"),
                }
                match control.serve(shared, &mut outbox).await {
                    Ok(Ended::Drain(within)) => return within,
                    Ok(Ended::Closed) => tracing::info!("the agent has gone; its rules stay in force"),
                    Err(error) => tracing::warn!("the agent's connection broke: {error:#}"),
                }
            }
            Err(error) if !is_said => {
                tracing::warn!("{error:#}");
                is_said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Accepts on what was handed over, until the sender says true.
fn listen(
    shared: &Arc<Shared>,
    handed: Vec<(Descriptor, OwnedFd)>,
    open_lookup: &OpenLookup,
) -> Result<watch::Sender<bool>> {
    let (stop, stopping) = watch::channel(false);
    let mut listeners = Vec::new();
    let mut sockets = Vec::new();
    for (what, descriptor) in handed {
        match what {
            Descriptor::FlowsMap => {
                let lookup = open_lookup(descriptor).context("opening the map of flows")?;
                shared.lookup.store(Arc::new(lookup));
            }
            Descriptor::TcpListener => {
                let listener = StdListener::from(descriptor);
                listener.set_nonblocking(true)?;
                listeners.push(TcpListener::from_std(listener)?);
            }
            Descriptor::UdpSocket => {
                let socket = StdUdpSocket::from(descriptor);
                socket.set_nonblocking(true)?;
                sockets.push(UdpSocket::from_std(socket)?);
            }
        }
    }
    tracing::info!("{} listeners and {} sockets from the agent", listeners.len(), sockets.len());
    for listener in listeners {
        tokio::spawn(accept::accept(shared.clone(), listener, stopping.clone()));
    }
    for socket in sockets {
        tokio::spawn(dns::udp::serve(shared.clone(), socket, stopping.clone()));
    }
    Ok(stop)
}

/// Waits until all connections have ended.
async fn drain(shared: &Arc<Shared>, within: Duration) {
    let deadline = Instant::now() + within;
    while shared.shares.count() > 0 && Instant::now() < deadline {
        tokio::time::sleep(PAUSE).await;
    }
}
