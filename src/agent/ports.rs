//! Which ports of the node masquerading uses.
//!
//! The programs ask the node's sockets before they take a port, but a socket of the node may come later:
//! the kernel gives sockets ports of `ip_local_port_range`. So the two ranges are kept apart as far as
//! that goes.

use std::ops::RangeInclusive;

use crate::netlink;

/// What is left of a range must be worth having.
const FEWEST: usize = 1024;

/// The ports for masquerading, and what people should know of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports {
    /// In use.
    pub range: RangeInclusive<u16>,
    /// Why these are not the ports that were asked for, or not as good.
    pub remark: Option<String>,
}

impl Ports {
    /// Of what was asked for, what this node's settings leave.
    pub fn choose(wanted: RangeInclusive<u16>) -> Self {
        let read = |name: &str| {
            netlink::get_sysctl(name).unwrap_or_else(|error| {
                tracing::warn!(%error, "keeping the ports of masquerading and of the node's sockets apart");
                None
            })
        };
        let sockets = read("net/ipv4/ip_local_port_range");
        let reserved = read("net/ipv4/ip_local_reserved_ports");
        let ports = Self::apart_from(wanted, &sockets.unwrap_or_default(), &reserved.unwrap_or_default());
        if let Some(remark) = &ports.remark {
            tracing::warn!(range = ?ports.range, "ports of masquerading: {remark}");
        }
        ports
    }

    fn apart_from(wanted: RangeInclusive<u16>, sockets: &str, reserved: &str) -> Self {
        let clear = Self { range: wanted.clone(), remark: None };
        let Some(sockets) = pair(sockets, char::is_whitespace) else { return clear };
        let (first, last) = (*wanted.start().max(sockets.start()), *wanted.end().min(sockets.end()));
        let is_reserved = |range: RangeInclusive<u16>| *range.start() <= first && last <= *range.end();
        if first > last || reserved.split(',').filter_map(port_or_range).any(is_reserved) {
            return clear;
        }
        let below = *wanted.start()..=sockets.start().saturating_sub(1);
        let above = sockets.end().saturating_add(1)..=*wanted.end();
        let left = if above.len() > below.len() { above } else { below };
        let overlap = format!(
            "--nat-port-min and --nat-port-max give {}-{}, and net.ipv4.ip_local_port_range, the ports of \
             the node's own sockets, is {}-{}",
            wanted.start(),
            wanted.end(),
            sockets.start(),
            sockets.end(),
        );
        if left.len() >= FEWEST {
            return Self { range: left, remark: Some(overlap) };
        }
        let remark = format!(
            "{overlap}: too little is left, so a pod's connection may lose its port to a socket of the node"
        );
        Self { range: wanted, remark: Some(remark) }
    }
}

/// Keeps the kernel from giving node ports to the node's own sockets, where `ip_local_port_range` has some.
pub fn reserve(node_ports: RangeInclusive<u16>) -> netlink::Result<()> {
    const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";
    let sockets = netlink::get_sysctl("net/ipv4/ip_local_port_range")?.unwrap_or_default();
    let reserved = netlink::get_sysctl(RESERVED)?.unwrap_or_default();
    match with_reserved(&node_ports, &sockets, &reserved) {
        Some(reserved) => netlink::set_sysctl(RESERVED, &reserved),
        None => Ok(()),
    }
}

/// What is reserved and these, unless that is so or sockets get none of them anyway.
fn with_reserved(node_ports: &RangeInclusive<u16>, sockets: &str, reserved: &str) -> Option<String> {
    let sockets = pair(sockets, char::is_whitespace)?;
    let (first, last) = (*node_ports.start().max(sockets.start()), *node_ports.end().min(sockets.end()));
    let is_reserved = |range: RangeInclusive<u16>| *range.start() <= first && last <= *range.end();
    if first > last || reserved.split(',').filter_map(port_or_range).any(is_reserved) {
        return None;
    }
    let ours = format!("{}-{}", node_ports.start(), node_ports.end());
    Some(if reserved.trim().is_empty() { ours } else { format!("{},{ours}", reserved.trim()) })
}

impl std::fmt::Display for Ports {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}-{}", self.range.start(), self.range.end())?;
        self.remark.as_ref().map_or(Ok(()), |remark| write!(out, " ({remark})"))
    }
}

fn pair(text: &str, separator: impl Fn(char) -> bool) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.trim().split_once(separator)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

/// As ip_local_reserved_ports has them.
fn port_or_range(text: &str) -> Option<RangeInclusive<u16>> {
    pair(text, |separator| separator == '-').or_else(|| {
        let port = text.trim().parse().ok()?;
        Some(port..=port)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ports_are_reserved_where_sockets_would_get_them() {
        let with = |sockets, reserved| with_reserved(&(30000..=32767), sockets, reserved);
        assert_eq!(with("32768\t60999", ""), None);
        assert_eq!(with("1024\t65535", "").as_deref(), Some("30000-32767"));
        assert_eq!(with("32000\t60999", "8080,9148").as_deref(), Some("8080,9148,30000-32767"));
        assert_eq!(with("1024\t65535", "30000-32767"), None);
        assert_eq!(with("32000\t60999", "1,32000-33000"), None);
    }

    fn chosen(wanted: RangeInclusive<u16>, sockets: &str, reserved: &str) -> (RangeInclusive<u16>, bool) {
        let ports = Ports::apart_from(wanted, sockets, reserved);
        (ports.range, ports.remark.is_some())
    }

    #[test]
    fn the_ports_of_the_nodes_sockets_are_left_to_them() {
        let default = 12288..=28671;
        for (sockets, range, has_remark) in [
            ("32768\t60999", default.clone(), false),
            ("", default.clone(), false),
            ("15000\t65535", 12288..=14999, true),
            ("1024\t20000", 20001..=28671, true),
            ("15000\t20000", 20001..=28671, true),
            // Nothing is left, or next to nothing.
            ("1024\t65535", default.clone(), true),
            ("12300\t65535", default.clone(), true),
        ] {
            assert_eq!(chosen(default.clone(), sockets, ""), (range, has_remark), "{sockets:?}");
        }
        assert_eq!(chosen(40000..=40000, "32768 60999", ""), (40000..=40000, true));
    }

    #[test]
    fn a_port_that_the_kernel_gives_to_nobody_is_free() {
        let (all, wanted) = ("1024 65535", 12288..=28671);
        assert_eq!(chosen(wanted.clone(), all, "8080,12288-28671"), (wanted.clone(), false));
        assert_eq!(chosen(wanted.clone(), all, "8080,12288-28670"), (wanted, true));
    }
}
