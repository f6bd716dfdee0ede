//! Egress gateways: what some pods send out of the cluster leaves by a node, and with an address, that a policy names.
//! The wire is looked at all the while.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::{Lab, OUTSIDE, Pod, Setup, Traffic, Via, ping, pod_cidrs, socket_address, wait_for};
use crate::require::require_lab;

/// Addresses that the gateways have beside their own, by node.
const EGRESS: [(usize, &str, &str); 2] =
    [(2, "10.200.0.22", "fd00:200::22"), (3, "10.200.0.33", "fd00:200::33")];

fn start(routing: &str, more: &[&str]) -> Result<Lab> {
    let mut agent_arguments: Vec<String> = more.iter().map(|argument| (*argument).to_owned()).collect();
    agent_arguments.extend(["--egress-gateway", "true"].map(str::to_owned));
    let lab =
        Lab::start(Setup { nodes: 3, routing: routing.to_owned(), agent_arguments, ..Setup::default() })?;
    for (node, ipv4, ipv6) in EGRESS {
        lab.node(node).space().configure(&[
            &format!("addr add {ipv4}/24 dev eth0"),
            &format!("addr add {ipv6}/64 dev eth0 nodad"),
        ])?;
    }
    Ok(lab)
}

fn gateway(node: usize, address: &str) -> Value {
    json!({"nodeSelector": {"matchLabels": {"kubernetes.io/hostname": format!("node{node}")}}, "egressIP": address})
}

/// A policy for the pods `app: web`, for what the outside host has behind it.
fn policy(name: &str, destination: &str, gateways: &[Value]) -> Value {
    json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumEgressGatewayPolicy", "metadata": {"name": name},
        "spec": {
            "selectors": [{"podSelector": {"matchLabels": {"app": "web"}}}],
            "destinationCIDRs": [destination], "egressGateways": gateways,
        },
    })
}

fn apply(lab: &Lab, nodes: &[usize]) -> Result<()> {
    let of = |number: &usize| EGRESS.iter().find(|(node, ..)| node == number).expect("a gateway");
    let ipv4: Vec<Value> = nodes.iter().map(of).map(|(node, ipv4, _)| gateway(*node, ipv4)).collect();
    let ipv6: Vec<Value> = nodes.iter().map(of).map(|(node, _, ipv6)| gateway(*node, ipv6)).collect();
    lab.manifests().write(&policy("four", "203.0.113.0/24", &ipv4))?;
    lab.manifests().write(&policy("six", "2001:db8:ffff::/64", &ipv6))
}

/// A pod that the policies select; at its first packets they are in force.
fn web(lab: &Lab, node: usize, name: &str) -> Result<Pod> {
    lab.pod(node, name).label("app", "web").create()
}

fn far(is_ipv4: bool) -> IpAddr {
    OUTSIDE[if is_ipv4 { 2 } else { 3 }].parse().expect("OUTSIDE holds addresses")
}

/// As whom the far host sees the pod, by each family and protocol; `None`: no answer.
fn seen(pod: &Pod) -> Vec<Option<IpAddr>> {
    let families = [true, false].into_iter();
    let probe =
        |is_ipv4| [Via::Tcp, Via::Udp].map(|via| pod.probe(via, SocketAddr::new(far(is_ipv4), 80)).seen_as());
    families.flat_map(probe).collect()
}

fn wait_to_be_seen_as(pod: &Pod, ipv4: &str, ipv6: &str) -> Result<()> {
    let wanted: Vec<Option<IpAddr>> = [ipv4, ipv4, ipv6, ipv6].iter().map(|it| it.parse().ok()).collect();
    let mut found = Vec::new();
    let waited = wait_for(&format!("{} to leave as {ipv4} and {ipv6}", pod.name()), || {
        found = seen(pod);
        Ok(found == wanted)
    });
    waited.with_context(|| format!("seen as {found:?}"))
}

fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| text.parse().expect("an address")).collect()
}

