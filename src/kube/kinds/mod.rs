//! The kinds that sources deliver, a file each. What is here is read, from an API server and from a directory.

use super::kind::{Kind, ObjectKind};

/// Does something for every kind.
pub trait Visitor {
    /// For this one.
    fn visit<K: ObjectKind>(&mut self);
}

macro_rules! kinds {
    ($($module:ident::$kind:ident),* $(,)?) => {
        $(mod $module;)*
        $(pub use $module::$kind;)*

        /// Every kind.
        pub const ALL: &[Kind] = &[$($kind::KIND),*];

        /// Shows every kind to `visitor`.
        pub fn visit_all(visitor: &mut impl Visitor) {
            $(visitor.visit::<$kind>();)*
        }
    };
}

// The list: a new kind is a line here.
kinds! {
    namespace::Namespace,
    pod::Pod,
    node::Node,
    service::Service,
    endpoint_slice::EndpointSlice,
    network_policy::NetworkPolicy,
    cilium_network_policy::CiliumNetworkPolicy,
    cilium_clusterwide_network_policy::CiliumClusterwideNetworkPolicy,
    cluster_network_policy::ClusterNetworkPolicy,
    cilium_cidr_group::CiliumCIDRGroup,
    cilium_local_redirect_policy::CiliumLocalRedirectPolicy,
    cilium_egress_gateway_policy::CiliumEgressGatewayPolicy,
    cilium_l2_announcement_policy::CiliumL2AnnouncementPolicy,
    load_balancer_pool::LoadBalancerPool,
    identity::Identity,
    node_endpoints::NodeEndpoints,
    weir_node::WeirNode,
}

pub use identity::ClaimedIdentity;
pub use network_policy::requirement;
