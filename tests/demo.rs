//! `make demo`: two nodes, a small shop, its policies, traffic, and what the flows say about it.
//!
//! Ends with 0 only if every attempt ended as the policies demand and the flows tell so.
//! With KEEP=1 a process of its own keeps it running, and this one says how to look around.

#[path = "lab/mod.rs"]
mod lab;
#[path = "shop/mod.rs"]
mod shop;

use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use shop::page::{AGENT_ARGUMENTS, Page};
use shop::{ATTEMPTS, Shop};

/// Printed by the kept process when it has shown everything; the exit code follows.
const SHOWN: &str = "\u{4}";

fn main() -> ExitCode {
    let is_kept = env::args().nth(1).as_deref() == Some("kept");
    let keeps = env::var("KEEP").is_ok_and(|keep| !keep.is_empty() && keep != "0");
    let ended = if keeps && !is_kept { start_kept() } else { run(is_kept) };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the process that stays, and shows what it prints until it has shown everything.
fn start_kept() -> Result<bool> {
    let mut kept = Command::new(env::current_exe()?);
    kept.arg("kept").stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut kept = kept.spawn().context("starting the process that stays")?;
    for line in BufReader::new(kept.stdout.take().context("its output")?).lines() {
        let line = line?;
        match line.strip_prefix(SHOWN) {
            Some(code) => return Ok(code == "0"),
            None => println!("{line}"),
        }
    }
    bail!("the process that stays ended: {}", kept.wait()?)
}

fn run(is_kept: bool) -> Result<bool> {
    if let Some(lack) = lab::machine_lacks() {
        bail!("the demo {lack}");
    }
    println!("Two nodes in VXLAN mode, each with its agent; pods by weir-cni; objects from deploy/demo.\n");
    let shop = Shop::open_with(&AGENT_ARGUMENTS)?;
    let outcomes = shop.try_until_right()?;
    let is_right = show_verdicts(&shop, &outcomes)?;
    show_flows(&shop)?;
    if !is_right {
        println!("\nNot as expected.");
        for node in shop.lab().nodes() {
            println!("{}", node.log_tail());
        }
    }
    if !is_kept {
        return Ok(is_right);
    }
    // Another demo may have the usual port.
    let page =
        Page::serve(shop.lab(), "127.0.0.1:4246").or_else(|_| Page::serve(shop.lab(), "127.0.0.1:0"))?;
    show_how_to_go_on(&shop, &page)?;
    println!("{SHOWN}{}", i32::from(!is_right));
    loop {
        // Somebody may be changing everything: what comes of it is theirs to see.
        let _ = shop.try_all();
        std::thread::sleep(Duration::from_secs(2));
    }
}

fn show_verdicts(shop: &Shop, outcomes: &[lab::Outcome]) -> Result<bool> {
    // The reader of the ring buffer and the naming of flows need a moment.
    let mut flows = Vec::new();
    let told = lab::wait_for("the flows to tell every verdict", || {
        flows = shop.flows()?;
        Ok(ATTEMPTS.iter().all(|attempt| shop.seen(attempt, &flows).is_some()))
    });
    println!(
        "{:<14} {:<27} {:>5}  {:<9} {:<10} WHY (from the flows)",
        "FROM", "TO", "PORT", "RESULT", "FLOW"
    );
    let mut is_right = true;
    for (attempt, outcome) in ATTEMPTS.iter().zip(outcomes) {
        let seen = shop.seen(attempt, &flows);
        let result = if outcome.is_answered() { "answered" } else { "no answer" };
        let (verdict, why) =
            seen.as_ref().map_or(("-", "no flow tells"), |seen| (&*seen.verdict, &*seen.why));
        let is_expected = attempt.is_as_expected(outcome) && seen.is_some();
        let mark = if is_expected { "" } else { "   <-- NOT AS EXPECTED" };
        println!(
            "{:<14} {:<27} {:>5}  {result:<9} {verdict:<10} {why}{mark}",
            attempt.from, attempt.to, attempt.port
        );
        is_right &= is_expected;
    }
    if let Err(error) = told {
        println!("{error:#}");
    }
    Ok(is_right)
}

fn show_flows(shop: &Shop) -> Result<()> {
    for node in shop.lab().nodes() {
        println!("\nweir observe --last 8, on {}:", node.name());
        print!("{}", node.weir(&["observe", "--last", "8"])?);
    }
    Ok(())
}

fn show_how_to_go_on(shop: &Shop, page: &Page) -> Result<()> {
    let weir = lab::binary("weir")?;
    let (weir, directory) = (weir.display(), shop.lab().directory().display());
    println!("\nIt goes on; the shop tries everything again every two seconds.");
    println!("\nOpen the page of both nodes' flows, by a relay:\n  {}", page.url());
    println!("\nEnter a pod:");
    for pod in shop.pods() {
        println!("  ip netns exec {} bash    # {}/{}", pod.space().name(), pod.namespace(), pod.name());
    }
    println!("Apply another policy (here: the front end serves only the back end), and take it back:");
    println!(
        "  cp deploy/demo/closed.yaml {directory}/manifests/networkpolicy-shop-frontend-serves-everyone.yaml"
    );
    println!("  cp deploy/demo/policies.yaml {directory}/manifests/");
    println!("Look:");
    for node in shop.lab().nodes() {
        println!("  {weir} observe --follow --socket {}", node.socket().display());
    }
    println!("  {weir} endpoint list --socket {}", shop.lab().node(1).socket().display());
    println!("End it:");
    println!("  kill {}", std::process::id());
    Ok(())
}
