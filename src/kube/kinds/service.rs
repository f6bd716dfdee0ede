//! Services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::kube::Tables;
use crate::kube::convert::{Field, FieldError, Notes, ObjectId, Result, items, names};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{self, Protocol, ServicePort};

/// v1
pub struct Service;

impl ObjectKind for Service {
    const META: Meta = Meta { name: "Service", plural: "services", ..Meta::CORE };
    type Row = model::Service;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<model::Service>> {
        service(id, document, &mut notes.warnings)
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::Service>> {
        rows::plain(tables.services.clone(), Clone::clone)
    }
}

/// Labels of a Service that something else looks after, whatever their values.
const NOT_OURS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];

/// `None` for a Service that has no addresses by its type, or that is not ours to serve.
fn service(
    id: &ObjectId,
    document: &Field,
    warnings: &mut Vec<FieldError>,
) -> Result<Option<model::Service>> {
    let labels = document.get("metadata")?.get("labels")?.strings()?;
    if NOT_OURS.iter().any(|label| labels.contains_key(*label)) {
        return Ok(None);
    }
    let spec = document.get("spec")?;
    let kind = spec.get("type")?;
    match kind.string()? {
        Some("ExternalName") => return Ok(None),
        None | Some("" | "ClusterIP") => {}
        Some(name @ ("NodePort" | "LoadBalancer")) => {
            warnings.push(kind.error(format!("of a {name} Service Weir serves the cluster IPs only")));
        }
        Some(other) => {
            let known = "ClusterIP, NodePort, LoadBalancer and ExternalName";
            return Err(kind.error(format!("{other:?} is not a type of Service; known are {known}")));
        }
    }
    let addresses = cluster_addresses(&spec)?;
    let ports = service_ports(&spec.get("ports")?)?;
    warn_of_unserved(&spec, warnings)?;
    Ok(Some(model::Service { addresses, ports, ..model::Service::new(id.key.clone()) }))
}

/// What a Service may ask for and does not get: whoever wrote it should not find out by himself.
fn warn_of_unserved(spec: &Field, warnings: &mut Vec<FieldError>) -> Result<()> {
    let affinity = spec.get("sessionAffinity")?;
    if affinity.string()? == Some("ClientIP") {
        warnings.push(affinity.error("ClientIP is not kept: each connection may reach another backend"));
    }
    let traffic = spec.get("internalTrafficPolicy")?;
    if traffic.string()? == Some("Local") {
        warnings.push(traffic.error("Local is not kept: backends of all nodes are reached"));
    }
    let external = spec.get("externalIPs")?;
    if !items(&external)?.is_empty() {
        warnings.push(external.error("are not served: of these addresses Weir takes no packets"));
    }
    for port in items(&spec.get("ports")?)? {
        let protocol = port.get("protocol")?;
        if protocol.protocol()? == Protocol::Sctp {
            warnings.push(protocol.error("Weir serves TCP and UDP only"));
        }
    }
    Ok(())
}

/// `clusterIPs`, or `clusterIP`; none for a headless Service.
fn cluster_addresses(spec: &Field) -> Result<Vec<IpAddr>> {
    let mut fields = items(&spec.get("clusterIPs")?)?;
    if fields.is_empty() {
        let single = spec.get("clusterIP")?;
        if single.string()?.is_none_or(str::is_empty) {
            return Err(single.error("is required: an address, or None for a headless Service"));
        }
        fields.push(single);
    }
    if fields[0].string()? == Some("None") {
        return Ok(Vec::new());
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for field in fields {
        let address = field.address()?;
        if let Some(reason) = unusable(address) {
            return Err(field.error(format!("{address} {reason}")));
        }
        if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(field.error("is a second address of its family; at most one of each is allowed"));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

fn service_ports(list: &Field) -> Result<Vec<ServicePort>> {
    let fields = items(list)?;
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    let mut ports = Vec::with_capacity(fields.len());
    for field in &fields {
        let number = field.get("port")?;
        let port = ServicePort {
            name: field.get("name")?.string()?.unwrap_or_default().to_owned(),
            protocol: field.get("protocol")?.protocol()?,
            port: number.port()?.ok_or_else(|| number.error("is required"))?,
            node_port: None,
        };
        let name = field.get("name")?;
        if port.name.is_empty() && fields.len() > 1 {
            return Err(name.error("is required where a Service has several ports"));
        }
        if !port.name.is_empty() && !names::is_dns_label(&port.name) {
            return Err(name.error(format!(
                "{:?} is not a port's name (lower-case letters, digits and '-', at most 63 characters)",
                port.name
            )));
        }
        if !names.insert(port.name.clone()) {
            return Err(name.error(format!("{:?} is the name of another port of this Service", port.name)));
        }
        if !numbers.insert((port.protocol, port.port)) {
            return Err(number.error(format!("{} {} is there already", port.protocol, port.port)));
        }
        ports.push(port);
    }
    Ok(ports)
}

/// Why neither a Service nor a backend may have this address.
pub(super) fn unusable(address: IpAddr) -> Option<&'static str> {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    if address.is_unspecified() {
        Some("is unspecified")
    } else if address.is_loopback() {
        Some("is a loopback address")
    } else if address.is_multicast() {
        Some("is a multicast address")
    } else if is_link_local {
        Some("is a link-local address")
    } else {
        None
    }
}
