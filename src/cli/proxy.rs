//! `weir proxy`: privileges, log, runtime, then the proxy itself.

use std::os::fd::OwnedFd;

use anyhow::Context;
use tokio::sync::watch;

use super::Failure;
use super::agent::log;
use crate::datapath::FlowsMap;
use crate::model::l7::Lookup;
use crate::netlink::{keep_transparent_sockets_only, raise_descriptor_limit};
use crate::proxy::{ProxyArgs, ProxyConfig};
use crate::signals::stop_at_signal;

/// Runs until the agent or a signal ends it.
pub fn run(args: ProxyArgs) -> Result<(), Failure> {
    let config = ProxyConfig::try_from(args).map_err(anyhow::Error::from)?;
    log(config.args.log.log_format);
    raise_descriptor_limit().context("raising the limit of descriptors")?;
    keep_transparent_sockets_only().context("giving up privileges")?;
    // The runtime's threads have what this one has left.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads())
        .max_blocking_threads(2)
        .thread_name("weir-proxy")
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let (stop, _) = watch::channel(false);
        tokio::spawn(stop_at_signal(stop.clone(), "connections may go on for a while"));
        crate::proxy::run(config, Box::new(open_lookup), stop).await
    });
    runtime.shutdown_background();
    Ok(outcome?)
}

/// The map that says who judges a flow.
fn open_lookup(map: OwnedFd) -> anyhow::Result<Box<dyn Lookup>> {
    Ok(Box::new(FlowsMap::new(map)?))
}
