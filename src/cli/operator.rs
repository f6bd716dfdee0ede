//! `weir operator`: log, runtime, then the operator itself.

use super::Failure;
use super::agent::{WORKERS, log};
use crate::config::check_variables;
use crate::operator::{OperatorArgs, OperatorConfig};

/// Runs until the process is asked to stop.
pub fn run(args: OperatorArgs) -> Result<(), Failure> {
    let names = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    check_variables(names).map_err(anyhow::Error::from)?;
    let config = OperatorConfig::try_from(args).map_err(anyhow::Error::from)?;
    log(config.args.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("weir-operator")
        .enable_all()
        .build()?;
    Ok(runtime.block_on(crate::operator::run(config))?)
}
