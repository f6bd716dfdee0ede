//! An agent whose maps have another layout than those of the agent before it.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Object};
use serde_json::json;
use weir::datapath::abi::{Endpoint, Nat, NatKey, NodeState, Plain, Service, ServiceKey};
use weir::datapath::{AttachedDevices, Datapath, addr_of, dump, mount_bpffs};

use super::{isolated, options};
use crate::packets::world::load_test_program;
use crate::require::require_lab;

/// Loads the maps of previous.bpf.c, and pins them below `pins`.
fn load_previous(pins: &Path) -> Result<Object> {
    mount_bpffs(pins.ancestors().nth(2).context("the BPF file system")?)?;
    let maps = pins.join("maps");
    std::fs::create_dir_all(&maps)?;
    let directory = tempfile::tempdir()?;
    let object = directory.path().join("previous.bpf.o");
    let mut object = load_test_program("tests/it/datapath/previous.bpf.c", &object, &[])?;
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        map.pin(maps.join(name))?;
    }
    Ok(object)
}

fn put(object: &Object, map: &str, key: &[u8], value: &[u8]) -> Result<()> {
    let map = object.maps().find(|found| found.name() == map).context("no such map")?;
    Ok(map.update(key, value, MapFlags::ANY)?)
}

/// A row of `nat` as the other version has it: from a pod's port 40000 to port 443.
fn masquerade(object: &Object, local_port: u16, node_port: u16) -> Result<()> {
    let [local, remote, node] = ["10.0.0.9", "203.0.113.7", "192.0.2.1"]
        .map(|address| addr_of(address.parse().expect("an address")).as_bytes().to_vec());
    let mut key = vec![2, 6];
    key.extend(443_u16.to_be_bytes());
    key.extend(local_port.to_be_bytes());
    key.extend([9, 9]);
    key.extend([remote, local].concat());
    let mut value = node_port.to_be_bytes().to_vec();
    value.extend([9; 6]);
    value.extend(node);
    put(object, "nat", &key, &value)
}

/// What `nat` has for this port of the pod.
fn masqueraded(datapath: &Datapath, local_port: u16) -> Result<Option<u16>> {
    let key = NatKey {
        local: addr_of("10.0.0.9".parse()?),
        remote: addr_of("203.0.113.7".parse()?),
        local_port: local_port.to_be(),
        remote_port: 443_u16.to_be(),
        protocol: 6,
        direction: 2,
        ..NatKey::default()
    };
    let row = datapath.typed::<NatKey, Nat>("nat")?.get(&key)?;
    Ok(row.map(|row| u16::from_be(row.port)))
}

fn fill(object: &Object) -> Result<()> {
    let mut endpoint = addr_of("fd00::9".parse()?).as_bytes().to_vec();
    endpoint.extend(addr_of("10.0.0.9".parse()?).as_bytes());
    [300_u32, 12, 0x8000_0005, 7, 1].iter().for_each(|number| endpoint.extend(number.to_ne_bytes()));
    endpoint.extend([2, 0, 0, 0, 0, 9, 88, 88]);
    put(object, "endpoints", &9_u32.to_ne_bytes(), &endpoint)?;
    put(object, "node_state", &0_u32.to_ne_bytes(), &[1_u32.to_ne_bytes(), 4711_u32.to_ne_bytes()].concat())?;
    let mut frontend = addr_of("10.96.0.20".parse()?).as_bytes().to_vec();
    frontend.extend([0, 80, 6, 0]);
    put(object, "services", &frontend, &[1_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat())?;
    masquerade(object, 40000, 20000)
}

fn check(datapath: &Datapath) -> Result<()> {
    let endpoint = datapath.typed::<u32, Endpoint>("endpoints")?.get(&9)?.context("the endpoint")?;
    let expected = Endpoint {
        epoch: 7,
        policy: 0x8000_0005,
        ipv4: addr_of("10.0.0.9".parse()?),
        ipv6: addr_of("fd00::9".parse()?),
        ifindex: 12,
        identity: 300,
        mac: [2, 0, 0, 0, 0, 9],
        flags: 1,
    };
    assert_eq!(endpoint.as_bytes(), expected.as_bytes());
    let state = datapath.typed::<u32, NodeState>("node_state")?.get(&0)?.context("the node's state")?;
    assert_eq!((state.address_epoch, state.flags), (4711, 1));
    assert_eq!(masqueraded(datapath, 40000)?, Some(20000));
    assert!(datapath.typed::<ServiceKey, Service>("services")?.rows()?.is_empty(), "its rows lack fields");
    Ok(())
}

#[test]
fn rows_of_another_layout_are_carried_over_by_the_names_of_their_fields() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let old = pins.with_file_name("v0");
        let previous = load_previous(&old)?;
        fill(&previous)?;
        let datapath = Datapath::load(&options(pins))?;
        assert!(datapath.is_succeeding());
        check(&datapath)?;
        // Every flow gets a new verdict, after the tables are written.
        let mut writers = datapath.writers()?;
        let epoch = || -> Result<_> { Ok(dump(pins, "node_state")?[0]["address_epoch"].clone()) };
        assert_eq!(epoch()?, json!(4711));
        writers.addresses.write(&Default::default(), &Default::default())?;
        assert_eq!(epoch()?, json!(4712));
        // What the old programs write until they are replaced.
        masquerade(&previous, 40001, 20001)?;
        assert_eq!(masqueraded(&datapath, 40001)?, None);
        datapath.succeed(&AttachedDevices::default(), || masquerade(&previous, 40002, 20002))?;
        assert_eq!(masqueraded(&datapath, 40001)?, Some(20001));
        assert_eq!(masqueraded(&datapath, 40002)?, Some(20002), "written while the programs were replaced");
        datapath.end_succession()?;
        assert!(!old.exists());
        Ok(())
    })
}

#[test]
fn a_map_of_the_same_layout_is_shared_with_the_other_version() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let _previous = load_previous(&pins.with_file_name("v0"))?;
        let id = |pins: &Path| -> Result<u32> {
            Ok(MapHandle::from_pinned_path(pins.join("maps/metrics"))?.info()?.info.id)
        };
        drop(Datapath::load(&options(pins))?);
        assert_eq!(id(pins)?, id(&pins.with_file_name("v0"))?);
        Ok(())
    })
}

#[test]
fn work_that_was_left_half_done_is_done_by_the_next_process() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let previous = load_previous(&pins.with_file_name("v0"))?;
        fill(&previous)?;
        // It ends before it has replaced anything.
        drop(Datapath::load(&options(pins))?);
        masquerade(&previous, 40001, 20001)?;
        let datapath = Datapath::load(&options(pins))?;
        check(&datapath)?;
        datapath.succeed(&AttachedDevices::default(), || Ok(()))?;
        assert_eq!(masqueraded(&datapath, 40001)?, Some(20001));
        Ok(())
    })
}

#[test]
fn a_layout_that_changed_within_a_version_is_carried_over_likewise() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        fill(&load_previous(pins)?)?;
        let datapath = Datapath::load(&options(pins))?;
        assert!(datapath.is_succeeding());
        check(&datapath)?;
        drop(datapath);
        assert!(!Datapath::load(&options(pins))?.is_succeeding());
        Ok(())
    })
}
