//! Node objects and what the operator gave to nodes, joined to one table of nodes.
//!
//! The pod CIDRs of the Node object count where there are any: the cluster gave them.
//! `nodes` is shown, and synced, when both sources have delivered.

use std::sync::{Arc, Mutex, MutexGuard};

use super::Tables;
use crate::model::{Allocation, Node};
use crate::tables::Table;

/// The Node objects as they came. Whoever holds the lock may write `nodes`.
#[derive(Default)]
pub struct Joining {
    objects: Table<Arc<str>, Arc<Node>>,
    lock: Mutex<()>,
}

impl Tables {
    /// A Node object as it came.
    pub(super) fn node_object(&self, name: &Arc<str>) -> Option<Arc<Node>> {
        self.joining.objects.get(name)
    }

    pub(super) fn apply_node(&self, name: Arc<str>, node: Arc<Node>) -> bool {
        let _one_writer = self.joining_lock();
        self.joining.objects.apply(name.clone(), node);
        self.join_one(&name)
    }

    pub(super) fn delete_node(&self, name: &Arc<str>) -> bool {
        let _one_writer = self.joining_lock();
        self.joining.objects.delete(name);
        self.join_one(name)
    }

    pub(super) fn reset_nodes(&self, all: impl IntoIterator<Item = (Arc<str>, Arc<Node>)>) -> bool {
        let _one_writer = self.joining_lock();
        self.joining.objects.reset(all);
        self.join_all()
    }

    pub(super) fn apply_allocation(&self, name: Arc<str>, allocation: Arc<Allocation>) -> bool {
        let _one_writer = self.joining_lock();
        self.allocations.apply(name.clone(), allocation);
        self.join_one(&name)
    }

    pub(super) fn delete_allocation(&self, name: &Arc<str>) -> bool {
        let _one_writer = self.joining_lock();
        self.allocations.delete(name);
        self.join_one(name)
    }

    pub(super) fn reset_allocations(
        &self,
        all: impl IntoIterator<Item = (Arc<str>, Arc<Allocation>)>,
    ) -> bool {
        let _one_writer = self.joining_lock();
        self.allocations.reset(all);
        self.join_all()
    }

    fn joining_lock(&self) -> MutexGuard<'_, ()> {
        self.joining.lock.lock().expect("nobody panics while holding the lock")
    }

    fn join_one(&self, name: &Arc<str>) -> bool {
        match self.joining.objects.get(name) {
            Some(node) if self.nodes.is_synced() => self.nodes.apply(name.clone(), self.joined(node)),
            Some(_) => false,
            None => self.nodes.delete(name),
        }
    }

    fn join_all(&self) -> bool {
        if !self.joining.objects.is_synced() || !self.allocations.is_synced() {
            return false;
        }
        let objects = self.joining.objects.snapshot();
        self.nodes.reset(objects.into_iter().map(|(name, node)| (name, self.joined(node))))
    }

    fn joined(&self, node: Arc<Node>) -> Arc<Node> {
        match self.allocations.get(&Arc::from(node.name.as_str())) {
            Some(given) if node.pod_cidrs.is_empty() && !given.pod_cidrs.is_empty() => {
                Arc::new(Node { pod_cidrs: given.pod_cidrs.clone(), ..(*node).clone() })
            }
            _ => node,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Arc<str> {
        Arc::from("a")
    }

    fn node(pod_cidrs: &[&str]) -> Arc<Node> {
        let pod_cidrs = pod_cidrs.iter().map(|cidr| cidr.parse().expect("a CIDR")).collect();
        Arc::new(Node {
            name: "a".to_owned(),
            labels: Default::default(),
            addresses: vec![],
            pod_cidrs,
            is_leaving: false,
            is_unready: false,
        })
    }

    fn given(pod_cidrs: &[&str]) -> Arc<Allocation> {
        Arc::new(Allocation { pod_cidrs: node(pod_cidrs).pod_cidrs.clone(), ..Allocation::default() })
    }

    #[test]
    fn nodes_without_pod_cidrs_have_those_of_the_operator() {
        let tables = Tables::new();
        tables.reset_nodes([(name(), node(&[]))]);
        assert!(!tables.nodes.is_synced());
        tables.reset_allocations([(name(), given(&["10.1.0.0/24"]))]);
        assert!(tables.nodes.is_synced());
        assert_eq!(tables.nodes.get(&name()), Some(node(&["10.1.0.0/24"])));
        tables.apply_node(name(), node(&["10.9.0.0/24"]));
        assert_eq!(tables.nodes.get(&name()), Some(node(&["10.9.0.0/24"])));
        tables.apply_node(name(), node(&[]));
        tables.delete_allocation(&name());
        assert_eq!(tables.nodes.get(&name()), Some(node(&[])));
        tables.apply_allocation(name(), given(&["10.2.0.0/24"]));
        assert_eq!(tables.nodes.get(&name()), Some(node(&["10.2.0.0/24"])));
        tables.delete_node(&name());
        assert_eq!(tables.nodes.get(&name()), None);
    }
}
