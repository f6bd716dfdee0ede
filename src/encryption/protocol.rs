//! What the agent says to `weir wireguard`, and hears: JSON objects over a Unix socket, one a line, an answer to
//! each request. Descriptors come with the line that needs them.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::PrivateKey;
use crate::model::{EncryptionPeer, PeerState, PublicKey};
use crate::netlink;

/// Where the process listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/weir/wireguard.sock";

/// The same beside the socket of an agent.
pub const SOCKET_NAME: &str = "wireguard.sock";

/// Longer requests are refused; 5,000 peers have two fifths of it.
const REQUEST_BYTES_MAX: usize = 4 * 1024 * 1024;
/// An answer that takes longer does not come.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Everything that can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum Request {
    /// Begin; the TUN device comes with it, then one UDP socket or two. Once in the life of a process.
    Start {
        /// This node's key.
        private_key: PrivateKey,
        /// The device, by its index.
        ifindex: u32,
    },
    /// These are all peers.
    Peers {
        /// In any order.
        peers: Vec<EncryptionPeer>,
    },
    /// How it is.
    Status,
    /// End.
    Stop,
}

/// How the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideState {
    /// Of the program.
    pub version: String,
    /// The process's id.
    pub pid: u32,
    /// The device and the key that it has; none before it was told to begin.
    pub running: Option<Running>,
    /// How its peers are.
    pub peers: Vec<PeerState>,
    /// Packets to addresses that no peer has.
    pub without_peer: u64,
}

/// What a process was begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The device.
    pub ifindex: u32,
    /// The public half of the key.
    pub public_key: PublicKey,
}

/// The answer to a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was done; this is how the process is now.
    State(SideState),
    /// It was not, and why.
    Error(String),
}

/// The agent's end.
#[derive(Debug)]
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects to a process.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks, and hands over descriptors.
    pub fn call(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<SideState> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        netlink::send_with_descriptors(self.0.get_ref(), &line, descriptors)?;
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up without an answer"));
        }
        match serde_json::from_str(&line)? {
            Answer::State(state) => Ok(state),
            Answer::Error(error) => Err(io::Error::other(error)),
        }
    }

    /// Returns when the process has ended.
    pub fn wait_for_end(mut self) {
        if self.0.get_ref().set_read_timeout(None).is_ok() {
            // Nothing is asked on this connection: the process says nothing.
            let _ = self.0.read(&mut [0]);
        }
    }
}

/// The process's end of a connection.
pub(super) struct Asked {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Asked {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, bytes: Vec::new() }
    }

    /// The next request with its descriptors; `None` when the other end has hung up.
    pub(super) fn next(&mut self) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
        let mut descriptors = Vec::new();
        let mut part = vec![0; 64 * 1024];
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return Ok(Some((serde_json::from_slice(&line)?, descriptors)));
            }
            if self.bytes.len() > REQUEST_BYTES_MAX {
                return Err(io::Error::other("a request is longer than any may be"));
            }
            match netlink::receive_with_descriptors(&self.stream, &mut part, &mut descriptors)? {
                0 => return Ok(None),
                count => self.bytes.extend_from_slice(&part[..count]),
            }
        }
    }

    pub(super) fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        netlink::send_with_descriptors(&self.stream, &line, &[])
    }
}