fn leave_by_gateway(routing: &str, more: &[&str]) -> Result<()> {
    let lab = start(routing, more)?;
    let wall = lab.look_at_wire()?;
    apply(&lab, &[2])?;
    let away = web(&lab, 1, "shop/away")?;
    let here = web(&lab, 2, "shop/here")?;
    for pod in [&away, &here] {
        wait_to_be_seen_as(pod, "10.200.0.22", "fd00:200::22")?;
        for is_ipv4 in [true, false] {
            for size in [56, 1300, 3000] {
                let target = far(is_ipv4);
                // A fragment may be lost on a busy machine: it waits 50 ms for the first one of its packet.
                wait_for(&format!("an answer to {size} bytes from {target}"), || {
                    Ok(pod.space().run(move || ping(target, size))?.is_answered())
                })?;
            }
            let stream = Traffic::tcp(pod.space(), SocketAddr::new(far(is_ipv4), 80));
            stream.wait_for_answers(200)?;
            stream.stop()?.check_nothing_lost()?;
        }
        // What no policy is about goes as ever.
        let near = pod.probe(Via::Tcp, socket_address(OUTSIDE[0], 80)).seen_as();
        ensure!(near == lab.node_of(pod).addresses().first().copied(), "seen as {near:?}");
    }
    let seen = wall.stop()?;
    let leaving: BTreeSet<IpAddr> = seen.leaving.keys().copied().collect();
    ensure!(leaving == addresses(&["10.200.0.22", "fd00:200::22"]), "{seen:?}");
    let is_encrypted = !more.is_empty();
    ensure!(seen.plain.is_empty() == is_encrypted && (seen.encrypted > 0) == is_encrypted, "{seen:?}");
    shown(&lab)
}

fn shown(lab: &Lab) -> Result<()> {
    let text = lab.node(1).weir(&["egress", "list"])?;
    let words: Vec<&str> = text.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    ensure!(words == ["four", "shop/away", "node1", "node2", "10.200.0.22", "203.0.113.0/24", "-"], "{text}");
    let served = lab.node(2).metric("weir_egress_gateway_pods_served", &[])?;
    ensure!(served == 2.0, "weir_egress_gateway_pods_served is {served}");
    Ok(())
}

#[test]
fn pods_leave_by_the_gateway_with_its_address_in_the_tunnel() -> Result<()> {
    require_lab!();
    leave_by_gateway("tunnel", &[])
}

#[test]
fn pods_leave_by_the_gateway_with_its_address_with_native_routing() -> Result<()> {
    require_lab!();
    leave_by_gateway("native", &[])
}

#[test]
fn what_goes_to_the_gateway_is_encrypted_in_the_tunnel() -> Result<()> {
    require_lab!();
    leave_by_gateway("tunnel", &["--encryption", "wireguard", "--wireguard-device", "user"])
}

#[test]
fn what_goes_to_the_gateway_is_encrypted_with_native_routing() -> Result<()> {
    require_lab!();
    leave_by_gateway("native", &["--encryption", "wireguard", "--wireguard-device", "user"])
}

fn set_ready(lab: &Lab, number: usize, is_ready: bool) -> Result<()> {
    let node = lab.node(number);
    let addresses: Vec<Value> =
        node.addresses().iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    let status = if is_ready { "True" } else { "Unknown" };
    lab.manifests().write(&json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name(), "labels": {"kubernetes.io/hostname": node.name()}},
        "spec": {"podCIDRs": pod_cidrs(number)},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": status}]},
    }))
}

fn dropped_for(lab: &Lab, node: usize, reason: &str) -> Result<bool> {
    let flows = lab.node(node).flows(&["--verdict", "dropped"])?;
    Ok(flows.iter().any(|flow| flow["drop_reason_desc"] == reason))
}

#[test]
fn a_gateway_that_is_not_ready_is_left_out_and_without_one_nothing_leaves() -> Result<()> {
    require_lab!();
    let lab = start("tunnel", &[])?;
    let wall = lab.look_at_wire()?;
    apply(&lab, &[2, 3])?;
    let pod = web(&lab, 1, "shop/away")?;
    let mut found = Vec::new();
    wait_for("the pod to leave", || {
        found = seen(&pod);
        Ok(found.iter().all(Option::is_some))
    })?;
    let chosen = EGRESS.iter().position(|(_, ipv4, _)| found[0] == ipv4.parse().ok());
    let chosen = chosen.with_context(|| format!("seen as {found:?}"))?;
    let (first, other) = (EGRESS[chosen], EGRESS[1 - chosen]);
    wait_to_be_seen_as(&pod, first.1, first.2)?;

    // The other one comes and goes: the pod and its connection stay.
    let stream = Traffic::tcp(pod.space(), SocketAddr::new(far(true), 80));
    for is_ready in [false, true] {
        set_ready(&lab, other.0, is_ready)?;
        stream.wait_for_answers(200)?;
    }
    stream.stop()?.check_nothing_lost()?;
    set_ready(&lab, first.0, false)?;
    wait_to_be_seen_as(&pod, other.1, other.2)?;
    set_ready(&lab, other.0, false)?;
    wait_for("nothing to leave", || Ok(seen(&pod).iter().all(Option::is_none)))?;
    wait_for("the drop with its reason", || dropped_for(&lab, 1, "NO_EGRESS_GATEWAY"))?;
    let text = lab.node(1).weir(&["egress", "list"])?;
    ensure!(text.contains("none is ready: dropped"), "{text}");
    set_ready(&lab, first.0, true)?;
    wait_to_be_seen_as(&pod, first.1, first.2)?;
    let leaving: BTreeSet<IpAddr> = wall.stop()?.leaving.into_keys().collect();
    ensure!(leaving == addresses(&[first.1, first.2, other.1, other.2]), "{leaving:?}");
    Ok(())
}

