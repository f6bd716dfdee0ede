//! Weir's own kinds: Identity, NodeEndpoints and WeirNode.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::{Field, ObjectId, Result, items};
use crate::kube::crd::UNUSED_SINCE;
use crate::model::{
    Allocation, IdentityId, IdentityLabels, NamedPort, NodeEndpoints, ObjectKey, PublishedEndpoint,
};

/// Number, labels, and whether it is marked as unused.
pub fn identity(id: &ObjectId, document: &Field) -> Result<(IdentityId, IdentityLabels, bool)> {
    let name = document.get("metadata")?.get("name")?;
    let number = id.key.name.parse().ok().filter(|number: &u32| number.to_string() == *id.key.name);
    let number = number.map(IdentityId).filter(|number| is_cluster_identity(*number)).ok_or_else(|| {
        let (first, last) = (IdentityId::FIRST_CLUSTER, IdentityId::LAST_CLUSTER);
        name.error(format!("{:?} is not an identity's number ({first} to {last})", id.key.name))
    })?;
    let spec = document.get("spec")?;
    spec.only(&["namespace", "namespaceLabels", "serviceAccount", "podLabels", "namedPorts"])?;
    let labels = IdentityLabels {
        namespace: spec.get("namespace")?.required_string()?.to_owned(),
        namespace_labels: spec.get("namespaceLabels")?.strings()?,
        service_account: spec.get("serviceAccount")?.required_string()?.to_owned(),
        pod_labels: spec.get("podLabels")?.strings()?,
        named_ports: named_ports(&spec.get("namedPorts")?)?,
    };
    let annotations = document.get("metadata")?.get("annotations")?;
    Ok((number, labels, annotations.get(UNUSED_SINCE)?.is_present()))
}

fn is_cluster_identity(id: IdentityId) -> bool {
    (IdentityId::FIRST_CLUSTER..=IdentityId::LAST_CLUSTER).contains(&id)
}

fn named_ports(field: &Field) -> Result<BTreeMap<String, Vec<NamedPort>>> {
    let mut named = BTreeMap::new();
    for (name, list) in field.entries()? {
        let mut ports = Vec::new();
        for entry in items(&list)? {
            let port = entry.get("port")?;
            ports.push(NamedPort {
                protocol: entry.get("protocol")?.protocol()?,
                port: port.port()?.ok_or_else(|| port.error("is required"))?,
            });
        }
        ports.sort_unstable();
        ports.dedup();
        named.insert(name.to_owned(), ports);
    }
    Ok(named)
}

/// One object of a node's. Its name must be the node's with a number: who may write
/// only objects of its own name can then speak for no other node.
pub fn node_endpoints(id: &ObjectId, document: &Field) -> Result<NodeEndpoints> {
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
        });
    }
    Ok(NodeEndpoints {
        node: name.to_owned(),
        internal_addresses: addresses(spec.get("internalAddresses")?)?,
        endpoints,
    })
}

/// What the operator gave to a node; the rest of a WeirNode is for people and the operator.
pub fn allocation(document: &Field) -> Result<Allocation> {
    let pod_cidrs = items(&document.get("spec")?.get("podCIDRs")?)?;
    Ok(Allocation { pod_cidrs: pod_cidrs.iter().map(Field::cidr).collect::<Result<_>>()? })
}

/// The node and the number in the name of a NodeEndpoints object.
pub fn part_of(name: &str) -> Option<(&str, usize)> {
    let (node, part) = name.rsplit_once('-')?;
    let number: usize = part.parse().ok().filter(|number: &usize| number.to_string() == part)?;
    Some((node, number))
}
