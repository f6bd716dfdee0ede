//! EndpointSlices.

use std::sync::Arc;

use super::service::unusable;
use crate::kube::Tables;
use crate::kube::convert::{Field, FieldError, Notes, ObjectId, Result, items};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{self, Hints, ObjectKey, SliceBackend, SlicePort};

/// Annotations of a slice that give its backends' share of what Maglev spreads.
const WEIGHT: [&str; 2] = ["weir.dev/weight", "service.cilium.io/weight"];
/// The label of a slice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// discovery.k8s.io/v1
pub struct EndpointSlice;

impl ObjectKind for EndpointSlice {
    const META: Meta = Meta {
        name: "EndpointSlice",
        plural: "endpointslices",
        group: "discovery.k8s.io",
        ..Meta::CORE
    };
    type Row = model::EndpointSlice;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<model::EndpointSlice>> {
        endpoint_slice(id, document, &mut notes.warnings)
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::EndpointSlice>> {
        rows::plain(tables.slices.clone(), Clone::clone)
    }
}

/// `None` for a slice of names, or one that belongs to no Service.
fn endpoint_slice(
    id: &ObjectId,
    document: &Field,
    warnings: &mut Vec<FieldError>,
) -> Result<Option<model::EndpointSlice>> {
    let address_type = document.get("addressType")?;
    let is_ipv4 = match address_type.required_string()? {
        "IPv4" => true,
        "IPv6" => false,
        "FQDN" => {
            warnings.push(address_type.error("FQDN names no addresses, so this slice has no backends"));
            return Ok(None);
        }
        other => return Err(address_type.error(format!("{other:?} is not IPv4, IPv6 or FQDN"))),
    };
    let labels = document.get("metadata")?.get("labels")?.strings()?;
    let Some(service) = labels.get(SERVICE_NAME).filter(|name| !name.is_empty()) else { return Ok(None) };
    let weight = weight(&document.get("metadata")?.get("annotations")?, warnings)?;
    let mut backends = Vec::new();
    for endpoint in items(&document.get("endpoints")?)? {
        let backend = backend(&endpoint, is_ipv4, warnings)?;
        backends.extend(backend.map(|backend| SliceBackend { weight, ..backend }));
    }
    Ok(Some(model::EndpointSlice {
        key: id.key.clone(),
        service: ObjectKey::new(id.key.namespace.clone(), service.as_str()),
        ports: slice_ports(&document.get("ports")?)?,
        backends,
    }))
}

/// A port without a number means all ports, which no Service can lead to.
fn slice_ports(list: &Field) -> Result<Vec<SlicePort>> {
    let mut ports = Vec::new();
    for field in items(list)? {
        if let Some(port) = field.get("port")?.port()? {
            let name = field.get("name")?.string()?.unwrap_or_default().to_owned();
            ports.push(SlicePort { name, protocol: field.get("protocol")?.protocol()?, port });
        }
    }
    Ok(ports)
}

/// The API says that consumers use the first address only.
fn backend(endpoint: &Field, is_ipv4: bool, warnings: &mut Vec<FieldError>) -> Result<Option<SliceBackend>> {
    let mut first = None;
    for field in items(&endpoint.get("addresses")?)? {
        let address = field.address()?;
        // Who may write slices must not reach what listens on the node itself (CVE-2021-25737).
        let reason = match unusable(address) {
            None if address.is_ipv4() != is_ipv4 => Some("is not of the slice's addressType"),
            other => other,
        };
        match reason {
            Some(reason) => warnings.push(field.error(format!("{address} {reason}; left out"))),
            None => first = first.or(Some(address)),
        }
    }
    let conditions = endpoint.get("conditions")?;
    let ready = conditions.get("ready")?.boolean()?.unwrap_or(true);
    let serving = conditions.get("serving")?.boolean()?.unwrap_or(ready);
    let terminating = conditions.get("terminating")?.boolean()?.unwrap_or(false);
    let text = |name: &str| -> Result<Option<Arc<str>>> {
        Ok(endpoint.get(name)?.string()?.filter(|text| !text.is_empty()).map(Arc::from))
    };
    let (node, zone) = (text("nodeName")?, text("zone")?);
    let hints = hints(&endpoint.get("hints")?)?;
    Ok(first.map(|address| SliceBackend {
        ready,
        serving,
        terminating,
        node,
        zone,
        hints,
        ..SliceBackend::ready(address)
    }))
}

/// For which zones and nodes a backend is meant.
fn hints(field: &Field) -> Result<Option<Arc<Hints>>> {
    let names = |list: &str| -> Result<Vec<Arc<str>>> {
        let names = items(&field.get(list)?)?;
        names.iter().map(|item| Ok(item.get("name")?.required_string()?.into())).collect()
    };
    let hints = Hints { zones: names("forZones")?, nodes: names("forNodes")? };
    Ok((hints != Hints::default()).then(|| Arc::new(hints)))
}

/// 0 to 65535; 1 where nothing is said, or what is no number.
fn weight(annotations: &Field, warnings: &mut Vec<FieldError>) -> Result<u16> {
    for name in WEIGHT {
        let field = annotations.get(name)?;
        let Some(text) = field.string()? else { continue };
        match text.parse() {
            Ok(weight) => return Ok(weight),
            Err(_) => warnings.push(field.error(format!("{text:?} is not a weight (0 to 65535)"))),
        }
    }
    Ok(1)
}

