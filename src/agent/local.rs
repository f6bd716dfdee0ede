//! The addresses of this node and the devices that lead out of it, which come and go: a virtual IP moves
//! here, DHCP gives another address, a card is added.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::devices;
use crate::kube::Tables;
use crate::model::{NetworkDevice, Node};
use crate::netlink;
use crate::tables::Table;

/// Without news everything is listed all the same: level, not edge.
const LIST_EVERY: Duration = Duration::from_secs(60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);
/// News come in bursts.
const BURST: Duration = Duration::from_millis(50);
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The addresses that are this node's.
pub type LocalAddresses = Table<IpAddr, ()>;
/// The devices that lead out, by index.
pub type LocalDevices = Table<u32, NetworkDevice>;

/// What is known of this node from its kernel.
#[derive(Default)]
pub struct Local {
    /// Its addresses as the API has them and as its devices have them, and the loopback ones; not those of
    /// the pod network. Host ports are at these.
    pub addresses: LocalAddresses,
    /// Its devices that lead out.
    pub devices: LocalDevices,
}

/// What decides about the tables.
pub struct Follow {
    /// Of the cluster; has the Node object.
    pub tables: Arc<Tables>,
    /// The Node object as it was at start.
    pub node: Arc<Node>,
    /// The node's own addresses in the pod network.
    pub internal: Vec<IpAddr>,
    /// `--device`.
    pub names: Vec<String>,
}

impl Follow {
    /// The tables, filled, and kept as the kernel has it from now on.
    pub fn start(self) -> netlink::Result<Arc<Local>> {
        let local = Arc::new(Local::default());
        // Before the list, or what changes in between would be missed.
        let news = netlink::address_news()?;
        self.list(&local)?;
        tokio::spawn(self.run(local.clone(), news));
        Ok(local)
    }

    async fn run(self, local: Arc<Local>, mut news: watch::Receiver<()>) {
        let mut nodes = self.tables.nodes.subscribe();
        loop {
            let changed = timeout(LIST_EVERY, async {
                tokio::select! {
                    changed = news.changed() => changed,
                    _ = nodes.changed() => Ok(()),
                }
            });
            if let Ok(Err(_closed)) = changed.await {
                sleep(RETRY).await;
                match netlink::address_news() {
                    Ok(again) => news = again,
                    Err(error) => tracing::warn!(%error, retry = ?RETRY, "following the node's addresses"),
                }
            }
            sleep(BURST).await;
            news.mark_unchanged();
            nodes.mark_unchanged();
            if let Err(error) = tokio::task::block_in_place(|| self.list(&local)) {
                tracing::warn!(%error, "listing the node's addresses and devices");
            }
        }
    }

    fn list(&self, local: &Local) -> netlink::Result<()> {
        let node =
            self.tables.nodes.get(&self.node.name.as_str().into()).unwrap_or_else(|| self.node.clone());
        let mut addresses: BTreeSet<IpAddr> = netlink::local_addresses()?;
        addresses.retain(|address| !self.internal.contains(address));
        addresses.extend(node.addresses.iter().chain(&LOOPBACK));
        if local.addresses.reset(addresses.iter().map(|address| (*address, ()))) {
            tracing::debug!(?addresses, "the addresses of this node");
        }
        let devices = devices::list(&self.names, &node.addresses)?;
        if local.devices.reset(devices.iter().map(|(ifindex, device)| (*ifindex, device.clone()))) {
            tracing::debug!(?devices, "the devices that lead out");
        }
        Ok(())
    }
}
