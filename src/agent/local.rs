//! The addresses of this node's devices, which come and go: a virtual IP moves here, DHCP gives another.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::model::Node;
use crate::netlink;
use crate::tables::Table;

/// Without news the addresses are listed all the same: level, not edge.
const LIST_EVERY: Duration = Duration::from_secs(60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// Where pods' host ports are.
pub type LocalAddresses = Table<IpAddr, ()>;

/// The node's addresses as the API has them and as its devices have them, and for its own sockets the
/// loopback ones; not those of the pod network.
fn addresses(node: &Node, internal: &[IpAddr]) -> netlink::Result<BTreeSet<IpAddr>> {
    let mut addresses = netlink::local_addresses()?;
    addresses.retain(|address| !internal.contains(address));
    addresses.extend(node.addresses.iter().chain(&LOOPBACK));
    Ok(addresses)
}

fn list(table: &LocalAddresses, node: &Node, internal: &[IpAddr]) -> netlink::Result<()> {
    let addresses = addresses(node, internal)?;
    if table.reset(addresses.iter().map(|address| (*address, ()))) {
        tracing::debug!(?addresses, "host ports are at these addresses");
    }
    Ok(())
}

/// The table of these addresses, filled, and kept as they are from now on.
pub fn follow(node: Arc<Node>, internal: Vec<IpAddr>) -> netlink::Result<Arc<LocalAddresses>> {
    let table = Arc::new(Table::new());
    // Before the list, or what changes in between would be missed.
    let mut news = netlink::address_news()?;
    list(&table, &node, &internal)?;
    let kept = table.clone();
    tokio::spawn(async move {
        loop {
            if let Ok(Err(_closed)) = timeout(LIST_EVERY, news.changed()).await {
                tokio::time::sleep(RETRY).await;
                match netlink::address_news() {
                    Ok(again) => news = again,
                    Err(error) => tracing::warn!(%error, retry = ?RETRY, "following the node's addresses"),
                }
            }
            if let Err(error) = list(&kept, &node, &internal) {
                tracing::warn!(%error, "listing the node's addresses");
            }
        }
    });
    Ok(table)
}
