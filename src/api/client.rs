//! The asking side: blocking, of the standard library alone, quick to start.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::{Error, Line, Request};

/// Longer answers are refused: nothing the agent says in one line comes near it.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Read at once: some fifty flows.
const READ_BYTES: usize = 64 * 1024;

/// A connection that will carry one request.
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects; `Error::Unavailable` at once when nobody listens.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path)
            .map_err(|source| Error::Unavailable { path: path.to_owned(), source })?;
        Ok(Self { stream })
    }

    /// Gives up on an answer after so long; without it a call waits for ever.
    pub fn with_timeout(self, timeout: Duration) -> Result<Self, Error> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.set_write_timeout(Some(timeout))?;
        Ok(self)
    }

    /// Asks, and reads the one answer.
    pub fn call<T: DeserializeOwned>(self, request: &Request) -> Result<T, Error> {
        self.stream(request)?.next().unwrap_or_else(|| {
            Err(Error::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up without an answer")))
        })
    }

    /// Asks, and reads answers as they come, until the agent has no more.
    pub fn stream<T: DeserializeOwned>(mut self, request: &Request) -> Result<Stream<T>, Error> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.write_all(&line)?;
        Ok(Stream { reader: BufReader::with_capacity(READ_BYTES, self.stream), answers: PhantomData })
    }
}

/// The answers to one request.
pub struct Stream<T> {
    reader: BufReader<UnixStream>,
    answers: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Iterator for Stream<T> {
    type Item = Result<T, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        match (&mut self.reader).take(ANSWER_BYTES_MAX).read_until(b'\n', &mut line) {
            Err(error) => Some(Err(Error::Io(error))),
            Ok(0) => None,
            Ok(_) => Some(match serde_json::from_slice::<Line<T>>(&line) {
                Ok(Line::Result(result)) => Ok(result),
                Ok(Line::Error(refusal)) => Err(Error::Refused(refusal)),
                Err(error) => Err(Error::Protocol(error)),
            }),
        }
    }
}
