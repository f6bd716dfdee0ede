//! One WireGuard device, which has one key: there are two of them, so that keys change without loss.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

use super::process::{Process, Task};
use super::protocol::{Client, Request};
use super::{PrivateKey, lock};
use crate::model::{EncryptionPeer, PeerState};
use crate::netlink;

/// The devices' names, whoever encrypts.
pub const DEVICES: [&str; 2] = ["weir_wg", "weir_wg1"];
/// Of the processes, beside the socket of the agent.
const SOCKETS: [&str; 2] = [super::protocol::SOCKET_NAME, "wireguard1.sock"];

/// The socket of the process behind each device, where the agent's socket is this one.
pub fn sockets(of_agent: &Path) -> [PathBuf; 2] {
    SOCKETS.map(|name| of_agent.with_file_name(name))
}

/// Who works behind a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The kernel.
    Kernel,
    /// A process.
    User,
}

/// A device.
#[derive(Debug)]
pub struct Slot {
    kind: By,
    name: &'static str,
    mtu: u32,
    port: u16,
    socket: PathBuf,
    ifindex: u32,
    /// While the device has a key.
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Open {
    key: PrivateKey,
    process: Option<Arc<Process>>,
}

impl Slot {
    /// Makes the device, or finds it; `None` on a kernel without WireGuard, if that is to encrypt.
    pub fn prepare(
        kind: By,
        number: usize,
        mtu: u32,
        port: u16,
        socket: PathBuf,
        key: Option<&PrivateKey>,
    ) -> Result<Option<Self>> {
        let name = DEVICES[number];
        let made = match kind {
            By::Kernel => netlink::ensure_wireguard(name, mtu, key.map(PrivateKey::bytes), port)
                .context("making the WireGuard device")?,
            By::User => Some(netlink::ensure_tun(name, mtu).context("making the TUN device")?),
        };
        let Some(ifindex) = made else { return Ok(None) };
        let slot = Self { kind, name, mtu, port, socket, ifindex, open: Mutex::default() };
        match (kind, key) {
            // The kernel has it: told twice, it would be none the wiser.
            (By::Kernel, Some(key)) => {
                *lock(&slot.open) = Some(Open { key: key.clone(), process: None });
            }
            (By::User, Some(key)) => slot.open(key)?,
            (_, None) => slot.close()?,
        }
        Ok(Some(slot))
    }

    /// The device's index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its UDP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process behind it.
    pub fn pid(&self) -> Option<u32> {
        self.process()?.state().ok().map(|state| state.pid)
    }

    fn process(&self) -> Option<Arc<Process>> {
        lock(&self.open).as_ref()?.process.clone()
    }

    /// Gives the device a key, and whoever works behind it.
    pub fn open(&self, key: &PrivateKey) -> Result<()> {
        let mut open = lock(&self.open);
        if open.as_ref().is_some_and(|open| open.key == *key) {
            return Ok(());
        }
        if let Some(Open { process: Some(process), .. }) = open.take() {
            process.end();
        }
        let process = match self.kind {
            By::Kernel => {
                netlink::ensure_wireguard(self.name, self.mtu, Some(key.bytes()), self.port)?;
                None
            }
            By::User => Some(Process::start(Task {
                device: self.name,
                ifindex: self.ifindex,
                socket: self.socket.clone(),
                port: self.port,
                key: key.clone(),
            })?),
        };
        *open = Some(Open { key: key.clone(), process });
        Ok(())
    }

    /// It has a key.
    pub fn is_open(&self) -> bool {
        lock(&self.open).is_some()
    }

    /// Takes the key away, and all peers.
    pub fn close(&self) -> Result<()> {
        let mut open = lock(&self.open);
        match (self.kind, &*open) {
            (By::Kernel, _) => {
                netlink::set_wireguard_peers(self.name, &[])?;
                netlink::ensure_wireguard(self.name, self.mtu, None, self.port)?;
            }
            (By::User, Some(Open { process: Some(process), .. })) => process.end(),
            (By::User, _) => end_process(&self.socket)?,
        }
        *open = None;
        Ok(())
    }

    /// Makes these all peers, where the device has a key.
    pub fn set_peers(&self, peers: &[EncryptionPeer]) -> Result<()> {
        if lock(&self.open).is_none() {
            return Ok(());
        }
        match self.process() {
            None => netlink::set_wireguard_peers(self.name, peers).context("telling WireGuard its peers"),
            Some(process) => process.set_peers(peers),
        }
    }

    /// How the peers are.
    pub fn peers(&self) -> Result<Vec<PeerState>> {
        if lock(&self.open).is_none() {
            return Ok(Vec::new());
        }
        match self.process() {
            None => netlink::wireguard_peers(self.name).context("reading WireGuard's peers"),
            Some(process) => Ok(process.state()?.peers),
        }
    }

    /// What is wrong with the device.
    pub fn look(&self) -> Result<Option<String>> {
        let name = self.name;
        // WireGuard's device is down while it has no key.
        let is_to_be_up = self.kind == By::User || lock(&self.open).is_some();
        let there = netlink::link(name)?.filter(|link| link.index == self.ifindex);
        Ok(match there {
            None => Some(format!("device {name} is gone")),
            Some(link) if is_to_be_up && !link.is_up => Some(format!("device {name} is down")),
            Some(link) if is_to_be_up && link.mtu != self.mtu => {
                Some(format!("device {name} has MTU {}, and not {}", link.mtu, self.mtu))
            }
            Some(_) => None,
        })
    }

    /// Makes the device as it was. False: it has another index now.
    pub fn mend(&self) -> Result<bool> {
        let open = lock(&self.open);
        let ifindex = match self.kind {
            By::Kernel => {
                let key = open.as_ref().map(|open| open.key.bytes());
                netlink::ensure_wireguard(self.name, self.mtu, key, self.port)?
            }
            By::User => Some(netlink::ensure_tun(self.name, self.mtu)?),
        };
        Ok(ifindex == Some(self.ifindex))
    }
}

/// Ends the process that listens at a socket, if there is one.
fn end_process(socket: &Path) -> Result<()> {
    match Client::connect(socket) {
        Ok(mut client) => client.call(&Request::Stop, &[]).map(drop).context("ending weir wireguard"),
        Err(_) => Ok(()),
    }
}

/// Ends the processes, if there are any, and removes the devices; false if there were none.
pub fn remove_wireguard(socket_of_agent: &Path) -> Result<bool> {
    let mut were_there = false;
    for (name, socket) in DEVICES.into_iter().zip(sockets(socket_of_agent)) {
        end_process(&socket)?;
        were_there |= netlink::delete_link(name).with_context(|| format!("removing the device {name}"))?;
    }
    Ok(were_there)
}
