//! `weir relay`: log, runtime, then the relay itself.

use super::agent::{WORKERS, log};
use super::{Failure, settings};
use crate::relay::{RelayArgs, RelayConfig};

/// Runs until the process is asked to stop.
pub fn run(args: RelayArgs) -> Result<(), Failure> {
    settings::check_environment().map_err(anyhow::Error::from)?;
    let config = RelayConfig::try_from(args).map_err(anyhow::Error::from)?;
    log(config.args.log.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("weir-relay")
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(crate::relay::run(config));
    runtime.shutdown_background();
    Ok(outcome?)
}
