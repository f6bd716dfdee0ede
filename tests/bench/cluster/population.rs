//! The objects of a large cluster, as kubelets, controllers and other nodes' agents write them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::Api;
use kube::core::NamespaceResourceScope;
use kube::{Client, Resource};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use weir::identity;
use weir::kube::crd::{Endpoint, Identity, IdentitySpec, NodeEndpoints, NodeEndpointsSpec};
use weir::model::{IdentityId, IdentityLabels};

use super::world::node_object;

pub const NODES: usize = 1000;
pub const PODS_PER_NODE: usize = 50;
pub const IDENTITIES: usize = 2000;
pub const SERVICES: usize = 5000;
pub const POLICIES: usize = 1000;
pub const NAMESPACES: usize = 100;
const BACKENDS: usize = NODES * PODS_PER_NODE / SERVICES;
/// Objects that are created at the same time.
const AT_ONCE: usize = 48;

/// A namespace of the cluster.
pub fn namespace(number: usize) -> String {
    format!("team-{}", number % NAMESPACES)
}

/// The labels of the pods of identity `number`, which are in `namespace(number)`.
pub fn pod_labels(number: usize) -> BTreeMap<String, String> {
    let app = number / NAMESPACES;
    let tier = ["front", "middle", "back"][app % 3];
    [("app", format!("app-{app}")), ("tier", tier.to_owned())]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
}

/// The name of another node, from 2.
pub fn node_name(number: usize) -> String {
    format!("other-{number}")
}

/// Both addresses of pod `pod` of node `node`.
fn addresses(node: usize, pod: usize) -> [String; 2] {
    let [high, low] = [node / 256, node % 256];
    [format!("10.{}.{low}.{}", 16 + high, pod + 2), format!("fd00:2:0:{node:x}::{:x}", pod + 2)]
}

/// Which identity the pod has.
fn identity_of(node: usize, pod: usize) -> usize {
    (node * PODS_PER_NODE + pod) % IDENTITIES
}

/// The labels that identity `number` stands for.
fn labels(number: usize) -> IdentityLabels {
    let namespace = namespace(number);
    let name = ("kubernetes.io/metadata.name".to_owned(), namespace.clone());
    IdentityLabels {
        namespace,
        namespace_labels: [name].into(),
        service_account: "default".to_owned(),
        pod_labels: pod_labels(number),
        named_ports: BTreeMap::new(),
    }
}

/// Everything but the nodes that run here, and what the cluster's identities are called.
pub async fn write(client: &Client) -> Result<Vec<IdentityId>> {
    let identities = identities();
    let namespaced = (0..NAMESPACES).map(|number| json!({"metadata": {"name": namespace(number)}}));
    create::<Namespace>(Api::all(client.clone()), namespaced.collect()).await?;
    let nodes = (2..=NODES).map(|number| -> Result<Value> {
        let own: IpAddr = format!("10.201.{}.{}", number / 250, number % 250 + 1).parse()?;
        let [high, low] = [number / 256, number % 256];
        let cidrs = [format!("10.{}.{low}.0/24", 16 + high), format!("fd00:2:0:{number:x}::/64")];
        Ok(node_object(&node_name(number), &[own, format!("fd00:201::{number:x}").parse()?], &cidrs))
    });
    create::<Node>(Api::all(client.clone()), nodes.collect::<Result<_>>()?).await?;
    let objects = identities.iter().enumerate().map(|(number, id)| {
        serde_json::to_value(Identity::new(&id.to_string(), IdentitySpec::from(&labels(number))))
    });
    create::<Identity>(Api::all(client.clone()), objects.collect::<Result<_, _>>()?).await?;
    let published = (2..=NODES).map(|number| {
        let spec = node_endpoints(number, &identities, 0);
        serde_json::to_value(NodeEndpoints::new(&format!("{}-0", node_name(number)), spec))
    });
    create::<NodeEndpoints>(Api::all(client.clone()), published.collect::<Result<_, _>>()?).await?;
    create_in::<Service>(client, (0..SERVICES).map(service).collect()).await?;
    create_in::<EndpointSlice>(client, (0..SERVICES).flat_map(slices).collect()).await?;
    create_in::<NetworkPolicy>(client, (0..POLICIES).map(policy).collect()).await?;
    Ok(identities)
}

/// The number of each identity: as agents claim them, without those that hash to a taken one.
fn identities() -> Vec<IdentityId> {
    let mut taken = BTreeSet::new();
    let number = |number| {
        let labels = labels(number);
        let free = (0..).map(|attempt| identity::number(&labels, attempt)).find(|id| taken.insert(*id));
        free.expect("there are 2^24 numbers")
    };
    (0..IDENTITIES).map(number).collect()
}

