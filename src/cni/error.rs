//! Errors with the codes of the CNI specification.

use serde::{Deserialize, Serialize};

use crate::api::Refusal;

/// The codes that the specification gives a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The configuration's version is none that we speak.
    IncompatibleVersion = 1,
    /// A field of the configuration that we cannot honour.
    UnsupportedField = 2,
    /// There is no such container, or no such interface of it.
    UnknownContainer = 3,
    /// A `CNI_*` variable is missing or not acceptable.
    InvalidEnvironment = 4,
    /// Reading or writing went wrong.
    Io = 5,
    /// What was sent is no JSON.
    Decode = 6,
    /// The configuration is not acceptable.
    InvalidConfig = 7,
    /// It would work later.
    TryAgainLater = 11,
    /// No pod can be connected now.
    NotAvailable = 50,
    /// What the specification leaves to plugins: it was tried, and did not work.
    Failed = 100,
}

/// A refusal on its way to the runtime.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct Error(pub Refusal);

impl Error {
    /// An error of that code; the message is one sentence without a full stop.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(Refusal::new(code, message))
    }

    /// Adds what a person may need to act on it.
    pub fn with_details(self, details: impl Into<String>) -> Self {
        Self(self.0.with_details(details))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        error.0
    }
}

impl Refusal {
    /// A refusal of that code; the message is one sentence without a full stop.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code as u32, message: message.into(), details: String::new() }
    }

    /// Adds what a person may need to act on it.
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }
}
