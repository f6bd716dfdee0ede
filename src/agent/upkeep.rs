//! Work in the background that no table asks for: expired connections, sockets
//! of backends that are gone.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use super::removed::Removed;
use crate::datapath::{self, Datapath, abi};
use crate::model::{Endpoint, EndpointId};
use crate::netlink;
use crate::tables::Table;

/// Between two attempts to delete expired connections when one failed.
const GARBAGE_RETRY: Duration = Duration::from_secs(15);

/// How often it is asked whether the programs of new pods can move to links.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);
/// Pods often come several at a time: this long after the last one, all of them are there.
const QUIET: Duration = Duration::from_secs(2);

/// The first time what starting took is given back, then what was more than usual.
const MEMORY_INTERVALS: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(300)];

/// Gives memory that is free back to the kernel, for ever.
pub async fn give_memory_back() {
    let [first, then] = MEMORY_INTERVALS;
    let mut pause = first;
    loop {
        tokio::time::sleep(std::mem::replace(&mut pause, then)).await;
        if let Err(error) = tokio::task::spawn_blocking(datapath::give_back_memory).await {
            tracing::error!(%error, "giving memory back");
        }
    }
}

/// Gives links to pods that came with filters, for ever; one after the other, so that an ADD can come between.
pub async fn settle_pods(datapath: Arc<Datapath>) {
    loop {
        let datapath = datapath.clone();
        match tokio::task::spawn_blocking(move || datapath.settle_a_pod(QUIET)).await {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "giving links to a pod"),
        }
        tokio::time::sleep(SETTLE_INTERVAL).await;
    }
}

/// Deletes expired connections for ever.
pub async fn collect_garbage(datapath: Arc<Datapath>) {
    loop {
        let mut rest = GARBAGE_RETRY;
        let datapath = datapath.clone();
        match tokio::task::spawn_blocking(move || datapath.collect_garbage()).await {
            Ok(Ok(report)) => {
                tracing::debug!(?report, "collected expired connections");
                rest = report.rest();
            }
            Ok(Err(error)) => {
                tracing::warn!(error = crate::error::chain(&error), "collecting expired connections")
            }
            Err(error) => tracing::error!(%error, "collecting expired connections"),
        }
        tokio::time::sleep(rest).await;
    }
}

/// Ends a socket of the calling thread's namespace; one that has ended is no error.
fn end_socket(socket: &abi::StaleSocket) -> Result<()> {
    let end = |addr, port| SocketAddr::new(abi::ip_of(addr), u16::from_be(port));
    let local = end(socket.local, socket.local_port);
    let remote = end(socket.remote, socket.remote_port);
    netlink::destroy_socket(socket.protocol, local, remote, socket.ifindex, socket.cookie)?;
    Ok(())
}

/// Ends sockets of pods and of the node: by UDP when the backend was taken out of its service, by TCP when the
/// backend exists no more.
pub async fn end_stale_sockets(
    datapath: Arc<Datapath>,
    endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    mut removed: mpsc::UnboundedReceiver<Removed>,
) {
    while let Some(mut backends) = removed.recv().await {
        while let Ok(more) = removed.try_recv() {
            backends.extend(more);
        }
        let gone = backends.gone.clone();
        let (datapath, endpoints) = (datapath.clone(), endpoints.snapshot());
        let ended = tokio::task::spawn_blocking(move || {
            let mut namespaces =
                vec![File::open("/proc/self/ns/net").context("opening the node's own namespace")?];
            // A namespace that is gone has no sockets either.
            namespaces.extend(endpoints.values().filter_map(|endpoint| File::open(&endpoint.netns).ok()));
            let descriptors: Vec<_> = namespaces.iter().map(AsFd::as_fd).collect();
            datapath.destroy_stale_sockets(&descriptors, &gone, end_socket)
        });
        match ended.await {
            Ok(Ok(sockets)) => tracing::debug!(sockets, ?backends, "ended sockets of removed backends"),
            Ok(Err(error)) => {
                tracing::warn!(error = crate::error::chain(&error), "ending sockets of removed backends")
            }
            Err(error) => tracing::error!(%error, "ending sockets of removed backends"),
        }
    }
}
