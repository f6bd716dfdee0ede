//! What a container runtime asks, and what it is told: the words that `weir-cni`, the agent's socket
//! and the endpoint manager share.

mod error;
mod request;

pub use error::{Error, ErrorCode, Refusal, Result};
pub use request::{AddResult, Attachment, Request, is_identifier};
