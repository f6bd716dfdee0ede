//! What leads out of this node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address of each family, where there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressPair {
    /// IPv4.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6.
    pub ipv6: Option<Ipv6Addr>,
}

impl AddressPair {
    /// The first of each family.
    pub fn first_of(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut pair = Self::default();
        for address in addresses {
            match address {
                IpAddr::V4(address) => pair.ipv4 = pair.ipv4.or(Some(address)),
                IpAddr::V6(address) => pair.ipv6 = pair.ipv6.or(Some(address)),
            }
        }
        pair
    }
}

/// A device that leads out of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkDevice {
    /// Its name.
    pub name: String,
    /// The addresses that the node gives to what leaves by it.
    pub sources: AddressPair,
    /// Every address that it has.
    pub addresses: Vec<IpAddr>,
}
