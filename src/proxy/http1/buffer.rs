//! Bytes on their way: those that may go on, and behind them those that nobody has judged yet.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;

/// How much is read at once, by default and inside of long bodies.
const READ: usize = 16 << 10;
const READ_LONG: usize = 64 << 10;
/// With so much waiting to be written, nothing more is read.
const FULL: usize = 64 << 10;

/// One direction of a connection.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// What lies before was written.
    start: usize,
    /// What lies before may be written.
    judged: usize,
    /// The peer sends no more.
    pub is_ended: bool,
}

impl Buffer {
    /// Bytes that nobody has judged yet.
    pub fn unjudged(&self) -> &[u8] {
        &self.bytes[self.judged..]
    }

    /// Lets the next bytes go on.
    pub fn pass(&mut self, count: usize) {
        self.judged = (self.judged + count).min(self.bytes.len());
    }

    /// Lets everything go on.
    pub fn pass_all(&mut self) {
        self.judged = self.bytes.len();
    }

    /// Takes the next bytes away.
    pub fn discard(&mut self, count: usize) {
        let end = (self.judged + count).min(self.bytes.len());
        self.bytes.drain(self.judged..end);
    }

    /// Puts bytes in the place of the next ones, and lets them go on.
    pub fn replace(&mut self, count: usize, by: &[u8]) {
        let end = (self.judged + count).min(self.bytes.len());
        self.bytes.splice(self.judged..end, by.iter().copied());
        self.judged += by.len();
    }

    /// How many bytes wait to be written.
    pub fn waiting(&self) -> usize {
        self.judged - self.start
    }

    /// True if so much waits that nothing more should be read.
    pub fn is_full(&self) -> bool {
        self.waiting() >= FULL
    }

    /// Takes everything out that was not written.
    pub fn take(&mut self) -> Vec<u8> {
        let rest = self.bytes.split_off(self.start);
        *self = Self { is_ended: self.is_ended, ..Self::default() };
        rest
    }

    /// Gives memory back when nothing is in it.
    pub fn shrink(&mut self) {
        if self.start == self.bytes.len() && self.bytes.capacity() > 0 {
            self.bytes = Vec::new();
            (self.start, self.judged) = (0, 0);
        }
    }

    /// Reads what there is; `Ready(0)` at the end.
    pub fn poll_read(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
        is_long: bool,
    ) -> Poll<io::Result<usize>> {
        // Nothing is allocated for a peer that has sent nothing.
        std::task::ready!(stream.poll_read_ready(cx))?;
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.judged -= self.start;
            self.start = 0;
        }
        self.bytes.reserve(if is_long { READ_LONG } else { READ });
        let count = std::task::ready!(pin!(stream.read_buf(&mut self.bytes)).poll(cx))?;
        self.is_ended = count == 0;
        Poll::Ready(Ok(count))
    }

    /// Writes what may be written.
    pub fn poll_write(&mut self, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let waiting = &self.bytes[self.start..self.judged];
        let count = std::task::ready!(Pin::new(stream).poll_write(cx, waiting))?;
        self.start += count;
        Poll::Ready(Ok(count))
    }
}
