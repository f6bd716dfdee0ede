//! Sockets that another process listens on, taken from it (pidfd_getfd(2)), and its end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Error, Result};

/// Of a line of /proc/PID/net/tcp: local address, state, inode.
const LOCAL_COLUMN: usize = 1;
const STATE_COLUMN: usize = 3;
const INODE_COLUMN: usize = 9;
/// TCP_LISTEN.
const LISTENS: &str = "0A";

/// A port of the loopback address of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoopbackPort {
    /// Its number.
    pub port: u16,
    /// `::1`, else `127.0.0.1`.
    pub is_ipv6: bool,
}

/// The sockets on which the process listens, of these ports of the loopback address of its own network namespace. A
/// process that is gone, or does not listen there, has none.
pub fn listening_sockets(
    pid: i32,
    ports: &BTreeSet<LoopbackPort>,
) -> Result<BTreeMap<LoopbackPort, OwnedFd>> {
    let failed = |error| Error::kernel(format!("taking the sockets of process {pid}"), error);
    let mut inodes = BTreeMap::new();
    for (table, is_ipv6) in [("tcp", false), ("tcp6", true)] {
        let text = match fs::read_to_string(format!("/proc/{pid}/net/{table}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read.map_err(failed)?,
        };
        let listeners = text.lines().skip(1).filter_map(|line| listener(line, is_ipv6));
        inodes.extend(listeners.filter(|(port, _)| ports.contains(port)).map(|(port, inode)| (inode, port)));
    }
    let mut sockets = BTreeMap::new();
    if inodes.is_empty() {
        return Ok(sockets);
    }
    let process = open_process(pid).map_err(failed)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let inode = target
            .to_str()
            .and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (Some(inode), Some(number)) = (inode, number) else { continue };
        if let Some(port) = inodes.get::<u64>(&inode).filter(|port| !sockets.contains_key(*port)) {
            sockets.insert(*port, take(&process, number).map_err(failed)?);
        }
    }
    Ok(sockets)
}

/// Ends the process, and waits until it has ended and has let go of its sockets; an error if that takes longer.
pub fn end_process(pid: i32, within: Duration) -> Result<()> {
    let failed = |error| Error::kernel(format!("ending process {pid}"), error);
    let process = match open_process(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        opened => opened.map_err(failed)?,
    };
    match kill(&process) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        killed => killed.map_err(failed)?,
    }
    let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
    let mut ends = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    match poll(&mut ends, timeout) {
        Ok(0) => Err(failed(io::ErrorKind::TimedOut.into())),
        Ok(_) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

/// The port and inode of a line that is a listener at a loopback address.
fn listener(line: &str, is_ipv6: bool) -> Option<(LoopbackPort, u64)> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = columns.get(LOCAL_COLUMN)?.split_once(':')?;
    // In memory order, as words of the machine.
    let loopback = match is_ipv6 {
        true => format!("{:024}{:08X}", 0, u32::from_ne_bytes([0, 0, 0, 1])),
        false => format!("{:08X}", u32::from_ne_bytes([127, 0, 0, 1])),
    };
    let is_it = *columns.get(STATE_COLUMN)? == LISTENS && address == loopback;
    let port = LoopbackPort { port: u16::from_str_radix(port, 16).ok()?, is_ipv6 };
    Some((port, columns.get(INODE_COLUMN)?.parse().ok()?)).filter(|_| is_it)
}

#[allow(unsafe_code)]
fn open_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes plain numbers.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(descriptor)
}

#[allow(unsafe_code)]
fn take(process: &OwnedFd, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes plain numbers, of which the first is an open descriptor.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    owned(descriptor)
}

#[allow(unsafe_code)]
fn kill(process: &OwnedFd) -> io::Result<()> {
    let nothing = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the call takes plain numbers, of which the first is an open descriptor, and no address.
    let done =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGKILL, nothing, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[allow(unsafe_code)]
fn owned(descriptor: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(descriptor) {
        // SAFETY: the kernel has just opened the descriptor for this process, and nobody else has it.
        Ok(descriptor @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_of_a_process_is_found_by_its_port() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = LoopbackPort { port: listener.local_addr()?.port(), is_ipv6: false };
        let absent = LoopbackPort { is_ipv6: true, ..port };
        let pid = i32::try_from(std::process::id())?;
        let found = listening_sockets(pid, &BTreeSet::from([port, absent]))?;
        assert_eq!(found.keys().collect::<Vec<_>>(), [&port]);
        let taken = TcpListener::from(found.into_values().next().ok_or("a socket")?);
        assert_eq!(taken.local_addr()?, listener.local_addr()?);
        assert!(listening_sockets(pid, &BTreeSet::from([absent]))?.is_empty());
        Ok(())
    }

    #[test]
    fn a_process_that_was_ended_has_ended() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let mut child = std::process::Command::new("sleep").arg("600").spawn()?;
        let pid = i32::try_from(child.id())?;
        end_process(pid, Duration::from_secs(60))?;
        assert!(child.try_wait()?.is_some_and(|status| !status.success()), "it runs yet");
        // It is gone: that is no error.
        end_process(pid, Duration::from_secs(60))?;
        Ok(())
    }
}
