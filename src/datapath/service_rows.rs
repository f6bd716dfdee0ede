//! A frontend as rows: what `services`, `slots`, `maglev` and `source_ranges` say of it.

use std::net::{IpAddr, SocketAddr};

use super::abi::{MaglevKey, MaglevPiece, Service, ServiceKey, SlotKey, SourceRangeKey, addr_of};
use super::maglev;
use super::types::{maglev_size, service_algorithm, service_flags, service_kind, service_scope};
use crate::model::{Algorithm, Forwarding, Frontend, FrontendKey, FrontendKind, Scope};

/// Places of a table in one row.
const PIECE: usize = maglev_size::MAGLEV_PIECE.0 as usize;

/// The key of a frontend's row.
pub(super) fn service_key(key: &FrontendKey) -> ServiceKey {
    let scope = match key.scope {
        Scope::Internal => service_scope::SCOPE_INTERNAL,
        Scope::External => service_scope::SCOPE_EXTERNAL,
    };
    ServiceKey {
        addr: addr_of(key.address),
        port: key.port.to_be(),
        protocol: key.protocol.map_or(0, |protocol| protocol.number()),
        scope: scope.0 as u8,
    }
}

/// The row of a frontend, without id and generation.
pub(super) fn service(key: &FrontendKey, frontend: &Frontend) -> Service {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let (kind, algorithm) = (kind(frontend.kind), algorithm(frontend.algorithm));
    Service {
        backend_count: count(frontend.backends.len()),
        draining_count: count(backends(frontend).count() - frontend.backends.len()),
        affinity_seconds: frontend.affinity.unwrap_or(0),
        flags: flags(key, frontend) as u16,
        kind: kind.0 as u8,
        algorithm: algorithm.0 as u8,
        ..Service::default()
    }
}

fn kind(kind: FrontendKind) -> service_kind {
    match kind {
        FrontendKind::ClusterIp | FrontendKind::LocalRedirect => service_kind::SERVICE_CLUSTER_IP,
        FrontendKind::NodePort => service_kind::SERVICE_NODE_PORT,
        FrontendKind::LoadBalancer => service_kind::SERVICE_LOAD_BALANCER,
        FrontendKind::ExternalIp => service_kind::SERVICE_EXTERNAL_IP,
        FrontendKind::HostPort => service_kind::SERVICE_HOST_PORT,
    }
}

fn algorithm(algorithm: Algorithm) -> service_algorithm {
    match algorithm {
        Algorithm::Random => service_algorithm::SERVICE_RANDOM,
        Algorithm::Maglev => service_algorithm::SERVICE_MAGLEV,
    }
}

fn flags(key: &FrontendKey, frontend: &Frontend) -> u32 {
    let is_external = key.scope == Scope::External;
    [
        (key.protocol.is_none(), service_flags::SERVICE_WILDCARD),
        (key.address.is_loopback(), service_flags::SERVICE_LOOPBACK),
        (frontend.has_others, service_flags::SERVICE_HAS_OTHERS),
        (is_external && !frontend.source_ranges.is_empty(), service_flags::SERVICE_RANGES),
        (is_external && frontend.forwarding == Forwarding::Dsr, service_flags::SERVICE_DSR),
    ]
    .into_iter()
    .filter_map(|(is_set, flag)| is_set.then_some(flag.0))
    .fold(0, |flags, flag| flags | flag)
}

/// In the order of slots: what new connections may choose, then what only drains.
pub(super) fn backends(frontend: &Frontend) -> impl Iterator<Item = SocketAddr> + '_ {
    let is_chosen = |address: &SocketAddr| frontend.addresses().any(|chosen| chosen == *address);
    let draining = frontend.draining.iter().copied();
    frontend.addresses().chain(draining.filter(move |address| !is_chosen(address)))
}

/// The slots of a set.
pub(super) fn slot_keys(service: &Service) -> impl Iterator<Item = SlotKey> + use<> {
    let Service { service_id, generation, backend_count, draining_count, .. } = *service;
    (0..backend_count + draining_count).map(move |slot| SlotKey { service_id, generation, slot })
}

/// The table of a frontend whose backends have these ids; none without Maglev.
pub(super) fn pieces(
    frontend: &Frontend,
    service: &Service,
    ids: &[u32],
    size: u32,
) -> Vec<(MaglevKey, MaglevPiece)> {
    if frontend.algorithm != Algorithm::Maglev {
        return Vec::new();
    }
    let weighted: Vec<_> =
        frontend.backends.iter().map(|backend| (backend.address, backend.weight)).collect();
    let table = maglev::table(&weighted, size);
    let pieces = table.chunks(PIECE).zip(0..).map(|(places, piece)| {
        let Service { service_id, generation, .. } = *service;
        let mut row = MaglevPiece { service_id, ..MaglevPiece::default() };
        for (entry, index) in row.backends.iter_mut().zip(places) {
            *entry = ids.get(*index as usize).copied().unwrap_or(0);
        }
        (MaglevKey { service_id, generation, piece }, row)
    });
    pieces.collect()
}

/// Who may use the frontend from outside; empty where everybody may.
pub(super) fn ranges(frontend: &Frontend, service_id: u32) -> impl Iterator<Item = SourceRangeKey> + '_ {
    frontend.source_ranges.iter().map(move |range| {
        let before = match range.network() {
            IpAddr::V4(_) => 32 + 96,
            IpAddr::V6(_) => 32,
        };
        SourceRangeKey {
            prefix_length: before + u32::from(range.prefix_len()),
            service_id: service_id.to_be(),
            addr: addr_of(range.network()),
        }
    })
}
