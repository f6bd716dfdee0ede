//! What a process that faces strangers may still do.

use std::io;

/// Of capabilities(7): another address's sockets, and ports below 1024.
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_NET_RAW: u32 = 13;
/// _LINUX_CAPABILITY_VERSION_3: 64 capabilities in two words.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    process: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Set {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up every capability of the calling thread but what transparent sockets need, for good: programs that it
/// starts get none back. Threads that it starts later have no more than it has.
#[allow(unsafe_code)]
pub fn keep_transparent_sockets_only() -> io::Result<()> {
    // SAFETY: these calls take plain numbers.
    let outcome = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
            | libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0)
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    let kept = (1 << CAP_NET_BIND_SERVICE) | (1 << CAP_NET_RAW);
    let header = Header { version: VERSION_3, process: 0 };
    let sets = [Set { effective: kept, permitted: kept, inheritable: 0 }, Set::default()];
    // SAFETY: the kernel reads a header and two sets, which is what version 3 has, and writes to the header only.
    let outcome = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the process open as many descriptors as it ever may.
pub fn raise_descriptor_limit() -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}
