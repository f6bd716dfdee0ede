//! Work in a pod's network namespace: a thread that enters it and ends there.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io, thread};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::{Error, Result};

/// NS_GET_NSTYPE of linux/nsfs.h, `_IO(0xb7, 3)`; the kernel has it since 4.11.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
/// Of asm-generic/socket.h; the libc crate does not have it.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Opens `path` if it is a network namespace and not the agent's own.
pub fn open_namespace(path: &Path) -> Result<File> {
    let refuse = |reason: String, is_absent| Error::Namespace { path: path.to_owned(), reason, is_absent };
    let file = File::open(path)
        .map_err(|error| refuse(error.to_string(), error.kind() == io::ErrorKind::NotFound))?;
    let kind = fstatfs(&file).map_err(|error| refuse(error.to_string(), false))?.filesystem_type();
    if kind != NSFS_MAGIC {
        // What is left of a mounted namespace is an empty file.
        return Err(refuse("is no namespace".to_owned(), true));
    }
    if !is_network_namespace(&file) {
        return Err(refuse("is another kind of namespace".to_owned(), false));
    }
    let its = file.metadata().map_err(|error| refuse(error.to_string(), false))?;
    let ours = fs::metadata("/proc/thread-self/ns/net").map_err(|error| refuse(error.to_string(), false))?;
    if (its.dev(), its.ino()) == (ours.dev(), ours.ino()) {
        return Err(refuse("is the node's own".to_owned(), false));
    }
    Ok(file)
}

/// Runs `work` on a thread of its own within the network namespace.
pub fn within<T: Send>(namespace: &File, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let entered = || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|error| Error::kernel("entering the network namespace", error))?;
            work()
        };
        thread::Builder::new()
            .name("weir-netns".to_owned())
            .spawn_scoped(scope, entered)
            .map_err(|error| Error::kernel("starting a thread", error))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The kernel's name for the network namespace of the calling thread, which is never 0; `None` where it
/// has none (SO_NETNS_COOKIE of socket(7), since 5.14).
#[allow(unsafe_code)]
pub fn namespace_cookie() -> Option<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))
        .or_else(|_| std::net::UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, 0)))
        .ok()?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes to `cookie`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (outcome == 0 && cookie != 0).then_some(cookie)
}

#[allow(unsafe_code)]
fn is_network_namespace(namespace: &File) -> bool {
    // SAFETY: the descriptor is open; this request takes no argument and writes no memory.
    let kind = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}
