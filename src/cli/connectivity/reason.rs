//! Why something did not work, by the flows that the agents saw meanwhile. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::objects::PORT;
use super::plan::{Asker, Check, World};
use crate::hubble::proto::flow::{Flow, TrafficDirection, Verdict};
use crate::hubble::view::{deciding, drop_reason, policy_name, protocol, sides};

/// What each node's agent saw; or why it could not be asked.
pub type Seen = BTreeMap<String, Result<Vec<Flow>, String>>;

/// The drop by a policy that a denied check ought to have left behind, in words.
pub fn policy_drop(check: &Check, world: &World, seen: &Seen) -> Option<String> {
    drops(check, world, seen)
        .find(|(_, flow)| drop_reason(flow).is_some_and(|reason| reason.is_policy()))
        .map(|(node, flow)| dropped(node, flow))
}

/// What the flows say about a check that should have worked.
pub fn of_failure(check: &Check, world: &World, seen: &Seen) -> String {
    if let Some((node, flow)) = drops(check, world, seen).last() {
        return dropped(node, flow);
    }
    let near = world.places.first().map_or("", |place| place.node.as_str());
    let far = check.place.and_then(|number| world.places.get(number - 1)).map(|place| place.node.as_str());
    for node in std::iter::once(near).chain(far) {
        match seen.get(node) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return format!("no flows of {node}: {error}"),
            None => return format!("no flows of {node}"),
        }
    }
    let Some(left) = last_flow(check, world, seen, near) else {
        return match check.asker {
            Asker::Pod(_) => format!("the agent of {near} saw no packet of it"),
            // The node's own traffic is no pod's: only the destination's node judges it.
            Asker::Node => not_come(near, far),
        };
    };
    match far.filter(|far| *far != near) {
        Some(far) => match last_flow(check, world, seen, far) {
            None => not_come(near, Some(far)),
            Some(came) if answers(came) == 0 => {
                format!("came to {far}, but nobody there answered")
            }
            Some(_) => format!(
                "answered on {far}, but the answer did not come to {near}: what is between the nodes?"
            ),
        },
        None if answers(left) == 0 => format!("left {near}, no answer came back"),
        None => format!("an answer came to {near}"),
    }
}

fn not_come(near: &str, far: Option<&str>) -> String {
    match far.filter(|far| *far != near) {
        Some(far) => format!(
            "left {near}, but did not come to {far}: what is between the nodes (tunnel: is its UDP port let through? native: is there a route)?"
        ),
        None => format!("no drop was recorded on {near}"),
    }
}

fn drops<'a>(
    check: &'a Check,
    world: &'a World,
    seen: &'a Seen,
) -> impl Iterator<Item = (&'a str, &'a Flow)> {
    let nodes =
        seen.iter().flat_map(|(node, flows)| flows.iter().flatten().map(move |flow| (node.as_str(), flow)));
    nodes.filter(|(_, flow)| {
        let is_way = is_between(check, world, flow, false) || is_between(check, world, flow, true);
        flow.verdict() == Verdict::Dropped && is_way
    })
}

fn last_flow<'a>(check: &Check, world: &World, seen: &'a Seen, node: &str) -> Option<&'a Flow> {
    let flows = seen.get(node)?.as_ref().ok()?;
    flows
        .iter()
        .rev()
        .find(|flow| flow.verdict() == Verdict::Forwarded && is_between(check, world, flow, false))
}

/// True if the flow is of the check's two sides; or the other way round, as a reply is that was
/// dropped without a connection.
fn is_between(check: &Check, world: &World, flow: &Flow, is_reply: bool) -> bool {
    let Some(target) = check.target() else { return false };
    let [first, second] = sides(flow);
    let (asker, answerer) = if is_reply { (second, first) } else { (first, second) };
    let is_asker = match check.asker {
        Asker::Pod(name) => world.pods.get(name).zip(asker.ip).is_some_and(|(ips, ip)| ips.contains(&ip)),
        Asker::Node => !world.pods.values().flatten().any(|ip| asker.ip == Some(*ip)),
    };
    let is_service = flow.weir.as_ref().is_some_and(|weir| weir.service.parse() == Ok(target));
    let is_target = answerer
        .socket()
        .is_some_and(|answers| answers == target || backends(world, target.ip()).contains(&answers));
    let is_protocol = protocol(flow).is_some_and(|protocol| protocol.to_string() == check.protocol);
    is_protocol && is_asker && (is_target || is_service)
}

/// Packets of the side that did not begin it.
fn answers(flow: &Flow) -> u64 {
    flow.weir.as_ref().map_or(0, |weir| weir.packets_received)
}

/// The pods behind a service of the test.
fn backends(world: &World, service: IpAddr) -> Vec<SocketAddr> {
    let name = world.services.iter().find(|(_, ips)| ips.contains(&service)).map(|(name, _)| name);
    let ips = name.and_then(|name| world.pods.get(name)).into_iter().flatten();
    ips.map(|ip| SocketAddr::new(*ip, PORT)).collect()
}

