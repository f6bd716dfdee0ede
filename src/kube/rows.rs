//! Where the rows of a kind go: mostly to one table, one row an object.
//!
//! Three kinds need more than that: a node's endpoints come in several objects
//! ([`super::kinds`]), nodes are joined with what the operator gave them ([`super::joined`]),
//! and an identity may be ahead of its source, or outlive it ([`super::claims`]).

use std::sync::Arc;

use tokio::sync::watch;

use super::convert::ObjectId;
use super::kind::Object;
use crate::model::ObjectKey;
use crate::tables::{State, Table};

/// The one writer of a kind's rows.
pub trait Rows<R>: Send {
    /// Makes the rows exactly `all`, and marks them as synced.
    fn reset(&mut self, all: Vec<(ObjectKey, Arc<R>)>);
    /// The object's row as it last was.
    fn get(&self, key: &ObjectKey) -> Option<Arc<R>>;
    /// Inserts or replaces an object's row.
    fn apply(&mut self, key: &ObjectKey, row: Arc<R>);
    /// Removes an object's row.
    fn delete(&mut self, key: &ObjectKey);
    /// How many rows there are.
    fn count(&self) -> usize;
    /// Their revision, and whether they are synced.
    fn subscribe(&self) -> watch::Receiver<State>;
}

/// A table with a row an object, under the key that `key` makes of the object's.
pub fn plain<K, R>(table: Arc<Table<K, Arc<R>>>, key: fn(&ObjectKey) -> K) -> Box<dyn Rows<R>>
where
    K: Ord + Clone + Send + Sync + 'static,
    R: PartialEq + Send + Sync + 'static,
{
    Box::new(Plain { table, key })
}

/// Objects that have no namespace are found by name.
pub fn by_name(key: &ObjectKey) -> Arc<str> {
    key.name.clone()
}

struct Plain<K, R> {
    table: Arc<Table<K, Arc<R>>>,
    key: fn(&ObjectKey) -> K,
}

impl<K, R> Rows<R> for Plain<K, R>
where
    K: Ord + Clone + Send + Sync,
    R: PartialEq + Send + Sync,
{
    fn reset(&mut self, all: Vec<(ObjectKey, Arc<R>)>) {
        self.table.reset(all.into_iter().map(|(key, row)| ((self.key)(&key), row)));
    }

    fn get(&self, key: &ObjectKey) -> Option<Arc<R>> {
        self.table.get(&(self.key)(key))
    }

    fn apply(&mut self, key: &ObjectKey, row: Arc<R>) {
        self.table.apply((self.key)(key), row);
    }

    fn delete(&mut self, key: &ObjectKey) {
        self.table.delete(&(self.key)(key));
    }

    fn count(&self) -> usize {
        self.table.snapshot().len()
    }

    fn subscribe(&self) -> watch::Receiver<State> {
        self.table.subscribe()
    }
}

/// The rows of some kind.
pub trait AnyRows: Send {
    /// Makes the rows exactly `all`, and marks them as synced.
    fn reset(&mut self, all: Vec<(ObjectId, Object)>);
    /// Inserts or replaces an object's row.
    fn apply(&mut self, id: &ObjectId, object: &Object);
    /// Removes an object's row.
    fn delete(&mut self, id: &ObjectId);
    /// How many rows there are.
    fn count(&self) -> usize;
    /// Their revision, and whether they are synced.
    fn subscribe(&self) -> watch::Receiver<State>;
}

/// Rows of one type, to be used without knowing it.
pub struct Erased<R>(pub Box<dyn Rows<R>>);

impl<R: Send + Sync + 'static> AnyRows for Erased<R> {
    fn reset(&mut self, all: Vec<(ObjectId, Object)>) {
        let row = |(id, object): (ObjectId, Object)| Some((id.key, object.row::<R>()?));
        self.0.reset(all.into_iter().filter_map(row).collect());
    }

    fn apply(&mut self, id: &ObjectId, object: &Object) {
        if let Some(row) = object.row::<R>() {
            self.0.apply(&id.key, row);
        }
    }

    fn delete(&mut self, id: &ObjectId) {
        self.0.delete(&id.key);
    }

    fn count(&self) -> usize {
        self.0.count()
    }

    fn subscribe(&self) -> watch::Receiver<State> {
        self.0.subscribe()
    }
}
