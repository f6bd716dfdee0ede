//! `weir wireguard`, as the agent keeps it running behind a TUN device.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

use super::protocol::{Client, Request, Running, SideState};
use super::{PrivateKey, lock};
use crate::model::EncryptionPeer;
use crate::netlink::{self, TunOffload};

/// What the sockets hold while the process does not run: a tenth of a second of 200,000 packets a second.
const SOCKET_BYTES: usize = 4 << 20;
/// A process that has just been started listens within this time.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);
/// After a failure.
const RETRY: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(10);

/// What a process is given.
#[derive(Clone, Debug)]
pub struct Task {
    /// The TUN device's name.
    pub device: &'static str,
    /// The device's index.
    pub ifindex: u32,
    /// Where the process listens for the agent.
    pub socket: PathBuf,
    /// The UDP port.
    pub port: u16,
    /// The node's key.
    pub key: PrivateKey,
}

/// The process, as the agent keeps it running.
#[derive(Debug)]
pub struct Process {
    task: Task,
    peers: Mutex<Vec<EncryptionPeer>>,
    /// Where requests go while the process runs; else why it does not.
    client: Mutex<Result<Client, String>>,
    is_ended: AtomicBool,
}

impl Process {
    /// Finds the process of the task or starts it, and again whenever it ends.
    pub fn start(task: Task) -> Result<Arc<Self>> {
        let client = Mutex::new(Err("weir wireguard has not been started yet".to_owned()));
        let process =
            Arc::new(Self { task, peers: Mutex::default(), client, is_ended: AtomicBool::new(false) });
        let supervised = process.clone();
        thread::Builder::new()
            .name("weir-wireguard".to_owned())
            .spawn(move || supervised.supervise())
            .context("starting a thread")?;
        Ok(process)
    }

    /// Ends the process for good.
    pub fn end(&self) {
        self.is_ended.store(true, Ordering::SeqCst);
        // Whatever listens there is of no use any more.
        if let Ok(mut client) = Client::connect(&self.task.socket) {
            let _ = client.call(&Request::Stop, &[]);
        }
        *lock(&self.client) = Err("weir wireguard was ended with its key".to_owned());
    }

    /// Makes these all peers.
    pub fn set_peers(&self, peers: &[EncryptionPeer]) -> Result<()> {
        // A process that comes later gets them from here.
        let mut all = lock(&self.peers);
        *all = peers.to_vec();
        self.ask(&Request::Peers { peers: peers.to_vec() }).map(drop)
    }

    /// How the process is.
    pub fn state(&self) -> Result<SideState> {
        self.ask(&Request::Status)
    }

    fn ask(&self, request: &Request) -> Result<SideState> {
        match &mut *lock(&self.client) {
            Ok(client) => {
                let answer = client.call(request, &[]);
                // An answer that comes late would be taken for the next one.
                if answer.is_err()
                    && let Ok(another) = Client::connect(&self.task.socket)
                {
                    *client = another;
                }
                answer.context("talking to weir wireguard")
            }
            Err(why) => bail!("{why}"),
        }
    }

    /// Keeps a process running that has the device, the key and the peers.
    fn supervise(&self) {
        let mut child: Option<Child> = None;
        while !self.is_ended.load(Ordering::SeqCst) {
            match self.connect(&mut child) {
                Ok(watch) => {
                    watch.wait_for_end();
                    if self.is_ended.load(Ordering::SeqCst) {
                        break;
                    }
                    tracing::warn!("weir wireguard has ended: starting it again");
                    *lock(&self.client) = Err("weir wireguard has ended".to_owned());
                }
                Err(error) => {
                    let why = crate::error::chain(&error);
                    tracing::error!(error = why, retry = ?RETRY, "starting weir wireguard");
                    *lock(&self.client) = Err(why);
                    thread::sleep(RETRY);
                }
            }
        }
        if let Some(mut child) = child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Finds the process or starts one, gives it all that it lacks, and returns a connection that ends with it.
    fn connect(&self, child: &mut Option<Child>) -> Result<Client> {
        let mut client = match Client::connect(&self.task.socket) {
            Ok(client) => client,
            Err(_) => self.spawn(child)?,
        };
        let watch = Client::connect(&self.task.socket).context("connecting to weir wireguard")?;
        let state = client.call(&Request::Status, &[]).context("asking weir wireguard")?;
        let is_ours = |running: &Running| {
            running.ifindex == self.task.ifindex && running.public_key == self.task.key.public()
        };
        match state.running {
            None => self.give(&mut client)?,
            Some(running) if is_ours(&running) => {
                tracing::info!(pid = state.pid, "weir wireguard runs already");
            }
            // With another device or key: what it does is of no use.
            Some(_) => {
                let _ = client.call(&Request::Stop, &[]);
                watch.wait_for_end();
                bail!("it had another device or key, and was ended");
            }
        }
        let peers = lock(&self.peers);
        if !peers.is_empty() {
            let request = Request::Peers { peers: peers.clone() };
            client.call(&request, &[]).context("telling weir wireguard its peers")?;
        }
        // One that was started while it was to end.
        if self.is_ended.load(Ordering::SeqCst) {
            let _ = client.call(&Request::Stop, &[]);
            bail!("it was ended");
        }
        // Whoever sets the peers from now on does so here: none is missed.
        *lock(&self.client) = Ok(client);
        drop(peers);
        Ok(watch)
    }

    fn spawn(&self, child: &mut Option<Child>) -> Result<Client> {
        if let Some(mut before) = child.take() {
            // It does not listen: it has ended, or is about to.
            let _ = before.kill();
            let _ = before.wait();
        }
        let program = std::env::current_exe().context("finding the program")?;
        let mut command = Command::new(program);
        command.arg("wireguard").arg("--socket").arg(&self.task.socket).stdin(Stdio::null());
        // What ends the agent does not end it.
        command.process_group(0);
        *child = Some(command.spawn().context("starting weir wireguard")?);
        let deadline = Instant::now() + LISTENS_WITHIN;
        loop {
            match Client::connect(&self.task.socket) {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("weir wireguard does not listen");
                }
                Err(_) => thread::sleep(POLL),
            }
        }
    }

    fn give(&self, client: &mut Client) -> Result<()> {
        let device = netlink::take_tun(self.task.device)?;
        netlink::set_tun_offload(&device.as_raw_fd(), TunOffload::Tcp)?;
        let port = self.task.port;
        let ipv4 = listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            .with_context(|| format!("listening at UDP port {port}"))?;
        let ipv6 = listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        let mut descriptors = vec![device.as_fd(), ipv4.as_fd()];
        match &ipv6 {
            Ok(ipv6) => descriptors.push(ipv6.as_fd()),
            Err(error) => tracing::info!(%error, "no IPv6 between the nodes"),
        }
        let request = Request::Start { private_key: self.task.key.clone(), ifindex: self.task.ifindex };
        let state = client.call(&request, &descriptors).context("giving weir wireguard its device")?;
        tracing::info!(pid = state.pid, device = self.task.device, "weir wireguard encrypts");
        Ok(())
    }
}

/// A UDP socket of one family.
fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    // Smaller buffers lose packets under load, which is no reason not to begin.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BYTES);
    let _ = setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BYTES);
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}
