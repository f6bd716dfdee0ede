//! Namespaces.

use std::sync::Arc;

use crate::identity::NAMESPACE_NAME;
use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, labels, marks};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model;

/// v1
pub struct Namespace;

impl ObjectKind for Namespace {
    const META: Meta = Meta {
        name: "Namespace",
        plural: "namespaces",
        is_namespaced: false,
        is_reported: false,
        doubt: "no pod of it gets an identity: its labels count",
        ..Meta::CORE
    };
    type Row = model::Namespace;

    /// A namespace whose labels cannot be read is there all the same: without its labels a policy that asks
    /// for their absence would let its pods in.
    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<model::Namespace>> {
        let read = notes.read(labels(document));
        let is_partial = read.is_none();
        let mut labels = read.unwrap_or_default();
        labels.insert(NAMESPACE_NAME.to_owned(), id.key.name.to_string());
        let marks = marks(document, &mut notes.warnings);
        let is_leaving = document.get("metadata").and_then(|it| Ok(it.get("deletionTimestamp")?.is_present()));
        let is_leaving = is_leaving.unwrap_or(false);
        Ok(Some(model::Namespace { labels, is_partial, is_leaving, marks }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<model::Namespace>> {
        rows::plain(tables.namespaces.clone(), rows::by_name)
    }
}
