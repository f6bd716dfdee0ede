//! Peers that are names: Services, nodes, groups of prefixes, the API server. What a name stands for may change,
//! and the policy does not.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::{Value, json};

use crate::lab::{Backend, Lab, OUTSIDE, Pod, ServicePort, Setup, Via};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

struct World {
    client: Pod,
    near: Pod,
    far: Pod,
    lab: Lab,
}

impl World {
    fn start() -> Result<Self> {
        let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
        let client = lab.pod(1, "shop/client").label("app", "client").create()?;
        let near = lab.pod(1, "shop/near").label("app", "near").create()?;
        let far = lab.pod(2, "store/far").label("app", "far").create()?;
        Ok(Self { client, near, far, lab })
    }

    /// What the client may send.
    fn egress(&self, rule: &Value) -> Result<()> {
        self.lab.manifests().write(&json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
            "metadata": {"name": "client", "namespace": "shop"},
            "spec": {"endpointSelector": {"matchLabels": {"app": "client"}}, "egress": [rule]},
        }))
    }

    fn backends(&self, key: (&str, &str), addresses: &[&str]) -> Result<()> {
        let addresses = addresses.iter().map(|text| Ok(text.parse()?)).collect::<Result<_>>()?;
        let backend = Backend { addresses, is_ready: true, node: "node1".to_owned() };
        self.lab.manifests().slices(key, &[ServicePort::from(("http", "TCP", 80, 80))], &[backend])
    }

    /// Whom the client reaches of near, far, and the two addresses outside, in both families.
    fn expect(&self, answered: &[&str]) -> Result<()> {
        let mut rows = Vec::new();
        for name in ["near", "far", "outside", "world"] {
            let addresses = match name {
                "near" => self.near.addresses().to_vec(),
                "far" => self.far.addresses().to_vec(),
                "outside" => vec![OUTSIDE[0].parse()?, OUTSIDE[1].parse()?],
                _ => vec![OUTSIDE[2].parse()?, OUTSIDE[3].parse()?],
            };
            let expected = if answered.contains(&name) { Expected::Answered } else { Expected::Denied };
            for address in addresses {
                let target = SocketAddr::new(address, 80);
                rows.push(Row::new(&self.client, Via::Tcp, target, expected).named(name));
            }
        }
        expect_all(&rows)
    }
}

#[test]
fn services_nodes_and_groups_stand_for_who_they_are_now() -> Result<()> {
    require_lab!();
    let world = World::start()?;
    let manifests = world.lab.manifests();
    world.expect(&["near", "far", "outside", "world"])?;
    // A Service with a selector is its pods, one without is the addresses of its slices.
    let service = |name: &str, selector: Value| {
        manifests.write(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "store"},
            "spec": {"clusterIP": "None", "selector": selector, "ports": [{"port": 80}]},
        }))
    };
    service("far", json!({"app": "far"}))?;
    service("elsewhere", Value::Null)?;
    let to =
        |name: &str| json!({"toServices": [{"k8sService": {"serviceName": name, "namespace": "store"}}]});
    world.egress(&to("far"))?;
    world.expect(&["far"])?;
    world.egress(&to("elsewhere"))?;
    world.expect(&[])?;
    world.backends(("store", "elsewhere"), &OUTSIDE[..2])?;
    world.expect(&["outside"])?;
    world.backends(("store", "elsewhere"), &OUTSIDE[2..])?;
    world.expect(&["world"])?;
    // Groups, with a hole, and one that there is not.
    let group = |cidrs: &[&str]| {
        manifests.write(&json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumCIDRGroup", "metadata": {"name": "partners"},
            "spec": {"externalCIDRs": cidrs},
        }))
    };
    world.egress(&json!({"toCIDRSet": [{"cidrGroupRef": "partners"}]}))?;
    world.expect(&[])?;
    group(&["203.0.113.0/24", "2001:db8:ffff::/48"])?;
    world.expect(&["world"])?;
    group(&["10.200.0.0/16", "fd00:200::/64"])?;
    world.expect(&["outside"])?;
    world.egress(
        &json!({"toCIDRSet": [{"cidrGroupRef": "partners", "except": ["10.200.0.0/16", "fd00:200::/64"]}]}),
    )?;
    world.expect(&[])?;
    // The API server, where its slices say.
    world.egress(&json!({"toEntities": ["kube-apiserver"]}))?;
    world.expect(&[])?;
    world.backends(("default", "kubernetes"), &OUTSIDE[2..])?;
    world.expect(&["world"])
}

#[test]
fn bypass_13_a_node_is_no_pod_that_runs_on_it() -> Result<()> {
    require_lab!();
    let world = World::start()?;
    world.lab.manifests().write(&json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "near", "namespace": "shop"},
        "spec": {"endpointSelector": {"matchLabels": {"app": "near"}}, "ingress": [
            {"fromNodes": [{"matchLabels": {"kubernetes.io/hostname": "node2"}}]},
        ]},
    }))?;
    let mut rows = Vec::new();
    for address in world.near.addresses() {
        let target = SocketAddr::new(*address, 80);
        let node = |number: usize| world.lab.node(number).space();
        rows.push(Row::from_space(node(2), "node2", Via::Tcp, target, Expected::Answered));
        // CVE-2025-30163: pods of the node were let in, too.
        rows.push(Row::new(&world.far, Via::Tcp, target, Expected::Denied));
        rows.push(Row::new(&world.client, Via::Tcp, target, Expected::Denied));
        rows.push(Row::from_space(world.lab.outside(), "outside", Via::Tcp, target, Expected::Denied));
        // The own node reaches its pods, whatever their policies say.
        rows.push(Row::from_space(node(1), "node1", Via::Tcp, target, Expected::Answered));
    }
    expect_all(&rows)
}
