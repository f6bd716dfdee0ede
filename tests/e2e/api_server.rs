//! The integration tests that want an API server of their own: one without controllers.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::kubernetes::{Cluster, Platform, Setup};
use crate::lab::output_of;
use crate::world::World;

/// `cargo test --test it api_server` against it.
pub fn sources_against_a_bare_api_server(_world: &mut World) -> Result<()> {
    let name = format!("weirlab-{}-2", std::process::id());
    let setup = Setup { nodes: 0, platform: Platform::Kubeadm, has_controllers: false };
    let bare = Cluster::start(&name, &setup)?;
    let mut tests = Command::new("cargo");
    tests.args(["test", "--quiet", "--test", "it", "--", "api_server::", "--test-threads=1"]);
    tests.current_dir(env!("CARGO_MANIFEST_DIR")).env("WEIR_TEST_KUBECONFIG", bare.kubeconfig());
    let written = output_of(&mut tests, "")?;
    ensure!(written.contains("test result: ok") && !written.contains(" 0 passed"), "{written}");
    Ok(())
}
