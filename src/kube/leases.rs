//! Who answers on the link for the addresses of which Services: a Lease names each one's leader, and one Lease
//! a leading node says that its agent lives.
//!
//! Only the nodes' Leases are renewed: what it costs grows with nodes that lead, not with Services. All are where
//! the objects come from: in the API server, or below the directory of manifests. A write names the version that
//! it replaces, so of two candidates one is refused.

mod files;
mod server;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Notify;

use super::Source;
use crate::model::ObjectKey;
use files::Files;
use server::Server;

/// Names of the Leases of Services begin so; namespace and name with a dot between them follow.
const OF_SERVICE: &str = "announce-";
/// Names of the Leases of nodes begin so.
const OF_NODE: &str = "announcer-";

/// The Lease by which a node says that it still answers for Services' addresses.
pub fn announcer_name(node: &str) -> String {
    format!("{OF_NODE}{node}")
}

/// The Lease of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Posted {
    /// The node that leads; empty: none.
    pub holder: String,
    /// Changes with every write.
    pub version: String,
}

/// All that is posted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Postings {
    /// By Service.
    pub services: BTreeMap<ObjectKey, Posted>,
    /// By node: what changes when its agent renews its Lease.
    pub nodes: BTreeMap<String, String>,
}

/// Where it is posted who leads, as the agent of one node reads and writes it.
pub struct Board {
    target: Target,
    changed: Arc<Notify>,
}

// There is one.
#[allow(clippy::large_enum_variant)]
enum Target {
    Server(Server),
    Files(Files),
}

impl Board {
    /// The board of `source`, for `node`, which says that it lives for `duration` each time.
    pub fn new(source: &Source, node: &str, duration: Duration) -> Self {
        let changed = Arc::new(Notify::new());
        let target = match source {
            Source::Kubernetes(client, _) => {
                Target::Server(Server::new(client, node, duration, changed.clone()))
            }
            Source::Manifests(directory) => Target::Files(Files::new(directory, node)),
        };
        Self { target, changed }
    }

    /// Keeps what `read` says up to date. Never returns.
    pub async fn follow(&self) {
        if let Target::Server(server) = &self.target {
            server.follow().await;
        }
        std::future::pending().await
    }

    /// Returns after news.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What is posted; `None` before the first full list.
    pub async fn read(&self) -> Result<Option<Postings>> {
        match &self.target {
            Target::Server(server) => Ok(server.read()),
            Target::Files(files) => files.read().await.map(Some),
        }
    }

    /// Says that this node's agent lives.
    pub async fn renew(&self) -> Result<()> {
        match &self.target {
            Target::Server(server) => server.renew().await,
            Target::Files(files) => files.renew().await,
        }
    }

    /// Makes `holder` the leader in place of what was posted; false if that is not the newest any more.
    pub async fn post(&self, service: &ObjectKey, old: Option<&Posted>, holder: &str) -> Result<bool> {
        match &self.target {
            Target::Server(server) => server.post(service, old, holder).await,
            Target::Files(files) => files.post(service, old, Some(holder)).await,
        }
    }

    /// Takes the Lease of a Service away; false if `old` is not the newest any more.
    pub async fn remove(&self, service: &ObjectKey, old: &Posted) -> Result<bool> {
        match &self.target {
            Target::Server(server) => server.remove(service, old).await,
            Target::Files(files) => files.post(service, Some(old), None).await,
        }
    }
}

fn name_of(service: &ObjectKey) -> String {
    format!("{OF_SERVICE}{}.{}", service.namespace, service.name)
}

/// What the name of a Lease stands for.
enum Meaning<'a> {
    Service(ObjectKey),
    Node(&'a str),
}

/// A namespace has no dots.
fn meaning(name: &str) -> Option<Meaning<'_>> {
    if let Some(node) = name.strip_prefix(OF_NODE) {
        return Some(Meaning::Node(node));
    }
    let (namespace, name) = name.strip_prefix(OF_SERVICE)?.split_once('.')?;
    Some(Meaning::Service(ObjectKey::new(namespace, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn posted(board: &Board, service: &ObjectKey) -> Option<Posted> {
        board.read().await.expect("a board").and_then(|all| all.services.get(service).cloned())
    }

    #[tokio::test]
    async fn of_two_who_take_a_service_one_gets_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let source = Source::Manifests(directory.path().to_owned());
        let [one, two] = ["one", "two"].map(|node| Board::new(&source, node, Duration::from_secs(1)));
        let service = ObjectKey::new("shop", "web.v2");
        assert_eq!(one.read().await.expect("a board"), Some(Postings::default()));
        assert!(one.post(&service, None, "one").await.expect("a write"));
        assert!(!two.post(&service, None, "two").await.expect("an answer"));
        let old = posted(&two, &service).await.expect("a leader");
        assert_eq!(old.holder, "one");
        assert!(two.post(&service, Some(&old), "two").await.expect("a write"));
        assert!(!one.post(&service, Some(&old), "one").await.expect("an answer"));
        let new = posted(&one, &service).await.expect("a leader");
        assert_eq!(new.holder, "two");
        assert!(!one.remove(&service, &old).await.expect("an answer"));
        assert!(two.remove(&service, &new).await.expect("a write"));
        assert_eq!(posted(&one, &service).await, None);
        one.renew().await.expect("a write");
        let first = two.read().await.expect("a board").expect("a list").nodes;
        one.renew().await.expect("a write");
        let second = two.read().await.expect("a board").expect("a list").nodes;
        assert!(first.contains_key("one") && first != second, "{first:?} {second:?}");
    }
}