#[test]
fn an_address_that_the_gateway_lacks_lets_nothing_leave() -> Result<()> {
    require_lab!();
    let lab = start("tunnel", &[])?;
    let wall = lab.look_at_wire()?;
    for (name, destination) in [("four", "203.0.113.0/24"), ("six", "2001:db8:ffff::/64")] {
        lab.manifests().write(&policy(name, destination, &[gateway(2, "10.200.0.99")]))?;
    }
    let (away, here) = (web(&lab, 1, "shop/away")?, web(&lab, 2, "shop/here")?);
    for pod in [&away, &here] {
        ensure!(seen(pod) == [None; 4], "seen as {:?}", seen(pod));
    }
    wait_for("the drop with its reason", || dropped_for(&lab, 2, "DROP_NO_EGRESS_IP"))?;
    let seen_before = wall.stop()?.leaving;
    ensure!(seen_before.is_empty(), "{seen_before:?}");
    // The gateway gets the address, and loses it again with the policy.
    lab.node(2).space().configure(&["addr add 10.200.0.99/24 dev eth0"])?;
    let wanted: Option<IpAddr> = "10.200.0.99".parse().ok();
    wait_for("the address to be used", || {
        Ok([&away, &here].iter().all(|pod| seen(pod)[..2] == [wanted; 2]))
    })?;
    for name in ["four", "six"] {
        lab.manifests().remove(&policy(name, "", &[]))?;
    }
    wait_to_be_seen_as(&away, "10.200.0.1", "fd00:200::1")
}

/// A full map costs the pods whose rules do not fit, also those that run: they are closed to the world, and say so.
#[test]
fn pods_whose_rules_do_not_fit_are_closed_and_the_others_leave_by_their_gateway() -> Result<()> {
    require_lab!();
    // Two rows of IPv4 and two of IPv6 for the first pod.
    let lab = start("tunnel", &["--map-size", "egress_rules=4"])?;
    let wall = lab.look_at_wire()?;
    apply(&lab, &[2])?;
    let away = web(&lab, 1, "shop/away")?;
    wait_to_be_seen_as(&away, "10.200.0.22", "fd00:200::22")?;
    let other = lab.pod(1, "shop/other").label("app", "db").create()?;
    wait_to_be_seen_as(&other, "10.200.0.1", "fd00:200::1")?;

    let mut second = policy("second", "203.0.113.0/25", &[gateway(2, "10.200.0.22")]);
    second["spec"]["selectors"][0]["podSelector"]["matchLabels"]["app"] = json!("db");
    lab.manifests().write(&second)?;
    wait_for("the pod to be closed", || Ok(seen(&other).iter().all(Option::is_none)))?;
    wait_for("the drop with its reason", || dropped_for(&lab, 1, "NO_EGRESS_GATEWAY"))?;
    let said = lab.node(1).status()?.to_string();
    ensure!(said.contains("shop/other") && said.contains("egress rules are not in force"), "{said}");
    // Pods are none of it.
    let target = SocketAddr::new(away.address(true), 80);
    ensure!(other.probe(Via::Tcp, target).is_answered(), "a pod is closed to pods");
    wait_to_be_seen_as(&away, "10.200.0.22", "fd00:200::22")?;
    lab.manifests().remove(&second)?;
    wait_to_be_seen_as(&other, "10.200.0.1", "fd00:200::1")?;
    let leaving: BTreeSet<IpAddr> = wall.stop()?.leaving.into_keys().collect();
    ensure!(
        leaving == addresses(&["10.200.0.22", "fd00:200::22", "10.200.0.1", "fd00:200::1"]),
        "{leaving:?}"
    );
    Ok(())
}
