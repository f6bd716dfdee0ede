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

    /// A selector that cannot be read selects by what of it can, and then by no gateway; one of which nothing is left
    /// selects nothing. A destination that cannot be read is any, by no gateway; a gateway that cannot be read is none.
    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<EgressPolicy>> {
        let spec = document.get("spec")?;
        let selectors = spec.get("selectors").and_then(|list| items(&list));
        let selectors = notes.read(selectors).unwrap_or_default();
        let (mut pods, mut is_wider) = (Vec::new(), false);
        for rule in &selectors {
            let doubts = notes.doubt_count();
            pods.extend(pods_of(rule, notes).inspect(|_| is_wider |= notes.doubt_count() > doubts));
        }
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
        if is_wider {
            // Nobody meant these pods to have the address.
            gateways.clear();
        }
        Ok(Some(EgressPolicy { key: id.key.clone(), pods, destinations, excluded, gateways, is_partial }))
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<EgressPolicy>> {
        rows::plain(tables.of::<Self>(), ObjectKey::clone)
    }
}

fn pods_of(rule: &Field, notes: &mut Notes) -> Option<EgressPods> {
    let doubts = notes.doubt_count();
    notes.read(rule.only_known(&["podSelector", "namespaceSelector", "nodeSelector"]));
    let pod = rule.get("podSelector");
    let pod = pod.and_then(|it| if it.is_present() { of_pods(&it) } else { Ok(Default::default()) });
    let (mut namespaces, pods) = notes.read(pod).unwrap_or_default();
    let of = |name| rule.get(name).and_then(|it| of_labels(&it));
    namespaces.extend(notes.read(of("namespaceSelector")).unwrap_or_default().requirements);
    let nodes = notes.read(of("nodeSelector")).unwrap_or_default();
    let is_bare = namespaces.is_empty() && pods.is_empty() && nodes.requirements.is_empty();
    // One typo does not close the cluster.
    (!is_bare || notes.doubt_count() == doubts).then(|| EgressPods {
        namespaces: Selector::new(namespaces),
        pods: Selector::new(pods),
        nodes,
    })
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
        // A selector of which nothing is left selects nothing; one that lost a part leads by no gateway.
        let (policy, doubts) = read(&EXAMPLE.replace("matchLabels: {org", "matchLabel: {org")).expect("kept");
        assert_eq!((policy.pods.len(), policy.gateways.len(), doubts.len()), (0, 1, 1));
        let partial = "{selectors: [{namespaceSelector: {matchLabels: {team: a}}, podSelector: {matchLabel: {}}}], \
            destinationCIDRs: [0.0.0.0/0], egressGateway: {nodeSelector: {}}}";
        let (policy, doubts) = read(partial).expect("kept");
        assert_eq!((policy.pods.len(), policy.gateways.len(), doubts.len()), (1, 0, 1));
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
