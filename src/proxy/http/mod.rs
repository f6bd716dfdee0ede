//! What HTTP/1.1 and HTTP/2 have in common: rules, paths, and what a record says.

mod path;
mod rules;

pub use rules::{Edit, HttpRules, Request};

use crate::model::l7::{HttpMessage, TEXT_MAX};

/// A text of a peer's as records have it: what is no UTF-8 is replaced, what is long is cut.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(TEXT_MAX)]).into_owned()
}

/// What a record says of a request.
pub fn message(version: &str, request: &Request<'_>) -> HttpMessage {
    HttpMessage {
        version: version.to_owned(),
        method: text(request.method),
        path: text(request.path),
        host: text(request.host),
        trace_parent: request.header(b"traceparent").map(text),
        ..HttpMessage::default()
    }
}
