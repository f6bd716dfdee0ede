//! The types of `bpf/abi.h` under Rust names, in its order, and the one place
//! that says which of them may be read from and written to maps as bytes.

use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv6Addr};

pub use super::types::{
    addr as Addr, address as Address, affinity as Affinity, affinity_key as AffinityKey,
    announced as Announced, announced_key as AnnouncedKey, announcing as Announcing, backend as Backend,
    collect_request as CollectRequest, connection as Connection, connection_key as ConnectionKey,
    dns_automaton as DnsAutomaton, dns_pending as DnsPending, dns_record as DnsRecord, dns_state as DnsState,
    egress_rule as EgressRule, egress_rule_key as EgressRuleKey, ended as Ended, endpoint as Endpoint,
    event as Event, event_count as EventCount, fragment as Fragment, gone_backend as GoneBackend,
    l7_flow as L7Flow, l7_flow_key as L7FlowKey, l7_rule_listener_key as RuleListenerKey,
    maglev_key as MaglevKey, maglev_piece as MaglevPiece, metric as Metric, nat as Nat, nat_key as NatKey,
    nat_search as NatSearch, node_state as NodeState, own_addresses as OwnAddresses,
    policy_peer as PolicyPeer, policy_peer_key as PolicyPeerKey, policy_rule as PolicyRule,
    policy_rule_key as PolicyRuleKey, prefix as Prefix, prefix_key as PrefixKey, proxy_device as ProxyDevice,
    recount_request as RecountRequest, service as Service, service_key as ServiceKey, settings as Settings,
    slot as Slot, slot_key as SlotKey, source_range_key as SourceRangeKey, stale_socket as StaleSocket,
    usage as Usage,
};

/// Types that are nothing but their bytes: every bit pattern is a value, and
/// there is no padding, so that equal values have equal bytes.
///
/// # Safety
///
/// The type must be `repr(C)` or primitive, of integers only, without implicit padding.
pub unsafe trait Plain: Copy + Default + 'static {
    /// The value as the kernel sees it.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: a Plain type has no padding, so all its bytes are initialised.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    /// The value that the kernel wrote; `None` if the length is not the type's.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, and every bit pattern of a Plain type is a value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

// SAFETY: primitive integers.
unsafe impl Plain for u32 {}
// SAFETY: a primitive integer.
unsafe impl Plain for u64 {}

const fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Implements `Plain` after checking that the named fields are all there is:
/// their sizes add up to the struct's, so nothing is padding.
macro_rules! plain {
    ($($name:ident { $($field:ident),* $(,)? })*) => { $(
        const _: () = assert!(
            size_of::<$name>() == 0 $( + size_of_field::<$name, _>(|value| &value.$field) )*,
            concat!(stringify!($name), " has implicit padding or a field that is not listed")
        );
        // SAFETY: libbpf-cargo makes repr(C) structs of integers; the assertion excludes padding.
        unsafe impl Plain for $name {}
    )* };
}

