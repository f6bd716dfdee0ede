//! Loads the real object into the kernel: pins, restarts, attachment, and the
//! writers against real maps. Each test has a network and mount namespace and a
//! BPF file system of its own, which end with its thread.

mod attach;
mod events;
mod restart;
mod upgrade;
mod writers;

use std::path::Path;

use anyhow::Result;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use weir::datapath::{AttachMode, Datapath, MapSizes, Options, Settings};

use crate::require::require_lab;

/// Runs a test in namespaces of its own, with a directory for pins that does not exist yet.
fn isolated(test: impl FnOnce(&Path) -> Result<()> + Send) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("weir-datapath-").tempdir()?;
    std::thread::scope(|scope| {
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        let thread = std::thread::Builder::new().name(name).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            test(&directory.path().join("bpf/weir/v1"))
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn options(pins: &Path) -> Options {
    Options {
        pins: pins.to_owned(),
        cgroup_root: None,
        attach: AttachMode::Auto,
        map_sizes: small_maps(),
        settings: Settings::default(),
    }
}

/// Preallocated maps of production size cost tens of megabytes each.
fn small_maps() -> MapSizes {
    MapSizes::default().with("connections", 4096).with("nat", 4096)
}

/// Loads the datapath over private maps.
fn private(sizes: MapSizes) -> Result<Datapath> {
    Datapath::open_private(&Settings::default(), &sizes)
}

/// Id of a pinned link, and of the program that it runs.
fn link_ids(pins: &Path, name: &str) -> Result<(u32, u32)> {
    let info = libbpf_rs::Link::open(pins.join("links").join(name))?.info()?;
    Ok((info.id, info.prog_id))
}

#[test]
fn every_program_is_verified_within_the_limit() -> Result<()> {
    require_lab!();
    // A tunnel adds code, and so does everything else that is on by default.
    let settings = Settings { tunnel_ifindex: Some(1), ..Settings::default() };
    let rows = weir::datapath::verify(&settings)?;
    for row in &rows {
        assert!((1..200_000).contains(&row.verified_instructions), "{row:?}");
        assert!((1..100_000).contains(&row.loaded_instructions), "{row:?}");
        assert!((32..=weir::datapath::STACK_LIMIT_BYTES).contains(&row.stack_bytes), "{row:?}");
        assert!(row.stack_chain.starts_with(&format!("{} ", row.program)), "{row:?}");
    }
    let from_pod = rows.iter().find(|row| row.program == "from_pod").map(|row| row.stack_chain.as_str());
    assert!(from_pod.is_some_and(|chain| chain.matches(" > ").count() > 1), "{from_pod:?} calls functions");
    let names: Vec<_> = rows.iter().map(|row| row.program.as_str()).collect();
    for name in
        ["from_pod", "to_pod", "from_network", "to_network", "from_overlay", "connect4", "collect_nat"]
    {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    Ok(())
}
