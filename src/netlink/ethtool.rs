//! What a device's driver does by itself (uapi/linux/ethtool.h).

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{Error, Result};

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const GET_STRINGS: u32 = 0x1b;
const GET_SET_INFO: u32 = 0x37;
const GET_FEATURES: u32 = 0x3a;
const SET_TX_CHECKSUM: u32 = 0x17;
/// The set of strings that names features.
const FEATURES: u32 = 4;
const NAME_BYTES: usize = 32;
/// Words of a block of features: available, requested, active, never changed.
const BLOCK_WORDS: usize = 4;

/// The features of a device that are active, by the names that ethtool shows: `rx-vlan-hw-parse`.
pub fn active_features(device: &str) -> Result<BTreeSet<String>> {
    features(device).map_err(|cause| Error::kernel(format!("reading the features of device {device}"), cause))
}

/// Whether checksums of what the device sends are left to its driver.
pub fn set_tx_checksum(device: &str, on: bool) -> Result<()> {
    call(device, &mut [SET_TX_CHECKSUM, u32::from(on)])
        .map_err(|cause| Error::kernel(format!("setting the checksums of device {device}"), cause))
}

fn features(device: &str) -> io::Result<BTreeSet<String>> {
    let mask = 1_u64 << FEATURES;
    let mut info = [GET_SET_INFO, 0, mask as u32, (mask >> 32) as u32, 0];
    call(device, &mut info)?;
    let count = info[4] as usize;
    let mut names = vec![0; 3 + count * NAME_BYTES / size_of::<u32>()];
    names[..3].copy_from_slice(&[GET_STRINGS, FEATURES, info[4]]);
    call(device, &mut names)?;
    let blocks = count.div_ceil(32);
    let mut states = vec![0; 2 + blocks * BLOCK_WORDS];
    states[..2].copy_from_slice(&[GET_FEATURES, blocks as u32]);
    call(device, &mut states)?;
    let is_active = |index: usize| {
        let block = states.get(2 + index / 32 * BLOCK_WORDS..).unwrap_or_default();
        block.get(2).is_some_and(|active| active >> (index % 32) & 1 == 1)
    };
    let bytes: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let all = bytes.chunks_exact(NAME_BYTES).enumerate().filter(|(index, _)| is_active(*index));
    Ok(all.map(|(_, name)| text(name)).collect())
}

fn text(name: &[u8]) -> String {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

/// One command; `words` begins with its number, and has room for its whole answer.
#[allow(unsafe_code)]
fn call(device: &str, words: &mut [u32]) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: `struct ifreq` is numbers and a pointer; all of them may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: the descriptor is open; the kernel reads one `struct ifreq`, and writes to `words` no more than the
    // answer to their command has: the callers have made room for that.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, std::ptr::from_mut(&mut request)) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_device_has_features_and_an_unknown_one_is_an_error() {
        let features = active_features("lo").expect("it is always there");
        assert!(features.contains("tx-lockless") || features.contains("rx-checksum"), "{features:?}");
        assert!(active_features("no-such-dev").is_err());
        assert!(active_features("a-name-that-is-too-long").is_err());
    }
}
