//! Pools of load balancers' addresses, as far as nodes answer for them on the link. The operator gives the addresses.

use std::net::IpAddr;
use std::sync::Arc;

use super::network_policy::selector;
use crate::kube::Tables;
use crate::kube::convert::{Field, FieldError, Notes, ObjectId, Result, items};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{Announcement, ObjectKey};

/// weir.dev/v1alpha1
pub struct LoadBalancerPool;

impl ObjectKind for LoadBalancerPool {
    // An older operator has not brought the definition yet.
    const META: Meta =
        Meta { name: "LoadBalancerPool", plural: "loadbalancerpools", is_optional: true, ..Meta::OWN };
    type Row = Announcement;

    /// `None` where the network leads the addresses to nodes.
    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<Announcement>> {
        let spec = document.get("spec")?;
        let announce = spec.get("announce")?;
        if !announce.is_present() {
            return Ok(None);
        }
        let blocks = items(&spec.get("blocks")?)?;
        Ok(Some(Announcement {
            key: id.key.clone(),
            services: selector(&spec.get("serviceSelector")?)?,
            nodes: selector(&announce.get("nodeSelector")?)?,
            interfaces: interfaces(&announce.get("interfaces")?, &mut notes.warnings)?,
            within: Some(blocks.iter().map(block).collect::<Result<_>>()?),
            balancer: true,
            external: announce.get("externalIPs")?.boolean()? == Some(true),
        }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Announcement>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}

/// The first and the last address of a block.
fn block(field: &Field) -> Result<(IpAddr, IpAddr)> {
    let cidr = field.get("cidr")?;
    if cidr.string()?.is_some_and(|text| !text.is_empty()) {
        let cidr = cidr.cidr()?;
        return Ok((cidr.network(), cidr.broadcast()));
    }
    let (start, stop) = (field.get("start")?, field.get("stop")?);
    let first = start.address()?;
    match stop.string()?.filter(|text| !text.is_empty()) {
        Some(_) => Ok((first, stop.address()?)),
        None => Ok((first, first)),
    }
}

/// Regular expressions; one that is none names no device.
pub(super) fn interfaces(list: &Field, warnings: &mut Vec<FieldError>) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for item in items(list)? {
        let text = item.required_string()?;
        if let Err(error) = regex::Regex::new(text) {
            let reason = error.to_string().lines().last().unwrap_or_default().to_owned();
            warnings.push(item.error(format!("{text:?} is no regular expression and names no device: {reason}")));
        }
        all.push(text.to_owned());
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::CiliumL2AnnouncementPolicy;
    use super::*;
    use crate::kube::convert::identify;
    use crate::kube::kind;
    use crate::model::{Requirement, Selector};

    fn read<K: ObjectKind<Row = Announcement>>(spec: &str) -> (Option<Arc<Announcement>>, usize) {
        let yaml = format!("{{metadata: {{name: office}}, spec: {spec}}}");
        let value: serde_json::Value = crate::yaml::read(&yaml).expect("YAML");
        let id = identify(K::KIND, &Field::root(&value, false)).expect("a name");
        let read = kind::read::<K>(&id, &value, false).expect("it is well formed");
        (read.row, read.warnings.len())
    }

    #[test]
    fn a_pool_says_whether_nodes_answer_for_its_addresses() {
        assert_eq!(read::<LoadBalancerPool>("{blocks: [{cidr: 192.0.2.0/30}]}"), (None, 0));
        let spec = "{blocks: [{cidr: 192.0.2.0/30}, {start: 'fd00::1', stop: 'fd00::9'}], \
            serviceSelector: {matchLabels: {tier: front}}, announce: {interfaces: ['^eth0$', '(']}}";
        let (row, warnings) = read::<LoadBalancerPool>(spec);
        let row = row.expect("a row");
        assert_eq!((row.balancer, row.external, warnings), (true, false, 1));
        assert_eq!(row.services.requirements, [Requirement::In("tier".to_owned(), ["front".to_owned()].into())]);
        assert_eq!(row.nodes, Selector::default());
        for (address, expected) in
            [("192.0.2.0", true), ("192.0.2.4", false), ("fd00::9", true), ("fd00::a", false), ("::1", false)]
        {
            assert_eq!(row.has(address.parse().expect("an address")), expected, "{address}");
        }
    }

    #[test]
    fn a_policy_of_cilium_is_read_unchanged() {
        let (row, warnings) = read::<CiliumL2AnnouncementPolicy>("{loadBalancerIPs: true, interfaces: ['^en']}");
        let row = row.expect("a row");
        assert_eq!((row.balancer, row.external, row.within.is_none(), warnings), (true, false, true, 0));
        assert_eq!(row.interfaces, ["^en"]);
    }
}
