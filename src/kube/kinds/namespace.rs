//! Namespaces.

use std::sync::Arc;

use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, labels};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model;

/// The label that upstream gives every namespace.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// v1
pub struct Namespace;

impl ObjectKind for Namespace {
    const META: Meta = Meta {
        name: "Namespace",
        plural: "namespaces",
        is_namespaced: false,
        is_reported: false,
        ..Meta::CORE
    };
    type Row = model::Namespace;

    fn read(id: &ObjectId, document: &Field, _: &mut Notes) -> Result<Option<model::Namespace>> {
        let mut labels = labels(document)?;
        labels.insert(NAMESPACE_NAME.to_owned(), id.key.name.to_string());
        Ok(Some(model::Namespace { labels }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::Namespace>> {
        rows::plain(tables.namespaces.clone(), rows::by_name)
    }
}
