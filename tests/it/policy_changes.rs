//! Policies, labels and pods that change while traffic flows.

use std::net::SocketAddr;

use anyhow::Result;

use crate::lab::{Lab, Setup, Traffic, Via};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all, expect_full_mesh};

const ONLY_FRIENDS: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-friends, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {friend: 'yes'}}}]}]
";

const ONLY_TRUSTED: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-trusted, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {trusted: 'yes'}}}]}]
";

const DENY_ALL: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}
";

#[test]
fn a_pod_that_gains_a_label_is_let_in_and_one_that_loses_it_is_not() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let near = lab.pod(1, "shop/near").create()?;
    let far = lab.pod(2, "shop/far").create()?;
    lab.manifests().apply(ONLY_FRIENDS)?;
    let target = SocketAddr::new(server.address(true), 80);
    for (friend, expected) in
        [(false, Expected::Denied), (true, Expected::Answered), (false, Expected::Denied)]
    {
        let labels: &[_] = if friend { &[("friend", "yes")] } else { &[] };
        lab.manifests().pod(("shop", "near"), "node1", labels, &[])?;
        lab.manifests().pod(("shop", "far"), "node2", labels, &[])?;
        expect_all(&[
            Row::new(&near, Via::Tcp, target, expected),
            Row::new(&far, Via::Tcp, target, expected),
        ])?;
    }
    Ok(())
}

#[test]
fn a_namespace_that_gains_a_label_is_let_in() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let near = lab.pod(1, "other/near").create()?;
    let far = lab.pod(2, "other/far").create()?;
    lab.manifests().apply(ONLY_TRUSTED)?;
    let target = SocketAddr::new(server.address(false), 80);
    for (is_trusted, expected) in
        [(false, Expected::Denied), (true, Expected::Answered), (false, Expected::Denied)]
    {
        let labels: &[_] = if is_trusted { &[("trusted", "yes")] } else { &[] };
        lab.manifests().namespace("other", labels)?;
        expect_all(&[
            Row::new(&near, Via::Udp, target, expected),
            Row::new(&far, Via::Udp, target, expected),
        ])?;
    }
    Ok(())
}

#[test]
fn a_tightened_policy_stops_running_connections_and_a_loosened_one_lets_them_go_on() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let near = lab.pod(1, "shop/near").create()?;
    let far = lab.pod(2, "shop/far").create()?;
    expect_full_mesh(&[&server, &near, &far])?;
    let (v4, v6) = (SocketAddr::new(server.address(true), 80), SocketAddr::new(server.address(false), 80));
    let running = [
        Traffic::tcp(near.space(), v4),
        Traffic::tcp(far.space(), v6),
        Traffic::udp(near.space(), v6),
        Traffic::udp(far.space(), v4),
    ];
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    lab.manifests().apply(DENY_ALL)?;
    running.iter().try_for_each(Traffic::wait_for_silence)?;
    lab.manifests().delete(DENY_ALL)?;
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    running.into_iter().try_for_each(|traffic| traffic.stop().map(drop))
}

#[test]
fn an_unrelated_change_of_policy_loses_no_packet() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let near = lab.pod(1, "shop/near").label("friend", "yes").create()?;
    let far = lab.pod(2, "shop/far").label("friend", "yes").create()?;
    expect_full_mesh(&[&server, &near, &far])?;
    let target = SocketAddr::new(server.address(true), 80);
    let running = [Traffic::tcp(near.space(), target), Traffic::udp(far.space(), target)];
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    for _ in 0..5 {
        lab.manifests().apply(ONLY_FRIENDS)?;
        running.iter().try_for_each(|traffic| traffic.wait_for_answers(100))?;
        lab.manifests().delete(ONLY_FRIENDS)?;
        running.iter().try_for_each(|traffic| traffic.wait_for_answers(100))?;
    }
    running.into_iter().try_for_each(|traffic| traffic.stop()?.check_nothing_lost())
}

#[test]
fn bypass_12_a_pod_is_not_reached_before_its_policy_is_enforced() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let prober = lab.pod(1, "shop/prober").create()?;
    lab.manifests().apply(DENY_ALL)?;
    for number in 0..5 {
        let server = lab.pod(1, &format!("shop/server{number}")).label("app", "server").create()?;
        // At once: no poll, no second chance.
        for via in [Via::Tcp, Via::Udp, Via::Ping] {
            let outcome = prober.probe(via, SocketAddr::new(server.address(true), 80));
            assert!(!outcome.is_answered(), "server{number} answered {via:?}: {outcome}");
        }
    }
    Ok(())
}

/// Labels of a revision or run are in no identity, or each run would be one; where a policy asks for
/// such a label, they are.
#[test]
fn a_policy_may_ask_for_the_label_of_a_run() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let job = |node, name: &str, run: &str| lab.pod(node, name).label("job-name", run).create();
    let (night, day) = (job(1, "shop/night", "night")?, job(2, "shop/day", "day")?);
    let client = lab.pod(1, "shop/client").create()?;
    let rows = |night_expected, day_expected| {
        let target = |pod: &crate::lab::Pod| SocketAddr::new(pod.address(true), 80);
        vec![
            Row::new(&client, Via::Tcp, target(&night), night_expected),
            Row::new(&client, Via::Tcp, target(&day), Expected::Answered),
            Row::new(&day, Via::Tcp, target(&night), day_expected),
        ]
    };
    expect_all(&rows(Expected::Answered, Expected::Answered))?;
    let policy = |ingress: &str| {
        lab.manifests().apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: night, namespace: shop}}\n\
             spec: {{podSelector: {{matchLabels: {{job-name: night}}}}, ingress: {ingress}}}\n"
        ))
    };
    policy("[]")?;
    expect_all(&rows(Expected::Denied, Expected::Denied))?;
    policy("[{from: [{podSelector: {matchLabels: {job-name: day}}}]}]")?;
    expect_all(&rows(Expected::Denied, Expected::Answered))
}