/// What node `number` publishes; its first pod has been replaced `changes` times.
pub fn node_endpoints(number: usize, identities: &[IdentityId], changes: usize) -> NodeEndpointsSpec {
    let endpoint = |pod: usize| {
        // A pod that replaces another has the next address that is free.
        let at = if pod == 0 { changes % 100 * 2 % 150 + 60 } else { pod };
        let identity = identity_of(number, pod);
        Endpoint {
            namespace: namespace(identity),
            name: format!("app-{}-5d4f8c7b9-{number:03x}{at:02x}", identity / NAMESPACES),
            addresses: addresses(number, at).into(),
            identity: identities[identity].0,
            workload: None,
            host_ports: Vec::new(),
        }
    };
    NodeEndpointsSpec {
        node: node_name(number),
        internal_addresses: [
            format!("10.{}.{}.1", 16 + number / 256, number % 256),
            format!("fd00:2:0:{number:x}::1"),
        ]
        .into(),
        endpoints: (0..PODS_PER_NODE).map(endpoint).collect(),
    }
}

fn service(number: usize) -> Value {
    let cluster_ips =
        [format!("10.96.{}.{}", 1 + number / 250, 1 + number % 250), format!("fd02::{:x}", 0x1000 + number)];
    json!({
        "metadata": {"name": format!("service-{number}"), "namespace": namespace(number)},
        "spec": {
            "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ipFamilyPolicy": "RequireDualStack",
            "selector": pod_labels(number % IDENTITIES),
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "metrics", "port": 9090}],
        },
    })
}

/// One of each family.
fn slices(number: usize) -> [Value; 2] {
    ["IPv4", "IPv6"].map(|family| {
        let backend = |index: usize| {
            let (node, pod) = (2 + (number + index * 97) % (NODES - 1), 1 + (number + index) % (PODS_PER_NODE - 1));
            let address = &addresses(node, pod)[usize::from(family == "IPv6")];
            json!({"addresses": [address], "nodeName": node_name(node),
                "conditions": {"ready": true, "serving": true, "terminating": false}})
        };
        json!({
            "metadata": {"name": format!("service-{number}-{}", family.to_lowercase()), "namespace": namespace(number),
                "labels": {"kubernetes.io/service-name": format!("service-{number}")}},
            "addressType": family,
            "endpoints": (0..BACKENDS).map(backend).collect::<Vec<_>>(),
            "ports": [{"name": "http", "port": 8080}, {"name": "metrics", "port": 9090}],
        })
    })
}

/// Each namespace has ten; one in ten of the namespaces also says what may leave it.
fn policy(number: usize) -> Value {
    let app = number / NAMESPACES * 2;
    let mut spec = json!({
        "podSelector": {"matchLabels": {"app": format!("app-{app}")}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"tier": "front"}}}],
             "ports": [{"port": 8080}, {"port": 9000, "endPort": 9100}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace(number + 1)}},
                "podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["app-1", "app-2"]}]}}],
             "ports": [{"port": 9090}]},
        ],
    });
    if number.is_multiple_of(10) {
        spec["policyTypes"] = json!(["Ingress", "Egress"]);
        spec["egress"] = json!([
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}], "ports": [{"port": 443}]},
            {"to": [{"podSelector": {}}]},
        ]);
    }
    json!({"metadata": {"name": format!("policy-{number}"), "namespace": namespace(number)}, "spec": spec})
}

async fn create<K>(api: Api<K>, objects: Vec<Value>) -> Result<()>
where
    K: Clone + Debug + Serialize + DeserializeOwned,
{
    let created = objects.into_iter().map(|object| create_one(api.clone(), object));
    futures::stream::iter(created).buffer_unordered(AT_ONCE).try_collect().await
}

async fn create_in<K>(client: &Client, objects: Vec<Value>) -> Result<()>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned,
{
    let created = objects.into_iter().map(|object| {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        create_one::<K>(Api::namespaced(client.clone(), namespace), object)
    });
    futures::stream::iter(created).buffer_unordered(AT_ONCE).try_collect().await
}

async fn create_one<K>(api: Api<K>, object: Value) -> Result<()>
where
    K: Clone + Debug + Serialize + DeserializeOwned,
{
    let name = object["metadata"]["name"].to_string();
    let object = serde_json::from_value(object).with_context(|| format!("making {name}"))?;
    api.create(&Default::default(), &object).await.with_context(|| format!("creating {name}"))?;
    Ok(())
}
