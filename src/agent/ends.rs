//! Who somebody means by the name of an end: a pod, an address, labels, or a name of Cilium's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::identity::{LabelFilter, NAMESPACE_NAME};
use crate::kube::Tables;
use crate::model::l7::DnsRule;
use crate::model::{IdentityId, IdentityLabels, Labels, ObjectKey};
use crate::policy::explain::End;

/// What ends are looked for in.
pub struct Ends<'a> {
    /// What the sources say.
    pub tables: &'a Tables,
    /// Which labels count.
    pub filter: &'a LabelFilter,
    /// The labels that policies ask for beyond these.
    pub asked: &'a BTreeSet<String>,
    /// The pods of this node.
    pub local: Vec<(ObjectKey, Vec<IpAddr>)>,
    /// The rules that name addresses outside of the cluster.
    pub named: BTreeMap<IpAddr, Arc<[DnsRule]>>,
    /// The name of this node; empty where there is none.
    pub node: &'a str,
}

impl Ends<'_> {
    /// The end that `text` means, or why there is none.
    pub fn find(&self, text: &str) -> Result<End, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(self.by_address(address.to_canonical()));
        }
        let reserved = |base| End { name: text.to_owned(), base, ..End::default() };
        match text {
            "world" => return Ok(reserved(None)),
            "host" => return Ok(reserved(Some(IdentityId::HOST))),
            "remote-node" => return Ok(reserved(Some(IdentityId::REMOTE_NODE))),
            _ => {}
        }
        let (namespace, name) = text.split_once('/').ok_or_else(|| {
            format!("{text:?} is no end: write NAMESPACE/POD, NAMESPACE/KEY=VALUE,..., an address, world, host or remote-node")
        })?;
        match name.contains('=') {
            true => self.by_labels(text, namespace, name),
            false => self.by_pod(&ObjectKey::new(namespace, name)),
        }
    }

    fn by_pod(&self, pod: &ObjectKey) -> Result<End, String> {
        let local = self.local.iter().find(|(known, _)| known == pod);
        let published = self.tables.node_endpoints.snapshot();
        let mut published = published.values().flat_map(|node| &node.endpoints);
        let published = published.find(|endpoint| endpoint.pod == *pod);
        let mut addresses = local.map(|(_, addresses)| addresses.clone()).unwrap_or_default();
        if addresses.is_empty() {
            addresses = published.map(|endpoint| endpoint.addresses.clone()).unwrap_or_default();
        }
        let identity = published.map(|endpoint| endpoint.identity);
        let known = identity.and_then(|identity| self.tables.identities.get(&identity));
        let labels = match self.tables.pods.get(pod) {
            Some(pod) if pod.host_network => {
                return Err(format!("{} is in its node's network: policies do not select it", pod.key));
            }
            Some(pod) => {
                let namespace = self.tables.namespaces.get(&pod.key.namespace);
                Some(Arc::new(self.filter.labels_of(&pod, namespace.as_deref(), self.asked)))
            }
            None => known,
        };
        let labels = labels.ok_or_else(|| format!("no pod {pod} is known"))?;
        let base = Some(identity.unwrap_or(IdentityId::FIRST_CLUSTER));
        Ok(End { name: pod.to_string(), base, labels: Some(labels), addresses, ..End::default() })
    }

    fn by_labels(&self, text: &str, namespace: &str, pairs: &str) -> Result<End, String> {
        let mut labels = Labels::new();
        for pair in pairs.split(',') {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
            if key.starts_with("io.cilium.") || key.starts_with("reserved:") {
                return Err(format!("{key:?} is reserved: no pod's own label decides by this name"));
            }
            labels.insert(key.to_owned(), value.to_owned());
        }
        let known = self.tables.namespaces.get(&Arc::from(namespace));
        let mut namespace_labels = known.map(|known| known.labels.clone()).unwrap_or_default();
        namespace_labels.insert(NAMESPACE_NAME.to_owned(), namespace.to_owned());
        let labels = IdentityLabels {
            namespace: namespace.to_owned(),
            namespace_labels,
            service_account: "default".to_owned(),
            pod_labels: labels,
            ..IdentityLabels::default()
        };
        let (base, labels) = (Some(IdentityId::FIRST_CLUSTER), Some(Arc::new(labels)));
        Ok(End { name: text.to_owned(), base, labels, ..End::default() })
    }

    fn by_address(&self, address: IpAddr) -> End {
        let published = self.tables.node_endpoints.snapshot();
        let published = published.values().flat_map(|node| &node.endpoints);
        let published = published.map(|endpoint| (&endpoint.pod, &endpoint.addresses));
        let local = self.local.iter().map(|(pod, addresses)| (pod, addresses));
        let pod = local.chain(published).find(|(_, addresses)| addresses.contains(&address));
        if let Some(end) = pod.and_then(|(pod, _)| self.by_pod(pod).ok()) {
            return End { addresses: vec![address], ..end };
        }
        let nodes = self.tables.nodes.snapshot();
        let node = nodes.values().find(|node| node.addresses.contains(&address));
        let base = node.map(|node| match node.name == self.node {
            true => IdentityId::HOST,
            false => IdentityId::REMOTE_NODE,
        });
        let names = self.named.get(&address).cloned().unwrap_or_default();
        End { name: address.to_string(), base, addresses: vec![address], names, ..End::default() }
    }
}
