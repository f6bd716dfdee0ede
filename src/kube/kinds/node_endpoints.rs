//! The pods of every node, as its agent publishes them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use super::identity::is_cluster_identity;
use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, items};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::Rows;
use crate::model::{self, IdentityId, ObjectKey, PortMapping, PublishedEndpoint, Workload};
use crate::tables::State;

/// weir.dev/v1alpha1
pub struct NodeEndpoints;

impl ObjectKind for NodeEndpoints {
    const META: Meta = Meta { name: "NodeEndpoints", plural: "nodeendpoints", ..Meta::OWN };
    type Row = model::NodeEndpoints;

    fn read(id: &ObjectId, document: &Field, _: &mut Notes) -> Result<Option<model::NodeEndpoints>> {
        node_endpoints(id, document).map(Some)
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::NodeEndpoints>> {
        Box::new(Parts { tables: tables.clone(), parts: BTreeMap::new() })
    }
}

/// The objects that make up a node's endpoints, by object name.
struct Parts {
    tables: Arc<Tables>,
    parts: BTreeMap<Arc<str>, Arc<model::NodeEndpoints>>,
}

impl Rows<model::NodeEndpoints> for Parts {
    fn reset(&mut self, all: Vec<(ObjectKey, Arc<model::NodeEndpoints>)>) {
        self.parts = all.into_iter().map(|(key, part)| (key.name, part)).collect();
        let mut nodes: BTreeMap<Arc<str>, Vec<Arc<model::NodeEndpoints>>> = BTreeMap::new();
        for part in self.parts.values() {
            nodes.entry(part.node.as_str().into()).or_default().push(part.clone());
        }
        self.tables.node_endpoints.reset(nodes.into_iter().map(|(node, parts)| (node, join(&parts))));
    }

    fn get(&self, key: &ObjectKey) -> Option<Arc<model::NodeEndpoints>> {
        self.parts.get(&key.name).cloned()
    }

    fn apply(&mut self, key: &ObjectKey, part: Arc<model::NodeEndpoints>) {
        let node = part.node.clone();
        self.parts.insert(key.name.clone(), part);
        self.apply_endpoints_of(&node);
    }

    fn delete(&mut self, key: &ObjectKey) {
        if let Some(part) = self.parts.remove(&key.name) {
            self.apply_endpoints_of(&part.node);
        }
    }

    fn count(&self) -> usize {
        self.tables.node_endpoints.snapshot().len()
    }

    fn subscribe(&self) -> watch::Receiver<State> {
        self.tables.node_endpoints.subscribe()
    }
}

impl Parts {
    fn apply_endpoints_of(&self, node: &str) {
        let parts: Vec<_> = self.parts.values().filter(|part| part.node == node).cloned().collect();
        match parts.is_empty() {
            true => self.tables.node_endpoints.delete(&Arc::from(node)),
            false => self.tables.node_endpoints.apply(node.into(), join(&parts)),
        };
    }
}

/// One value of a node's parts. A pod that moves between parts may be in two of them
/// for a moment: it counts once.
fn join(parts: &[Arc<model::NodeEndpoints>]) -> Arc<model::NodeEndpoints> {
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
    Arc::new(model::NodeEndpoints {
        node: parts.first().map_or_else(String::new, |part| part.node.clone()),
        internal_addresses,
        endpoints: endpoints.into_values().cloned().collect(),
    })
}

/// One object of a node's. Its name must be the node's with a number: who may write
/// only objects of its own name can then speak for no other node.
fn node_endpoints(id: &ObjectId, document: &Field) -> Result<model::NodeEndpoints> {
    let spec = document.get("spec")?;
    let node = spec.get("node")?;
    let name = node.required_string()?;
    if part_of(&id.key.name).is_none_or(|(of, _)| of != name) {
        let given = &id.key.name;
        return Err(node
            .error(format!("{name:?} does not fit the object's name {given:?}; it must be {name}-NUMBER")));
    }
    let addresses = |field: Field| items(&field)?.iter().map(Field::address).collect::<Result<Vec<IpAddr>>>();
    let mut endpoints = Vec::new();
    for endpoint in items(&spec.get("endpoints")?)? {
        let identity = endpoint.get("identity")?;
        let number = identity.unsigned()?.and_then(|number| u32::try_from(number).ok()).map(IdentityId);
        endpoints.push(PublishedEndpoint {
            pod: ObjectKey::new(
                endpoint.get("namespace")?.required_string()?,
                endpoint.get("name")?.required_string()?,
            ),
            addresses: addresses(endpoint.get("addresses")?)?,
            identity: number.filter(|number| is_cluster_identity(*number)).ok_or_else(|| {
                let (first, last) = (IdentityId::FIRST_CLUSTER, IdentityId::LAST_CLUSTER);
                identity.error(format!("must be an identity's number ({first} to {last})"))
            })?,
            workload: endpoint.get("workload")?.string()?.and_then(Workload::parse),
            host_ports: items(&endpoint.get("hostPorts")?)?
                .iter()
                .map(host_port)
                .collect::<Result<_>>()?,
        });
    }
    Ok(model::NodeEndpoints {
        node: name.to_owned(),
        internal_addresses: addresses(spec.get("internalAddresses")?)?,
        endpoints,
    })
}

fn host_port(field: &Field) -> Result<PortMapping> {
    let port = |name: &str| -> Result<u16> {
        let field = field.get(name)?;
        let number = field.unsigned()?.and_then(|number| u16::try_from(number).ok());
        number.filter(|number| *number > 0).ok_or_else(|| field.error("must be a port (1 to 65535)"))
    };
    let host_ip = field.get("hostIP")?;
    Ok(PortMapping {
        host_port: port("hostPort")?,
        container_port: port("containerPort")?,
        protocol: field.get("protocol")?.protocol()?,
        host_ip: host_ip.string()?.map(|_| host_ip.address()).transpose()?,
    })
}

/// The node and the number in the name of a NodeEndpoints object.
fn part_of(name: &str) -> Option<(&str, usize)> {
    let (node, part) = name.rsplit_once('-')?;
    let number: usize = part.parse().ok().filter(|number: &usize| number.to_string() == part)?;
    Some((node, number))
}
