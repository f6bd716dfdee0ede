//! An Envoy in the proxy's place (`WEIR_PROXY=envoy`): the real program, which `scripts/envoy` brings.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::l7::{Client, Http, PORT, allow, ask, expect_health_only, wait_for_status};
use crate::lab::{Lab, Node, Setup, Space, noting_failure, wait_for};
use crate::require::{require_lab, say_skipped};

/// Where `scripts/envoy` has put the program.
fn envoy() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/envoy/envoy");
    program.is_file().then_some(program)
}

fn lab(nodes: usize, envoy: &Path) -> Result<Lab> {
    let program = envoy.display().to_string();
    let agent_arguments = ["--proxy", "envoy", "--envoy", &program].map(str::to_owned).to_vec();
    Lab::start(Setup { nodes, agent_arguments, ..Setup::default() })
}

/// How many flows of the node are in an Envoy's hands.
fn flows_of_envoy(node: &Node) -> Result<usize> {
    let rows = node.map("l7_flows")?;
    Ok(rows.iter().filter(|row| row["listener_set"].as_u64().is_some_and(|set| set > 0)).count())
}

/// A request on a connection of its own is allowed by no rule that is not in force: it fails, or is denied.
fn expect_closed(space: &Space, server: IpAddr) -> Result<()> {
    if let Ok((status, _)) = ask(space, server, "GET", "/health") {
        anyhow::bail!("GET /health: {status} with nobody to judge it");
    }
    Ok(())
}

#[test]
fn only_get_health_passes_an_envoy() -> Result<()> {
    require_lab!();
    let Some(envoy) = envoy() else {
        say_skipped("there is no Envoy: scripts/envoy brings one");
        return Ok(());
    };
    let lab = lab(2, &envoy)?;
    let client = lab.pod(1, "shop/client").create()?;
    let servers = [
        lab.pod(1, "shop/near").label("app", "web").create()?,
        lab.pod(2, "shop/far").label("app", "web").create()?,
    ];
    let running = servers.iter().map(|server| Http::start(server.space())).collect::<Result<Vec<_>>>()?;
    allow(&lab, "[{method: GET, path: /health}]")?;
    for (number, server) in servers.iter().enumerate() {
        for address in server.addresses().to_vec() {
            wait_for_status(client.space(), address, ("GET", "/admin"), 403)?;
            let outcome = expect_health_only(client.space(), Some(&client), address);
            noting_failure(outcome.with_context(|| format!("to {address}")))?;
            expect_health_only(lab.outside(), None, address)
                .with_context(|| format!("from outside to {address}"))?;
            let mut kept = Client::connect(client.space(), SocketAddr::new(address, PORT))?;
            ensure!(kept.ask("GET", "/health")?.0 == 200);
            let own = kept.address()?;
            ensure!(running[number].peers().contains(&own), "the server did not see {own}");
        }
    }
    ensure!(flows_of_envoy(lab.node(1))? > 0 && flows_of_envoy(lab.node(2))? > 0, "Envoy judged nothing");
    for (verdict, path) in [("forwarded", "^/health$"), ("dropped", "^/admin$")] {
        wait_for(&format!("the record of {path}"), || {
            let flows = lab.node(1).flows(&[
                "--http-path",
                path,
                "--verdict",
                verdict,
                "--from-pod",
                "shop/client",
            ])?;
            Ok(!flows.is_empty())
        })?;
    }
    Ok(())
}

