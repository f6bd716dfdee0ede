//! Programs on devices and cgroups: never two on a hook, whatever ran before.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weir::datapath::{AttachMode, Datapath, Options, detach_all, find_cgroup_root};
use weir::model::EndpointId;
use weir::netlink;

use super::{isolated, link_ids, options};
use crate::require::{require_lab, require_tcx};

fn attached_by(attach: AttachMode, pins: &Path) -> Result<Datapath> {
    let datapath = Datapath::load(&Options { attach, ..options(pins) })?;
    datapath.attach_network(1)?;
    Ok(datapath)
}

/// The clsact filters of the loopback device in both directions, one text each.
fn filters() -> Result<[Vec<String>; 2]> {
    let list = |direction: &str| -> Result<Vec<String>> {
        let output = Command::new("tc").args(["filter", "show", "dev", "lo", direction]).output()?;
        ensure!(output.status.success(), "tc filter show failed");
        let text = String::from_utf8(output.stdout)?;
        Ok(text.lines().filter(|line| line.contains(" handle ")).map(str::to_owned).collect())
    };
    Ok([list("ingress")?, list("egress")?])
}

#[test]
fn a_link_whose_device_is_gone_is_collected_and_its_pin_used_again() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        require_tcx!(datapath);
        let device = netlink::ensure_vxlan("weirtest0", 8472, 1400, None)?;
        datapath.attach_overlay(device)?;
        assert_eq!(datapath.collect_zombie_links()?, 0);
        ensure!(netlink::delete_link("weirtest0")?, "the device was not there");

        // The number is given to another device: ip can choose it.
        let number = device.to_string();
        let added = Command::new("ip")
            .args(["link", "add", "weirtest1", "index", &number, "type", "veth"])
            .status()?;
        ensure!(added.success(), "adding a device of the same number");
        let before = link_ids(pins, &format!("{device}-from_overlay"))?;
        datapath.attach_overlay(device)?;
        assert_ne!(
            link_ids(pins, &format!("{device}-from_overlay"))?.0,
            before.0,
            "a new link on the new device"
        );

        ensure!(netlink::delete_link("weirtest1")?, "the device was not there");
        assert_eq!(datapath.collect_zombie_links()?, 2);
        assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 0);
        Ok(())
    })
}

#[test]
fn clsact_filters_are_replaced_in_place() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let first = attached_by(AttachMode::Clsact, pins)?;
        assert_eq!(first.features().attach, AttachMode::Clsact);
        let before = filters()?;
        drop(first);
        assert_eq!(filters()?, before, "the filters stay without their agent");
        let second = attached_by(AttachMode::Clsact, pins)?;
        let after = filters()?;
        for (before, after) in before.iter().zip(&after) {
            assert_eq!((before.len(), after.len()), (1, 1), "{before:?} {after:?}");
            assert_ne!(before, after, "another program");
        }
        assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 0);
        drop(second);
        detach_all(pins)?;
        assert_eq!(filters()?, [Vec::<String>::new(), Vec::new()]);
        assert!(!pins.exists());
        Ok(())
    })
}

#[test]
fn a_change_of_the_attach_mode_leaves_one_program_on_a_hook() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let clsact = attached_by(AttachMode::Clsact, pins)?;
        require_tcx!(clsact);
        drop(clsact);
        drop(attached_by(AttachMode::Tcx, pins)?);
        assert_eq!(filters()?, [Vec::<String>::new(), Vec::new()]);
        let link = link_ids(pins, "1-from_network")?;
        drop(attached_by(AttachMode::Auto, pins)?);
        assert_eq!(link_ids(pins, "1-from_network")?.0, link.0);
        drop(attached_by(AttachMode::Clsact, pins)?);
        assert_eq!(filters()?.map(|filters| filters.len()), [1, 1]);
        assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 0);
        Ok(())
    })
}

