//! Addresses for pods: from this node's pod CIDRs, remembered by nobody but the endpoints that have them.
//!
//! At start the addresses in use are read from the endpoint store, so that
//! nothing can leak and nothing be given twice. Within a CIDR allocation goes
//! round: an address that was freed is the last to be given again. Of each CIDR
//! the network address, the first (the node's own) and IPv4's broadcast address
//! are never given.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Of larger CIDRs only so many addresses (as a power of two) are used.
const HOST_BITS_MAX: u8 = 32;
/// Network address and the node's own.
const RESERVED: u128 = 2;

/// The addresses of one pod: one of each family that the node has a CIDR of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// From an IPv4 CIDR.
    pub ipv4: Option<Ipv4Addr>,
    /// From an IPv6 CIDR.
    pub ipv6: Option<Ipv6Addr>,
}

/// Why there is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The node has none yet.
    #[error("this node has no pod CIDR yet")]
    NoCidr,
    /// Every address of a family is in use.
    #[error("every address of {} is in use", Joined(.0))]
    Exhausted(Vec<IpNet>),
}

/// Who may have which address.
#[derive(Clone, Debug)]
pub struct Ipam {
    pools: Vec<Pool>,
    used: HashSet<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pool {
    cidr: IpNet,
    /// The offset that is tried next.
    next: u128,
}

impl Ipam {
    /// Gives from `pod_cidrs`, never what is in `used`, and starts behind the highest of it.
    pub fn new(pod_cidrs: &[IpNet], used: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut ipam = Self { pools: Vec::new(), used: used.into_iter().collect() };
        ipam.set_pod_cidrs(pod_cidrs);
        ipam
    }

    /// Gives from other CIDRs from now on; what is in use stays so.
    pub fn set_pod_cidrs(&mut self, pod_cidrs: &[IpNet]) {
        let known = std::mem::take(&mut self.pools);
        for cidr in pod_cidrs.iter().map(IpNet::trunc) {
            let pool = known.iter().find(|pool| pool.cidr == cidr).cloned();
            let pool = pool.unwrap_or_else(|| Pool::new(cidr, &self.used));
            if !self.pools.iter().any(|other| other.cidr == cidr) {
                self.pools.push(pool);
            }
        }
    }

    /// One address of each family.
    pub fn allocate(&mut self) -> Result<Addresses, Error> {
        if self.pools.is_empty() {
            return Err(Error::NoCidr);
        }
        let mut addresses = Addresses::default();
        if let Some(IpAddr::V4(address)) = self.allocate_family(true)? {
            addresses.ipv4 = Some(address);
        }
        match self.allocate_family(false) {
            Ok(Some(IpAddr::V6(address))) => addresses.ipv6 = Some(address),
            Ok(_) => {}
            Err(error) => {
                self.release(addresses.ipv4.map(IpAddr::V4));
                return Err(error);
            }
        }
        Ok(addresses)
    }

    /// Takes addresses back; unknown ones change nothing.
    pub fn release(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.used.remove(&address);
        }
    }

    /// True if there is a CIDR to give from.
    pub fn has_cidr(&self) -> bool {
        !self.pools.is_empty()
    }

    /// True if a pod has the address.
    pub fn is_used(&self, address: IpAddr) -> bool {
        self.used.contains(&address)
    }

    /// `None`: the node has no CIDR of that family.
    fn allocate_family(&mut self, is_ipv4: bool) -> Result<Option<IpAddr>, Error> {
        let mut full = Vec::new();
        for pool in self.pools.iter_mut().filter(|pool| pool.cidr.addr().is_ipv4() == is_ipv4) {
            if let Some(address) = pool.take(&self.used) {
                self.used.insert(address);
                return Ok(Some(address));
            }
            full.push(pool.cidr);
        }
        if full.is_empty() { Ok(None) } else { Err(Error::Exhausted(full)) }
    }
}

impl Pool {
    fn new(cidr: IpNet, used: &HashSet<IpAddr>) -> Self {
        let mut pool = Self { cidr, next: RESERVED };
        let highest = used.iter().filter_map(|address| pool.offset_of(*address)).max();
        if let Some(highest) = highest {
            pool.next = highest + 1;
        }
        pool
    }

    /// One behind the last offset that may be given.
    fn end(&self) -> u128 {
        let host_bits = (self.cidr.max_prefix_len() - self.cidr.prefix_len()).min(HOST_BITS_MAX);
        let size = 1u128 << host_bits;
        if self.cidr.addr().is_ipv4() { size.saturating_sub(1) } else { size }
    }

    fn take(&mut self, used: &HashSet<IpAddr>) -> Option<IpAddr> {
        let end = self.end();
        // Among one address more than are in use there is a free one.
        let tries = end.saturating_sub(RESERVED).min(used.len() as u128 + 1);
        for _ in 0..tries {
            let offset = if self.next < end { self.next } else { RESERVED };
            self.next = offset + 1;
            let address = self.address_at(offset);
            if !used.contains(&address) {
                return Some(address);
            }
        }
        None
    }

    fn address_at(&self, offset: u128) -> IpAddr {
        match self.cidr.network() {
            // Offsets fit: they are below 2^32 and within the CIDR.
            IpAddr::V4(network) => IpAddr::V4(Ipv4Addr::from_bits(network.to_bits() | offset as u32)),
            IpAddr::V6(network) => IpAddr::V6(Ipv6Addr::from_bits(network.to_bits() | offset)),
        }
    }

    fn offset_of(&self, address: IpAddr) -> Option<u128> {
        if !self.cidr.contains(&address) {
            return None;
        }
        let offset = match (address, self.cidr.network()) {
            (IpAddr::V4(address), IpAddr::V4(network)) => u128::from(address.to_bits() - network.to_bits()),
            (IpAddr::V6(address), IpAddr::V6(network)) => address.to_bits() - network.to_bits(),
            _ => return None,
        };
        (offset < self.end()).then_some(offset)
    }
}

struct Joined<'a>(&'a [IpNet]);

impl fmt::Display for Joined<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, cidr) in self.0.iter().enumerate() {
            write!(f, "{}{cidr}", if place > 0 { " and " } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "ipam/tests.rs"]
mod tests;