plain! {
    Addr { w }
    Endpoint { epoch, policy, ipv4, ipv6, ifindex, identity, mac, flags }
    Address { node, identity, endpoint_id, flags }
    PrefixKey { prefix_length, addr }
    Prefix { node, identity, flags }
    EgressRuleKey { prefix_length, set, destination }
    EgressRule { node, address, ifindex, flags }
    PolicyPeerKey { policy_id, identity, direction }
    PolicyPeer { class }
    PolicyRuleKey { prefix_length, policy_id, class, direction, protocol, port }
    PolicyRule { rule_id, l7_set, verdict, reserved }
    L7FlowKey { client, server, client_port, server_port, protocol, pad }
    L7Flow { client_identity, server_identity, client_endpoint, server_endpoint, egress_set, ingress_set, listener_set, pad, alias, asked_jiffies }
    DnsState { next, accepts, pad }
    DnsAutomaton { first, count }
    DnsPending { flow, question, asked_ns }
    DnsRecord { timestamp_ns, asked_ns, key, flow, length, denied_by, pad }
    RuleListenerKey { set, is_ipv6, pad }
    ProxyDevice { netns_cookie, ifindex, mac, pad }
    ServiceKey { addr, port, protocol, scope }
    Service { service_id, generation, backend_count, draining_count, affinity_seconds, flags, kind, algorithm }
    SlotKey { service_id, generation, slot }
    Slot { backend, service_id }
    Backend { addr, id, port, protocol, pad }
    MaglevKey { service_id, generation, piece }
    MaglevPiece { service_id, backends }
    AffinityKey { client, service_id, kind }
    Affinity { used_jiffies, backend, pad }
    SourceRangeKey { prefix_length, service_id, addr }
    AnnouncedKey { addr, ifindex }
    Announced { mac, is_yielded, pad }
    Announcing { until_ns, led_until_ns }
    GoneBackend { addr, port, pad }
    ConnectionKey { addr, port, protocol, kind, asker, icmp_type }
    Connection {
        last_seen_jiffies, packets, bytes, service, egress_epoch, ingress_epoch,
        identity, egress_rule, ingress_rule, last_report_jiffies, sequence, endpoint, service_port, flags, tcp_flags, route, other_port, merged_jiffies,
        round_trip,
    }
    Ended { key, connection, check }
    NatKey { local, remote, local_port, remote_port, protocol, direction, pad }
    Nat { addr, service, last_seen_jiffies, port, service_port, tcp_flags, client_flags, is_answered, pad }
    Fragment { source, destination, seen_jiffies, id, way, source_port, destination_port, protocol, asks, answers, icmp_type, check }
    Metric { packets, bytes }
    NodeState { address_epoch, flags }
    EventCount { offered, lost, suppressed }
    NatSearch { searches, tries }
    Usage { in_use, taken, refused, records_due, records_suppressed, dns_records_due }
    OwnAddresses { ipv4, ipv6 }
    RecountRequest { is_end, lease_seconds }
    Event {
        timestamp_ns, packets, bytes, source, destination, service, source_identity,
        destination_identity, rule_id, ingress_rule_id, ifindex, source_port, destination_port, service_port,
        source_endpoint, destination_endpoint, protocol, r#type, reason, direction, tcp_flags,
        icmp_type, icmp_code, flags, round_trip, pad,
    }
    StaleSocket { cookie, local, remote, local_port, remote_port, ifindex, protocol, pad }
    CollectRequest { keys, count, deleted }
    Settings {
        loopback_ipv4, loopback_ipv6, secret, netns_cookie, jiffies_per_second,
        tunnel_ifindex, overlay_ifindex, flow_report_seconds, tcp_timeout_seconds, tcp_opening_seconds, tcp_closing_seconds,
        other_timeout_seconds, mark_mask, encrypt_ifindex, encrypt_second, path_mtu, wait_ifindex, limit_ifindex, quota_limit, quota_capacity, drop_record_cost, maglev_size, event_buffer_half,
        nat_port_min, nat_port_max, nat_known_min, nat_known_max, tunnel_port, masquerade_ipv4,
        masquerade_ipv6, flow_events, socket_lb, tunnel_direct, encrypt_strict, dns_denied, pad,
    }
}

/// Where `struct settings` lies in `.rodata`.
pub(super) const SETTINGS_OFFSET: usize = offset_of!(super::types::rodata, settings);

/// The 16 bytes of an address; IPv4 is v4-mapped.
pub fn addr_of(address: IpAddr) -> Addr {
    let octets = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    let (words, _) = octets.as_chunks::<4>();
    Addr { w: [0, 1, 2, 3].map(|i| u32::from_ne_bytes(words[i])) }
}

/// The address behind 16 bytes; v4-mapped ones are IPv4.
pub fn ip_of(addr: Addr) -> IpAddr {
    let mut octets = [0; 16];
    for (bytes, word) in octets.chunks_exact_mut(4).zip(addr.w) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(octets).to_canonical()
}

/// Like `ip_of`, where all zero means that there is none.
pub fn optional_ip_of(addr: Addr) -> Option<IpAddr> {
    (addr.w != [0; 4]).then(|| ip_of(addr))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::types;
    use crate::model::{EndpointId, IdentityId, MacAddress};

    #[test]
    fn ipv4_is_v4_mapped_in_network_order() {
        let addr = addr_of("10.1.2.3".parse().unwrap());
        assert_eq!(addr.as_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]);
        assert_eq!(ip_of(addr), "10.1.2.3".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn ipv6_keeps_its_bytes() {
        let address: IpAddr = "fd00:1::a".parse().unwrap();
        assert_eq!(ip_of(addr_of(address)), address);
        assert_eq!(optional_ip_of(Addr::default()), None);
    }

    #[test]
    fn the_model_has_the_numbers_of_abi_h() {
        use types::{endpoint_mac as mac, reserved_identity as identity};
        let [a, b, c, d] =
            [mac::ENDPOINT_MAC_0, mac::ENDPOINT_MAC_1, mac::ENDPOINT_MAC_2, mac::ENDPOINT_MAC_3]
                .map(|byte| byte.0 as u8);
        assert_eq!(MacAddress::of_host_side(EndpointId(0x0102)), MacAddress([a, b, c, d, 1, 2]));
        assert_eq!(
            [
                IdentityId::UNKNOWN,
                IdentityId::HOST,
                IdentityId::WORLD,
                IdentityId::REMOTE_NODE,
                IdentityId::FIRST_CLUSTER,
                IdentityId::LAST_CLUSTER,
                IdentityId::FIRST_LOCAL
            ]
            .map(|id| id.0),
            [
                identity::IDENTITY_UNKNOWN,
                identity::IDENTITY_HOST,
                identity::IDENTITY_WORLD,
                identity::IDENTITY_REMOTE_NODE,
                identity::IDENTITY_FIRST_CLUSTER,
                identity::IDENTITY_LAST_CLUSTER,
                identity::IDENTITY_FIRST_LOCAL
            ]
            .map(|id| id.0)
        );
    }
}
