//! `weir operator`: log, runtime, then the operator itself.

use super::agent::{WORKERS, log};
use super::{Failure, settings};
use crate::operator::{OperatorArgs, OperatorConfig};

/// Runs until the process is asked to stop.
pub fn run(args: OperatorArgs) -> Result<(), Failure> {
    settings::check_environment().map_err(anyhow::Error::from)?;
    let config = OperatorConfig::try_from(args).map_err(anyhow::Error::from)?;
    log(config.args.log.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("weir-operator")
        .enable_all()
        .build()?;
    Ok(runtime.block_on(crate::operator::run(config))?)
}
