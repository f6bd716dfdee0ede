//! Every MTU of a node, from the one of its devices: what encryption and the tunnel add has to fit.

use super::args::Routing;

/// Bytes that VXLAN adds: outer Ethernet, IP, UDP and VXLAN headers.
const TUNNEL_IPV4: u32 = 50;
const TUNNEL_IPV6: u32 = 70;
/// Bytes that WireGuard adds: IP, UDP, and 32 of its own.
const WIREGUARD_IPV4: u32 = 60;
const WIREGUARD_IPV6: u32 = 80;
/// WireGuard pads packets to a multiple of this, so that an MTU that is one leaves no padding over.
const WIREGUARD_PADDING: u32 = 16;

/// What the MTUs depend on.
#[derive(Clone, Copy, Debug)]
pub struct Ground {
    /// The least of the devices that lead out.
    pub underlay: u32,
    /// How pods of different nodes reach one another.
    pub routing: Routing,
    /// The nodes have no IPv4: the outer headers are IPv6's.
    pub is_ipv6: bool,
    /// What goes between nodes is encrypted.
    pub is_encrypted: bool,
    /// The setting; 0: none.
    pub given: u32,
}

/// The MTUs of a node's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mtus {
    /// The device that encrypts.
    pub encrypted: Option<u32>,
    /// The pods' devices, the tunnel's device, and the routes to other nodes' pods.
    pub pod: u32,
}

impl Mtus {
    /// From what is there.
    pub fn of(ground: Ground) -> Self {
        let wireguard = if ground.is_ipv6 { WIREGUARD_IPV6 } else { WIREGUARD_IPV4 };
        let tunnel = match (ground.routing, ground.is_ipv6) {
            (Routing::Native, _) => 0,
            (Routing::Tunnel, false) => TUNNEL_IPV4,
            (Routing::Tunnel, true) => TUNNEL_IPV6,
        };
        let room = ground.underlay.saturating_sub(wireguard);
        let encrypted = ground.is_encrypted.then(|| room - room % WIREGUARD_PADDING);
        let pod = match ground.given {
            0 => encrypted.unwrap_or(ground.underlay).saturating_sub(tunnel),
            given => given,
        };
        Self { encrypted, pod }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_packet_fits_the_wire_with_all_that_is_added() {
        let ground = |routing, is_ipv6, is_encrypted| Ground {
            underlay: 1500,
            routing,
            is_ipv6,
            is_encrypted,
            given: 0,
        };
        for (ground, encrypted, pod) in [
            (ground(Routing::Native, false, false), None, 1500),
            (ground(Routing::Tunnel, false, false), None, 1450),
            (ground(Routing::Tunnel, true, false), None, 1430),
            (ground(Routing::Native, false, true), Some(1440), 1440),
            (ground(Routing::Tunnel, false, true), Some(1440), 1390),
            (ground(Routing::Native, true, true), Some(1408), 1408),
            (ground(Routing::Tunnel, true, true), Some(1408), 1338),
            (Ground { given: 1400, ..ground(Routing::Tunnel, false, true) }, Some(1440), 1400),
        ] {
            assert_eq!(Mtus::of(ground), Mtus { encrypted, pod }, "{ground:?}");
        }
    }
}
