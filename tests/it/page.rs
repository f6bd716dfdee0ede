//! The page of a real relay in a real browser, with two agents and the demo's traffic; and whether the rule
//! that the page offers for a denied flow does allow it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::{Lab, Setup, Via, binary, wait_for};
use crate::names;
use crate::require::require_lab;
use crate::shop::page::{AGENT_ARGUMENTS, Page};
use crate::shop::{ATTEMPTS, Shop};
use crate::verdicts::{Expected, Row, expect_all};

/// What this machine lacks for a browser; `make ui-test` installs it.
fn browser_lacks() -> Option<&'static str> {
    let has = |path: &str| Path::new(path).exists();
    if !ui().join("node_modules/playwright-core").exists() {
        return Some("needs ui/node_modules: make ui");
    }
    let browsers = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
    (!browsers.into_iter().any(has)).then_some("needs Chromium: apt-get install chromium")
}

fn ui() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ui")
}

/// Runs a file of the page's tests (ui/tests/real); what they printed, if they failed.
fn browse(file: &str, url: &str, rule: &Path) -> Result<()> {
    let output = Command::new("npm")
        .args(["run", "--silent", "test:real", "--", file])
        .current_dir(ui())
        .env("WEIR_PAGE", url)
        .env("WEIR_RULE", rule)
        .output()
        .context("running npm")?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "the page's tests failed:\n{text}");
    Ok(())
}

#[test]
fn the_page_shows_the_shop_and_its_rule_allows_what_was_denied() -> Result<()> {
    require_lab!();
    if let Some(lack) = browser_lacks() {
        eprintln!("SKIPPED the_page_shows_the_shop_and_its_rule_allows_what_was_denied: {lack}");
        return Ok(());
    }
    let shop = Shop::open_with(&AGENT_ARGUMENTS)?;
    shop.try_until_right()?;
    let page = Page::serve(shop.lab(), "127.0.0.1:0")?;
    let rule = shop.lab().directory().join("rule.yaml");
    let browsing = thread::spawn({
        let (url, rule) = (page.url(), rule.clone());
        move || browse("shop", &url, &rule)
    });
    // The first screen shows what happens now.
    while !browsing.is_finished() {
        shop.try_all()?;
    }
    browsing.join().expect("the browser's thread does not panic")?;
    shop.lab()
        .manifests()
        .apply(&fs::read_to_string(&rule).context("reading the rule that the page gave")?)?;
    let denied =
        ATTEMPTS.iter().position(|attempt| attempt.to == "service data/database" && !attempt.is_allowed);
    let denied = denied.context("the shop denies its front end the database")?;
    wait_for("the rule to allow what was denied", || Ok(shop.try_all()?[denied].is_answered()))
}

/// Requests of a pod whose namespace only asks to see them are flows of the relay and on the page.
#[test]
fn requests_that_are_only_shown_are_on_the_page() -> Result<()> {
    require_lab!();
    let agent_arguments = AGENT_ARGUMENTS.map(str::to_owned).to_vec();
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    lab.manifests().apply(
        "apiVersion: v1
kind: Namespace
metadata: {name: shown, annotations: {weir.dev/visibility: http}}
",
    )?;
    let client = lab.pod(1, "shown/client").create()?;
    // Every port of a pod has a server of the lab's.
    lab.outside().configure(&["route add local 198.18.0.0/16 dev lo"])?;
    let web: std::net::SocketAddr = "198.18.0.80:8080".parse()?;
    names::serve(lab.outside(), web, |_| b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec())?;
    let ask = || client.space().http_get(web, "/only-shown");
    let page = Page::serve(&lab, "127.0.0.1:0")?;
    let of_relay = || -> Result<Vec<Value>> {
        let mut command = Command::new(binary("weir")?);
        command.args(["observe", "--all", "--type", "l7", "-o", "json", "--server", "127.0.0.1:4245"]);
        let written = lab.node(1).space().command(command, "")?;
        let answers = written.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
        Ok(answers.into_iter().map(|mut answer| answer["flow"].take()).filter(Value::is_object).collect())
    };
    wait_for("the requests by the relay", || {
        anyhow::ensure!(ask()?.0 == 200);
        Ok(of_relay()?.iter().any(|flow| flow["l7"]["http"]["url"].to_string().contains("/only-shown")))
    })?;
    anyhow::ensure!(of_relay()?.iter().all(|flow| flow["verdict"] == "FORWARDED"), "nothing is denied");
    if let Some(lack) = browser_lacks() {
        eprintln!("SKIPPED (the page) requests_that_are_only_shown_are_on_the_page: {lack}");
        return Ok(());
    }
    let browsing = thread::spawn({
        let (url, rule) = (page.url(), lab.directory().join("rule.yaml"));
        move || browse("shown", &url, &rule)
    });
    while !browsing.is_finished() {
        anyhow::ensure!(ask()?.0 == 200);
    }
    browsing.join().expect("the browser's thread does not panic")
}

/// `weir observe` and `weir top` ask a relay, which asks every node.
#[test]
fn a_relay_answers_observe_and_top_for_every_node() -> Result<()> {
    require_lab!();
    let agent_arguments = AGENT_ARGUMENTS.map(str::to_owned).to_vec();
    let lab = Lab::start(Setup { nodes: 2, agent_arguments, ..Setup::default() })?;
    let client = lab.pod(1, "shop/client").create()?;
    let server = lab.pod(2, "shop/server").label("app", "server").create()?;
    lab.manifests().apply(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}}
",
    )?;
    let _page = Page::serve(&lab, "127.0.0.1:0")?;
    let target = std::net::SocketAddr::new(server.address(true), 80);
    expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Denied)])?;
    let ask = |arguments: &[&str]| -> Result<String> {
        let mut command = Command::new(binary("weir")?);
        command.args(arguments).args(["-o", "json", "--server", "127.0.0.1:4245"]);
        lab.node(1).space().command(command, "")
    };
    let mut seen = Vec::new();
    wait_for("flows of both nodes by the relay", || {
        let written = ask(&["observe", "--all", "--from-pod", "shop/client", "--to-pod", "shop/server"])?;
        let flows: Vec<Value> = written.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        seen = flows.into_iter().map(|mut flow| flow["flow"].take()).filter(Value::is_object).collect();
        let is_of = |place: usize| seen.iter().any(|flow| flow["node_name"] == lab.node(place).name());
        Ok(is_of(1) && is_of(2))
    })?;
    let dropped: Vec<_> = seen.iter().filter(|flow| flow["verdict"] == "DROPPED").collect();
    assert!(
        !dropped.is_empty() && dropped.iter().all(|flow| flow["node_name"] == lab.node(2).name()),
        "{seen:?}"
    );
    let top: Value = serde_json::from_str(&ask(&["top", "--once", "--window", "600"])?)?;
    assert_eq!(top["drops"][0]["source"], "shop/client", "{top}");
    assert_eq!(top["drops"][0]["destination"], "shop/server", "{top}");
    Ok(())
}
