//! Answers: read only as far as the proxy must know where they end.

use super::body::{Body, Framing};

/// The longest head of an answer.
const HEAD_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 200;

/// What an answer's head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerHead {
    /// `200`
    pub status: u16,
    /// Where the head ends.
    pub length: usize,
    /// How the body ends.
    pub framing: Framing,
    /// The server closes behind it.
    pub closes: bool,
}

/// An answer's head could not be read: from here on nobody knows where answers end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable;

/// Reads the head of the answer to a request of `method`; `None`: it is not whole yet.
pub fn answer_head(bytes: &[u8], method: Asked) -> Result<Option<AnswerHead>, Unreadable> {
    let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut lines);
    let mut config = httparse::ParserConfig::default();
    config
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .ignore_invalid_headers_in_responses(true);
    let length = match config.parse_response(&mut parsed, bytes) {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_MAX => length,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => return Ok(None),
        _ => return Err(Unreadable),
    };
    let status = parsed.code.ok_or(Unreadable)?;
    let mut closes = parsed.version != Some(1);
    let mut content_length = None;
    let mut encoding: Option<&[u8]> = None;
    for header in parsed.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let number = super::head::number(header.value).map_err(|_| Unreadable)?;
            if content_length.replace(number).is_some_and(|other| other != number) {
                return Err(Unreadable);
            }
        } else if is("transfer-encoding") {
            encoding = Some(header.value);
        } else if is("connection") {
            let has = |option: &[u8]| {
                let mut options = header.value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                options.any(|value| value.eq_ignore_ascii_case(option))
            };
            closes = has(b"close") || (closes && !has(b"keep-alive"));
        }
    }
    let has_body = status >= 200 && status != 204 && status != 304 && method != Asked::Head;
    let framing = match (encoding, content_length) {
        _ if !has_body => Framing::None,
        (Some(encoding), _) if encoding.eq_ignore_ascii_case(b"chunked") => Framing::Chunked,
        (Some(_), _) | (None, None) => Framing::Close,
        (None, Some(0)) => Framing::None,
        (None, Some(length)) => Framing::Length(length),
    };
    Ok(Some(AnswerHead { status, length, framing, closes }))
}

/// What of a request's method decides how its answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The answer has no body.
    Head,
    /// An answer of 2xx has no end.
    Connect,
    /// Any other.
    Other,
}

impl Asked {
    /// Of a method.
    pub fn of(method: &[u8]) -> Self {
        match method {
            b"HEAD" => Self::Head,
            b"CONNECT" => Self::Connect,
            _ => Self::Other,
        }
    }
}

impl AnswerHead {
    /// The body behind it.
    pub fn body(&self) -> Body {
        Body::new(self.framing)
    }
}
