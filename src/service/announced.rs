//! Which addresses are to be answered on the link, and which nodes may: the same on every node.
//!
//! One node answers for an address. Services that share an address are one group with one leader, which is
//! named after the first of them.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use super::rows::outer_addresses;
use super::{Services, Slices};
use crate::model::{Announcement, FrontendKind, Node, ObjectKey, Service, TrafficPolicy};
use crate::tables::Snapshot;

/// Classes of load balancers whose addresses are announced, beside those without a class.
const CLASSES: [&str; 2] = ["weir.dev/pool", "io.cilium/l2-announcer"];

/// What the groups are made of.
#[derive(Clone, Default)]
pub struct Wishes {
    /// All Services.
    pub services: Services,
    /// All EndpointSlices.
    pub slices: Slices,
    /// All nodes.
    pub nodes: Snapshot<Arc<str>, Arc<Node>>,
    /// Who wishes what.
    pub announcements: [Snapshot<ObjectKey, Arc<Announcement>>; 2],
}

/// Services with one leader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// All of them.
    pub services: BTreeSet<ObjectKey>,
    /// Their addresses, with who wishes them to be answered.
    pub addresses: BTreeMap<IpAddr, Vec<Arc<Announcement>>>,
    /// The nodes that may lead.
    pub candidates: BTreeSet<Arc<str>>,
}

impl Wishes {
    /// These are the very same tables.
    pub fn is_same(&self, other: &Self) -> bool {
        let [pools, policies] = &self.announcements;
        self.services.ptr_eq(&other.services)
            && self.slices.ptr_eq(&other.slices)
            && self.nodes.ptr_eq(&other.nodes)
            && pools.ptr_eq(&other.announcements[0])
            && policies.ptr_eq(&other.announcements[1])
    }

    /// The groups, by the first Service of each.
    pub fn groups(&self) -> BTreeMap<ObjectKey, Group> {
        let announcements: Vec<_> = self.announcements.iter().flat_map(|all| all.values()).collect();
        let mut groups = BTreeMap::new();
        let mut group_of: BTreeMap<IpAddr, ObjectKey> = BTreeMap::new();
        if announcements.is_empty() {
            return groups;
        }
        let of_nodes: BTreeSet<IpAddr> =
            self.nodes.values().flat_map(|node| &node.addresses).copied().collect();
        let with_backend = self.nodes_with_backend();
        for (key, service) in &self.services {
            let addresses = addresses(service, &announcements, &of_nodes);
            if addresses.is_empty() {
                continue;
            }
            let with_backend = with_backend.get(key);
            let candidates = self.candidates(service, &addresses, with_backend.unwrap_or(&BTreeSet::new()));
            let mut group = Group { services: [key.clone()].into(), addresses, candidates };
            let shared: BTreeSet<ObjectKey> =
                group.addresses.keys().filter_map(|address| group_of.get(address).cloned()).collect();
            let name = shared.first().unwrap_or(key).clone();
            for other in shared.iter().filter_map(|other| groups.remove(other)) {
                group.join(other);
            }
            group_of.extend(group.addresses.keys().map(|address| (*address, name.clone())));
            groups.insert(name, group);
        }
        groups
    }

    /// The nodes that have a ready backend of a Service whose policy is Local.
    fn nodes_with_backend(&self) -> BTreeMap<&ObjectKey, BTreeSet<Arc<str>>> {
        let is_local = |key: &ObjectKey| {
            self.services.get(key).is_some_and(|service| service.external_policy == TrafficPolicy::Local)
        };
        let mut nodes: BTreeMap<&ObjectKey, BTreeSet<Arc<str>>> = BTreeMap::new();
        for slice in self.slices.values().filter(|slice| is_local(&slice.service)) {
            let ready = slice.backends.iter().filter(|backend| backend.ready);
            nodes.entry(&slice.service).or_default().extend(ready.filter_map(|backend| backend.node.clone()));
        }
        nodes
    }

