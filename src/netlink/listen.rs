//! Messages that the kernel sends to a group of listeners.

use std::io;
use std::thread;

use netlink_sys::{Socket, SocketAddr};
use tokio::sync::watch;

/// Changes whenever the kernel sends a message to one of these groups of a netlink protocol, in the calling
/// thread's network namespace; several messages may be one change. `name` is the listening thread's. The
/// channel closes when the kernel can no longer be heard.
pub(super) fn listen(protocol: isize, groups: &[u32], name: &str) -> io::Result<watch::Receiver<()>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    let (news, heard) = watch::channel(());
    let listen = move || {
        while hear(&socket).is_ok() {
            if news.send(()).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name(name.to_owned()).spawn(listen)?;
    Ok(heard)
}

/// Waits for a message. The content does not matter: the listener asks for the whole state again.
fn hear(socket: &Socket) -> io::Result<()> {
    match socket.recv_from_full() {
        Ok(_) => Ok(()),
        // More came than the kernel kept.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(error) => Err(error),
    }
}
