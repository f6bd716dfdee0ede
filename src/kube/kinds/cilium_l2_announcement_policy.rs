//! Cilium's wish that nodes answer ARP and neighbour discovery for Services' addresses; applied unchanged.

use std::sync::Arc;

use super::load_balancer_pool::interfaces;
use super::network_policy::selector;
use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{Announcement, ObjectKey};

/// cilium.io/v2alpha1
pub struct CiliumL2AnnouncementPolicy;

impl ObjectKind for CiliumL2AnnouncementPolicy {
    const META: Meta = Meta {
        name: "CiliumL2AnnouncementPolicy",
        plural: "ciliuml2announcementpolicies",
        group: "cilium.io",
        version: "v2alpha1",
        is_namespaced: false,
        is_optional: true,
        ..Meta::CORE
    };
    type Row = Announcement;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<Announcement>> {
        let spec = document.get("spec")?;
        let is_true = |name: &str| Ok(spec.get(name)?.boolean()? == Some(true));
        Ok(Some(Announcement {
            key: id.key.clone(),
            services: selector(&spec.get("serviceSelector")?)?,
            nodes: selector(&spec.get("nodeSelector")?)?,
            interfaces: interfaces(&spec.get("interfaces")?, &mut notes.warnings)?,
            within: None,
            balancer: is_true("loadBalancerIPs")?,
            external: is_true("externalIPs")?,
        }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Announcement>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}
