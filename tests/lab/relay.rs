//! Two connections that are one: for whoever sits in another network namespace.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::thread;

/// Carries everything both ways until both ends have ended.
pub fn relay(client: TcpStream, server: TcpStream) -> io::Result<()> {
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let forth = thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (server, client);
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = forth.join();
    Ok(())
}
