//! Nodes as Weir has them: what the operator gave to each, and the key that each has published.

use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use tokio::sync::watch;

use crate::kube::Tables;
use crate::kube::convert::{Cidr, Field, Notes, ObjectId, Result};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::Rows;
use crate::model::{Allocation, KeyAt, NodeKey, ObjectKey, KeyProtocol};
use crate::tables::State;

/// weir.dev/v1alpha1
pub struct WeirNode;

/// The part that the operator writes; the rest is for people and the operator.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Spec {
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<Cidr>,
}

/// What the node's agent says of it; the rest is for people and the operator.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    encryption: Option<Encryption>,
}

/// The keys of a node. One that is not understood is none: nothing goes to that node then.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Encryption {
    protocol: KeyProtocol,
    #[serde(flatten)]
    active: Key,
    other: Option<Key>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Key {
    public_key: String,
    port: u16,
    #[serde(default)]
    generation: u32,
    receives: Option<String>,
}

impl Encryption {
    fn key(&self) -> Option<NodeKey> {
        let read = |key: &Key| key.read(self.protocol);
        Some(NodeKey {
            protocol: self.protocol,
            active: read(&self.active)?,
            other: self.other.as_ref().and_then(read),
        })
    }
}

impl Key {
    fn read(&self, protocol: KeyProtocol) -> Option<KeyAt> {
        let public_key = self.public_key.parse().ok()?;
        let receives = self.receives.as_ref().and_then(|sum| u64::from_str_radix(sum, 16).ok());
        let has_port = self.port > 0 || protocol == KeyProtocol::Ipsec;
        has_port.then_some(KeyAt { public_key, port: self.port, generation: self.generation, receives })
    }
}

impl ObjectKind for WeirNode {
    const META: Meta = Meta { name: "WeirNode", plural: "weirnodes", ..Meta::OWN };
    type Row = Allocation;

    fn read(_: &ObjectId, document: &Field, _: &mut Notes) -> Result<Option<Allocation>> {
        let spec: Spec = document.get("spec")?.read()?;
        let status: Status = document.get("status")?.read()?;
        let key = status.encryption.and_then(|encryption| encryption.key());
        Ok(Some(Allocation { pod_cidrs: spec.pod_cidrs.into_iter().map(IpNet::from).collect(), key }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Allocation>> {
        Box::new(Allocations(tables.clone()))
    }
}

/// Joined with the Node objects.
struct Allocations(Arc<Tables>);

impl Rows<Allocation> for Allocations {
    fn reset(&mut self, all: Vec<(ObjectKey, Arc<Allocation>)>) {
        self.0.reset_allocations(all.into_iter().map(|(key, row)| (key.name, row)));
    }

    fn get(&self, key: &ObjectKey) -> Option<Arc<Allocation>> {
        self.0.allocations.get(&key.name)
    }

    fn apply(&mut self, key: &ObjectKey, row: Arc<Allocation>) {
        self.0.apply_allocation(key.name.clone(), row);
    }

    fn delete(&mut self, key: &ObjectKey) {
        self.0.delete_allocation(&key.name);
    }

    fn count(&self) -> usize {
        self.0.allocations.snapshot().len()
    }

    fn subscribe(&self) -> watch::Receiver<State> {
        self.0.allocations.subscribe()
    }
}
