//! Objects as the API server sends them, converted while they are read.
//!
//! An object's JSON lives no longer than it takes to convert it; what is left of a
//! page of a list are rows. A broken object is a value like any other, so that it
//! costs only itself and never the list that it is in.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::DynamicResourceScope;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::convert::{self, Converted, Field, FieldError, Kind, ObjectId};
use crate::model;

/// A type of the model that one kind of the API becomes.
pub trait Watchable: 'static {
    /// The kind.
    const KIND: Kind;
}

macro_rules! watchable {
    ($($model:ident => $kind:ident),* $(,)?) => {
        $(impl Watchable for model::$model {
            const KIND: Kind = Kind::$kind;
        })*
    };
}

watchable! {
    Namespace => Namespace,
    Pod => Pod,
    Node => Node,
    Service => Service,
    EndpointSlice => EndpointSlice,
    Policy => NetworkPolicy,
    IdentityLabels => Identity,
    NodeEndpoints => NodeEndpoints,
    Allocation => WeirNode,
}

/// An object of the kind that becomes `M`, converted.
pub struct Watched<M> {
    metadata: ObjectMeta,
    /// Which object it is; none has been seen without a valid name.
    pub id: Result<ObjectId, FieldError>,
    /// What came of it.
    pub outcome: Result<Converted, FieldError>,
    kind: PhantomData<fn() -> M>,
}

impl<M: Watchable> Watched<M> {
    fn new(value: &Value) -> Self {
        let text = |field: &str| value["metadata"][field].as_str().map(str::to_owned);
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            uid: text("uid"),
            ..ObjectMeta::default()
        };
        let id = convert::identify(M::KIND, &Field::root(value, false));
        let outcome = id.clone().and_then(|id| convert::convert(&id, value, false));
        Self { metadata, id, outcome, kind: PhantomData }
    }
}

impl<'de, M: Watchable> Deserialize<'de> for Watched<M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self::new(&value))
    }
}

impl<M> Clone for Watched<M> {
    fn clone(&self) -> Self {
        let (metadata, id, outcome) = (self.metadata.clone(), self.id.clone(), self.outcome.clone());
        Self { metadata, id, outcome, kind: PhantomData }
    }
}

impl<M> fmt::Debug for Watched<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("id", &self.id).field("outcome", &self.outcome).finish()
    }
}

impl<M: Watchable> Resource for Watched<M> {
    type DynamicType = ();
    type Scope = DynamicResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        M::KIND.name().into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        M::KIND.group().into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        M::KIND.version().into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        M::KIND.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