    /// With externalTrafficPolicy Local only nodes with a ready endpoint serve what they answer for.
    fn candidates(
        &self,
        service: &Service,
        addresses: &BTreeMap<IpAddr, Vec<Arc<Announcement>>>,
        with_backend: &BTreeSet<Arc<str>>,
    ) -> BTreeSet<Arc<str>> {
        let is_wished = |node: &Node| {
            let mut wishes = addresses.values().flatten();
            !node.is_leaving && wishes.any(|wish| wish.nodes.matches(&node.labels))
        };
        let mut all: BTreeSet<Arc<str>> =
            self.nodes.iter().filter(|(_, node)| is_wished(node)).map(|(name, _)| name.clone()).collect();
        if service.external_policy == TrafficPolicy::Local {
            all.retain(|node| with_backend.contains(node));
        }
        all
    }
}

impl Group {
    /// Who leads must be able to lead all.
    fn join(&mut self, other: Self) {
        self.services.extend(other.services);
        for (address, wishes) in other.addresses {
            let there = self.addresses.entry(address).or_default();
            there.extend(wishes);
            there.sort_by(|one, two| one.key.cmp(&two.key));
            there.dedup();
        }
        self.candidates.retain(|node| other.candidates.contains(node));
    }

    /// How many candidates are to try before this node: leaders are spread over them, the same on every node.
    pub fn rank(&self, name: &ObjectKey, node: &str, is_alive: impl Fn(&str) -> bool) -> usize {
        let weight = |node: &str| {
            let mut hasher = DefaultHasher::new();
            (name, node).hash(&mut hasher);
            (hasher.finish(), node.to_owned())
        };
        let own = weight(node);
        let before = |other: &&Arc<str>| ***other != *node && weight(other) < own && is_alive(other);
        self.candidates.iter().filter(before).count()
    }
}

/// Those of a Service that are to be answered, by whom. Addresses of nodes are answered by their kernels.
fn addresses(
    service: &Service,
    announcements: &[&Arc<Announcement>],
    of_nodes: &BTreeSet<IpAddr>,
) -> BTreeMap<IpAddr, Vec<Arc<Announcement>>> {
    let class = service.balancer_class.as_deref();
    let is_ours = class.is_none_or(|class| CLASSES.contains(&class));
    let mut all = BTreeMap::new();
    for (address, kind) in outer_addresses(service).filter(|(address, _)| !of_nodes.contains(address)) {
        let wish = |of: &&&Arc<Announcement>| {
            let is_meant = match kind {
                FrontendKind::LoadBalancer => of.balancer && is_ours,
                _ => of.external,
            };
            is_meant && of.has(address) && selects(of, service)
        };
        let wishes: Vec<_> = announcements.iter().filter(wish).map(|of| Arc::clone(of)).collect();
        if !wishes.is_empty() {
            all.insert(address, wishes);
        }
    }
    all
}

