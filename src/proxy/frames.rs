//! Messages that stand behind their length.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is read at once.
const READ: usize = 4096;

/// Reads messages from one direction of a connection. A read that is given up loses nothing.
#[derive(Debug)]
pub struct Frames {
    bytes: Vec<u8>,
    width: usize,
    longest: usize,
}

impl Frames {
    /// Lengths have `width` bytes and are at most `longest`.
    pub fn new(width: usize, longest: usize) -> Self {
        Self { bytes: Vec::new(), width, longest }
    }

    /// The next message with its length before it; `None`: the peer has ended the connection.
    pub async fn next(&mut self, reads: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            self.bytes.reserve(READ);
            if reads.read_buf(&mut self.bytes).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// True if a message has begun and is not whole.
    pub fn is_inside(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// What was read and is no whole message yet.
    pub fn into_rest(self) -> Vec<u8> {
        self.bytes
    }

    fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(prefix) = self.bytes.get(..self.width) else { return Ok(None) };
        let length = prefix.iter().fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
        if length > self.longest {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than it may be"));
        }
        if self.bytes.len() < self.width + length {
            return Ok(None);
        }
        let rest = self.bytes.split_off(self.width + length);
        Ok(Some(std::mem::replace(&mut self.bytes, rest)))
    }
}