fn dropped(node: &str, flow: &Flow) -> String {
    let reason = drop_reason(flow);
    let way = match flow.traffic_direction() {
        TrafficDirection::Unknown => String::new(),
        direction => format!(" ({})", direction.as_str_name().to_lowercase()),
    };
    let is_policy = reason.is_some_and(|reason| reason.is_policy());
    let reason = reason.map_or("no reason given", |reason| reason.text());
    let policies: Vec<String> = deciding(flow).map(policy_name).collect();
    let policy = match policies.is_empty() {
        _ if !is_policy => String::new(),
        false => format!(", denied by {}", policies.join(", ")),
        true => ", no rule allows it".to_owned(),
    };
    format!("{node} dropped it: {reason}{way}{policy}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cli::connectivity::objects::{CLIENT, server};
    use crate::cli::connectivity::plan::{Place, open};

    fn world() -> World {
        let ips = |ip: &str| vec![ip.parse::<IpAddr>().expect("an address")];
        let place = |node: &str| Place { node: node.to_owned(), ..Place::default() };
        World {
            places: vec![place("a"), place("b")],
            pods: [(CLIENT.to_owned(), ips("10.0.0.2")), (server(2), ips("10.0.1.2"))].into(),
            services: [(server(2), ips("10.96.0.5"))].into(),
            ..World::default()
        }
    }

    fn flow(from: &str, to: &str, more: Value) -> Flow {
        let [from, to] = [from, to].map(|text| text.parse::<SocketAddr>().expect("an address"));
        let mut flow = json!({
            "time": "2026-11-22T12:00:00Z", "node_name": "a", "verdict": "FORWARDED",
            "traffic_direction": "EGRESS", "is_reply": false,
            "IP": { "source": from.ip(), "destination": to.ip(), "ipVersion": "IPv4" },
            "l4": { "TCP": { "source_port": from.port(), "destination_port": to.port() } },
            "weir": { "event": "CONNECTION_NEW", "packets_sent": 1 },
        });
        for (key, value) in more.as_object().expect("fields") {
            flow[key] = value.clone();
        }
        crate::hubble::json::from_str(&flow.to_string()).expect("a flow")
    }

    fn check(world: &World, to: &str, protocol: &str) -> Check {
        let checks = open(world).checks;
        let is_it =
            |check: &Check| check.to == to && check.protocol == protocol && check.asker != Asker::Node;
        checks.into_iter().find(is_it).expect("planned")
    }

    #[test]
    fn a_drop_is_the_reason() {
        let world = world();
        let denied = json!({ "verdict": "DROPPED", "drop_reason_desc": "POLICY_DENIED",
            "traffic_direction": "INGRESS", "is_reply": null });
        let denied = flow("10.0.0.2:40000", "10.0.1.2:8080", denied);
        let seen: Seen = [("a".to_owned(), Ok(vec![])), ("b".to_owned(), Ok(vec![denied]))].into();
        let check_pod = check(&world, "server-2", "TCP");
        let expected = "b dropped it: Policy denied (ingress), no rule allows it";
        assert_eq!(of_failure(&check_pod, &world, &seen), expected);
        assert_eq!(policy_drop(&check_pod, &world, &seen).as_deref(), Some(expected));
        // Another protocol between the same two is another matter.
        assert_eq!(policy_drop(&check(&world, "server-2", "UDP"), &world, &seen), None);
        // The service's flow is the backend's.
        assert_eq!(of_failure(&check(&world, "service server-2", "TCP"), &world, &seen), expected);
    }

    #[test]
    fn where_it_got_lost() {
        let world = world();
        let check = check(&world, "server-2", "TCP");
        let there = flow("10.0.0.2:40000", "10.0.1.2:8080", json!({}));
        let answered = flow(
            "10.0.0.2:40000",
            "10.0.1.2:8080",
            json!({ "weir": { "packets_sent": 1, "packets_received": 1 } }),
        );
        let text = |near: Vec<Flow>, far: Vec<Flow>| {
            of_failure(&check, &world, &[("a".to_owned(), Ok(near)), ("b".to_owned(), Ok(far))].into())
        };
        assert_eq!(text(vec![], vec![]), "the agent of a saw no packet of it");
        assert!(text(vec![there.clone()], vec![]).starts_with("left a, but did not come to b"));
        assert_eq!(text(vec![there.clone()], vec![there.clone()]), "came to b, but nobody there answered");
        assert!(text(vec![there], vec![answered]).starts_with("answered on b, but the answer did not come"));
        let away: Seen = [("a".to_owned(), Err("away".to_owned()))].into();
        assert_eq!(of_failure(&check, &world, &away), "no flows of a: away");
    }
}
