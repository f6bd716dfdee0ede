//! What a restarted agent finds, and what it changes.

use std::collections::BTreeMap;
use std::env;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle, MapType};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use serde_json::json;
use weir::datapath::{Datapath, MapSizes, Options, Settings, dump};
use weir::model::{AddressEntry, AddressKind, EndpointId, IdentityId};
use weir::tables::Snapshot;

use super::{isolated, link_ids, options, small_maps};
use crate::require::{require_lab, require_tcx};

const PINS_OF_CHILD: &str = "WEIR_TEST_DATAPATH_PINS";

fn one_address() -> Result<Snapshot<IpAddr, AddressEntry>> {
    let entry =
        AddressEntry { identity: IdentityId(300), node: None, endpoint: None, kind: AddressKind::Pod };
    Ok(Snapshot::unit("10.0.0.1".parse()?, entry))
}

/// The ids of both links of the loopback device, as (link, program).
fn pod_links(pins: &Path) -> Result<[(u32, u32); 2]> {
    Ok([link_ids(pins, "1-from_pod")?, link_ids(pins, "1-to_pod")?])
}

/// As when the pod has been there for a while.
fn attach_and_settle(datapath: &Datapath) -> Result<()> {
    datapath.attach_pod(EndpointId(1), 1)?;
    datapath.settle_a_pod(Duration::ZERO);
    datapath.verify_pod(1)
}

#[test]
fn links_and_rows_survive_a_restart() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let first = Datapath::load(&options(pins))?;
        require_tcx!(first);
        attach_and_settle(&first)?;
        first.writers()?.addresses.write(&one_address()?, &BTreeMap::new())?;
        let before = pod_links(pins)?;
        drop(first);
        assert_eq!(pod_links(pins)?, before, "the programs run on without their agent");
        restart_and_check(pins, before)
    })
}

#[test]
fn links_and_rows_survive_a_kill() -> Result<()> {
    require_lab!();
    // In another mount namespace the path may be another.
    let program = env::current_exe()?;
    isolated(|pins| {
        require_tcx!(Datapath::open_private(&Settings::default(), &small_maps())?);
        let mut child = Command::new(&program)
            .args(["--ignored", "--exact", "--nocapture", "datapath::restart::as_a_child_to_be_killed"])
            .env(PINS_OF_CHILD, pins)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().context("the child's output")?);
        let is_ready = output.lines().map_while(Result::ok).any(|line| line.contains("loaded and attached"));
        child.kill()?;
        child.wait()?;
        assert!(is_ready, "the child did not get ready");
        restart_and_check(pins, pod_links(pins)?)
    })
}

/// Loads over what another process left; the links must be the same and run new programs.
fn restart_and_check(pins: &Path, before: [(u32, u32); 2]) -> Result<()> {
    let datapath = Datapath::load(&options(pins))?;
    datapath.attach_pod(EndpointId(1), 1)?;
    let after = pod_links(pins)?;
    assert_eq!(after.map(|(link, _)| link), before.map(|(link, _)| link), "the links are the same");
    for ((_, old), (_, new)) in before.into_iter().zip(after) {
        assert_ne!(old, new, "the link runs the new program");
    }
    let row = json!({ "address": "10.0.0.1", "identity": 300, "node": null, "endpoint": 0, "flags": ["pod", "local"] });
    assert_eq!(dump(pins, "addresses")?, [row]);
    datapath.detach_pod(EndpointId(1), 1)?;
    assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 0);
    Ok(())
}

/// Not a test: `links_and_rows_survive_a_kill` runs it as a process of its own.
#[test]
#[ignore = "started by links_and_rows_survive_a_kill"]
fn as_a_child_to_be_killed() -> Result<()> {
    let Some(pins) = env::var_os(PINS_OF_CHILD).map(PathBuf::from) else { return Ok(()) };
    let datapath = Datapath::load(&options(&pins))?;
    attach_and_settle(&datapath)?;
    datapath.writers()?.addresses.write(&one_address()?, &BTreeMap::new())?;
    println!("loaded and attached");
    std::thread::sleep(std::time::Duration::from_secs(60));
    Ok(())
}

#[test]
fn the_bpf_file_system_is_mounted_where_it_is_missing() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        drop(Datapath::load(&options(pins))?);
        assert_eq!(statfs(pins)?.filesystem_type(), BPF_FS_MAGIC);
        for directory in [pins, &pins.join("maps"), &pins.join("links")] {
            assert_eq!(directory.metadata()?.permissions().mode() & 0o777, 0o700, "{}", directory.display());
        }
        let names: Vec<_> = std::fs::read_dir(pins.join("maps"))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<_, _>>()?;
        assert!(
            names.iter().all(|name| !name.to_string_lossy().contains("rodata") && name != "scratch"),
            "{names:?}"
        );
        Ok(())
    })
}

#[test]
fn another_abi_version_takes_over_the_links() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let old = pins.with_file_name("v0");
        let datapath = Datapath::load(&options(&old))?;
        require_tcx!(datapath);
        attach_and_settle(&datapath)?;
        datapath.attach_network(1)?;
        let before = pod_links(&old)?;
        drop(datapath);
        let datapath = Datapath::load(&options(pins))?;
        datapath.attach_pod(EndpointId(1), 1)?;
        let after = pod_links(pins)?;
        assert_eq!(after.map(|(link, _)| link), before.map(|(link, _)| link), "the links are the same");
        assert_ne!(after.map(|(_, program)| program), before.map(|(_, program)| program));
        assert_eq!(std::fs::read_dir(old.join("links"))?.count(), 2, "not attached by the new version yet");
        datapath.end_succession()?;
        assert!(!old.exists());
        assert_eq!(pod_links(pins)?, after);
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

#[test]
fn a_pinned_map_of_another_shape_is_replaced() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        drop(Datapath::load(&options(pins))?);
        let path = pins.join("maps/nat");
        std::fs::remove_file(&path)?;
        let create = libbpf_rs::libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
            ..Default::default()
        };
        MapHandle::create(MapType::Hash, Some("nat"), 8, 8, 16, &create)?.pin(&path)?;
        drop(Datapath::load(&options(pins))?);
        assert_eq!(MapHandle::from_pinned_path(&path)?.map_type(), MapType::LruHash);
        Ok(())
    })
}

#[test]
fn writers_maps_grow_with_their_rows_and_the_kernels_keep_their_size() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let sized = |size: u32| {
            let map_sizes = MapSizes::default()
                .with("addresses", size)
                .with("prefixes", size)
                .with("connections", size)
                .with("nat", 4096);
            Options { map_sizes, ..options(pins) }
        };
        let prefixes: BTreeMap<ipnet::IpNet, _> = [(
            "192.0.2.0/24".parse()?,
            weir::model::PrefixEntry {
                identity: IdentityId::FIRST_LOCAL,
                ..weir::model::PrefixEntry::default()
            },
        )]
        .into();
        let first = Datapath::load(&sized(1024))?;
        first.writers()?.addresses.write(&one_address()?, &prefixes)?;
        drop(first);
        let before = (dump(pins, "addresses")?, dump(pins, "prefixes")?);
        drop(Datapath::load(&sized(2048))?);
        assert_eq!((dump(pins, "addresses")?, dump(pins, "prefixes")?), before);
        let size = |name: &str| -> Result<u32> {
            Ok(MapHandle::from_pinned_path(pins.join("maps").join(name))?.max_entries())
        };
        assert_eq!([size("addresses")?, size("prefixes")?, size("connections")?], [2048, 2048, 1024]);
        Ok(())
    })
}
