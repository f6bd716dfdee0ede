//! The agent's Unix socket: what `weir-cni` and the command line ask of it.
//!
//! One request a connection. Client and server write JSON objects, one a line:
//!
//! ```text
//! -> {"method":"cni_add","params":{"container_id":"...","interface":"eth0",...}}
//! <- {"result":{...}}
//! <- {"error":{"code":11,"message":"...","details":"..."}}
//! ```
//!
//! Methods that stream answer with many result lines; the end of the connection
//! ends them. Only root may ask: the socket's mode says so, and the server looks
//! at every peer's credentials again.

pub mod answers;
mod client;
mod server;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use client::{Client, Stream};
pub use server::{Gone, Handler, OTHERS_MAX, Reply, bind, serve, serve_on};

pub use crate::model::cni::Refusal;
use crate::model::{ServiceQuestion, cni};
use crate::policy::explain::Packet;

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/weir/agent.sock";

/// Longer requests are refused; a GC that lists every pod of a full node has half of it.
const REQUEST_BYTES_MAX: usize = 1024 * 1024;

/// Everything that can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
// One a connection: its size is nobody's cost.
#[allow(clippy::large_enum_variant)]
pub enum Request {
    /// Connect a pod; answers `cni::AddResult` when its policy is enforced.
    CniAdd(cni::Request),
    /// Disconnect a pod; answers null, also when there is none such.
    CniDel(cni::Request),
    /// Verify a pod's connection; answers `cni::AddResult` as it stands.
    CniCheck(cni::Request),
    /// Disconnect every pod that is not listed; answers null.
    CniGc {
        /// The attachments that the runtime knows.
        valid: Vec<cni::Attachment>,
    },
    /// Answers null when pods can be connected, else the error that an ADD would meet.
    CniStatus,
    /// How the agent is.
    Status,
    /// The pods of this node.
    Endpoints,
    /// The identities that this node knows.
    Identities,
    /// The policies in force.
    Policies,
    /// Policies of kinds that are not enforced.
    ForeignPolicies,
    /// Why one end may speak to another or not.
    PolicyExplain {
        /// Who begins.
        from: String,
        /// Who is spoken to.
        to: String,
        /// By what.
        packet: Packet,
    },
    /// What the policies of a file would change for the pods of this node.
    PolicyDiff {
        /// The file's text.
        manifests: String,
    },
    /// Services and their backends.
    Services,
    /// Where a new connection to a service would go, and why.
    ServiceTrace(ServiceQuestion),
    /// Who encrypts, and how the peers are.
    Encryption,
    /// Change the keys, on every node; answers what becomes of it.
    EncryptionRotate,
    /// What DNS told the pods of this node.
    Names,
    /// Pods whose packets leave the cluster by a gateway.
    Egress,
    /// The nodes of the cluster.
    Nodes,
}

impl Request {
    /// Whether the container runtime asks: its requests have room of their own.
    fn is_runtimes(&self) -> bool {
        matches!(
            self,
            Self::CniAdd(_) | Self::CniDel(_) | Self::CniCheck(_) | Self::CniGc { .. } | Self::CniStatus
        )
    }
}

/// Why a call brought no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens at the socket.
    #[error("the agent does not listen at {path}")]
    Unavailable {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or the answer did not come in time.
    #[error("talking to the agent: {0}")]
    Io(#[from] io::Error),
    /// The answer is not of this protocol.
    #[error("understanding the agent: {0}")]
    Protocol(#[from] serde_json::Error),
    /// The agent answered, and said no.
    #[error("{0}")]
    Refused(#[from] Refusal),
}

/// One line of an answer.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line<T> {
    Result(T),
    Error(Refusal),
}

/// The directory of the socket; the current one when the path has none.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