fn selects(announcement: &Announcement, service: &Service) -> bool {
    announcement.services.matches_by(|key| match key {
        "io.kubernetes.service.namespace" => Some(&*service.key.namespace),
        "io.kubernetes.service.name" => Some(&*service.key.name),
        key => service.labels.get(key).map(String::as_str),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointSlice, Requirement, Selector, SliceBackend};

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn node(name: &str, is_leaving: bool) -> (Arc<str>, Arc<Node>) {
        let labels = [("rack".to_owned(), name.to_owned())].into();
        let addresses = vec![ip(&format!("192.0.2.10{}", &name[1..]))];
        let node = Node {
            name: name.to_owned(),
            labels,
            addresses,
            pod_cidrs: vec![],
            is_leaving,
            is_unready: false,
        };
        (name.into(), Arc::new(node))
    }

    fn service(name: &str, balancer: &[&str], policy: TrafficPolicy) -> (ObjectKey, Arc<Service>) {
        let key = ObjectKey::new("shop", name);
        let service = Service {
            balancer_addresses: balancer.iter().map(|text| ip(text)).collect(),
            external_policy: policy,
            ..Service::new(key.clone())
        };
        (key, Arc::new(service))
    }

    fn wishes(services: Vec<(ObjectKey, Arc<Service>)>) -> Wishes {
        let announcement = Announcement {
            key: ObjectKey::new("", "office"),
            services: Selector::default(),
            nodes: Selector::new(vec![Requirement::NotIn("rack".to_owned(), ["n4".to_owned()].into())]),
            interfaces: vec![],
            within: None,
            balancer: true,
            external: false,
        };
        let nodes = [("n1", false), ("n2", false), ("n3", true), ("n4", false)];
        Wishes {
            services: services.into_iter().collect(),
            nodes: nodes.into_iter().map(|(name, is_leaving)| node(name, is_leaving)).collect(),
            announcements: [
                [(announcement.key.clone(), Arc::new(announcement))].into_iter().collect(),
                Snapshot::new(),
            ],
            slices: Snapshot::new(),
        }
    }

    fn names(group: &Group) -> Vec<&str> {
        group.candidates.iter().map(AsRef::as_ref).collect()
    }

    #[test]
    fn every_wished_node_that_stays_may_lead_and_local_ones_need_an_endpoint() {
        let mut wishes = wishes(vec![
            service("a", &["192.0.2.1", "fd00::1"], TrafficPolicy::Cluster),
            service("b", &["192.0.2.2"], TrafficPolicy::Local),
            // A node's own address is its kernel's.
            service("c", &["192.0.2.101"], TrafficPolicy::Cluster),
        ]);
        let groups = wishes.groups();
        assert_eq!(groups.keys().map(|key| &*key.name).collect::<Vec<_>>(), ["a", "b"]);
        let [a, b] = ["a", "b"].map(|name| ObjectKey::new("shop", name));
        assert_eq!(names(&groups[&a]), ["n1", "n2"]);
        assert_eq!(groups[&a].addresses.len(), 2);
        assert!(groups[&b].candidates.is_empty());
        let backend = |node: &str, ready| SliceBackend {
            node: Some(node.into()),
            ready,
            ..SliceBackend::ready(ip("10.0.0.1"))
        };
        let slice = EndpointSlice {
            key: ObjectKey::new("shop", "b-1"),
            service: b.clone(),
            ports: vec![],
            backends: vec![backend("n1", false), backend("n2", true), backend("n4", true)],
        };
        wishes.slices.insert(slice.key.clone(), Arc::new(slice));
        assert_eq!(names(&wishes.groups()[&b]), ["n2"]);
    }

    #[test]
    fn services_that_share_an_address_have_one_leader() {
        let all = vec![
            service("a", &["192.0.2.1"], TrafficPolicy::Cluster),
            service("b", &["192.0.2.2"], TrafficPolicy::Cluster),
            service("c", &["192.0.2.1", "192.0.2.2"], TrafficPolicy::Local),
            service("d", &["192.0.2.3"], TrafficPolicy::Cluster),
        ];
        let groups = wishes(all).groups();
        let services =
            groups.iter().map(|(name, group)| (&*name.name, group.services.len())).collect::<Vec<_>>();
        assert_eq!(services, [("a", 3), ("d", 1)]);
        assert!(groups.values().next().is_some_and(|group| group.candidates.is_empty()), "c has no endpoint");
    }

    #[test]
    fn foreign_load_balancers_are_left_alone_and_leaders_are_spread() {
        let of_class = |class: &str| {
            let (key, service) = service("a", &["192.0.2.1"], TrafficPolicy::Cluster);
            (key, Arc::new(Service { balancer_class: Some(class.into()), ..Service::clone(&service) }))
        };
        assert_eq!(wishes(vec![of_class("example.com/cloud")]).groups().len(), 0);
        assert_eq!(wishes(vec![of_class("io.cilium/l2-announcer")]).groups().len(), 1);
        let many = (0..100)
            .map(|n| service(&format!("s{n}"), &[&format!("198.51.100.{n}")], TrafficPolicy::Cluster));
        let groups = wishes(many.collect()).groups();
        let first =
            |node: &str| groups.iter().filter(|(name, group)| group.rank(name, node, |_| true) == 0).count();
        assert_eq!(first("n1") + first("n2"), 100);
        assert!(first("n1") > 25 && first("n2") > 25, "{}", first("n1"));
        assert!(groups.iter().all(|(name, group)| group.rank(name, "n2", |_| false) == 0));
    }
}
