//! Services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use crate::kube::Tables;
use crate::kube::convert::{Field, FieldError, Notes, ObjectId, Result, items, names};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{self, Distribution, Protocol, ServicePort, TrafficPolicy};

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
/// Cilium's users have this annotation, and mean that the ranges are kept out.
const RANGES_POLICY: &str = "service.cilium.io/src-ranges-policy";
/// What the API server writes where nothing is said.
const AFFINITY_SECONDS: u64 = 10_800;
/// The longest affinity that the API server allows.
const AFFINITY_SECONDS_MAX: u64 = 86_400;

/// `None` for a Service that has no addresses by its type, or that is not ours to serve.
fn service(
    id: &ObjectId,
    document: &Field,
    warnings: &mut Vec<FieldError>,
) -> Result<Option<model::Service>> {
    let metadata = document.get("metadata")?;
    let labels = metadata.get("labels")?.strings()?;
    if NOT_OURS.iter().any(|label| labels.contains_key(*label)) {
        return Ok(None);
    }
    let spec = document.get("spec")?;
    let kind = spec.get("type")?;
    let type_ = match kind.string()? {
        Some("ExternalName") => return Ok(None),
        None | Some("" | "ClusterIP") => Type::ClusterIp,
        Some("NodePort") => Type::NodePort,
        Some("LoadBalancer") => Type::LoadBalancer,
        Some(other) => {
            let known = "ClusterIP, NodePort, LoadBalancer and ExternalName";
            return Err(kind.error(format!("{other:?} is not a type of Service; known are {known}")));
        }
    };
    let addresses = cluster_addresses(&spec)?;
    let mut ports = service_ports(&spec.get("ports")?)?;
    if type_ == Type::ClusterIp || addresses.is_empty() {
        ports.iter_mut().for_each(|port| port.node_port = None);
    }
    let selector = spec.get("selector")?.strings()?;
    let mut service =
        model::Service { addresses, ports, labels, selector, ..model::Service::new(id.key.clone()) };
    read_traffic(&spec, &mut service)?;
    if !service.addresses.is_empty() {
        service.external_addresses = outer_addresses(&items(&spec.get("externalIPs")?)?, warnings)?;
    }
    if type_ == Type::LoadBalancer {
        read_balancer(document, &mut service, warnings)?;
    }
    if type_ == Type::LoadBalancer && service.external_policy == TrafficPolicy::Local {
        service.health_port = spec.get("healthCheckNodePort")?.port_or_zero()?;
    }
    let annotations = metadata.get("annotations")?;
    service.algorithm = annotated(&annotations, ["weir.dev/algorithm", "service.cilium.io/lb-algorithm"], warnings)?;
    service.forwarding =
        annotated(&annotations, ["weir.dev/forwarding", "service.cilium.io/forwarding-mode"], warnings)?;
    warn_of_unserved(&spec, warnings)?;
    Ok(Some(service))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

/// Traffic policies, affinity and distribution.
fn read_traffic(spec: &Field, service: &mut model::Service) -> Result<()> {
    let policy = |name: &str| {
        let field = spec.get(name)?;
        match field.string()? {
            None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
            Some("Local") => Ok(TrafficPolicy::Local),
            Some(other) => Err(field.error(format!("{other:?} is not Cluster or Local"))),
        }
    };
    service.internal_policy = policy("internalTrafficPolicy")?;
    service.external_policy = policy("externalTrafficPolicy")?;
    let affinity = spec.get("sessionAffinity")?;
    service.affinity = match affinity.string()? {
        None | Some("" | "None") => None,
        Some("ClientIP") => {
            let seconds = spec.get("sessionAffinityConfig")?.get("clientIP")?.get("timeoutSeconds")?;
            match seconds.unsigned()?.unwrap_or(AFFINITY_SECONDS) {
                number @ 1..=AFFINITY_SECONDS_MAX => Some(number as u32),
                number => {
                    let may = format!("{number} is not 1 to {AFFINITY_SECONDS_MAX} seconds");
                    return Err(seconds.error(may));
                }
            }
        }
        Some(other) => return Err(affinity.error(format!("{other:?} is not None or ClientIP"))),
    };
    service.distribution = match spec.get("trafficDistribution")?.string()? {
        Some("PreferClose" | "PreferSameZone") => Some(Distribution::SameZone),
        Some("PreferSameNode") => Some(Distribution::SameNode),
        // A hint that is not known is no hint, as the API says.
        _ => None,
    };
    Ok(())
}

/// The addresses that a load balancer leaves in its packets, and who may come by it.
fn read_balancer(
    document: &Field,
    service: &mut model::Service,
    warnings: &mut Vec<FieldError>,
) -> Result<()> {
    let spec = document.get("spec")?;
    service.balancer_class = spec.get("loadBalancerClass")?.string()?.map(Into::into);
    let ranges = items(&spec.get("loadBalancerSourceRanges")?)?;
    service.source_ranges = ranges.iter().map(Field::cidr).collect::<Result<Vec<_>>>()?.into();
    let policy = document.get("metadata")?.get("annotations")?.get(RANGES_POLICY)?;
    if policy.string()? == Some("deny") && !service.source_ranges.is_empty() {
        warnings.push(policy.error("deny is not known to Weir: the load balancer's addresses are not served"));
        return Ok(());
    }
    let mut fields = Vec::new();
    for ingress in items(&document.get("status")?.get("loadBalancer")?.get("ingress")?)? {
        // A proxy gives its packets the node's address: its own leads to the proxy, also from within the cluster.
        let is_proxy = ingress.get("ipMode")?.string()? == Some("Proxy");
        let address = ingress.get("ip")?;
        if !is_proxy && address.string()?.is_some_and(|text| !text.is_empty()) {
            fields.push(address);
        }
    }
    service.balancer_addresses = outer_addresses(&fields, warnings)?;
    Ok(())
}

/// Addresses that the cluster does not give; what cannot be one is left out.
fn outer_addresses(fields: &[Field], warnings: &mut Vec<FieldError>) -> Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for field in fields {
        let address = field.address()?;
        match unusable(address) {
            Some(reason) => warnings.push(field.error(format!("{address} {reason}; left out"))),
            None if addresses.contains(&address) => {}
            None => addresses.push(address),
        }
    }
    Ok(addresses)
}

/// The first of these annotations that is there. What it may not say is said, and counts for nothing.
fn annotated<T: FromStr<Err = String>>(
    annotations: &Field,
    names: [&str; 2],
    warnings: &mut Vec<FieldError>,
) -> Result<Option<T>> {
    for name in names {
        let field = annotations.get(name)?;
        let Some(text) = field.string()? else { continue };
        match text.parse() {
            Ok(value) => return Ok(Some(value)),
            Err(reason) => warnings.push(field.error(reason)),
        }
    }
    Ok(None)
}

/// What a Service may ask for and does not get: whoever wrote it should not find out by himself.
fn warn_of_unserved(spec: &Field, warnings: &mut Vec<FieldError>) -> Result<()> {
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
            node_port: field.get("nodePort")?.port_or_zero()?,
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
