//! An independent model of policies: the specifications read literally, one packet at a
//! time, without identities, classes or prefixes trees. It shares the objects' types with
//! Weir and no code that judges them, so that both being wrong in one way is unlikely.

pub mod random;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use weir::model::{
    Action, Entity, Labels, Peer, Pod, Policy, PolicyDirection, PolicyRule, PortSelector, Protocol,
    Requirement, Selector, Subject, Tier,
};

/// A cluster, as far as policy can see it.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Labels of each namespace, its name's label not among them.
    pub namespaces: BTreeMap<String, Labels>,
    /// The pods.
    pub pods: Vec<ClusterPod>,
    /// Addresses of nodes other than the two that run the pods.
    pub nodes: Vec<IpAddr>,
    /// Addresses of the node that is asked.
    pub own: Vec<IpAddr>,
    /// Addresses of nobody known.
    pub outside: Vec<IpAddr>,
    /// The policies, of every namespace.
    pub policies: Vec<Policy>,
}

/// A pod and where it runs.
#[derive(Clone, Debug)]
pub struct ClusterPod {
    /// The object.
    pub pod: Pod,
    /// One of each family.
    pub addresses: [IpAddr; 2],
    /// 0 or 1.
    pub node: usize,
}

/// One end of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// What stands in its IP header.
    pub address: IpAddr,
    /// Whose address that is, if a pod's.
    pub pod: Option<&'a ClusterPod>,
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// To a port.
    Port(Protocol, u16),
    /// ICMP or ICMPv6 echo.
    Icmp,
    /// Another query: ICMP timestamp, ICMPv6 extended echo.
    OtherQuery,
}

impl Payload {
    /// Protocol, and port or type, as a packet of the family has them.
    pub fn numbers(self, is_ipv4: bool) -> (u8, u16) {
        match (self, is_ipv4) {
            (Self::Port(protocol, port), _) => (protocol.number(), port),
            (Self::Icmp, true) => (1, 8),
            (Self::Icmp, false) => (58, 128),
            (Self::OtherQuery, true) => (1, 13),
            (Self::OtherQuery, false) => (58, 160),
        }
    }
}

