//! What goes between nodes is encrypted, through every accident; the wire is looked at all the while.

mod forged;
mod keys;

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use weir::encryption::protocol::{Client, Request, SideState};

use crate::lab::{Lab, MARKER, Node, Pod, Setup, Space, Traffic, ping, probe_udp, wait_for};
use crate::require::{require_lab, say_skipped};
use crate::two_nodes::nodes_reach_pods;
use crate::verdicts::expect_full_mesh;

fn setup(routing: &str) -> Setup {
    setup_by("user", routing)
}

/// By `kernel` or `user` with WireGuard, or by `ipsec`.
fn setup_by(device: &str, routing: &str) -> Setup {
    let arguments: &[&str] = match device {
        "ipsec" => &["--encryption", "ipsec"],
        _ => &["--encryption", "wireguard", "--wireguard-device", device],
    };
    Setup {
        nodes: 2,
        routing: routing.to_owned(),
        agent_arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        ..Setup::default()
    }
}

/// The kernel has devices of IPsec, and ESP with AES-GCM.
fn has_ipsec() -> Result<bool> {
    static PROBES: AtomicUsize = AtomicUsize::new(0);
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let space = Space::create(&format!("weirlab-{}-ip{number}", std::process::id()), None)?;
    let key = "0x".to_owned() + &"5a".repeat(36);
    let state = format!(
        "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode tunnel aead rfc4106(gcm(aes)) {key} 128"
    );
    Ok(space.configure(&["link add probe type xfrm if_id 7", &state]).is_ok())
}

/// The kernel has WireGuard, built in or as a module.
fn has_kernel_wireguard() -> Result<bool> {
    static PROBES: AtomicUsize = AtomicUsize::new(0);
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let space = Space::create(&format!("weirlab-{}-wg{number}", std::process::id()), None)?;
    Ok(space.configure(&["link add probe type wireguard"]).is_ok())
}

/// How the process is that encrypts for a node.
fn side(node: &Node) -> Result<SideState> {
    let mut client = Client::connect(&node.directory().join("run/wireguard.sock"))?;
    Ok(client.call(&Request::Status, &[])?)
}

fn say_the_marker(from: &Pod, to: &Pod) -> Result<()> {
    for address in to.addresses().to_vec() {
        let target = SocketAddr::new(address, 80);
        let said = from.space().run(move || probe_udp(target, &[MARKER, &[b'x'; 1000]].concat()));
        let outcome = said.with_context(|| format!("UDP to {target}"))?;
        ensure!(outcome.is_answered(), "UDP {address}: {outcome}");
        let said = from.space().run(move || ping(address, 3000));
        let outcome = said.with_context(|| format!("fragments to {address}"))?;
        ensure!(outcome.is_answered(), "fragments to {address}: {outcome}");
    }
    Ok(())
}

/// What the kernel and the agents have counted, for who reads why a test failed.
fn counted(lab: &Lab) -> String {
    let of_node = |node: &Node| {
        let kernel = node.space().run(|| {
            let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
            ["xfrm_stat", "snmp"].map(|name| read(name).unwrap_or_default()).concat()
        });
        let kernel: Vec<&str> = kernel
            .lines()
            .filter(|line| !line.trim_end().ends_with("\t0") && !line.ends_with(" 0"))
            .collect();
        let drops = node.flows(&["--verdict", "DROPPED"]).unwrap_or_default();
        let drops: Vec<String> = drops.iter().rev().take(10).map(ToString::to_string).collect();
        let links = node.space().command(
            {
                let mut command = std::process::Command::new("ip");
                command.args(["-s", "xfrm", "state"]);
                command
            },
            "",
        );
        let status = node.weir(&["encryption", "status"]).unwrap_or_default();
        format!("{kernel:#?}\n{drops:#?}\n{}\n{status}\n{}", links.unwrap_or_default(), node.log_tail())
    };
    lab.nodes().iter().map(of_node).collect::<Vec<_>>().join("\n")
}

