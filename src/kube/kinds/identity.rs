//! Identities, which agents claim.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, items};
use crate::kube::crd::UNUSED_SINCE;
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::Rows;
use crate::model::{IdentityId, IdentityLabels, NamedPort, ObjectKey};
use crate::tables::State;

/// weir.dev/v1alpha1
pub struct Identity;

/// What an Identity says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimedIdentity {
    /// Its name.
    pub number: IdentityId,
    /// What it stands for.
    pub labels: Arc<IdentityLabels>,
    /// It is marked as unused.
    pub is_unused: bool,
}

impl ObjectKind for Identity {
    const META: Meta = Meta { name: "Identity", plural: "identities", ..Meta::OWN };
    type Row = ClaimedIdentity;

    fn read(id: &ObjectId, document: &Field, _: &mut Notes) -> Result<Option<ClaimedIdentity>> {
        identity(id, document).map(Some)
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<ClaimedIdentity>> {
        Box::new(Identities(tables.clone()))
    }
}

/// Rows that may be ahead of their objects, or outlive them.
struct Identities(Arc<Tables>);

fn number_of(key: &ObjectKey) -> Option<IdentityId> {
    key.name.parse().map(IdentityId).ok()
}

impl Rows<ClaimedIdentity> for Identities {
    fn reset(&mut self, all: Vec<(ObjectKey, Arc<ClaimedIdentity>)>) {
        let listed = all.iter().map(|(_, row)| (row.number, (row.labels.clone(), row.is_unused)));
        self.0.reset_identities(listed.collect());
    }

    fn get(&self, key: &ObjectKey) -> Option<Arc<ClaimedIdentity>> {
        let number = number_of(key)?;
        let is_unused = self.0.to_claim.get(&number).is_some();
        let labels = self.0.identities.get(&number)?;
        Some(Arc::new(ClaimedIdentity { number, labels, is_unused }))
    }

    fn apply(&mut self, _: &ObjectKey, row: Arc<ClaimedIdentity>) {
        self.0.apply_identity(row.number, row.labels.clone(), row.is_unused);
    }

    fn delete(&mut self, key: &ObjectKey) {
        if let Some(number) = number_of(key) {
            self.0.delete_identity(number);
        }
    }

    fn count(&self) -> usize {
        self.0.identities.snapshot().len()
    }

    fn subscribe(&self) -> watch::Receiver<State> {
        self.0.identities.subscribe()
    }
}

fn identity(id: &ObjectId, document: &Field) -> Result<ClaimedIdentity> {
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
    let is_unused = annotations.get(UNUSED_SINCE)?.is_present();
    Ok(ClaimedIdentity { number, labels: Arc::new(labels), is_unused })
}

pub(super) fn is_cluster_identity(id: IdentityId) -> bool {
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

