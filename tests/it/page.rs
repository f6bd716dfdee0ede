//! The page of a real relay in a real browser, with two agents and the demo's traffic; and whether the rule
//! that the page offers for a denied flow does allow it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};

use crate::lab::wait_for;
use crate::require::require_lab;
use crate::shop::page::{AGENT_ARGUMENTS, Page};
use crate::shop::{ATTEMPTS, Shop};

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

/// Runs the page's tests (ui/tests/real); what they printed, if they failed.
fn browse(url: &str, rule: &Path) -> Result<()> {
    let output = Command::new("npm")
        .args(["run", "--silent", "test:real"])
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
        move || browse(&url, &rule)
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