fn all_is_encrypted(device: &str, routing: &str) -> Result<()> {
    let lab = Lab::start(setup_by(device, routing))?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    say_the_marker(&a, &b).with_context(|| counted(&lab))?;
    say_the_marker(&b, &a).with_context(|| counted(&lab))?;
    nodes_reach_pods(&lab, &a, &b).with_context(|| counted(&lab))?;
    for is_ipv4 in [true, false] {
        let stream = Traffic::tcp(a.space(), SocketAddr::new(b.address(is_ipv4), 80));
        stream.wait_for_answers(200)?;
        stream.stop()?.check_nothing_lost()?;
    }
    peers_are_shown(&lab, device)?;
    wall.check().map(drop)
}

fn peers_are_shown(lab: &Lab, device: &str) -> Result<()> {
    let shown = lab.node(1).weir_json(&["encryption", "status"])?;
    let (by, name) = match device {
        "kernel" => ("the kernel's WireGuard", "weir_wg"),
        "ipsec" => ("the kernel's IPsec", "weir_ipsec"),
        _ => ("weir wireguard", "weir_wg"),
    };
    ensure!(shown["device"]["kind"].as_str().is_some_and(|kind| kind.starts_with(by)), "{shown}");
    ensure!(shown["peers"][0]["node"] == "node2", "{shown}");
    let state = &shown["peers"][0]["state"];
    ensure!(
        state["last_handshake_seconds"].is_u64() != (device == "ipsec")
            && state["received_bytes"].as_u64() > Some(0),
        "{shown}"
    );
    let metric = lab.node(1).metric("weir_encryption_peer_sent_bytes_total", &["node2"])?;
    ensure!(metric > 0.0, "weir_encryption_peer_sent_bytes_total is {metric}");
    let status = lab.node(1).weir(&["status"])?;
    ensure!(status.contains(&format!("{name} with MTU 1440, strict")), "{status}");
    Ok(())
}

#[test]
fn pods_of_two_nodes_are_encrypted_by_the_kernels_wireguard() -> Result<()> {
    require_lab!();
    if !has_kernel_wireguard()? {
        say_skipped("needs WireGuard in the kernel: `make kernels`");
        return Ok(());
    }
    all_is_encrypted("kernel", "tunnel")?;
    all_is_encrypted("kernel", "native")
}

#[test]
fn pods_of_two_nodes_are_encrypted_by_ipsec() -> Result<()> {
    require_lab!();
    if !has_ipsec()? {
        say_skipped("needs ESP and xfrm interfaces in the kernel: `make kernels`");
        return Ok(());
    }
    all_is_encrypted("ipsec", "tunnel")?;
    all_is_encrypted("ipsec", "native")
}

/// What the other tests look at would show it if it were there.
#[test]
fn without_encryption_the_wire_shows_what_pods_say() -> Result<()> {
    require_lab!();
    for (routing, what) in [("tunnel", "a tunnel packet"), ("native", "protocol")] {
        let lab = Lab::start(Setup { agent_arguments: vec![], ..setup(routing) })?;
        let wall = lab.look_at_wire()?;
        let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
        expect_full_mesh(&[&a, &b])?;
        say_the_marker(&a, &b)?;
        let seen = wall.stop()?;
        ensure!(seen.encrypted == 0, "{seen:?}");
        for sign in [what, "the marker"] {
            ensure!(seen.plain.keys().any(|found| found.contains(sign)), "{sign}: {seen:?}");
        }
    }
    Ok(())
}

#[test]
fn pods_of_two_nodes_are_encrypted_in_the_tunnel() -> Result<()> {
    require_lab!();
    all_is_encrypted("user", "tunnel")
}

#[test]
fn pods_of_two_nodes_are_encrypted_with_native_routing() -> Result<()> {
    require_lab!();
    all_is_encrypted("user", "native")
}

fn survive(routing: &str) -> Result<()> {
    let lab = Lab::start(setup(routing))?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    let streams: Vec<Traffic> =
        [true, false].map(|is_ipv4| Traffic::udp(a.space(), SocketAddr::new(b.address(is_ipv4), 80))).into();
    let goes_on = || streams.iter().try_for_each(|stream| stream.wait_for_answers(100));
    goes_on()?;

    // The agent is away: nothing else is.
    let before = side(lab.node(1))?;
    lab.node(1).kill_agent()?;
    goes_on()?;
    ensure!(side(lab.node(1))?.pid == before.pid, "the process has ended with its agent");
    lab.node(1).start_agent()?;
    lab.node(1).wait_ready()?;
    goes_on()?;
    ensure!(side(lab.node(1))?.pid == before.pid, "the agent has started another process");

    // The process is killed: another one comes.
    kill(Pid::from_raw(before.pid as i32), Signal::SIGKILL)?;
    wait_for("another process", || Ok(side(lab.node(1)).is_ok_and(|now| now.pid != before.pid)))?;
    goes_on()?;

    // Both are killed, and then the agent comes back.
    let before = side(lab.node(1))?;
    lab.node(1).kill_agent()?;
    kill(Pid::from_raw(before.pid as i32), Signal::SIGKILL)?;
    streams[0].wait_for_silence()?;
    lab.node(1).start_agent()?;
    lab.node(1).wait_ready()?;
    goes_on()?;
    for stream in streams {
        stream.stop()?;
    }
    wall.check().map(drop)
}

