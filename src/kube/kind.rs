//! What a kind of object is to the sources.
//!
//! A kind is one type: what the API calls it, how an object of it is read, where its rows go. Watches,
//! the directory of manifests, reports and status know nothing else of it. A new kind is a file in
//! [`super::kinds`] and a line in its list.

use std::any::Any;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::Value;

use super::Tables;
use super::convert::{Converted, Field, Notes, ObjectId, Result};
use super::kinds;
use super::rows::{AnyRows, Erased, Rows};

/// What the API calls a kind, and what is special about it.
#[derive(Debug)]
pub struct Meta {
    /// `kind` in a document.
    pub name: &'static str,
    /// The name in the API's paths.
    pub plural: &'static str,
    /// The API group; empty for the core one.
    pub group: &'static str,
    /// The version of the group that is read.
    pub version: &'static str,
    /// Objects have a namespace.
    pub is_namespaced: bool,
    /// People write such objects: the operator says on the object what is wrong with it.
    pub is_reported: bool,
    /// A cluster may be without the kind: it has no such objects then.
    pub is_optional: bool,
    /// What becomes of an object of which something cannot be read, and that is kept all the same.
    pub doubt: &'static str,
}

impl Meta {
    /// A namespaced kind of the core group that people write.
    pub const CORE: Self = Self {
        name: "",
        plural: "",
        group: "",
        version: "v1",
        is_namespaced: true,
        is_reported: true,
        is_optional: false,
        doubt: "what cannot be read counts for nothing",
    };
    /// A kind of Weir's own, of the cluster.
    pub const OWN: Self = Self { group: "weir.dev", version: "v1alpha1", is_namespaced: false, ..Self::CORE };
}

/// One kind, as a type.
pub trait ObjectKind: Sized + Send + Sync + 'static {
    /// What the API calls it.
    const META: Meta;
    /// The kind as a value.
    const KIND: Kind = Kind { entry: &Self::ENTRY };
    #[doc(hidden)]
    const ENTRY: Entry = Entry {
        meta: Self::META,
        read: read_any::<Self>,
        read_other_version: read_any_other_version::<Self>,
        rows: rows_of::<Self>,
    };

    /// What is left of an object.
    type Row: fmt::Debug + PartialEq + Send + Sync + 'static;

    /// Reads an object. `None`: it is well formed and does not concern us, such as a Service of type
    /// ExternalName. An error costs the object's last good row nothing; a kind that grants or denies
    /// something has no errors but doubts, and closes what they are about.
    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<Self::Row>>;

    /// Reads an object of another version of the group, as far as that is safe.
    fn read_other_version(_: &ObjectId, _: &Field, _: &mut Notes) -> Option<Self::Row> {
        None
    }

    /// The field selector of those that an agent on `node` wants.
    fn fields(_node: &str) -> Option<String> {
        None
    }

    /// The table that rows go to, by one writer.
    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Self::Row>>;
}

/// A kind as a value.
#[derive(Clone, Copy)]
pub struct Kind {
    entry: &'static Entry,
}

#[doc(hidden)]
pub struct Entry {
    meta: Meta,
    read: fn(&ObjectId, &Value, bool) -> Result<Converted<Object>>,
    read_other_version: fn(&ObjectId, &Value) -> Option<Converted<Object>>,
    rows: fn(&Arc<Tables>) -> Box<dyn AnyRows>,
}

impl Kind {
    /// Every kind.
    pub const ALL: &'static [Self] = kinds::ALL;

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }

    /// What is special about it.
    pub fn meta(self) -> &'static Meta {
        &self.entry.meta
    }

    /// `kind` in a document.
    pub fn name(self) -> &'static str {
        self.meta().name
    }

    /// The name in the API's paths.
    pub fn plural(self) -> &'static str {
        self.meta().plural
    }

    /// The API group; empty for the core one.
    pub fn group(self) -> &'static str {
        self.meta().group
    }

    /// The version of the group that is read.
    pub fn version(self) -> &'static str {
        self.meta().version
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
        self.group() == Meta::OWN.group
    }

    /// Objects of this kind have a namespace.
    pub fn is_namespaced(self) -> bool {
        self.meta().is_namespaced
    }

    /// How many rows there are.
    pub fn count(self, tables: &Arc<Tables>) -> usize {
        self.rows(tables).count()
    }

    /// The writer of its rows.
    pub(super) fn rows(self, tables: &Arc<Tables>) -> Box<dyn AnyRows> {
        (self.entry.rows)(tables)
    }

    /// Reads a document of this kind. A strict one was written by a person and not yet checked by an API server.
    pub(super) fn read(self, id: &ObjectId, document: &Value, is_strict: bool) -> Result<Converted<Object>> {
        (self.entry.read)(id, document, is_strict)
    }

    /// Reads a document of another version of this kind, where that is safe.
    pub(super) fn read_other_version(self, id: &ObjectId, document: &Value) -> Option<Converted<Object>> {
        (self.entry.read_other_version)(id, document)
    }
}

fn read_any<K: ObjectKind>(id: &ObjectId, document: &Value, is_strict: bool) -> Result<Converted<Object>> {
    let Converted { row, warnings, doubts } = read::<K>(id, document, is_strict)?;
    Ok(Converted { row: row.map(|row| Object(row)), warnings, doubts })
}

fn read_any_other_version<K: ObjectKind>(id: &ObjectId, document: &Value) -> Option<Converted<Object>> {
    let mut notes = Notes::default();
    let row = K::read_other_version(id, &Field::root(document, true), &mut notes)?;
    Some(Converted { row: Some(Object(Arc::new(row))), warnings: notes.warnings, doubts: notes.doubts })
}

/// Reads an object of one kind.
pub fn read<K: ObjectKind>(
    id: &ObjectId,
    document: &Value,
    is_strict: bool,
) -> Result<Converted<Arc<K::Row>>> {
    let mut notes = Notes::default();
    let row = K::read(id, &Field::root(document, is_strict), &mut notes)?;
    Ok(Converted { row: row.map(Arc::new), warnings: notes.warnings, doubts: notes.doubts })
}

fn rows_of<K: ObjectKind>(tables: &Arc<Tables>) -> Box<dyn AnyRows> {
    Box::new(Erased(K::rows(tables)))
}

/// A row of any kind.
#[derive(Clone, Debug)]
pub struct Object(Arc<dyn AnyRow + Send + Sync>);

impl Object {
    /// The row, if it is one of this type.
    pub fn row<R: Any + Send + Sync>(&self) -> Option<Arc<R>> {
        let row: Arc<dyn Any + Send + Sync> = self.0.clone();
        row.downcast().ok()
    }
}

impl PartialEq for Object {
    fn eq(&self, other: &Self) -> bool {
        self.0.is_equal(&*other.0)
    }
}

impl Eq for Object {}

trait AnyRow: Any + fmt::Debug {
    fn is_equal(&self, other: &dyn AnyRow) -> bool;
}

impl<R: Any + fmt::Debug + PartialEq> AnyRow for R {
    fn is_equal(&self, other: &dyn AnyRow) -> bool {
        let other: &dyn Any = other;
        other.downcast_ref::<R>().is_some_and(|other| self == other)
    }
}

impl Kind {
    fn key(self) -> (&'static str, &'static str) {
        (self.group(), self.name())
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Kind {}

impl PartialOrd for Kind {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Kind {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for Kind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
