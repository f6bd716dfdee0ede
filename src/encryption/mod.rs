//! Encryption between nodes: one device that encrypts what is sent to it.
//!
//! The device is the kernel's WireGuard. Where the kernel has none, it is a persistent TUN device behind
//! `weir wireguard`, a process of its own: it needs neither BPF nor the API server, and it goes on while the
//! agent is away.
//!
//! ```text
//! args        settings
//! device      the agent's side: makes the device, keeps the process running, tells it the peers
//! key         the node's key
//! protocol    what the agent says to the process, over a Unix socket
//! side        the process
//! ```

pub mod args;
mod device;
mod key;
pub mod protocol;
pub mod side;

pub use args::{EncryptionArgs, Mode};
pub use device::{DEVICE, Device, DeviceKind, Plan, remove_device};
pub use key::PrivateKey;
