//! Every MTU of a node, from the one of its devices: what encryption and the tunnel add has to fit.

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
    /// Pods' packets go by a tunnel: to other nodes, or to egress gateways alone.
    pub has_tunnel: bool,
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
        let tunnel = match (ground.has_tunnel, ground.is_ipv6) {
            (false, _) => 0,
            (true, false) => TUNNEL_IPV4,
            (true, true) => TUNNEL_IPV6,
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
        let ground = |has_tunnel, is_ipv6, is_encrypted| Ground {
            underlay: 1500,
            has_tunnel,
            is_ipv6,
            is_encrypted,
            given: 0,
        };
        for (ground, encrypted, pod) in [
            (ground(false, false, false), None, 1500),
            (ground(true, false, false), None, 1450),
            (ground(true, true, false), None, 1430),
            (ground(false, false, true), Some(1440), 1440),
            (ground(true, false, true), Some(1440), 1390),
            (ground(false, true, true), Some(1408), 1408),
            (ground(true, true, true), Some(1408), 1338),
            (Ground { given: 1400, ..ground(true, false, true) }, Some(1440), 1400),
        ] {
            assert_eq!(Mtus::of(ground), Mtus { encrypted, pod }, "{ground:?}");
        }
    }
}
