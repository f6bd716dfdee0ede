//! From converted objects to rows of [`Tables`].
//!
//! Three kinds need more than a row per object: a node's endpoints come in several
//! objects, nodes are joined with what the operator gave them ([`super::joined`]), and an
//! identity may be ahead of its source, or outlive it ([`super::claims`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Tables;
use super::convert::{Kind, Object, ObjectId};
use crate::model::{IdentityId, NodeEndpoints, PolicyRef};

/// Writes objects of one source into the tables.
pub struct Sink {
    tables: Arc<Tables>,
    /// The objects that make up a node's endpoints, by object name.
    parts: BTreeMap<Arc<str>, Arc<NodeEndpoints>>,
}

impl Sink {
    pub fn new(tables: Arc<Tables>) -> Self {
        Self { tables, parts: BTreeMap::new() }
    }

    /// Makes a kind's table hold exactly `all`, and marks it synced.
    pub fn reset(&mut self, kind: Kind, all: Vec<(ObjectId, Object)>) {
        let tables = self.tables.clone();
        let objects = all.iter().map(|(id, object)| (id, object));
        macro_rules! rows {
            ($variant:ident, $key:expr) => {
                objects.filter_map(|(id, object)| match object {
                    Object::$variant(row) => Some(($key(id), row.clone())),
                    _ => None,
                })
            };
        }
        let by_name = |id: &ObjectId| id.key.name.clone();
        let by_key = |id: &ObjectId| id.key.clone();
        match kind {
            Kind::Namespace => tables.namespaces.reset(rows!(Namespace, by_name)),
            Kind::Pod => tables.pods.reset(rows!(Pod, by_key)),
            Kind::Node => tables.reset_nodes(rows!(Node, by_name)),
            Kind::Service => tables.services.reset(rows!(Service, by_key)),
            Kind::EndpointSlice => tables.slices.reset(rows!(EndpointSlice, by_key)),
            Kind::NetworkPolicy => tables
                .policies
                .reset(rows!(NetworkPolicy, |id: &ObjectId| PolicyRef::network_policy(&id.key))),
            Kind::Identity => {
                let listed = objects.filter_map(|(_, object)| match object {
                    Object::Identity(number, labels, is_unused) => {
                        Some((*number, (labels.clone(), *is_unused)))
                    }
                    _ => None,
                });
                tables.reset_identities(listed.collect())
            }
            Kind::WeirNode => tables.reset_allocations(rows!(WeirNode, by_name)),
            Kind::NodeEndpoints => {
                self.parts = rows!(NodeEndpoints, by_name).collect();
                let mut nodes: BTreeMap<Arc<str>, Vec<Arc<NodeEndpoints>>> = BTreeMap::new();
                for part in self.parts.values() {
                    nodes.entry(part.node.as_str().into()).or_default().push(part.clone());
                }
                tables.node_endpoints.reset(nodes.into_iter().map(|(node, parts)| (node, join(&parts))))
            }
        };
    }

    /// The object as it last was, where it makes a row.
    pub fn get(&self, id: &ObjectId) -> Option<Object> {
        let (tables, key) = (&self.tables, &id.key);
        match id.kind {
            Kind::Namespace => tables.namespaces.get(&key.name).map(Object::Namespace),
            Kind::Pod => tables.pods.get(key).map(Object::Pod),
            Kind::Node => tables.node_object(&key.name).map(Object::Node),
            Kind::Service => tables.services.get(key).map(Object::Service),
            Kind::EndpointSlice => tables.slices.get(key).map(Object::EndpointSlice),
            Kind::NetworkPolicy => {
                tables.policies.get(&PolicyRef::network_policy(key)).map(Object::NetworkPolicy)
            }
            Kind::Identity => {
                let number = key.name.parse().map(IdentityId).ok()?;
                let is_unused = tables.to_claim.get(&number).is_some();
                tables.identities.get(&number).map(|labels| Object::Identity(number, labels, is_unused))
            }
            Kind::NodeEndpoints => self.parts.get(&key.name).cloned().map(Object::NodeEndpoints),
            Kind::WeirNode => tables.allocations.get(&key.name).map(Object::WeirNode),
        }
    }

    /// Inserts or replaces an object's row.
    pub fn apply(&mut self, id: &ObjectId, object: Object) {
        let (tables, key) = (&self.tables, id.key.clone());
        match object {
            Object::Namespace(row) => tables.namespaces.apply(key.name, row),
            Object::Pod(row) => tables.pods.apply(key, row),
            Object::Node(row) => tables.apply_node(key.name, row),
            Object::Service(row) => tables.services.apply(key, row),
            Object::EndpointSlice(row) => tables.slices.apply(key, row),
            Object::NetworkPolicy(row) => tables.policies.apply(row.reference.clone(), row),
            Object::Identity(number, row, is_unused) => tables.apply_identity(number, row, is_unused),
            Object::WeirNode(row) => tables.apply_allocation(key.name, row),
            Object::NodeEndpoints(part) => {
                let node = part.node.clone();
                self.parts.insert(key.name, part);
                self.apply_endpoints_of(&node)
            }
        };
    }

    /// Removes an object's row.
    pub fn delete(&mut self, id: &ObjectId) {
        let tables = &self.tables;
        match id.kind {
            Kind::Namespace => tables.namespaces.delete(&id.key.name),
            Kind::Pod => tables.pods.delete(&id.key),
            Kind::Node => tables.delete_node(&id.key.name),
            Kind::Service => tables.services.delete(&id.key),
            Kind::EndpointSlice => tables.slices.delete(&id.key),
            Kind::NetworkPolicy => tables.policies.delete(&PolicyRef::network_policy(&id.key)),
            Kind::Identity => match id.key.name.parse().map(IdentityId) {
                Ok(number) => tables.delete_identity(number),
                Err(_) => false,
            },
            Kind::WeirNode => tables.delete_allocation(&id.key.name),
            Kind::NodeEndpoints => match self.parts.remove(&id.key.name) {
                Some(part) => self.apply_endpoints_of(&part.node),
                None => false,
            },
        };
    }

    fn apply_endpoints_of(&self, node: &str) -> bool {
        let parts: Vec<_> = self.parts.values().filter(|part| part.node == node).cloned().collect();
        match parts.is_empty() {
            true => self.tables.node_endpoints.delete(&Arc::from(node)),
            false => self.tables.node_endpoints.apply(node.into(), join(&parts)),
        }
    }
}

/// One value of a node's parts. A pod that moves between parts may be in two of them
/// for a moment: it counts once.
fn join(parts: &[Arc<NodeEndpoints>]) -> Arc<NodeEndpoints> {
    if let [part] = parts {
        return part.clone();
    }
    let mut internal_addresses: Vec<_> =
        parts.iter().flat_map(|part| part.internal_addresses.clone()).collect();
    internal_addresses.sort_unstable();
    internal_addresses.dedup();
    let endpoints: BTreeMap<_, _> = parts
        .iter()
        .flat_map(|part| &part.endpoints)
        .map(|endpoint| (endpoint.pod.clone(), endpoint))
        .collect();
    Arc::new(NodeEndpoints {
        node: parts.first().map_or_else(String::new, |part| part.node.clone()),
        internal_addresses,
        endpoints: endpoints.into_values().cloned().collect(),
    })
}
