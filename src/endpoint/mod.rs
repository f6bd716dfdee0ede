//! The pods of this node: made and unmade for CNI, remembered on disk.
//!
//! ```text
//!             allocate      store       create link     row in table
//! CNI ADD --> id, addresses --> file --> host side down --> agent compiles,
//!                                                           writes, attaches
//!         <-- answer <-- host side up <-- Enforced <--------------'
//! ```
//!
//! A pod's packets can pass only after its policy is enforced. Whatever fails on
//! the way, everything before it is undone. After a restart the files are the
//! truth: ids and addresses in use come from them.

mod enforced;
mod manager;
mod removal;
mod store;

use sha2::{Digest, Sha256};

pub use enforced::{Enforced, Progress};
pub use manager::{Manager, Options, VerifyPrograms};
pub use store::Store;

use crate::model::MacAddress;
use crate::model::cni::Attachment;

/// What the devices on the node's side begin with.
const INTERFACE_PREFIX: &str = "weir";
const INTERFACE_DIGITS: usize = 10;

/// The name of the node's side of an attachment's link: DEL finds it without any state.
pub fn host_interface_name(attachment: &Attachment) -> String {
    let digits: String = digest(attachment).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{INTERFACE_PREFIX}{}", &digits[..INTERFACE_DIGITS])
}

/// True for names that `host_interface_name` makes.
pub fn is_host_interface_name(name: &str) -> bool {
    name.strip_prefix(INTERFACE_PREFIX).is_some_and(|digits| {
        digits.len() == INTERFACE_DIGITS
            && digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    })
}

/// The hardware address inside the pod: locally administered, of the attachment alone.
fn pod_mac(attachment: &Attachment) -> MacAddress {
    let digest = digest(attachment);
    MacAddress([0x0a, digest[5], digest[6], digest[7], digest[8], digest[9]])
}

fn digest(attachment: &Attachment) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(&attachment.container_id);
    hash.update([0]);
    hash.update(&attachment.interface);
    hash.finalize().into()
}

#[cfg(test)]
mod tests;
