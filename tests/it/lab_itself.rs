//! The lab, without Weir: what the other tests take for granted.

use anyhow::Result;

use crate::lab::{Lab, OUTSIDE, Outcome, Setup, Via, probe, socket_address};
use crate::require::require_lab;

#[test]
fn nodes_reach_the_outside_host_and_one_another() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, starts_agents: false, ..Setup::default() })?;
    for target in OUTSIDE {
        for via in [Via::Tcp, Via::Udp, Via::Ping] {
            let target = socket_address(target, 80);
            let outcome = lab.node(1).space().run(move || probe(via, target));
            assert!(outcome.is_answered(), "{via:?} {target}: {outcome}");
        }
    }
    let closed = socket_address("10.200.0.2", 80);
    assert_eq!(lab.node(1).space().run(move || probe(Via::Tcp, closed)), Outcome::Refused);
    Ok(())
}

#[test]
fn a_dropped_lab_leaves_nothing() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 1, starts_agents: false, ..Setup::default() })?;
    let (name, directory, cgroup) =
        (lab.name().to_owned(), lab.directory().to_owned(), lab.node(1).cgroup().to_owned());
    drop(lab);
    assert!(!directory.exists());
    assert!(!cgroup.exists(), "{}", cgroup.display());
    for entry in std::fs::read_dir("/run/netns")?.flatten() {
        assert!(!entry.file_name().to_string_lossy().starts_with(&format!("{name}-")), "{:?}", entry.path());
    }
    Ok(())
}
