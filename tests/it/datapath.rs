//! Loads the real object into the kernel: pins, restarts, attachment, and the
//! writers against real maps. Each test has a network and mount namespace and a
//! BPF file system of its own, which end with its thread.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use weir::datapath::abi::{self, Plain};
use weir::datapath::{AttachMode, Bytes, Datapath, MapError, MapSizes, Options, Settings, types};
use weir::model::*;

use crate::require::require_lab;

/// Runs a test in namespaces of its own, with a directory for pins that does not exist yet.
fn isolated(test: impl FnOnce(&Path) -> Result<()> + Send) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("weir-datapath-").tempdir()?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            test(&directory.path().join("bpf/weir/v1"))
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn options(pins: &Path) -> Options {
    Options {
        pins: pins.to_owned(),
        cgroup_root: None,
        attach: AttachMode::Auto,
        map_sizes: MapSizes::default().with("connections", 4096).with("nat", 4096),
        settings: Settings::default(),
    }
}

/// Id of a pinned link and of the program that it runs.
fn link_ids(pins: &Path, name: &str) -> Result<(u32, u32)> {
    let info = libbpf_rs::Link::open(pins.join("links").join(name))?.info()?;
    Ok((info.id, info.prog_id))
}

#[test]
fn links_and_rows_survive_a_restart() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let address: BTreeMap<IpAddr, AddressEntry> = [(
            "10.0.0.1".parse()?,
            AddressEntry { identity: IdentityId(300), node: None, endpoint: None, kind: AddressKind::Pod },
        )]
        .into();
        let first = Datapath::load(&options(pins))?;
        first.attach_pod(EndpointId(1), 1)?;
        first.writers()?.addresses.write(&address, &BTreeMap::new())?;
        let before = (link_ids(pins, "1-from_pod")?, link_ids(pins, "1-to_pod")?);
        drop(first);
        assert_eq!((link_ids(pins, "1-from_pod")?, link_ids(pins, "1-to_pod")?), before);

        let second = Datapath::load(&options(pins))?;
        second.attach_pod(EndpointId(1), 1)?;
        let after = (link_ids(pins, "1-from_pod")?, link_ids(pins, "1-to_pod")?);
        assert_eq!((after.0.0, after.1.0), (before.0.0, before.1.0), "the links are the same");
        assert_ne!((after.0.1, after.1.1), (before.0.1, before.1.1), "they run the new programs");
        let rows = weir::datapath::dump(pins, "addresses")?;
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0]["address"], "10.0.0.1");
        second.detach_pod(EndpointId(1), 1)?;
        assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 0);
        Ok(())
    })
}

#[test]
fn a_second_agent_is_refused() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let _first = Datapath::load(&options(pins))?;
        let error = Datapath::load(&options(pins)).err().context("a second agent on the same pins")?;
        assert!(error.to_string().starts_with("another agent is running on the pins in "), "{error:#}");
        Ok(())
    })
}
