//! A directory of manifests as a cluster that nobody runs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::cli::Failure;
use crate::kube::{self, Health, Source, Tables};
use crate::model::{Policy, PolicyRef};
use crate::policy::Resolver;
use crate::tables::Snapshot;

/// A directory is read within this time, or never.
const READ_WITHIN: Duration = Duration::from_secs(60);

/// What a directory holds.
pub fn tables(directory: &Path) -> Result<Arc<Tables>, Failure> {
    if !directory.is_dir() {
        return Err(Failure::Other(anyhow::anyhow!("{} is no directory", directory.display())));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting")?;
    let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
    let source = Source::Manifests(directory.to_owned());
    let reading = {
        let (tables, health) = (tables.clone(), health.clone());
        async move {
            tokio::select! {
                () = kube::run(source, tables.clone(), health) => bail!("the directory was not read"),
                () = tables.wait_synced() => Ok(()),
                () = tokio::time::sleep(READ_WITHIN) => bail!("the directory was not read within {READ_WITHIN:?}"),
            }
        }
    };
    runtime.block_on(reading).with_context(|| format!("reading {}", directory.display()))?;
    for report in health.reports() {
        eprintln!("{}: {}: {}", report.source, report.object.unwrap_or_default(), report.reason);
    }
    Ok(tables)
}

/// Its policies, with what their names stand for.
pub fn policies(tables: &Tables) -> Snapshot<PolicyRef, Arc<Policy>> {
    Resolver::default().update(tables.policy_sources(), tables.policy_references())
}
