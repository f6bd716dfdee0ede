//! Why packets are dropped: number (abi.h), Hubble's name, and words for people.

use std::fmt;

/// Number, Hubble's `DropReason` name, words for people; sorted by number.
const REASONS: &[(u8, &str, &str)] = &[
    (132, "INVALID_SOURCE_IP", "Source address is not the pod's"),
    (133, "POLICY_DENIED", "Policy denied"),
    (134, "INVALID_PACKET_DROPPED", "Malformed packet"),
    (135, "CT_TRUNCATED_OR_INVALID_HEADER", "Truncated header"),
    (139, "UNSUPPORTED_L3_PROTOCOL", "Unsupported network protocol"),
    (141, "ERROR_WRITING_TO_PACKET", "Packet could not be rewritten"),
    (142, "UNKNOWN_L4_PROTOCOL", "Unknown transport protocol"),
    (143, "UNKNOWN_ICMPV4_CODE", "Unsupported ICMP message"),
    (151, "STALE_OR_UNROUTABLE_IP", "Nobody has this pod address"),
    (155, "CT_MAP_INSERTION_FAILED", "Connection table is full"),
    (156, "INVALID_IPV6_EXTENSION_HEADER", "Invalid IPv6 extension header"),
    (157, "IP_FRAGMENTATION_NOT_SUPPORTED", "Fragment cannot be handled"),
    (158, "SERVICE_BACKEND_NOT_FOUND", "Service has no ready backend"),
    (160, "NO_TUNNEL_OR_ENCAPSULATION_ENDPOINT", "No tunnel to the node"),
    (166, "UNSUPPORTED_L2_PROTOCOL", "Unsupported link protocol"),
    (167, "NO_MAPPING_FOR_NAT_MASQUERADE", "No free port for masquerading"),
    (169, "FIB_LOOKUP_FAILED", "No route"),
    (170, "ENCAPSULATION_TRAFFIC_IS_PROHIBITED", "Pods may not send tunnel packets"),
    (171, "INVALID_IDENTITY", "Invalid identity"),
    (172, "UNKNOWN_SENDER", "Unknown sender"),
    (174, "IS_A_CLUSTERIP", "Not a port of this service"),
    (175, "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND", "First fragment was not seen"),
    (176, "FORBIDDEN_ICMPV6_MESSAGE", "Forbidden ICMPv6 message"),
    (177, "DENIED_BY_LB_SRC_RANGE_CHECK", "Denied by LB source range check"),
    (181, "POLICY_DENY", "Denied by a deny rule"),
    (183, "INVALID_VNI", "Tunnel packet with an invalid VNI"),
    (194, "NO_EGRESS_GATEWAY", "No egress gateway is there for it"),
    (195, "UNENCRYPTED_TRAFFIC", "Came in plain and had to be encrypted"),
    (196, "TTL_EXCEEDED", "Time to live exceeded"),
    (198, "DROP_RATE_LIMITED", "Pod has its share of connections"),
    (203, "DROP_EP_NOT_READY", "Policy of the pod is not in force yet"),
    (204, "DROP_NO_EGRESS_IP", "Egress gateway lacks the address"),
    // Not Hubble's: its clients show the number.
    (240, "NAT_PORT_QUOTA_EXCEEDED", "Pod has its share of ports for masquerading"),
    (244, "NO_PROXY", "No proxy takes what it must judge"),
    (245, "DNS_UNASKED", "An answer of DNS that nobody asked for"),
];

/// A drop reason by its number; numbers that this version does not know are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DropReason(pub u8);

impl DropReason {
    /// No rule of the policies that select the pod allows it.
    pub const POLICY_DENIED: Self = Self(133);
    /// A deny rule decided.
    pub const POLICY_DENY: Self = Self(181);

    /// Every reason that the programs can give.
    pub fn all() -> impl Iterator<Item = Self> {
        REASONS.iter().map(|(number, ..)| Self(*number))
    }

    /// The name in Hubble's `DropReason`; `DROP_REASON_UNKNOWN` for numbers not known here.
    pub fn name(self) -> &'static str {
        self.row().map_or("DROP_REASON_UNKNOWN", |(_, name, _)| name)
    }

    /// Words for people.
    pub fn text(self) -> &'static str {
        self.row().map_or("Unknown reason", |(.., text)| text)
    }

    /// True when a policy decided, by a rule or by having none that allows.
    pub fn is_policy(self) -> bool {
        self == Self::POLICY_DENIED || self == Self::POLICY_DENY
    }

    fn row(self) -> Option<&'static (u8, &'static str, &'static str)> {
        REASONS.binary_search_by_key(&self.0, |(number, ..)| *number).ok().map(|index| &REASONS[index])
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.row() {
            Some((_, name, _)) => f.write_str(name),
            None => write!(f, "DROP_REASON_{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// abi.h is the truth: every `DROP_NAME = n` of it must have a row here, and no other.
    #[test]
    fn every_reason_of_the_kernel_has_a_row() {
        let abi = include_str!("../../bpf/abi.h");
        let in_kernel: Vec<u8> = abi
            .lines()
            .filter_map(|line| line.trim().strip_prefix("DROP_")?.split_once(" = "))
            .map(|(_, number)| number.trim_end_matches(',').parse().expect("a number below 256"))
            .filter(|number| *number != 0)
            .collect();
        assert_eq!(in_kernel, DropReason::all().map(|reason| reason.0).collect::<Vec<_>>());
        assert_eq!(
            u32::from(DropReason::POLICY_DENIED.0),
            crate::datapath::types::drop_reason::DROP_POLICY_DENIED.0
        );
        assert_eq!(
            u32::from(DropReason::POLICY_DENY.0),
            crate::datapath::types::drop_reason::DROP_POLICY_DENY_RULE.0
        );
    }
}
