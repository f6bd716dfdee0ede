//! Pods.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, items, labels, marks};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{self, NamedPort, Workload};

/// v1
pub struct Pod;

impl ObjectKind for Pod {
    const META: Meta = Meta { name: "Pod", plural: "pods", is_reported: false, ..Meta::CORE };
    type Row = model::Pod;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<model::Pod>> {
        let marks = marks(document, &mut notes.warnings);
        Ok(Some(model::Pod { marks, ..pod(id, document)? }))
    }

    fn fields(node: &str) -> Option<String> {
        Some(format!("spec.nodeName={node}"))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::Pod>> {
        rows::plain(tables.pods.clone(), Clone::clone)
    }
}

fn pod(id: &ObjectId, document: &Field) -> Result<model::Pod> {
    let spec = document.get("spec")?;
    let service_account = spec.get("serviceAccountName")?.string()?.filter(|name| !name.is_empty());
    let node = spec.get("nodeName")?.string()?.filter(|name| !name.is_empty());
    let phase = document.get("status")?.get("phase")?.string()?;
    Ok(model::Pod {
        key: id.key.clone(),
        uid: document.get("metadata")?.get("uid")?.string()?.unwrap_or_default().to_owned(),
        labels: labels(document)?,
        service_account: service_account.unwrap_or("default").to_owned(),
        node: node.map(str::to_owned),
        host_network: spec.get("hostNetwork")?.boolean()?.unwrap_or(false),
        is_terminal: matches!(phase, Some("Succeeded" | "Failed")),
        is_ready: is_ready(&document.get("status")?)?,
        named_ports: named_ports(&spec)?,
        marks: model::Marks::default(),
        workload: workload(document).ok().flatten(),
    })
}

/// What made the pod. A name that cannot be read costs the flows a name, and the pod nothing.
fn workload(document: &Field) -> Result<Option<Workload>> {
    let metadata = document.get("metadata")?;
    for owner in items(&metadata.get("ownerReferences")?)? {
        if owner.get("controller")?.boolean()? != Some(true) {
            continue;
        }
        let (kind, name) = (owner.get("kind")?.required_string()?, owner.get("name")?.required_string()?);
        let labels = labels(document)?;
        let hash = labels.get("pod-template-hash").map(|hash| format!("-{hash}"));
        let (kind, name) = match (kind, hash.and_then(|hash| name.strip_suffix(&hash))) {
            ("ReplicaSet", Some(deployment)) => ("Deployment", deployment),
            ("Job", _) => cron_job(name).map_or((kind, name), |cron_job| ("CronJob", cron_job)),
            _ => (kind, name),
        };
        return Ok(Some(Workload { kind: kind.into(), name: name.into() }));
    }
    Ok(None)
}

/// A CronJob names its Jobs after itself and the minute.
fn cron_job(job: &str) -> Option<&str> {
    let (name, minute) = job.rsplit_once('-')?;
    let is_minute = (8..=10).contains(&minute.len()) && minute.bytes().all(|byte| byte.is_ascii_digit());
    is_minute.then_some(name)
}

/// Without a word a pod is ready: kubelet says soon what is so, and of a manifest nobody does.
fn is_ready(status: &Field) -> Result<bool> {
    for condition in items(&status.get("conditions")?)? {
        if condition.get("type")?.string()? == Some("Ready") {
            return Ok(condition.get("status")?.string()? == Some("True"));
        }
    }
    Ok(true)
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
