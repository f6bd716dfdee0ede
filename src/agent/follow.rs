//! This node's own Node object, while the agent runs.
//!
//! What the agent gives pods comes from the Node: its pod CIDRs. When these change, the agent starts anew with
//! the new ones. When the Node has none any more, or is gone, no pod gets an address: the cluster may give the
//! same pod CIDR to another node at once. The Node's addresses are followed by `local` and the rounds.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::node;
use super::restart::Restart;
use super::sinks::few;
use crate::endpoint::Manager;
use crate::kube::Tables;
use crate::model::{Endpoint, EndpointId, Node};
use crate::tables::{Snapshot, Table};
use crate::telemetry::Parts;

/// The part of the agent that follows the Node.
const NODE: &str = "node";
/// It is looked at all the same: level, not edge.
const LOOK: Duration = Duration::from_secs(20);

/// What is to be done about the Node.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    /// Pods get addresses of these.
    pod_cidrs: Vec<IpNet>,
    /// Why the node is not as it should be.
    causes: Vec<String>,
    /// The agent has to start anew, and why.
    restart: Option<String>,
}

/// Follows the Node for ever. `start` is what the agent has started with.
pub async fn follow(
    start: Arc<Node>,
    tables: Arc<Tables>,
    endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    manager: Arc<Manager>,
    parts: Parts,
    restart: Restart,
    state_directory: PathBuf,
) {
    let mut remembered = start.clone();
    let (mut nodes, mut pods) = (tables.nodes.subscribe(), endpoints.subscribe());
    parts.add(NODE);
    loop {
        let is_synced = nodes.borrow_and_update().is_synced;
        pods.mark_unchanged();
        if is_synced {
            let node = tables.nodes.get(&start.name.as_str().into());
            remember(&state_directory, &mut remembered, node.as_ref());
            let verdict = judge(&start, node.as_deref(), &endpoints.snapshot());
            manager.set_pod_cidrs(&verdict.pod_cidrs);
            match verdict.causes.is_empty() {
                true => parts.works(NODE),
                false => drop(parts.fails(NODE, verdict.causes, true, false)),
            }
            if let Some(cause) = verdict.restart {
                restart.request(&cause);
            }
        }
        tokio::select! {
            changed = nodes.changed() => if changed.is_err() { return },
            changed = pods.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// A start without the API is to find the addresses of now.
fn remember(state_directory: &Path, remembered: &mut Arc<Node>, now: Option<&Arc<Node>>) {
    let Some(now) = now.filter(|now| *now != remembered && node::missing(now).is_none()) else { return };
    match node::remember(state_directory, now) {
        Ok(()) => *remembered = now.clone(),
        Err(error) => tracing::warn!(error = crate::error::chain(&error), "remembering this node"),
    }
}

fn judge(start: &Node, now: Option<&Node>, endpoints: &Snapshot<EndpointId, Arc<Endpoint>>) -> Verdict {
    let none = |cause: String| Verdict { pod_cidrs: Vec::new(), causes: vec![cause], restart: None };
    let Some(now) = now else {
        return none("there is no Node object of this node: another node may have its pod CIDRs, so no pod gets an address".to_owned());
    };
    if let Some(missing) = node::missing(now) {
        return none(format!("no pod gets an address: {missing}"));
    }
    let restart = if start.pod_cidrs != now.pod_cidrs {
        Some(format!("the Node's pod CIDRs are now {}", shown(&now.pod_cidrs)))
    } else {
        None
    };
    let is_outside = |address: IpAddr| !now.pod_cidrs.iter().any(|cidr| cidr.contains(&address));
    let outside = endpoints.values().filter(|endpoint| endpoint.addresses().any(is_outside));
    let outside: Vec<String> = outside.map(|endpoint| endpoint.pod.to_string()).collect();
    let cause = (!outside.is_empty()).then(|| {
        format!(
            "pods have addresses outside of the Node's pod CIDRs {}, which another node may give, too: delete {}",
            shown(&now.pod_cidrs),
            few(&outside)
        )
    });
    Verdict { pod_cidrs: now.pod_cidrs.clone(), causes: cause.into_iter().collect(), restart }
}

fn shown<T: ToString>(list: &[T]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{MacAddress, ObjectKey};

    fn node(addresses: &[&str], pod_cidrs: &[&str]) -> Node {
        Node {
            name: "a".to_owned(),
            labels: Default::default(),
            addresses: addresses.iter().map(|address| address.parse().expect("an address")).collect(),
            pod_cidrs: pod_cidrs.iter().map(|cidr| cidr.parse().expect("a CIDR")).collect(),
            is_leaving: false,
            is_unready: false,
        }
    }

    fn pods(addresses: &[[u8; 4]]) -> Snapshot<EndpointId, Arc<Endpoint>> {
        let pod = |(number, address): (u16, &[u8; 4])| {
            let endpoint = Endpoint {
                id: EndpointId(number),
                container_id: "c".to_owned(),
                interface: "eth0".to_owned(),
                netns: "/run/netns/c".into(),
                pod: ObjectKey::new("shop", format!("pod{number}")),
                pod_uid: None,
                ipv4: Some((*address).into()),
                ipv6: None,
                host_interface: "weir1".to_owned(),
                host_ifindex: 11,
                mac: MacAddress::default(),
                port_mappings: Vec::new(),
            };
            (EndpointId(number), Arc::new(endpoint))
        };
        (1..).zip(addresses).map(pod).collect()
    }

    #[test]
    fn a2_a_pod_cidr_that_went_away_gives_no_more_addresses_and_names_the_pods_that_have_some() {
        let start = node(&["192.0.2.1"], &["10.1.1.0/24"]);
        let now = node(&["192.0.2.1"], &["10.1.9.0/24"]);
        let verdict = judge(&start, Some(&now), &pods(&[[10, 1, 1, 2], [10, 1, 9, 2]]));
        assert_eq!(verdict.pod_cidrs, now.pod_cidrs);
        assert_eq!(verdict.restart.as_deref(), Some("the Node's pod CIDRs are now 10.1.9.0/24"));
        assert_eq!(
            verdict.causes,
            [
                "pods have addresses outside of the Node's pod CIDRs 10.1.9.0/24, which another node may give, too: delete shop/pod1"
            ]
        );
    }

    #[test]
    fn a2_a_node_that_is_gone_gives_no_more_addresses() {
        let start = node(&["192.0.2.1"], &["10.1.1.0/24"]);
        for now in [None, Some(node(&["192.0.2.1"], &[])), Some(node(&[], &["10.1.1.0/24"]))] {
            let verdict = judge(&start, now.as_ref(), &pods(&[]));
            assert_eq!((verdict.pod_cidrs.len(), verdict.causes.len(), verdict.restart), (0, 1, None));
        }
    }

    #[test]
    fn a2_other_addresses_need_no_start() {
        let start = node(&["192.0.2.1"], &["10.1.1.0/24"]);
        let other = judge(&start, Some(&node(&["192.0.2.3"], &["10.1.1.0/24"])), &pods(&[]));
        assert_eq!((other.restart, other.causes.len()), (None, 0));
    }
}