impl Cluster {
    /// Every end that a packet of the family can have.
    pub fn sides(&self, is_ipv4: bool) -> Vec<Side<'_>> {
        let pods = self
            .pods
            .iter()
            .map(|pod| Side { address: pod.addresses[usize::from(!is_ipv4)], pod: Some(pod) });
        let others = self.nodes.iter().chain(&self.outside).filter(|address| address.is_ipv4() == is_ipv4);
        pods.chain(others.map(|address| Side { address: *address, pod: None })).collect()
    }

    /// True if the connection is allowed: by the sender's egress and the receiver's ingress.
    pub fn allows(&self, from: Side<'_>, to: Side<'_>, payload: Payload) -> bool {
        self.allows_egress(from, to, payload) && self.allows_ingress(from, to, payload)
    }

    /// True if the sender may send it.
    pub fn allows_egress(&self, from: Side<'_>, to: Side<'_>, payload: Payload) -> bool {
        let Some(pod) = from.pod else { return true };
        self.permits(pod, |policy| policy.egress.as_ref(), to, to, payload)
    }

    /// True if the receiver may get it.
    pub fn allows_ingress(&self, from: Side<'_>, to: Side<'_>, payload: Payload) -> bool {
        let Some(pod) = to.pod else { return true };
        self.permits(pod, |policy| policy.ingress.as_ref(), from, to, payload)
    }

    /// Tier by tier: the first that decides does. What none decides is allowed.
    fn permits(
        &self,
        subject: &ClusterPod,
        direction: impl Fn(&Policy) -> Option<&PolicyDirection>,
        other: Side<'_>,
        destination: Side<'_>,
        payload: Payload,
    ) -> bool {
        for tier in [Tier::Admin, Tier::Namespaced, Tier::Baseline] {
            let mut policies: Vec<(&Policy, &PolicyDirection)> = Vec::new();
            for policy in &self.policies {
                if policy.tier == tier && self.is_subject(policy, subject) {
                    policies.extend(direction(policy).map(|direction| (policy, direction)));
                }
            }
            policies.sort_by_key(|(policy, _)| policy.priority);
            let mut met = Vec::new();
            for (policy, direction) in &policies {
                for rule in &direction.rules {
                    if self.has_peer(policy, rule, other) && has_port(rule, destination, payload) {
                        met.push(rule.action);
                    }
                }
            }
            let is_isolated = policies.iter().any(|(_, direction)| direction.default == Action::Deny);
            let decided = match tier {
                // Rules have no order: a deny beats every allow.
                Tier::Namespaced if met.contains(&Action::Deny) => Some(Action::Deny),
                Tier::Namespaced | Tier::Admin | Tier::Baseline => met.first().copied(),
            };
            match decided {
                Some(Action::Allow) => return true,
                Some(Action::Deny) => return false,
                Some(Action::Pass) => {}
                None if is_isolated => return false,
                None => {}
            }
        }
        true
    }

    fn is_node(&self, side: Side<'_>) -> bool {
        self.nodes.contains(&side.address) || self.own.contains(&side.address)
    }

    fn is_outside(&self, side: Side<'_>) -> bool {
        side.pod.is_none() && !self.is_node(side)
    }

    fn is_subject(&self, policy: &Policy, pod: &ClusterPod) -> bool {
        let namespace = &pod.pod.key.namespace;
        let Subject::Pods { namespaces, pods } = &policy.subject else { return false };
        policy.reference.namespace.as_ref().is_none_or(|own| own == namespace)
            && self.is_namespace(namespaces, namespace)
            && selects(pods, &pod.pod.labels)
    }

    fn is_namespace(&self, selector: &Selector, namespace: &str) -> bool {
        let mut labels = self.namespaces.get(namespace).cloned().unwrap_or_default();
        labels.insert("kubernetes.io/metadata.name".to_owned(), namespace.to_owned());
        selects(selector, &labels)
    }

    fn has_peer(&self, policy: &Policy, rule: &PolicyRule, other: Side<'_>) -> bool {
        let Some(peers) = &rule.peers else { return true };
        for peer in peers {
            let is_match = match (peer, other.pod) {
                (Peer::Block { cidr, except }, _) => {
                    is_within(other.address, cidr)
                        && !except.iter().any(|hole| is_within(other.address, hole))
                }
                (Peer::Pods { namespaces, pods }, Some(pod)) => {
                    let namespace = &pod.pod.key.namespace;
                    let is_namespace = match namespaces {
                        None => policy.reference.namespace.as_ref().is_none_or(|own| own == namespace),
                        Some(selector) => self.is_namespace(selector, namespace),
                    };
                    is_namespace && selects(pods, &pod.pod.labels)
                }
                (Peer::Pods { .. }, None) => false,
                // Cilium's rules on addresses do not speak of pods and nodes.
                (Peer::Outside { cidr, except }, _) => {
                    self.is_outside(other)
                        && is_within(other.address, cidr)
                        && !except.iter().any(|hole| is_within(other.address, hole))
                }
                (Peer::NodeAddresses(nodes), _) => {
                    self.is_node(other) && nodes.iter().any(|node| is_within(other.address, node))
                }
                (Peer::Entity(entity), _) => match entity {
                    Entity::World => self.is_outside(other),
                    Entity::Cluster => !self.is_outside(other),
                    Entity::Host => self.own.contains(&other.address),
                    Entity::RemoteNode => self.nodes.contains(&other.address),
                    Entity::KubeApiServer | Entity::Nobody => false,
                },
                (other, _) => panic!("not made by the generator: {other:?}"),
            };
            if is_match {
                return true;
            }
        }
        false
    }
}

fn has_port(rule: &PolicyRule, destination: Side<'_>, payload: Payload) -> bool {
    let Some(ports) = &rule.ports else { return true };
    let Payload::Port(protocol, number) = payload else {
        // To a rule a message's type is what a port is.
        let (protocol, kind) = payload.numbers(destination.address.is_ipv4());
        return ports.iter().any(|port| {
            port.protocol.0 == protocol
                && match port.port {
                    PortSelector::Any => true,
                    PortSelector::Range(from, to) => from <= kind && kind <= to,
                    PortSelector::Named(_) => false,
                }
        });
    };
    for port in ports {
        if port.protocol != protocol.into() {
            continue;
        }
        let is_match = match &port.port {
            PortSelector::Any => true,
            PortSelector::Range(from, to) => *from <= number && number <= *to,
            PortSelector::Named(name) => destination.pod.is_some_and(|pod| {
                let ports = pod.pod.named_ports.iter().filter(|(known, _)| *known == name);
                ports
                    .flat_map(|(_, ports)| ports)
                    .any(|port| port.protocol == protocol && port.port == number)
            }),
        };
        if is_match {
            return true;
        }
    }
    false
}

fn selects(selector: &Selector, labels: &Labels) -> bool {
    for requirement in &selector.requirements {
        let holds = match requirement {
            Requirement::In(key, values) => match labels.get(key) {
                Some(value) => values.iter().any(|allowed| allowed == value),
                None => false,
            },
            Requirement::NotIn(key, values) => match labels.get(key) {
                Some(value) => values.iter().all(|refused| refused != value),
                None => true,
            },
            Requirement::Exists(key) => labels.get(key).is_some(),
            Requirement::DoesNotExist(key) => labels.get(key).is_none(),
        };
        if !holds {
            return false;
        }
    }
    true
}

fn is_within(address: IpAddr, net: &IpNet) -> bool {
    let (a, b, width) = match (address, net.addr()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
        _ => return false,
    };
    let host_bits = width - u32::from(net.prefix_len());
    host_bits == 128 || (a >> host_bits) == (b >> host_bits)
}