#[test]
fn a_policy_counts_at_once_and_nothing_passes_without_the_envoy() -> Result<()> {
    require_lab!();
    let Some(envoy) = envoy() else {
        say_skipped("there is no Envoy: scripts/envoy brings one");
        return Ok(());
    };
    let lab = lab(1, &envoy)?;
    let node = lab.node(1);
    let client = lab.pod(1, "shop/client").create()?;
    let server = lab.pod(1, "shop/web").label("app", "web").create()?;
    let _running = Http::start(server.space())?;
    let target = SocketAddr::new(server.address(true), PORT);
    allow(&lab, "[{method: GET, path: /health}]")?;
    wait_for_status(client.space(), target.ip(), ("GET", "/admin"), 403)?;

    let mut kept = Client::connect(client.space(), target)?;
    ensure!(kept.ask("GET", "/health")?.0 == 200);
    allow(&lab, "[{method: GET, path: /status}]")?;
    wait_for_status(client.space(), target.ip(), ("GET", "/status"), 200)?;
    wait_for("the connection to lose its right", || {
        Ok(!kept.ask("GET", "/health").is_ok_and(|(status, _)| status == 200))
    })?;
    ensure!(ask(client.space(), target.ip(), "GET", "/health")?.0 == 403);

    // Without an agent nobody starts the next one.
    node.kill_agent()?;
    ensure!(ask(client.space(), target.ip(), "GET", "/status")?.0 == 200, "without an agent requests pass");
    allow(&lab, "[{method: GET, path: /health}]")?;
    let first = node.envoy_pid().context("an Envoy runs")?;
    node.kill_envoy()?;
    for _ in 0..5 {
        expect_closed(client.space(), target.ip())?;
    }
    node.start_agent()?;
    node.wait_ready()?;
    wait_for_status(client.space(), target.ip(), ("GET", "/health"), 200)?;
    ensure!(ask(client.space(), target.ip(), "GET", "/status")?.0 == 403);
    ensure!(node.envoy_pid().is_some_and(|pid| pid != first), "Envoy is another one");

    // The Envoy of an agent before judges by that agent's rules: each agent has its own.
    let second = node.envoy_pid().context("an Envoy runs")?;
    node.kill_agent()?;
    node.start_agent()?;
    wait_for("an Envoy of the new agent", || Ok(node.envoy_pid().is_some_and(|pid| pid != second)))?;
    wait_for_status(client.space(), target.ip(), ("GET", "/health"), 200)?;
    ensure!(ask(client.space(), target.ip(), "GET", "/status")?.0 == 403);

    let second = node.envoy_pid().context("an Envoy runs")?;
    let mut kept = Client::connect(client.space(), target)?;
    ensure!(kept.ask("GET", "/health")?.0 == 200);
    node.kill_envoy()?;
    ensure!(kept.ask("GET", "/health").is_err(), "what Envoy had in its hands breaks");
    wait_for_status(client.space(), target.ip(), ("GET", "/health"), 200)?;
    ensure!(ask(client.space(), target.ip(), "GET", "/status")?.0 == 403);
    ensure!(node.envoy_pid().is_some_and(|pid| pid != second), "Envoy is another one");
    ensure!(flows_of_envoy(node)? > 0, "Envoy judged nothing");
    Ok(())
}

/// Whatever a server makes of these paths, it is not asked for what the rule does not allow.
#[test]
fn a_path_that_servers_read_otherwise_does_not_pass_an_envoy() -> Result<()> {
    require_lab!();
    let Some(envoy) = envoy() else {
        say_skipped("there is no Envoy: scripts/envoy brings one");
        return Ok(());
    };
    let lab = lab(1, &envoy)?;
    let client = lab.pod(1, "shop/client").create()?;
    let server = lab.pod(1, "shop/web").label("app", "web").create()?;
    let _running = Http::start(server.space())?;
    let target = server.address(true);
    allow(&lab, "[{path: '/public/.*'}]")?;
    wait_for_status(client.space(), target, ("GET", "/admin"), 403)?;
    let passes = ["/public/a", "/public/caf%C3%A9?x=../;%2e", "/public//a", "/public/x/../a"];
    for path in passes {
        ensure!(ask(client.space(), target, "GET", path)?.0 == 200, "{path}");
    }
    let tricks = [
        "/public/../secret",
        "/public/%2e%2e/secret",
        "/public/..;/secret",
        "/public/..;a=b/secret",
        "/public/%252e%252e/secret",
        "/public/..%5csecret",
        "/public/..\\secret",
        "/public/..%2fsecret",
        "/public/%2e%2e%3b/secret",
        "/public/a%00b",
    ];
    for path in tricks {
        let status = ask(client.space(), target, "GET", path)?.0;
        ensure!(matches!(status, 400 | 403), "{path}: {status}");
    }
    ensure!(flows_of_envoy(lab.node(1))? > 0, "Envoy judged nothing");
    Ok(())
}

#[test]
fn what_an_envoy_cannot_do_weir_proxy_does() -> Result<()> {
    require_lab!();
    let Some(envoy) = envoy() else {
        say_skipped("there is no Envoy: scripts/envoy brings one");
        return Ok(());
    };
    let lab = lab(1, &envoy)?;
    let client = lab.pod(1, "shop/client").create()?;
    let server = lab.pod(1, "shop/web").label("app", "web").create()?;
    let _running = Http::start(server.space())?;
    let rule = "[{method: GET, path: /health, headerMatches: [{name: X-Team, value: red, mismatch: ADD}]}]";
    allow(&lab, rule)?;
    wait_for_status(client.space(), server.address(true), ("GET", "/admin"), 403)?;
    expect_health_only(client.space(), Some(&client), server.address(true))?;
    ensure!(flows_of_envoy(lab.node(1))? == 0, "Envoy judged what it cannot");
    // An expression that Envoy refuses and weir proxy would take: nothing passes, and people hear of it.
    allow(&lab, r"[{method: GET, path: '/(?x: health )'}]")?;
    wait_for("the status to say what is refused", || {
        Ok(lab.node(1).status()?["parts"].to_string().contains("Envoy refuses"))
    })?;
    wait_for("the port to be closed", || {
        Ok(ask(client.space(), server.address(true), "GET", "/health").is_err())
    })?;
    Ok(())
}
