//! Nodes.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;

use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, items, labels};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::Rows;
use crate::model::{self, ObjectKey};
use crate::tables::State;

/// v1
pub struct Node;

impl ObjectKind for Node {
    const META: Meta = Meta { name: "Node", plural: "nodes", is_namespaced: false, ..Meta::CORE };
    type Row = model::Node;

    fn read(id: &ObjectId, document: &Field, _: &mut Notes) -> Result<Option<model::Node>> {
        Ok(Some(model::Node {
            name: id.key.name.to_string(),
            labels: labels(document)?,
            addresses: internal_addresses(&document.get("status")?)?,
            pod_cidrs: pod_cidrs(&document.get("spec")?)?,
            is_leaving: is_leaving(document)?,
            is_unready: is_unready(document)?,
        }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::Node>> {
        Box::new(Nodes(tables.clone()))
    }
}

/// Joined with what the operator gave them.
struct Nodes(Arc<Tables>);

impl Rows<model::Node> for Nodes {
    fn reset(&mut self, all: Vec<(ObjectKey, Arc<model::Node>)>) {
        self.0.reset_nodes(all.into_iter().map(|(key, node)| (key.name, node)));
    }

    fn get(&self, key: &ObjectKey) -> Option<Arc<model::Node>> {
        self.0.node_object(&key.name)
    }

    fn apply(&mut self, key: &ObjectKey, node: Arc<model::Node>) {
        self.0.apply_node(key.name.clone(), node);
    }

    fn delete(&mut self, key: &ObjectKey) {
        self.0.delete_node(&key.name);
    }

    fn count(&self) -> usize {
        self.0.nodes.snapshot().len()
    }

    fn subscribe(&self) -> watch::Receiver<State> {
        self.0.nodes.subscribe()
    }
}

fn internal_addresses(status: &Field) -> Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for address in items(&status.get("addresses")?)? {
        if address.get("type")?.string()? == Some("InternalIP") {
            addresses.push(address.get("address")?.address()?);
        }
    }
    Ok(addresses)
}

/// Cluster Autoscaler sets this taint before it deletes a node.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

fn is_leaving(document: &Field) -> Result<bool> {
    if document.get("metadata")?.get("deletionTimestamp")?.is_present() {
        return Ok(true);
    }
    for taint in items(&document.get("spec")?.get("taints")?)? {
        if taint.get("key")?.string()? == Some(TO_BE_DELETED) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A node without the condition, as in a directory of manifests, is ready.
fn is_unready(document: &Field) -> Result<bool> {
    for condition in items(&document.get("status")?.get("conditions")?)? {
        if condition.get("type")?.string()? == Some("Ready") {
            return Ok(condition.get("status")?.string()? != Some("True"));
        }
    }
    Ok(false)
}

fn pod_cidrs(spec: &Field) -> Result<Vec<IpNet>> {
    let all = items(&spec.get("podCIDRs")?)?;
    let single = spec.get("podCIDR")?;
    if !all.is_empty() {
        return all.iter().map(Field::cidr).collect();
    }
    match single.string()? {
        None | Some("") => Ok(Vec::new()),
        Some(_) => Ok(vec![single.cidr()?]),
    }
}
