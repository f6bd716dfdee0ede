//! Objects as the API server sends them, converted while they are read.
//!
//! An object's JSON lives no longer than it takes to convert it; what is left of a
//! page of a list are rows. A broken object is a value like any other, so that it
//! costs only itself and never the list that it is in.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::DynamicResourceScope;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::convert::{self, Converted, Field, FieldError, ObjectId};
use super::kind::{self, ObjectKind};

/// An object of the kind `K`, converted.
pub struct Watched<K: ObjectKind> {
    metadata: ObjectMeta,
    /// Which object it is; none has been seen without a valid name.
    pub id: Result<ObjectId, FieldError>,
    /// What came of it.
    pub outcome: Result<Converted<Arc<K::Row>>, FieldError>,
}

impl<K: ObjectKind> Watched<K> {
    fn new(value: &Value) -> Self {
        let text = |field: &str| value["metadata"][field].as_str().map(str::to_owned);
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            uid: text("uid"),
            ..ObjectMeta::default()
        };
        let id = convert::identify(K::KIND, &Field::root(value, false));
        let outcome = id.clone().and_then(|id| kind::read::<K>(&id, value, false));
        Self { metadata, id, outcome }
    }
}

impl<'de, K: ObjectKind> Deserialize<'de> for Watched<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self::new(&value))
    }
}

impl<K: ObjectKind> Clone for Watched<K> {
    fn clone(&self) -> Self {
        Self { metadata: self.metadata.clone(), id: self.id.clone(), outcome: self.outcome.clone() }
    }
}

impl<K: ObjectKind> fmt::Debug for Watched<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("id", &self.id).field("outcome", &self.outcome).finish()
    }
}

impl<K: ObjectKind> Resource for Watched<K> {
    type DynamicType = ();
    type Scope = DynamicResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::KIND.name().into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::KIND.group().into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::KIND.version().into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::KIND.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
