//! Where the proxy is: a network namespace, a device that leads there, sockets where flows arrive.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::datapath::{Datapath, Listener};
use crate::model::l7::Descriptor;
use crate::netlink::{self, ProxyLink};

/// The node's end of the pair.
const DEVICE: &str = "weir_proxy";

/// All that the agent keeps for the proxy.
pub struct Place {
    datapath: Arc<Datapath>,
    namespace: File,
    listeners: [Option<OwnedFd>; 4],
    link: ProxyLink,
    mtu: u32,
}

impl Place {
    /// Takes the namespace that a former agent has made, or makes one, and all that belongs to it.
    pub fn make(datapath: Arc<Datapath>, namespace: Option<File>, mtu: u32) -> Result<Self> {
        let namespace = match namespace {
            Some(namespace) => namespace,
            None => netlink::new_namespace()?,
        };
        let listeners = netlink::within(&namespace, netlink::proxy_listeners)?;
        let link = link_to(&namespace, mtu)?;
        let place = Self { datapath, namespace, listeners, link, mtu };
        place.tell_kernel()?;
        tracing::info!(device = DEVICE, "the proxy has a namespace");
        Ok(place)
    }

    /// Puts back what somebody has taken away.
    pub fn mend(&mut self) -> Result<()> {
        let link = link_to(&self.namespace, self.mtu)?;
        let is_attached = self.datapath.verify_proxy(link.host_ifindex).is_ok()
            && netlink::within(&self.namespace, || {
                Ok(self.datapath.verify_before_proxy(link.inside_ifindex).is_ok())
            })?;
        if link != self.link || !is_attached {
            tracing::warn!(device = DEVICE, "somebody changed the proxy's device: putting it back");
            self.link = link;
            self.tell_kernel()?;
        }
        Ok(())
    }

    /// The namespace once more.
    pub fn namespace(&self) -> Result<File> {
        self.namespace.try_clone().context("opening the proxy's namespace once more")
    }

    /// The namespace has IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.listeners[1].is_some()
    }

    /// What is handed over to a proxy.
    pub fn descriptors(&self) -> Result<Vec<(Descriptor, OwnedFd)>> {
        let kinds =
            [Descriptor::TcpListener, Descriptor::TcpListener, Descriptor::UdpSocket, Descriptor::UdpSocket];
        let mut all = vec![(Descriptor::FlowsMap, self.datapath.flows_map()?)];
        for (kind, listener) in kinds.into_iter().zip(&self.listeners) {
            if let Some(listener) = listener {
                let copy = listener.try_clone().context("opening a listener of the proxy once more")?;
                all.push((kind, copy));
            }
        }
        Ok(all)
    }

    /// Flows go to the proxy only when all is there that they need.
    fn tell_kernel(&self) -> Result<()> {
        for (listener, socket) in Listener::ALL.into_iter().zip(&self.listeners) {
            if let Some(socket) = socket {
                self.datapath.set_listener(listener, socket.as_fd())?;
            }
        }
        self.datapath.attach_proxy(self.link.host_ifindex, &self.namespace)?;
        let inside = self.link.inside_ifindex;
        netlink::within(&self.namespace, || Ok(self.datapath.attach_before_proxy(inside)))??;
        let cookie = netlink::within(&self.namespace, || Ok(netlink::namespace_cookie()))?;
        self.datapath.set_proxy(Some((self.link.host_ifindex, self.link.inside_mac)), cookie)
    }
}

fn link_to(namespace: &File, mtu: u32) -> Result<ProxyLink> {
    if let Some(link) = netlink::find_proxy_link(namespace, DEVICE)? {
        return Ok(link);
    }
    netlink::create_proxy_link(namespace, DEVICE, mtu).context("making the proxy's device")
}
