//! Cilium's policies that lead what pods send out of the cluster by a gateway; applied unchanged.

use std::sync::Arc;

use ipnet::IpNet;

use crate::kube::Tables;
use crate::kube::cilium::selector::{of_nodes, of_pods};
use crate::kube::convert::{Cidr, Field, Notes, ObjectId, Result, items};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{EgressGateway, EgressPods, EgressPolicy, ObjectKey, Selector};

/// cilium.io/v2
pub struct CiliumEgressGatewayPolicy;

impl ObjectKind for CiliumEgressGatewayPolicy {
    const META: Meta = Meta {
        name: "CiliumEgressGatewayPolicy",
        plural: "ciliumegressgatewaypolicies",
        group: "cilium.io",
        version: "v2",
        is_namespaced: false,
        is_optional: true,
        doubt: "what the pods that it selects send out of the cluster is dropped, unless it can be read where to",
        ..Meta::CORE
    };
    type Row = EgressPolicy;

    /// Pods that cannot be told are an error. A destination that cannot be read is any, by no gateway; a gateway that
    /// cannot be read is none.
    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<EgressPolicy>> {
        let spec = document.get("spec")?;
        let pods = items(&spec.get("selectors")?)?.iter().map(pods_of).collect::<Result<Vec<_>>>()?;
        let known = ["selectors", "destinationCIDRs", "excludedCIDRs", "egressGateway", "egressGateways"];
        let doubts = notes.doubt_count();
        notes.read(spec.only_known(&known));
        let destinations = cidrs(&spec.get("destinationCIDRs")?, notes);
        let is_partial = notes.doubt_count() > doubts;
        let excluded = cidrs(&spec.get("excludedCIDRs")?, notes);
        let single = spec.get("egressGateway")?;
        let mut gateways = Vec::new();
        if single.is_present() {
            gateways.extend(notes.read(gateway(&single)));
        }
        let several = items(&spec.get("egressGateways")?);
        for item in notes.read(several).unwrap_or_default() {
            gateways.extend(notes.read(gateway(&item)));
        }
        Ok(Some(EgressPolicy { key: id.key.clone(), pods, destinations, excluded, gateways, is_partial }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<EgressPolicy>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}

fn pods_of(rule: &Field) -> Result<EgressPods> {
    rule.only_known(&["podSelector", "namespaceSelector", "nodeSelector"])?;
    let (mut namespaces, pods) = match rule.get("podSelector")? {
        selector if selector.is_present() => of_pods(&selector)?,
        _ => Default::default(),
    };
    namespaces.extend(of_labels(&rule.get("namespaceSelector")?)?.requirements);
    let nodes = of_labels(&rule.get("nodeSelector")?)?;
    Ok(EgressPods { namespaces: Selector::new(namespaces), pods: Selector::new(pods), nodes })
}

fn of_labels(selector: &Field) -> Result<Selector> {
    if selector.is_present() { of_nodes(selector) } else { Ok(Selector::default()) }
}

fn cidrs(list: &Field, notes: &mut Notes) -> Vec<IpNet> {
    let all = notes.read(items(list)).unwrap_or_default();
    all.iter().filter_map(|item| notes.read(item.read::<Cidr>()).map(IpNet::from)).collect()
}

fn gateway(field: &Field) -> Result<EgressGateway> {
    field.only_known(&["nodeSelector", "interface", "egressIP"])?;
    let interface = field.get("interface")?;
    let name = interface.string()?.filter(|name| !name.is_empty()).map(str::to_owned);
    let given = field.get("egressIP")?;
    let address = match given.string()?.filter(|text| !text.is_empty()) {
        Some(_) => Some(given.address()?),
        None => None,
    };
    if name.is_some() && address.is_some() {
        return Err(interface.error("and egressIP exclude one another"));
    }
    Ok(EgressGateway { nodes: of_nodes(&field.get("nodeSelector")?)?, interface: name, address })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::convert::identify;
    use crate::kube::kind;
    use crate::model::Labels;

    fn read(spec: &str) -> Result<(EgressPolicy, Vec<String>)> {
        let yaml = format!("{{metadata: {{name: out}}, spec: {spec}}}");
        let value: serde_json::Value = crate::yaml::read(&yaml).expect("YAML");
        let id = identify(CiliumEgressGatewayPolicy::KIND, &Field::root(&value, false)).expect("a name");
        let read = kind::read::<CiliumEgressGatewayPolicy>(&id, &value, false)?;
        let row = read.row.expect("a row");
        Ok((EgressPolicy::clone(&row), read.doubts.iter().map(ToString::to_string).collect()))
    }

    /// The example of Cilium's documentation.
    const EXAMPLE: &str = "{selectors: [{podSelector: {matchLabels: {org: empire, class: mediabot, \
        io.kubernetes.pod.namespace: default}}}], destinationCIDRs: [0.0.0.0/0], excludedCIDRs: [192.168.0.0/16], \
        egressGateway: {nodeSelector: {matchLabels: {node.kubernetes.io/name: a-specific-node}}, egressIP: 10.168.60.100}}";

    #[test]
    fn the_example_of_the_documentation_is_read_unchanged() {
        let (policy, doubts) = read(EXAMPLE).expect("it is well formed");
        assert_eq!((policy.is_partial, doubts), (false, vec![]));
        let labels = |key: &str, value: &str| Labels::from([(key.to_owned(), value.to_owned())]);
        let [pods] = policy.pods.as_slice() else { panic!("{policy:?}") };
        assert!(pods.namespaces.matches(&labels("kubernetes.io/metadata.name", "default")));
        assert!(!pods.namespaces.matches(&labels("kubernetes.io/metadata.name", "other")));
        let mut pod = labels("org", "empire");
        assert!(!pods.pods.matches(&pod));
        pod.insert("class".to_owned(), "mediabot".to_owned());
        assert!(pods.pods.matches(&pod));
        let [gateway] = policy.gateways.as_slice() else { panic!("{policy:?}") };
        assert_eq!(gateway.address, "10.168.60.100".parse().ok());
        assert!(gateway.nodes.matches(&labels("node.kubernetes.io/name", "a-specific-node")));
        let texts = |cidrs: &[IpNet]| cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let both = (texts(&policy.destinations), texts(&policy.excluded));
        assert_eq!(both, ("0.0.0.0/0".to_owned(), "192.168.0.0/16".to_owned()));
    }

    #[test]
    fn doubt_is_closed() {
        let broken = EXAMPLE.replace("[0.0.0.0/0]", "[0.0.0.0/0, 10.0.0]");
        let (policy, doubts) = read(&broken).expect("it is kept");
        assert!(policy.is_partial);
        assert_eq!(
            doubts,
            ["spec.destinationCIDRs[1]: \"10.0.0\" is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32"]
        );
        let both = EXAMPLE.replace("egressIP", "interface: eth1, egressIP");
        let (policy, doubts) = read(&both).expect("it is kept");
        assert_eq!((policy.gateways.len(), doubts.len()), (0, 1));
        assert!(read(&EXAMPLE.replace("matchLabels: {org", "matchLabel: {org")).is_err());
    }

    #[test]
    fn several_gateways_stand_beside_the_single_one() {
        let several = EXAMPLE.replace(
            "egressGateway:",
            "egressGateways: [{nodeSelector: {}, interface: eth1}, {nodeSelector: {}}], egressGateway:",
        );
        let (policy, doubts) = read(&several).expect("it is well formed");
        let names: Vec<Option<&str>> = policy.gateways.iter().map(|it| it.interface.as_deref()).collect();
        assert_eq!((names, doubts), (vec![None, Some("eth1"), None], vec![]));
    }
}
