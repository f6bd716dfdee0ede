//! The wire: a bridge in a namespace of its own, with a host on it that is not a node.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;

use super::space::Space;
use super::wait_for;

/// The address of the outside host on the wire, and one behind it that only a default route reaches.
pub const OUTSIDE: [&str; 4] = ["10.200.0.100", "fd00:200::100", "203.0.113.7", "2001:db8:ffff::7"];

/// A wire and the outside host.
#[derive(Debug)]
pub struct Wire {
    lab: String,
    outside: Space,
    space: Space,
}

impl Wire {
    /// Makes both, with names that begin with `lab`.
    pub fn create(lab: &str) -> Result<Self> {
        let space = Space::create(&format!("{lab}-wire"), None)?;
        space.configure(&["link add wire type bridge", "link set wire up"])?;
        let outside = Space::create(&format!("{lab}-outside"), None)?;
        let wire = Self { lab: lab.to_owned(), outside, space };
        wire.plug_in(&wire.outside, "outside", &OUTSIDE[..2])?;
        wire.outside.configure(&[
            &format!("addr add {}/32 dev lo", OUTSIDE[2]),
            &format!("addr add {}/128 dev lo nodad", OUTSIDE[3]),
        ])?;
        Ok(wire)
    }

    /// The namespace that joins the hosts.
    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// The host on the wire that is not a node.
    pub fn outside(&self) -> &Space {
        &self.outside
    }

    /// Makes the namespace of a host with `addresses` on the wire, which reaches the rest of the world
    /// through the outside host; its threads join `cgroup` where there is one.
    pub fn host(&self, name: &str, addresses: &[IpAddr], cgroup: Option<&Path>) -> Result<Space> {
        let host = Space::create(&format!("{}-{name}", self.lab), cgroup)?;
        // No second of duplicate-address detection on the wire.
        host.set_sysctls(&[("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")])?;
        let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        self.plug_in(&host, name, &[&addresses[0], &addresses[1]])?;
        default_routes(&host)?;
        Ok(host)
    }

    /// Deletes a host's device and makes another one under its name.
    pub fn renew(&self, host: &Space, name: &str, addresses: &[IpAddr]) -> Result<()> {
        self.unplug(name)?;
        self.plug_in(host, name, &[&addresses[0].to_string(), &addresses[1].to_string()])?;
        default_routes(host)
    }

    /// Takes a host off the wire. Its namespace may still be there: threads and processes hold it.
    pub fn unplug(&self, name: &str) -> Result<()> {
        self.space.configure(&[&format!("link delete {name}")])
    }

    /// Sets the wire's end of a host's link, in the words of `ip link set`.
    pub fn set_port(&self, name: &str, settings: &str) -> Result<()> {
        self.space.configure(&[&format!("link set dev {name} {settings}")])
    }

    /// Lets the outside host pass packets on between hosts that do not see one another.
    pub fn forward(&self) -> Result<()> {
        self.outside.set_sysctls(&[
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/eth0/send_redirects", "0"),
        ])
    }

    /// Lets both namespaces outlive this value.
    pub fn keep(&mut self) {
        self.outside.keep();
        self.space.keep();
    }

    fn plug_in(&self, space: &Space, name: &str, addresses: &[&str]) -> Result<()> {
        self.space.configure(&[
            &format!("link add {name} type veth peer name eth0 netns {}", space.name()),
            &format!("link set {name} master wire up"),
        ])?;
        space.configure(&[
            &format!("addr add {}/24 dev eth0", addresses[0]),
            &format!("addr add {}/64 dev eth0 nodad", addresses[1]),
            "link set eth0 up",
        ])?;
        // The kernel lets a device send some time after its other end came up, and at once
        // when it is asked for the device (6.8 and later); what is sent before is lost.
        for (space, device) in [(space, "eth0"), (&self.space, name)] {
            wait_for(&format!("{device} of {name} to be up"), || {
                Ok(space.ip(&format!("-oneline link show dev {device}"))?.contains("state UP"))
            })?;
        }
        Ok(())
    }
}

fn default_routes(host: &Space) -> Result<()> {
    host.configure(&[
        &format!("route add default via {}", OUTSIDE[0]),
        &format!("route add default via {}", OUTSIDE[1]),
    ])
}

/// The addresses of node `number`, IPv4 first.
pub fn node_addresses(number: usize) -> Result<Vec<IpAddr>> {
    Ok(vec![IpAddr::from([10, 200, 0, number as u8]), format!("fd00:200::{number:x}").parse()?])
}

/// Lets `space` reach pods on a node.
pub fn route_to_pods(space: &Space, cidrs: &[String], node: &[IpAddr]) -> Result<()> {
    let routes: Vec<String> = cidrs
        .iter()
        .filter_map(|cidr| {
            let via = node.iter().find(|address| address.is_ipv6() == cidr.contains(':'))?;
            Some(format!("route replace {cidr} via {via}"))
        })
        .collect();
    space.configure(&routes.iter().map(String::as_str).collect::<Vec<_>>())
}
