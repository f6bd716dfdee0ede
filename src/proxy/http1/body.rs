//! Where bodies end: by length, by chunks, or with the connection.

use super::head::{Refusal, is_framing, malformed};

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// After so many bytes.
    Length(u64),
    /// With the last chunk.
    Chunked,
    /// With the connection; answers only.
    Close,
}

/// The longest line of a chunk's size.
const SIZE_LINE_MAX: usize = 512;
/// The longest trailer section.
const TRAILERS_MAX: usize = 8 << 10;

/// Reads a body, and says how many of the bytes are its own.
#[derive(Clone, Debug)]
pub struct Body {
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// So many bytes to go, then the end.
    Length(u64),
    /// The line that begins a chunk; what has come of it.
    Size(Vec<u8>),
    /// So many bytes of a chunk to go.
    Data(u64),
    /// The CR and LF behind a chunk's data: how many have come.
    DataEnd(u8),
    /// Lines behind the last chunk: what has come of the line, and how many bytes there were.
    Trailers(Vec<u8>, usize),
    /// All until the connection ends.
    Close,
    /// It has ended.
    Done,
}

impl Body {
    /// A body that begins with the next byte.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size(Vec::new()),
            Framing::Close => State::Close,
        };
        Self { state }
    }

    /// True if no further byte belongs to it.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// How many bytes are sure to belong to it, whatever they are.
    pub fn sure(&self) -> u64 {
        match self.state {
            State::Length(left) | State::Data(left) => left,
            State::Close => u64::MAX,
            _ => 0,
        }
    }

    /// Says that bytes that are sure to belong to it went another way.
    pub fn skip(&mut self, bytes: u64) {
        match &mut self.state {
            State::Length(left) | State::Data(left) => *left = left.saturating_sub(bytes),
            _ => {}
        }
        match self.state {
            State::Length(0) => self.state = State::Done,
            State::Data(0) => self.state = State::DataEnd(0),
            _ => {}
        }
    }

    /// How many of `bytes` belong to the body.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        let mut taken = 0;
        while taken < bytes.len() && !self.is_done() {
            let sure = self.sure().min((bytes.len() - taken) as u64);
            if sure > 0 {
                self.skip(sure);
                // Not more than there are bytes.
                taken += sure as usize;
            } else {
                self.step(bytes[taken])?;
                taken += 1;
            }
        }
        Ok(taken)
    }

    fn step(&mut self, byte: u8) -> Result<(), Refusal> {
        match &mut self.state {
            State::Size(line) => {
                if let Some(line) = whole_line(line, byte, SIZE_LINE_MAX)? {
                    self.state = match chunk_size(&line)? {
                        0 => State::Trailers(Vec::new(), 0),
                        size => State::Data(size),
                    };
                }
            }
            State::DataEnd(came) => match (*came, byte) {
                (0, b'\r') => *came = 1,
                (1, b'\n') => self.state = State::Size(Vec::new()),
                _ => return Err(malformed("a chunk that is longer than its size")),
            },
            State::Trailers(line, length) => {
                *length += 1;
                if *length > TRAILERS_MAX {
                    return Err(Refusal { status: 431, why: "the trailers are too long" });
                }
                match whole_line(line, byte, TRAILERS_MAX)? {
                    Some(line) if line.is_empty() => self.state = State::Done,
                    Some(line) => check_trailer(&line)?,
                    None => {}
                }
            }
            State::Length(_) | State::Data(_) | State::Close | State::Done => {}
        }
        Ok(())
    }
}

/// Adds a byte to a line; gives the line without its CR LF when it is whole.
fn whole_line(line: &mut Vec<u8>, byte: u8, longest: usize) -> Result<Option<Vec<u8>>, Refusal> {
    match (line.last(), byte) {
        (Some(b'\r'), b'\n') => {
            line.pop();
            return Ok(Some(std::mem::take(line)));
        }
        (Some(b'\r'), _) => return Err(malformed("a CR without LF in a body's framing")),
        (_, b'\n') => return Err(malformed("an LF without CR in a body's framing")),
        _ if line.len() >= longest => return Err(malformed("a chunk's line is too long")),
        _ => line.push(byte),
    }
    Ok(None)
}

fn chunk_size(line: &[u8]) -> Result<u64, Refusal> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let is_extension = |rest: &[u8]| {
        rest.is_empty() || rest[0] == b';' && rest.iter().all(|byte| (b' '..0x7f).contains(byte))
    };
    if !(1..=15).contains(&digits) || !is_extension(&line[digits..]) {
        return Err(malformed("a chunk's size that is no number"));
    }
    let text = std::str::from_utf8(&line[..digits]).unwrap_or_default();
    u64::from_str_radix(text, 16).map_err(|_| malformed("a chunk's size that is no number"))
}

fn check_trailer(line: &[u8]) -> Result<(), Refusal> {
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let end = line.iter().position(|byte| *byte == b':').unwrap_or(0);
    let (name, value) = line.split_at(end);
    let is_visible = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
    if name.is_empty() || !name.iter().all(is_token) || !value.iter().all(is_visible) || is_framing(name) {
        return Err(malformed("a trailer that is no header"));
    }
    Ok(())
}
