//! Nodes as Weir has them: what the operator gave to each.

use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use tokio::sync::watch;

use crate::kube::Tables;
use crate::kube::convert::{Cidr, Field, Notes, ObjectId, Result};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::Rows;
use crate::model::{Allocation, ObjectKey};
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

impl ObjectKind for WeirNode {
    const META: Meta = Meta { name: "WeirNode", plural: "weirnodes", ..Meta::OWN };
    type Row = Allocation;

    fn read(_: &ObjectId, document: &Field, _: &mut Notes) -> Result<Option<Allocation>> {
        let spec: Spec = document.get("spec")?.read()?;
        Ok(Some(Allocation { pod_cidrs: spec.pod_cidrs.into_iter().map(IpNet::from).collect() }))
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
