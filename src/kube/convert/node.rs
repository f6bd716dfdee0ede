//! Nodes.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Field, ObjectId, Result, items, labels};
use crate::model::Node;

pub fn node(id: &ObjectId, document: &Field) -> Result<Node> {
    Ok(Node {
        name: id.key.name.to_string(),
        labels: labels(document)?,
        addresses: internal_addresses(&document.get("status")?)?,
        pod_cidrs: pod_cidrs(&document.get("spec")?)?,
    })
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
