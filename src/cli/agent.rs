//! `weir agent`: log, runtime, then the agent itself.

use tracing_subscriber::EnvFilter;

use super::{Failure, settings};
use crate::agent::{AgentArgs, Config};
use crate::settings::LogFormat;

/// Threads of the runtime. The agent's work is one loop and some waiting.
pub(super) const WORKERS: usize = 2;

/// Runs until the process is asked to stop.
pub fn run(args: AgentArgs) -> Result<(), Failure> {
    settings::check_environment().map_err(anyhow::Error::from)?;
    let config = Config::try_from(args).map_err(anyhow::Error::from)?;
    log(config.args.log.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("weir")
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(crate::agent::run(config));
    // What still blocks (a walk of a map) must not hold up the end.
    runtime.shutdown_background();
    Ok(outcome?)
}

/// To stderr; `WEIR_LOG` takes directives as `weir=debug`.
pub(super) fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("WEIR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
}
