//! The device that encrypts, as the agent has it.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

use super::PrivateKey;
use super::args::DeviceChoice;
use super::protocol::{Client, Request, SideState};
use crate::model::{EncryptionPeer, NodeKey, PeerState};
use crate::netlink::{self, TunOffload};

/// The device's name, whoever encrypts.
pub const DEVICE: &str = "weir_wg";

/// What the sockets hold while the process does not run: a tenth of a second of 200,000 packets a second.
const SOCKET_BYTES: usize = 4 << 20;
/// A process that has just been started listens within this time.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);
/// After a failure.
const RETRY: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(10);

/// What the device shall be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who encrypts.
    pub choice: DeviceChoice,
    /// Its MTU.
    pub mtu: u32,
    /// UDP port.
    pub port: u16,
    /// The mark of what the kernel's device sends.
    pub fwmark: u32,
    /// Where the key is.
    pub state_directory: PathBuf,
    /// The socket of the process.
    pub socket: PathBuf,
}

/// Who encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The kernel's WireGuard.
    Kernel,
    /// `weir wireguard`.
    User,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel's WireGuard",
            Self::User => "weir wireguard, as the kernel has no WireGuard or is not asked for it",
        })
    }
}

/// The device, and who works behind it.
#[derive(Debug)]
pub struct Device {
    plan: Plan,
    key: PrivateKey,
    kind: DeviceKind,
    ifindex: u32,
    side: Option<Arc<Side>>,
}

impl Device {
    /// Makes the device, or finds it, and starts who works behind it.
    pub fn prepare(plan: Plan) -> Result<Self> {
        let key = PrivateKey::of(&plan.state_directory)?;
        if plan.choice != DeviceChoice::User {
            let made = netlink::ensure_wireguard(DEVICE, plan.mtu, key.bytes(), plan.port, plan.fwmark)
                .context("making the WireGuard device")?;
            if let Some(ifindex) = made {
                return Ok(Self { plan, key, kind: DeviceKind::Kernel, ifindex, side: None });
            }
            if plan.choice == DeviceChoice::Kernel {
                bail!("WEIR_WIREGUARD_DEVICE=kernel, and this kernel has no WireGuard (module wireguard)");
            }
        }
        let ifindex = netlink::ensure_tun(DEVICE, plan.mtu).context("making the TUN device")?;
        let side = Arc::new(Side::new(&plan, key.clone(), ifindex));
        let supervised = side.clone();
        thread::Builder::new()
            .name("weir-wireguard".to_owned())
            .spawn(move || supervised.supervise())
            .context("starting a thread")?;
        Ok(Self { plan, key, kind: DeviceKind::User, ifindex, side: Some(side) })
    }

    /// Its index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Its MTU.
    pub fn mtu(&self) -> u32 {
        self.plan.mtu
    }

    /// Who encrypts.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// What this node publishes.
    pub fn published(&self) -> NodeKey {
        NodeKey { public_key: self.key.public(), port: self.plan.port }
    }

    /// Makes these all peers.
    pub fn set_peers(&self, peers: &[EncryptionPeer]) -> Result<()> {
        match &self.side {
            None => netlink::set_wireguard_peers(DEVICE, peers).context("telling WireGuard its peers"),
            Some(side) => side.set_peers(peers),
        }
    }

    /// How the peers are.
    pub fn peers(&self) -> Result<Vec<PeerState>> {
        match &self.side {
            None => netlink::wireguard_peers(DEVICE).context("reading WireGuard's peers"),
            Some(side) => Ok(side.state()?.peers),
        }
    }

    /// The process that encrypts.
    pub fn pid(&self) -> Option<u32> {
        self.side.as_ref()?.state().ok().map(|state| state.pid)
    }

    /// What is wrong with the device; it is mended where that is possible without another index.
    pub fn look(&self) -> Result<Option<String>> {
        let there = netlink::link(DEVICE)?.filter(|link| link.index == self.ifindex);
        Ok(match there {
            None => Some(format!("device {DEVICE} is gone")),
            Some(link) if !link.is_up => Some(format!("device {DEVICE} is down")),
            Some(link) if link.mtu != self.plan.mtu => {
                Some(format!("device {DEVICE} has MTU {}, and not {}", link.mtu, self.plan.mtu))
            }
            Some(_) => None,
        })
    }