#[test]
fn a_new_pod_has_filters_at_once_and_links_when_it_is_quiet() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let first = Datapath::load(&options(pins))?;
        require_tcx!(first);
        let links = || std::fs::read_dir(pins.join("links")).map(Iterator::count);
        first.attach_pod(EndpointId(1), 1)?;
        assert_eq!((filters()?.map(|filters| filters.len()), links()?), ([1, 1], 0));
        first.verify_pod(1)?;
        assert!(!first.settle_a_pod(Duration::from_secs(3600)), "pods may still be coming");
        assert_eq!(links()?, 0);
        drop(first);

        // An agent that ends in between leaves the filters; the next one takes them over.
        let second = Datapath::load(&options(pins))?;
        second.attach_pod(EndpointId(1), 1)?;
        second.verify_pod(1)?;
        assert_eq!((filters()?.map(|filters| filters.len()), links()?), ([1, 1], 0));
        assert!(second.settle_a_pod(Duration::ZERO));
        assert_eq!((filters()?.map(|filters| filters.len()), links()?), ([0, 0], 2));
        second.verify_pod(1)?;
        assert!(!second.settle_a_pod(Duration::ZERO), "nothing is left to do");
        second.detach_pod(EndpointId(1), 1)?;
        assert_eq!((filters()?.map(|filters| filters.len()), links()?), ([0, 0], 0));

        // Gone before it was quiet: nothing comes back.
        second.attach_pod(EndpointId(1), 1)?;
        second.detach_pod(EndpointId(1), 1)?;
        assert!(!second.settle_a_pod(Duration::ZERO));
        assert_eq!((filters()?.map(|filters| filters.len()), links()?), ([0, 0], 0));
        assert!(second.verify_pod(1).is_err());
        Ok(())
    })
}

#[test]
fn a_strangers_filter_is_not_replaced() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&Options { attach: AttachMode::Clsact, ..options(pins) })?;
        // Another program of ours in the wrong place stands for a stranger's.
        datapath.attach_network(1)?;
        let error = datapath.attach_pod(EndpointId(1), 1).err().context("a hook that is taken")?;
        assert_eq!(
            format!("{error:#}"),
            "attaching to the device of endpoint 1: another program (from_network) has handle 1 and priority 1 \
             of clsact on device 1"
        );
        Ok(())
    })
}

/// An empty cgroup, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn create(name: &str) -> Result<Self> {
        let root = find_cgroup_root()?.context("finding cgroup v2")?;
        let path = root.join(format!("weir-datapath-{}-{name}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn socket_programs_follow_the_cgroup_root() -> Result<()> {
    require_lab!();
    let first = Cgroup::create("1")?;
    let second = Cgroup::create("2")?;
    isolated(|pins| {
        let attach = |root: &Path| -> Result<(u32, u32)> {
            let datapath = Datapath::load(&Options { cgroup_root: Some(root.to_owned()), ..options(pins) })?;
            datapath.attach_sockets()?;
            link_ids(pins, "cgroup-connect4")
        };
        let before = attach(first.path())?;
        let restarted = attach(first.path())?;
        assert_eq!(restarted.0, before.0);
        assert_ne!(restarted.1, before.1);
        assert_ne!(attach(second.path())?.0, before.0, "another cgroup, another link");
        assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 10);
        let datapath = Datapath::load(&options(pins))?;
        datapath.detach_sockets()?;
        assert_eq!(std::fs::read_dir(pins.join("links"))?.count(), 0);
        Ok(())
    })
}

#[test]
fn what_is_missing_is_named() -> Result<()> {
    require_lab!();
    isolated(|pins| {
        let datapath = Datapath::load(&options(pins))?;
        let error = datapath.program("xdp_network").err().context("a program that does not exist")?;
        assert!(
            error.to_string().starts_with("the BPF object has no program xdp_network, only "),
            "{error:#}"
        );
        let error = datapath.attach_pod(EndpointId(1), 9999).err().context("a device that does not exist")?;
        let error = format!("{error:#}");
        let expected = match datapath.features().attach {
            AttachMode::Clsact => "adding clsact to device 9999",
            _ => "attaching from_pod to device 9999",
        };
        assert!(error.contains(expected), "{error}");
        Ok(())
    })
}
