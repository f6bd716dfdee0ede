//! Encryption between nodes: one device that encrypts what is sent to it.
//!
//! The device is the kernel's WireGuard. Where the kernel has none, it is a persistent TUN device behind
//! `weir wireguard`, a process of its own: it needs neither BPF nor the API server, and it goes on while the
//! agent is away.
//!
//! ```text
//! args        settings
//! device      the agent's side: two devices in turn, the keys, the other nodes
//! works       who encrypts: WireGuard or IPsec
//! slot        one of WireGuard's two devices
//! ipsec       the IPsec device, its states and policies
//! process     keeps the process of a device running, and tells it the peers
//! key, ring   the node's keys
//! rotation    when keys change
//! heard       which keys of other nodes work
//! protocol    what the agent says to the process, over a Unix socket
//! side        the process
//! ```

pub mod args;
mod device;
mod heard;
mod ipsec;
mod key;
mod process;
pub mod protocol;
mod ring;
mod rotation;
mod sent;
pub mod side;
mod slot;
mod works;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use args::{EncryptionArgs, Mode};
pub use device::{Device, DeviceKind, Plan};
pub use ipsec::IPSEC_NUMBER;
pub use key::PrivateKey;
pub use works::{ALL_DEVICES as DEVICES, remove_devices};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
