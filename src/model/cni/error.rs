//! Errors with the codes of the CNI specification.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The result of everything that can refuse.
pub type Result<T> = std::result::Result<T, Error>;

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

/// The agent's refusal, with the codes of the CNI specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Refusal {
    /// 1 to 99: the CNI specification's; 100 and more: ours.
    pub code: u32,
    /// One sentence.
    pub message: String,
    /// What a person may need to act on it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.details.is_empty() {
            write!(f, ": {}", self.details)?;
        }
        Ok(())
    }
}
