//! Kubernetes objects to `model` types, at the edge and nowhere else.
//!
//! Both sources end here with a JSON value, so that the same object means the same
//! and is refused with the same words whether an API server or a file gave it.

mod field;
mod names;
mod node;
mod own;
mod pod;
mod policy;
mod service;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

pub use field::{Field, FieldError, Result};
pub use names::is_object_name;
use policy::Notes;

use crate::model::{
    Allocation, EndpointSlice, IdentityId, IdentityLabels, Labels, Namespace, Node, NodeEndpoints, ObjectKey,
    Pod, Policy, Service,
};

/// The kinds of objects that sources deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Kind {
    /// v1
    Namespace,
    /// v1
    Pod,
    /// v1
    Node,
    /// v1
    Service,
    /// discovery.k8s.io/v1
    EndpointSlice,
    /// networking.k8s.io/v1
    NetworkPolicy,
    /// weir.dev/v1alpha1
    Identity,
    /// weir.dev/v1alpha1
    NodeEndpoints,
    /// weir.dev/v1alpha1
    WeirNode,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 9] = [
        Kind::Namespace,
        Kind::Pod,
        Kind::Node,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::NetworkPolicy,
        Kind::Identity,
        Kind::NodeEndpoints,
        Kind::WeirNode,
    ];

    /// `kind` in a document.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Namespace => "Namespace",
            Kind::Pod => "Pod",
            Kind::Node => "Node",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::NetworkPolicy => "NetworkPolicy",
            Kind::Identity => "Identity",
            Kind::NodeEndpoints => "NodeEndpoints",
            Kind::WeirNode => "WeirNode",
        }
    }

    /// The name in the API's paths.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Namespace => "namespaces",
            Kind::Pod => "pods",
            Kind::Node => "nodes",
            Kind::Service => "services",
            Kind::EndpointSlice => "endpointslices",
            Kind::NetworkPolicy => "networkpolicies",
            Kind::Identity => "identities",
            Kind::NodeEndpoints => "nodeendpoints",
            Kind::WeirNode => "weirnodes",
        }
    }

    /// The API group; empty for the core one.
    pub fn group(self) -> &'static str {
        match self {
            Kind::Namespace | Kind::Pod | Kind::Node | Kind::Service => "",
            Kind::EndpointSlice => "discovery.k8s.io",
            Kind::NetworkPolicy => "networking.k8s.io",
            Kind::Identity | Kind::NodeEndpoints | Kind::WeirNode => "weir.dev",
        }
    }

    /// The version of the group that is read.
    pub fn version(self) -> &'static str {
        match self {
            Kind::Identity | Kind::NodeEndpoints | Kind::WeirNode => "v1alpha1",
            _ => "v1",
        }
    }

    /// `apiVersion` in a document.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.version().to_owned(),
            group => format!("{group}/{}", self.version()),
        }
    }

    /// The kind is Weir's own: a definition brings it to the API server.
    pub fn is_own(self) -> bool {
        self.group() == "weir.dev"
    }

    /// Objects of this kind have a namespace.
    pub fn is_namespaced(self) -> bool {
        matches!(self, Kind::Pod | Kind::Service | Kind::EndpointSlice | Kind::NetworkPolicy)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which object: kind, namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Its kind.
    pub kind: Kind,
    /// Namespace, empty for cluster-scoped kinds, and name.
    pub key: ObjectKey,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.key.namespace {
            "" => write!(f, "{} {}", self.kind, self.key.name),
            _ => write!(f, "{} {}", self.kind, self.key),
        }
    }
}

/// A converted object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A row of `namespaces`.
    Namespace(Arc<Namespace>),
    /// A row of `pods`.
    Pod(Arc<Pod>),
    /// A row of `nodes`.
    Node(Arc<Node>),
    /// A row of `services`.
    Service(Arc<Service>),
    /// A row of `slices`.
    EndpointSlice(Arc<EndpointSlice>),
    /// A row of `policies`.
    NetworkPolicy(Arc<Policy>),
    /// A row of `identities`; true when the operator marked it as unused.
    Identity(IdentityId, Arc<IdentityLabels>, bool),
    /// One of the objects that together are a row of `node_endpoints`.
    NodeEndpoints(Arc<NodeEndpoints>),
    /// A row of `allocations`.
    WeirNode(Arc<Allocation>),
}

