//! Cilium's policies of the cluster.

use std::sync::Arc;

use crate::kube::Tables;
use crate::kube::cilium;
use crate::kube::convert::{Field, Notes, ObjectId, Result};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{ObjectKey, Policy, PolicyKind};

/// cilium.io/v2
pub struct CiliumClusterwideNetworkPolicy;

impl ObjectKind for CiliumClusterwideNetworkPolicy {
    const META: Meta = Meta {
        name: "CiliumClusterwideNetworkPolicy",
        plural: "ciliumclusterwidenetworkpolicies",
        group: "cilium.io",
        version: "v2",
        is_namespaced: false,
        is_optional: true,
        doubt: "the policy allows only what can be read of it, and denies at least that",
        ..Meta::CORE
    };
    type Row = Policy;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<Policy>> {
        Ok(Some(cilium::policy(PolicyKind::CiliumClusterwideNetworkPolicy, id, document, notes)))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Policy>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}