#[test]
fn nothing_goes_in_plain_when_agent_and_process_are_killed_in_the_tunnel() -> Result<()> {
    require_lab!();
    survive("tunnel")
}

#[test]
fn nothing_goes_in_plain_when_agent_and_process_are_killed_with_native_routing() -> Result<()> {
    require_lab!();
    survive("native")
}

#[test]
fn a_node_that_comes_anew_under_its_name_has_another_key() -> Result<()> {
    require_lab!();
    let lab = Lab::start(setup("tunnel"))?;
    let wall = lab.look_at_wire()?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    let node = lab.node(2);
    let before = side(node)?.running.context("the process has a device")?.public_key;
    node.stop_agent()?;
    Client::connect(&node.directory().join("run/wireguard.sock"))?.call(&Request::Stop, &[])?;
    std::fs::remove_file(node.directory().join("state/wireguard.key"))?;
    // Sends to a node that does not answer: node 1 waits, and says nothing in plain.
    let stream = Traffic::udp(a.space(), SocketAddr::new(b.address(true), 80));
    stream.wait_for_silence()?;
    node.start_agent()?;
    node.wait_ready()?;
    ensure!(side(node)?.running.is_some_and(|now| now.public_key != before), "it has the same key");
    stream.wait_for_answers(100)?;
    stream.stop()?;
    expect_full_mesh(&[&a, &b])?;
    wall.check().map(drop)
}

/// How large segments a new connection sends.
fn segment(from: &Pod, to: &Pod, is_ipv4: bool) -> Result<u32> {
    let target = SocketAddr::new(to.address(is_ipv4), 80);
    from.space().run(move || Ok(getsockopt(&TcpStream::connect(target)?, sockopt::TcpMaxSeg)?))
}

#[test]
fn segments_of_pods_that_are_older_than_encryption_fit() -> Result<()> {
    require_lab!();
    for (routing, mtu, before) in [("tunnel", 1390, 1450), ("native", 1440, 1500)] {
        let lab = Lab::start(Setup { agent_arguments: vec![], ..setup(routing) })?;
        let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
        let c = lab.pod(1, "shop/c").create()?;
        expect_full_mesh(&[&a, &b])?;
        // Without an option of TCP's own, which is 12 bytes of each segment.
        let fits = |mtu: u32, is_ipv4: bool| mtu - if is_ipv4 { 40 } else { 60 };
        for is_ipv4 in [true, false] {
            ensure!(segment(&a, &b, is_ipv4)? > fits(mtu, is_ipv4), "{routing}: small without encryption");
        }
        for node in lab.nodes() {
            node.stop_agent()?;
        }
        for node in lab.nodes() {
            node.start_agent_with(&["--encryption", "wireguard", "--wireguard-device", "user"])?;
        }
        for node in lab.nodes() {
            node.wait_ready()?;
        }
        expect_full_mesh(&[&a, &b])?;
        for (from, to) in [(&a, &b), (&b, &a)] {
            for is_ipv4 in [true, false] {
                let segment = segment(from, to, is_ipv4)?;
                ensure!(segment <= fits(mtu, is_ipv4), "{routing}: segments of {segment} bytes, MTU {mtu}");
            }
        }
        let on_one_node = segment(&a, &c, true)?;
        ensure!(on_one_node > fits(mtu, true), "{routing}: {on_one_node} bytes on one node");
        let status = lab.node(1).weir(&["status"])?;
        ensure!(status.contains(&format!("shop/a ({before})")), "{status}");
    }
    Ok(())
}
