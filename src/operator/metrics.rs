//! What the operator counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::pools::Pool;

/// Counts and states, all from zero.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// 1 while this replica leads.
    pub leader: Gauge,
    /// How many nodes' parts each pool has.
    pub pool_capacity: Family<PoolLabel, Gauge<f64, AtomicU64>>,
    /// How many of them are in use.
    pub pool_used: Family<PoolLabel, Gauge<f64, AtomicU64>>,
    /// Nodes that should have pod CIDRs and have none.
    pub nodes_without_pod_cidrs: Gauge,
    /// Services that should have a load balancer's address and have none.
    pub services_without_address: Gauge,
    /// Nodes by what their agents say.
    pub nodes: Family<StateLabel, Gauge>,
    /// Identities.
    pub identities: Gauge,
    /// Those that are marked as unused.
    pub identities_unused: Gauge,
    /// Those that were deleted.
    pub identities_deleted: Counter,
    /// Taints that were set.
    pub taints_set: Counter,
    /// Taints that were taken away.
    pub taints_removed: Counter,
    /// 1 while no further node is tainted, because too many would be.
    pub taint_brake: Gauge,
    /// Nodes whose objects were cleaned away.
    pub nodes_forgotten: Counter,
    /// Objects that Weir cannot take as they are, by kind.
    pub objects_reported: Family<KindLabel, Gauge>,
    /// Writes and passes that did not work and are tried again.
    pub errors: Counter,
}

/// A pool, as in the settings.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PoolLabel {
    pool: String,
}

impl From<&Pool> for PoolLabel {
    fn from(pool: &Pool) -> Self {
        Self { pool: pool.cidr.to_string() }
    }
}

/// A kind of objects.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    /// As in documents.
    pub kind: &'static str,
}

/// ready, not ready or silent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabel {
    /// The state.
    pub state: &'static str,
}

impl Metrics {
    /// Registers all of them under `weir_operator_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("operator");
        registry.register("leader", "1 while this replica leads", self.leader.clone());
        let capacity = "How many nodes a pool of pod CIDRs is enough for";
        registry.register("pool_capacity", capacity, self.pool_capacity.clone());
        let used = "How many nodes' parts of a pool of pod CIDRs are in use";
        registry.register("pool_used", used, self.pool_used.clone());
        registry.register(
            "nodes_without_pod_cidrs",
            "Nodes that no pool had pod CIDRs for",
            self.nodes_without_pod_cidrs.clone(),
        );
        registry.register(
            "services_without_address",
            "Services of type LoadBalancer that get no address, or not all; a condition on each says why",
            self.services_without_address.clone(),
        );
        registry.register("nodes", "Nodes with an agent, by its state", self.nodes.clone());
        registry.register("identities", "Identities of the cluster", self.identities.clone());
        registry.register("identities_unused", "Identities marked as unused", self.identities_unused.clone());
        registry.register("identities_deleted", "Unused identities deleted", self.identities_deleted.clone());
        registry.register("taints_set", "Nodes tainted for want of an agent", self.taints_set.clone());
        registry.register(
            "taint_brake",
            "1 while no further node is tainted, because more than a third of all would be",
            self.taint_brake.clone(),
        );
        registry.register("taints_removed", "Nodes whose taint was taken away", self.taints_removed.clone());
        registry.register(
            "objects_reported",
            "Objects that Weir cannot take as they are, by kind; an event on each says why",
            self.objects_reported.clone(),
        );
        registry.register("nodes_forgotten", "Deleted Nodes cleaned up after", self.nodes_forgotten.clone());
        registry.register("errors", "What did not work and is tried again", self.errors.clone());
    }
}
