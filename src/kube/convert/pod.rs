//! Pods and namespaces.

use std::collections::BTreeMap;

use super::{Field, ObjectId, Result, items, labels};
use crate::model::{NamedPort, Namespace, Pod};

/// The label that upstream gives every namespace.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

pub fn namespace(id: &ObjectId, document: &Field) -> Result<Namespace> {
    let mut labels = labels(document)?;
    labels.insert(NAMESPACE_NAME.to_owned(), id.key.name.to_string());
    Ok(Namespace { labels })
}

pub fn pod(id: &ObjectId, document: &Field) -> Result<Pod> {
    let spec = document.get("spec")?;
    let service_account = spec.get("serviceAccountName")?.string()?.filter(|name| !name.is_empty());
    let node = spec.get("nodeName")?.string()?.filter(|name| !name.is_empty());
    let phase = document.get("status")?.get("phase")?.string()?;
    Ok(Pod {
        key: id.key.clone(),
        uid: document.get("metadata")?.get("uid")?.string()?.unwrap_or_default().to_owned(),
        labels: labels(document)?,
        service_account: service_account.unwrap_or("default").to_owned(),
        node: node.map(str::to_owned),
        host_network: spec.get("hostNetwork")?.boolean()?.unwrap_or(false),
        is_terminal: matches!(phase, Some("Succeeded" | "Failed")),
        named_ports: named_ports(&spec)?,
    })
}

/// Named ports of the containers that run as long as the pod does: an init container
/// that is always restarted is a sidecar.
fn named_ports(spec: &Field) -> Result<BTreeMap<String, Vec<NamedPort>>> {
    let mut containers = items(&spec.get("containers")?)?;
    for container in items(&spec.get("initContainers")?)? {
        if container.get("restartPolicy")?.string()? == Some("Always") {
            containers.push(container);
        }
    }
    let mut named: BTreeMap<String, Vec<NamedPort>> = BTreeMap::new();
    for container in containers {
        for port in items(&container.get("ports")?)? {
            let field = port.get("containerPort")?;
            let number = field.port()?.ok_or_else(|| field.error("is required"))?;
            let protocol = port.get("protocol")?.protocol()?;
            if let Some(name) = port.get("name")?.string()?.filter(|name| !name.is_empty()) {
                named.entry(name.to_owned()).or_default().push(NamedPort { protocol, port: number });
            }
        }
    }
    for ports in named.values_mut() {
        ports.sort_unstable();
        ports.dedup();
    }
    Ok(named)
}
