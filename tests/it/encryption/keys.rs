//! Keys change under traffic: nothing is lost, and nothing goes in plain.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{has_ipsec, has_kernel_wireguard, say_the_marker, setup_by, side};
use crate::lab::{Lab, Node, Pod, Report, Traffic, wait_for};
use crate::require::{require_lab, say_skipped};
use crate::verdicts::expect_full_mesh;

/// The generation of the key that the node sends by, and what a change of keys waits for.
fn keys(node: &Node) -> Result<(u64, Option<String>)> {
    let shown = node.weir_json(&["encryption", "status"])?;
    let change = shown["device"]["change"].as_str().map(str::to_owned);
    Ok((shown["device"]["generation"].as_u64().unwrap_or(u64::MAX), change))
}

fn wait_for_generation(lab: &Lab, generation: u64) -> Result<()> {
    for node in lab.nodes() {
        wait_for("keys of the next generation alone", || {
            Ok(keys(node).is_ok_and(|keys| keys == (generation, None)))
        })?;
    }
    Ok(())
}

/// Datagrams both ways in both families, and a stream.
fn traffic(a: &Pod, b: &Pod) -> Result<Vec<Traffic>> {
    let mut running = Vec::new();
    for (from, to) in [(a, b), (b, a)] {
        for is_ipv4 in [true, false] {
            running.push(Traffic::udp(from.space(), SocketAddr::new(to.address(is_ipv4), 80)));
        }
    }
    running.push(Traffic::tcp(a.space(), SocketAddr::new(b.address(true), 80)));
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    Ok(running)
}

fn nothing_was_lost(running: Vec<Traffic>) -> Result<()> {
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    for traffic in running {
        // TCP repeats on a slow machine what was not lost: the datagrams tell.
        let report = Report { repeated: 0, ..traffic.stop()? };
        report.check_nothing_lost()?;
    }
    Ok(())
}

fn public_key(node: &Node) -> Result<Value> {
    Ok(node.weir_json(&["encryption", "status"])?["device"]["public_key"].clone())
}

/// From one device to the other and back again; the second time both nodes begin at once.
fn change_keys(device: &str, routing: &str) -> Result<()> {
    let lab = Lab::start(setup_by(device, routing))?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    wait_for_generation(&lab, 0)?;
    let first = [public_key(lab.node(1))?, public_key(lab.node(2))?];
    let running = traffic(&a, &b)?;

    lab.node(1).weir(&["encryption", "rotate"])?;
    wait_for_generation(&lab, 1)?;
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    let second = [public_key(lab.node(1))?, public_key(lab.node(2))?];
    ensure!(first[0] != second[0] && first[1] != second[1], "{first:?} {second:?}");
    for name in ["wireguard.key", "ipsec.key"] {
        let file = lab.node(1).directory().join("state").join(name);
        ensure!(!file.exists(), "the former key is still there: {}", file.display());
    }
    ensure!(lab.node(1).map("node_state")?[0]["flags"].to_string().contains("second key"));
    say_the_marker(&a, &b)?;

    lab.node(1).weir(&["encryption", "rotate"])?;
    lab.node(2).weir(&["encryption", "rotate"])?;
    wait_for_generation(&lab, 2)?;
    ensure!(public_key(lab.node(1))? != first[0], "the first key has come back");
    nothing_was_lost(running)?;
    say_the_marker(&b, &a)?;
    expect_full_mesh(&[&a, &b])?;
    wall.check().map(drop)
}

#[test]
fn keys_change_without_loss_in_the_tunnel() -> Result<()> {
    require_lab!();
    change_keys("user", "tunnel")
}

#[test]
fn keys_change_without_loss_with_native_routing() -> Result<()> {
    require_lab!();
    change_keys("user", "native")
}

#[test]
fn keys_of_the_kernels_wireguard_change_without_loss() -> Result<()> {
    require_lab!();
    if !has_kernel_wireguard()? {
        say_skipped("needs WireGuard in the kernel: `make kernels`");
        return Ok(());
    }
    change_keys("kernel", "tunnel")?;
    change_keys("kernel", "native")
}

#[test]
fn keys_of_ipsec_change_without_loss() -> Result<()> {
    require_lab!();
    if !has_ipsec()? {
        say_skipped("needs ESP and xfrm interfaces in the kernel: `make kernels`");
        return Ok(());
    }
    change_keys("ipsec", "tunnel")?;
    change_keys("ipsec", "native")
}

#[test]
fn a_change_of_keys_waits_for_a_node_whose_agent_is_away_and_goes_on_after_a_restart() -> Result<()> {
    require_lab!();
    let lab = Lab::start(setup_by("user", "tunnel"))?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    let running = traffic(&a, &b)?;
    let [one, two] = [lab.node(1), lab.node(2)];

    two.kill_agent()?;
    one.weir(&["encryption", "rotate"])?;
    let waits = || {
        Ok(keys(one)
            .is_ok_and(|(active, change)| active == 0 && change.is_some_and(|it| it.contains("node2"))))
    };
    wait_for("a change of keys that waits", waits)?;
    let before = side(one)?.pid;
    // In the middle of it.
    one.kill_agent()?;
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    one.start_agent()?;
    one.wait_ready()?;
    wait_for("the same change of keys", waits)?;
    ensure!(side(one)?.pid == before, "the process of the first key was started anew");
    two.start_agent()?;
    two.wait_ready()?;
    wait_for_generation(&lab, 1)?;
    nothing_was_lost(running)?;
    wall.check().map(drop)
}

#[test]
fn a_node_that_comes_anew_takes_the_generation_of_the_others() -> Result<()> {
    require_lab!();
    let lab = Lab::start(setup_by("user", "native"))?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    lab.node(2).weir(&["encryption", "rotate"])?;
    wait_for_generation(&lab, 1)?;
    let two = lab.node(2);
    two.stop_agent()?;
    for file in ["wireguard-keys.json", "wireguard1.key"] {
        std::fs::remove_file(two.directory().join("state").join(file))?;
    }
    two.start_agent()?;
    two.wait_ready()?;
    wait_for_generation(&lab, 1)?;
    expect_full_mesh(&[&a, &b])?;
    wall.check().map(drop)
}
