//! `weir wireguard`: WireGuard for a TUN device, where the kernel has none.
//!
//! The agent starts the process, or finds it, and gives it the device, the UDP sockets, the key and the peers.
//! The process goes on when the agent ends: packets need neither the agent nor the API server. It ends when
//! its device is gone, and by itself never: the agent makes everything anew.

mod net;
mod peers;
mod segment;
mod worker;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context, Result, bail};

use super::PrivateKey;
use super::protocol::{Answer, Asked, Request, Running, SideState};
use worker::Worker;

/// What is there once the agent has said so.
struct Started {
    running: Running,
    worker: Arc<Worker>,
}

/// The process, as its control connections share it.
#[derive(Default)]
struct Side {
    started: OnceLock<Started>,
}

/// Listens at `socket` for the agent; returns only with an error.
pub fn run(socket: &Path) -> Result<()> {
    let listener = listen(socket)?;
    let side = Arc::new(Side::default());
    tracing::info!(socket = %socket.display(), "waiting for the agent");
    for stream in listener.incoming() {
        let stream = stream.context("accepting a connection")?;
        let side = side.clone();
        thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || side.serve(stream))
            .context("starting a thread")?;
    }
    bail!("nobody can connect any more")
}

/// Only root may connect. A socket that a dead process left is replaced.
fn listen(socket: &Path) -> Result<UnixListener> {
    if UnixStream::connect(socket).is_ok() {
        bail!("another process listens at {}", socket.display());
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", socket.display()));
        }
        _ => {}
    }
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    }
    let listener =
        UnixListener::bind(socket).with_context(|| format!("listening at {}", socket.display()))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("keeping {} for root", socket.display()))?;
    Ok(listener)
}

impl Side {
    fn serve(&self, stream: UnixStream) {
        let is_root = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
            .is_ok_and(|peer| peer.uid() == 0);
        if !is_root {
            return;
        }
        let mut asked = Asked::new(stream);
        loop {
            let (request, descriptors) = match asked.next() {
                Ok(Some(next)) => next,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "hanging up on a request that is not understood");
                    return;
                }
            };
            let is_last = matches!(request, Request::Stop);
            let answer = match self.handle(request, descriptors) {
                Ok(()) => Answer::State(self.state()),
                Err(error) => Answer::Error(crate::error::chain(&error)),
            };
            let told = asked.answer(&answer);
            if is_last {
                tracing::info!("ending, as the agent says");
                std::process::exit(0);
            }
            if told.is_err() {
                return;
            }
        }
    }

    fn handle(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<()> {
        match request {
            Request::Start { private_key, ifindex } => self.start(&private_key, ifindex, descriptors),
            Request::Peers { peers } => {
                let started = self.started.get().context("the process has no device yet")?;
                started.worker.set_peers(&peers);
                Ok(())
            }
            Request::Status | Request::Stop => Ok(()),
        }
    }

    fn start(&self, key: &PrivateKey, ifindex: u32, descriptors: Vec<OwnedFd>) -> Result<()> {
        if self.started.get().is_some() {
            bail!("the process has a device already");
        }
        let worker = Worker::start(key, descriptors)?;
        let running = Running { ifindex, public_key: key.public() };
        tracing::info!(ifindex, public_key = %running.public_key, "encrypting");
        if self.started.set(Started { running, worker }).is_err() {
            bail!("the process has a device already");
        }
        Ok(())
    }

    fn state(&self) -> SideState {
        let started = self.started.get();
        SideState {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            running: started.map(|started| started.running),
            peers: started.map_or_else(Vec::new, |started| started.worker.states()),
            without_peer: started.map_or(0, |started| started.worker.without_peer()),
        }
    }
}