    /// Makes the device as it was. False: it has another index now.
    pub fn mend(&self) -> Result<bool> {
        let ifindex = match self.kind {
            DeviceKind::Kernel => {
                let (plan, key) = (&self.plan, self.key.bytes());
                netlink::ensure_wireguard(DEVICE, plan.mtu, key, plan.port, plan.fwmark)?
            }
            DeviceKind::User => Some(netlink::ensure_tun(DEVICE, self.plan.mtu)?),
        };
        Ok(ifindex == Some(self.ifindex))
    }
}

/// Ends the process, if there is one, and removes the device; false if there was none.
pub fn remove_device(socket: &Path) -> Result<bool> {
    if let Ok(mut client) = Client::connect(socket) {
        client.call(&Request::Stop, &[]).context("ending weir wireguard")?;
    }
    netlink::delete_link(DEVICE).context("removing the device")
}

/// The process, as the agent keeps it running.
#[derive(Debug)]
struct Side {
    plan: Plan,
    key: PrivateKey,
    ifindex: u32,
    peers: Mutex<Vec<EncryptionPeer>>,
    /// Where requests go while the process runs; else why it does not.
    client: Mutex<Result<Client, String>>,
}

impl Side {
    fn new(plan: &Plan, key: PrivateKey, ifindex: u32) -> Self {
        let client = Mutex::new(Err("weir wireguard has not been started yet".to_owned()));
        Self { plan: plan.clone(), key, ifindex, peers: Mutex::default(), client }
    }

    fn set_peers(&self, peers: &[EncryptionPeer]) -> Result<()> {
        // A process that comes later gets them from here.
        let mut all = lock(&self.peers);
        *all = peers.to_vec();
        self.ask(&Request::Peers { peers: peers.to_vec() }).map(drop)
    }

    fn state(&self) -> Result<SideState> {
        self.ask(&Request::Status)
    }

    fn ask(&self, request: &Request) -> Result<SideState> {
        match &mut *lock(&self.client) {
            Ok(client) => {
                let answer = client.call(request, &[]);
                // An answer that comes late would be taken for the next one.
                if answer.is_err()
                    && let Ok(another) = Client::connect(&self.plan.socket)
                {
                    *client = another;
                }
                answer.context("talking to weir wireguard")
            }
            Err(why) => bail!("{why}"),
        }
    }

    /// Keeps a process running that has the device, the key and the peers. Never returns.
    fn supervise(&self) {
        let mut child = None;
        loop {
            match self.connect(&mut child) {
                Ok(watch) => {
                    watch.wait_for_end();
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
    }

    /// Finds the process or starts one, gives it all that it lacks, and returns a connection that ends with it.
    fn connect(&self, child: &mut Option<Child>) -> Result<Client> {
        let mut client = match Client::connect(&self.plan.socket) {
            Ok(client) => client,
            Err(_) => self.spawn(child)?,
        };
        let watch = Client::connect(&self.plan.socket).context("connecting to weir wireguard")?;
        let state = client.call(&Request::Status, &[]).context("asking weir wireguard")?;
        let is_ours = |running: &super::protocol::Running| {
            running.ifindex == self.ifindex && running.public_key == self.key.public()
        };
        match state.running {
            None => self.start(&mut client)?,
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
        command.arg("wireguard").arg("--socket").arg(&self.plan.socket).stdin(Stdio::null());
        // What ends the agent does not end it.
        command.process_group(0);
        *child = Some(command.spawn().context("starting weir wireguard")?);
        let deadline = Instant::now() + LISTENS_WITHIN;
        loop {
            match Client::connect(&self.plan.socket) {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("weir wireguard does not listen");
                }
                Err(_) => thread::sleep(POLL),
            }
        }
    }

    fn start(&self, client: &mut Client) -> Result<()> {
        let device = netlink::take_tun(DEVICE)?;
        netlink::set_tun_offload(&device.as_raw_fd(), TunOffload::Tcp)?;
        let port = self.plan.port;
        let ipv4 = listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            .with_context(|| format!("listening at UDP port {port}"))?;
        let ipv6 = listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        let mut descriptors = vec![device.as_fd(), ipv4.as_fd()];
        match &ipv6 {
            Ok(ipv6) => descriptors.push(ipv6.as_fd()),
            Err(error) => tracing::info!(%error, "no IPv6 between the nodes"),
        }
        let request = Request::Start { private_key: self.key.clone(), ifindex: self.ifindex };
        let state = client.call(&request, &descriptors).context("giving weir wireguard its device")?;
        tracing::info!(pid = state.pid, device = DEVICE, "weir wireguard encrypts");
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
