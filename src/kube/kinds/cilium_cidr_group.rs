//! Groups of prefixes that policies name. Read and kept; policies that name them are to come.

use std::sync::Arc;

use ipnet::IpNet;

use crate::kube::Tables;
use crate::kube::convert::{Cidr, Field, Notes, ObjectId, Result, items, labels};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{CidrGroup, ObjectKey};

/// cilium.io/v2
pub struct CiliumCIDRGroup;

impl ObjectKind for CiliumCIDRGroup {
    const META: Meta = Meta {
        name: "CiliumCIDRGroup",
        plural: "ciliumcidrgroups",
        group: "cilium.io",
        version: "v2",
        is_namespaced: false,
        is_optional: true,
        doubt: "nothing is granted to what cannot be read, and whoever denies the group denies everything",
        ..Meta::CORE
    };
    type Row = CidrGroup;

    /// A prefix that cannot be read is in the group for whom it takes away, and not for whom it grants:
    /// the group says that it is not all there.
    fn read(_: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<CidrGroup>> {
        let labels = notes.read(labels(document)).unwrap_or_default();
        let spec = document.get("spec");
        let known = spec.clone().and_then(|spec| spec.only_known(&["externalCIDRs"]));
        notes.read(known);
        let list = spec.and_then(|spec| items(&spec.get("externalCIDRs")?));
        let mut cidrs = Vec::new();
        for item in notes.read(list).unwrap_or_default() {
            cidrs.extend(notes.read(item.read::<Cidr>()).map(IpNet::from));
        }
        Ok(Some(CidrGroup { labels, cidrs, is_partial: notes.doubt_count() > 0 }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<CidrGroup>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::convert::identify;
    use crate::kube::kind;

    #[test]
    fn a_group_is_what_can_be_read_of_it_and_says_when_that_is_not_all() {
        let group = |text: &str| {
            let yaml = format!("{{metadata: {{name: office, labels: {{site: one}}}}, spec: {text}}}");
            let value: serde_json::Value = crate::yaml::read(&yaml).expect("YAML");
            let id = identify(CiliumCIDRGroup::KIND, &Field::root(&value, false)).expect("a name");
            let read = kind::read::<CiliumCIDRGroup>(&id, &value, false).expect("it is always read");
            let doubts: Vec<String> = read.doubts.iter().map(ToString::to_string).collect();
            let group = read.row.expect("a row");
            let cidrs: Vec<String> = group.cidrs.iter().map(ToString::to_string).collect();
            (cidrs.join(" "), group.is_partial, doubts.join("; "))
        };
        assert_eq!(
            group("{externalCIDRs: [10.0.0.0/8, '2001:db8::/32']}"),
            ("10.0.0.0/8 2001:db8::/32".to_owned(), false, String::new())
        );
        let said = "spec.externalCIDRs[0]: \"10.0.0\" is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32";
        assert_eq!(
            group("{externalCIDRs: [10.0.0, 10.0.0.0/8]}"),
            ("10.0.0.0/8".to_owned(), true, said.to_owned())
        );
        assert!(group("{externalCIDRs: 7}").1);
    }
}