/// What came of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The object; `None` for one that is well formed and does not concern us, such as a
    /// Service of type ExternalName.
    pub object: Option<Object>,
    /// What was left out of it, and why.
    pub warnings: Vec<FieldError>,
    /// What could not be read of a policy, and is taken for closed.
    pub doubts: Vec<FieldError>,
}

/// Which object a document is about, as far as it says so.
pub fn identify(kind: Kind, document: &Field) -> Result<ObjectId> {
    let metadata = document.get("metadata")?;
    let name = metadata.get("name")?;
    let text = name.required_string()?;
    if !is_object_name(text) {
        return Err(name.error(format!(
            "{text:?} is not a name (lower-case letters, digits, '-' and '.', at most 253 characters)"
        )));
    }
    let namespace = metadata.get("namespace")?;
    let namespace = match namespace.string()? {
        _ if !kind.is_namespaced() => "",
        None | Some("") => "default",
        Some(text) if names::is_dns_label(text) => text,
        Some(text) => {
            return Err(namespace.error(format!(
                "{text:?} is not a namespace's name (lower-case letters, digits and '-', at most 63 characters)"
            )));
        }
    };
    Ok(ObjectId { kind, key: ObjectKey::new(namespace, text) })
}

/// Converts a document of the kind that `id` has. A strict one was written by a person
/// and not yet checked by an API server.
pub fn convert(id: &ObjectId, document: &Value, is_strict: bool) -> Result<Converted> {
    let document = Field::root(document, is_strict);
    let mut notes = Notes::default();
    let warnings = &mut notes.warnings;
    let object = match id.kind {
        Kind::Namespace => Some(Object::Namespace(Arc::new(pod::namespace(id, &document)?))),
        Kind::Pod => Some(Object::Pod(Arc::new(pod::pod(id, &document)?))),
        Kind::Node => Some(Object::Node(Arc::new(node::node(id, &document)?))),
        Kind::Service => {
            service::service(id, &document, warnings)?.map(|service| Object::Service(Arc::new(service)))
        }
        Kind::EndpointSlice => service::endpoint_slice(id, &document, warnings)?
            .map(|slice| Object::EndpointSlice(Arc::new(slice))),
        Kind::NetworkPolicy => {
            Some(Object::NetworkPolicy(Arc::new(policy::network_policy(id, &document, &mut notes))))
        }
        Kind::Identity => {
            let (number, labels, is_unused) = own::identity(id, &document)?;
            Some(Object::Identity(number, Arc::new(labels), is_unused))
        }
        Kind::NodeEndpoints => Some(Object::NodeEndpoints(Arc::new(own::node_endpoints(id, &document)?))),
        Kind::WeirNode => Some(Object::WeirNode(Arc::new(own::allocation(&document)?))),
    };
    Ok(Converted { object, warnings: notes.warnings, doubts: notes.doubts })
}

/// `metadata.labels`.
fn labels(document: &Field) -> Result<Labels> {
    let field = document.get("metadata")?.get("labels")?;
    let labels = field.strings()?;
    check_labels(&field, &labels)?;
    Ok(labels)
}

/// Refuses labels that no API server would store; only strict documents need the check.
fn check_labels(field: &Field, labels: &Labels) -> Result<()> {
    if !field.is_strict() {
        return Ok(());
    }
    for (key, value) in labels {
        if !names::is_label_key(key) {
            return Err(field.error(format!("{key:?} is not a label key")));
        }
        if !names::is_label_value(value) {
            return Err(field.get(key)?.error(format!(
                "{value:?} is not a label value (at most 63 letters, digits, '-', '_' and '.')"
            )));
        }
    }
    Ok(())
}

/// The elements of a list, none when it is absent.
fn items<'a>(field: &Field<'a>) -> Result<Vec<Field<'a>>> {
    Ok(field.items()?.unwrap_or_default())
}
