//! The directory of manifests that a lab's nodes share: the cluster's API.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Kubernetes objects as files, one each; any file may also be edited by hand.
#[derive(Debug)]
pub struct Manifests {
    directory: PathBuf,
    staging: PathBuf,
    written: AtomicUsize,
}

/// One port of a Service: its name, protocol, own port and the backends' port.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// Name, unique within the Service.
    pub name: String,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// The port of the cluster IP.
    pub port: u16,
    /// The port of the backends.
    pub target: u16,
}

/// One backend of a Service: its addresses and whether it is ready.
#[derive(Clone, Debug)]
pub struct Backend {
    /// One a family.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`.
    pub is_ready: bool,
    /// `nodeName`.
    pub node: String,
}

impl From<(&str, &'static str, u16, u16)> for ServicePort {
    fn from((name, protocol, port, target): (&str, &'static str, u16, u16)) -> Self {
        Self { name: name.to_owned(), protocol, port, target }
    }
}

impl Manifests {
    /// An empty directory below `lab`.
    pub fn create(lab: &Path) -> Result<Self> {
        let (directory, staging) = (lab.join("manifests"), lab.join("staging"));
        fs::create_dir_all(&directory)?;
        fs::create_dir_all(&staging)?;
        Ok(Self { directory, staging, written: AtomicUsize::new(0) })
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes every document of `yaml` to a file of its own.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        for object in weir::yaml::read_all::<Value>(yaml).context("parsing a manifest of the lab")? {
            if !object.is_null() {
                self.write(&object)?;
            }
        }
        Ok(())
    }

    /// Writes one object.
    pub fn write(&self, object: &Value) -> Result<()> {
        self.write_file(&file_of(object)?, &weir::yaml::write(object)?)
    }

    /// Puts a file of any content into the directory, in one step.
    pub fn write_file(&self, name: &str, content: &str) -> Result<()> {
        let staged = self.staging.join(self.written.fetch_add(1, Ordering::Relaxed).to_string());
        fs::write(&staged, content).with_context(|| format!("writing {}", staged.display()))?;
        fs::rename(&staged, self.directory.join(name)).with_context(|| format!("publishing {name}"))
    }

    /// Removes every object of `yaml` that is there.
    pub fn delete(&self, yaml: &str) -> Result<()> {
        for object in weir::yaml::read_all::<Value>(yaml).context("parsing a manifest of the lab")? {
            if !object.is_null() {
                self.remove(&object)?;
            }
        }
        Ok(())
    }

    /// Removes the file of one object, if there is one.
    pub fn remove(&self, object: &Value) -> Result<()> {
        self.remove_file(&file_of(object)?)
    }

    /// Removes a file, if it is there.
    pub fn remove_file(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.directory.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context(name.to_owned()),
            _ => Ok(()),
        }
    }

    /// A Node with its addresses and podCIDRs.
    pub fn node(&self, name: &str, addresses: &[IpAddr], pod_cidrs: &[String]) -> Result<()> {
        let addresses: Vec<Value> =
            addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
        self.write(&json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs},
            "status": {"addresses": addresses},
        }))
    }

    /// A Namespace with labels; the one with its name is added, as the API server does.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let mut labels = labels_of(labels);
        labels["kubernetes.io/metadata.name"] = json!(name);
        self.write(&json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels},
        }))
    }

    /// True if the namespace has been written.
    pub fn has_namespace(&self, name: &str) -> bool {
        self.directory.join(format!("namespace-{name}.yaml")).exists()
    }

    /// A Pod of `node`, with its labels and named ports.
    pub fn pod(
        &self,
        key: (&str, &str),
        node: &str,
        labels: &[(&str, &str)],
        ports: &[(&str, &str, u16)],
    ) -> Result<()> {
        let (namespace, name) = key;
        let ports: Vec<Value> = ports
            .iter()
            .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "containerPort": port}))
            .collect();
        self.write(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels_of(labels)},
            "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none", "ports": ports}]},
        }))
    }

    /// A Service with cluster IPs; `backends` become EndpointSlices, one a family.
    pub fn service(
        &self,
        key: (&str, &str),
        cluster_ips: &[&str],
        ports: &[ServicePort],
        backends: &[Backend],
    ) -> Result<()> {
        let (namespace, name) = key;
        let service_ports: Vec<Value> = ports
            .iter()
            .map(|port| {
                json!({"name": port.name, "protocol": port.protocol, "port": port.port, "targetPort": port.target})
            })
            .collect();
        self.write(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "type": "ClusterIP", "clusterIP": cluster_ips.first(), "clusterIPs": cluster_ips,
                "ipFamilyPolicy": "PreferDualStack", "ports": service_ports,
            },
        }))?;
        self.slices(key, ports, backends)
    }

    /// The EndpointSlices of a Service, one a family.
    pub fn slices(&self, key: (&str, &str), ports: &[ServicePort], backends: &[Backend]) -> Result<()> {
        let (namespace, name) = key;
        for (family, is_ipv4) in [("IPv4", true), ("IPv6", false)] {
            let endpoints: Vec<Value> = backends
                .iter()
                .filter_map(|backend| {
                    let address = backend.addresses.iter().find(|address| address.is_ipv4() == is_ipv4)?;
                    Some(json!({
                        "addresses": [address], "nodeName": backend.node,
                        "conditions": {"ready": backend.is_ready, "serving": backend.is_ready, "terminating": false},
                    }))
                })
                .collect();
            let slice_ports: Vec<Value> = ports
                .iter()
                .map(|port| json!({"name": port.name, "protocol": port.protocol, "port": port.target}))
                .collect();
            self.write(&json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{}", family.to_lowercase()), "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": family, "ports": slice_ports, "endpoints": endpoints,
            }))?;
        }
        Ok(())
    }
}

fn labels_of(labels: &[(&str, &str)]) -> Value {
    labels
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn file_of(object: &Value) -> Result<String> {
    let kind = object["kind"].as_str().context("a manifest without kind")?.to_lowercase();
    let name = object["metadata"]["name"].as_str().context("a manifest without name")?;
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{kind}-{namespace}-{name}.yaml"),
        None => format!("{kind}-{name}.yaml"),
    })
}
