//! End-to-end tests on real Kubernetes: `make e2e` shows what works, `make e2e-faults` what survives.
//!
//! One cluster of three nodes for all of them, with Weir deployed as anybody deploys it; the
//! steps run in order. It goes at the end, whatever the end is.
//!
//!     cargo test --test e2e                 every step
//!     cargo test --test e2e -- dns          those whose name has `dns` in it
//!     cargo test --test e2e -- --faults     the table of faults, or those that are named
//!     cargo test --test e2e -- --platforms  a cluster for each platform that there is an overlay for

#[path = "../kubernetes/mod.rs"]
mod kubernetes;
#[path = "../lab/mod.rs"]
mod lab;

mod api_server;
mod faults;
mod life;
mod north_south;
mod platforms;
mod pods;
mod policies;
mod services;
mod tools;
mod world;

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use world::{NoCluster, World};

/// A step, which finds the cluster as it was and leaves it so.
type Step = (&'static str, fn(&mut World) -> Result<()>);

/// What `make e2e` runs.
const STEPS: &[Step] = &[
    ("pods_reach_one_another", pods::pods_reach_one_another),
    ("pods_on_the_hosts_network", pods::pods_on_the_hosts_network),
    ("host_ports_by_address_and_protocol", pods::host_ports_by_address_and_protocol),
    ("services_of_both_families", services::services_of_both_families),
    ("services_follow_their_pods", services::services_follow_their_pods),
    ("node_ports_and_traffic_policies", north_south::node_ports_and_traffic_policies),
    ("one_client_keeps_its_backend", north_south::one_client_keeps_its_backend),
    ("load_balancers_get_addresses", north_south::load_balancers_get_addresses),
    ("load_balancers_ask_nodes", north_south::load_balancers_ask_nodes),
    ("names_by_cluster_dns", services::names_by_cluster_dns),
    ("policies_allow_and_deny", policies::policies_allow_and_deny),
    ("policies_follow_labels", policies::policies_follow_labels),
    ("policies_of_egress", policies::policies_of_egress),
    ("kubelet_probes_under_a_default_deny", policies::kubelet_probes_under_a_default_deny),
    ("malformed_objects_change_nothing_else", life::malformed_objects_change_nothing_else),
    ("namespaces_go_with_all_they_hold", life::namespaces_go_with_all_they_hold),
    ("agents_write_their_own_objects_only", life::agents_write_their_own_objects_only),
    ("numbers_in_a_real_prometheus", life::numbers_in_a_real_prometheus),
    ("connectivity_test_of_everything", tools::connectivity_test_of_everything),
    ("status_of_the_cluster", tools::status_of_the_cluster),
    ("the_relay_has_every_node", tools::the_relay_has_every_node),
    ("http_requests_that_a_policy_names", tools::http_requests_that_a_policy_names),
    ("sysdump_without_secrets", tools::sysdump_without_secrets),
    ("sources_against_a_bare_api_server", api_server::sources_against_a_bare_api_server),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let is_platforms = arguments.iter().any(|argument| argument == "--platforms");
    let is_faults = arguments.iter().any(|argument| argument == "--faults");
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let is_wanted =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    // `cargo test` asks every test binary for its list.
    if arguments.iter().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    if let Some(lack) = lab::machine_lacks() {
        eprintln!("e2e {lack}");
        return ExitCode::FAILURE;
    }
    let began = Instant::now();
    let ended = if is_platforms { platforms::run(is_wanted) } else { run_on_one(is_faults, is_wanted) };
    match ended {
        Ok(is_right) => {
            println!(
                "{} in {:.0} s",
                if is_right { "passed" } else { "FAILED" },
                began.elapsed().as_secs_f32()
            );
            if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        // Where Weir is checked on machines that nobody chose for it.
        Err(error) if error.is::<NoCluster>() && env::var_os("SKIP_WITHOUT_CLUSTER").is_some() => {
            println!("SKIPPED (needs Kubernetes): every end-to-end test: {error:#}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_on_one(is_faults: bool, is_wanted: impl Fn(&str) -> bool) -> Result<bool> {
    let began = Instant::now();
    let mut world = World::start()?;
    println!("cluster and Weir are up after {:.0} s: {}", began.elapsed().as_secs_f32(), world.version()?);
    if is_faults {
        let is_right = faults::run(&mut world, is_wanted)?;
        if !is_right {
            world.explain();
        }
        return Ok(is_right);
    }
    let ends = run(&mut world, is_wanted);
    if ends.iter().any(|end| end.again.is_some()) {
        world.explain();
    }
    // Last, where it is still seen when the log was cut.
    for End { name, first, again } in &ends {
        match again {
            None => println!("UNSTEADY: failed once and passed again: {name}: {first:#}"),
            Some(again) => println!("FAILED twice: {name}: {first:#}; {again:#}"),
        }
    }
    Ok(ends.iter().all(|end| end.again.is_none()))
}

/// A step that failed.
struct End {
    name: &'static str,
    first: anyhow::Error,
    /// Why it failed the second time, too.
    again: Option<anyhow::Error>,
}

/// Runs the steps, and returns those that failed. A step that failed is tried once more: on a busy
/// machine a process may be slow for a moment.
fn run(world: &mut World, is_wanted: impl Fn(&str) -> bool) -> Vec<End> {
    let mut ends = Vec::new();
    for (name, step) in STEPS.iter().filter(|(name, _)| is_wanted(name)) {
        if let Err(first) = run_step(world, name, *step) {
            let again = run_step(world, name, *step).err();
            ends.push(End { name, first, again });
        }
    }
    ends
}

fn run_step(world: &mut World, name: &str, step: fn(&mut World) -> Result<()>) -> Result<()> {
    let began = Instant::now();
    let ended = step(world);
    let took = began.elapsed().as_secs_f32();
    match &ended {
        Ok(()) => println!("ok      {name:<45} {took:5.1} s"),
        Err(error) => println!("FAILED  {name:<45} {took:5.1} s\n        {error:#}"),
    }
    ended
}
