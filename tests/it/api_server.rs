//! The Kubernetes source and the publisher against a real API server.
//!
//! Starts one ([`crate::control_plane`]), or takes one that this test may fill, named by
//! `WEIR_TEST_KUBECONFIG`: admin rights, service ranges 10.96.0.0/16 and fd02::/112, and neither controllers nor the
//! ServiceAccount admission plugin, so that what is created stays as it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use serde_json::json;
use weir::identity;
use weir::kube::crd::{Identity, IdentitySpec, NodeEndpoints as NodeEndpointsObject, crds};
use weir::kube::{Health, Kind, Publisher, Source, Tables};
use weir::model::{IdentityId, IdentityLabels, NodeEndpoints, ObjectKey, PublishedEndpoint};

/// One object of every kind.
const EVERY_KIND: &str = include_str!("../../src/kube/testdata/every_kind.yaml");

/// Tables that a source keeps filling.
struct Following {
    tables: Arc<Tables>,
    health: Arc<Health>,
    source: Source,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Following {
    async fn start(source: Source) -> Result<Self> {
        let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
        let task = tokio::spawn(weir::kube::run(source.clone(), tables.clone(), health.clone()));
        let synced = tokio::time::timeout(Duration::from_secs(30), tables.wait_synced()).await;
        synced.with_context(|| format!("waiting for the first lists: {:?}", health.kinds()))?;
        Ok(Self { tables, health, source, task })
    }

    async fn wait(&self, what: &str, is_so: impl Fn(&Tables) -> bool) -> Result<()> {
        let so = async {
            loop {
                let change = self.tables.changed();
                if is_so(&self.tables) {
                    return;
                }
                change.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), so).await.with_context(|| format!("waiting for {what}"))
    }
}

/// The tables as text, without uids, which only a server gives.
fn shown(tables: &Tables) -> Vec<String> {
    let pods: BTreeMap<_, _> = tables
        .pods
        .snapshot()
        .into_iter()
        .map(|(key, pod)| (key, weir::model::Pod { uid: String::new(), ..(*pod).clone() }))
        .collect();
    vec![
        format!("{:#?}", tables.namespaces.get(&Arc::from("shop"))),
        format!("{pods:#?}"),
        format!("{:#?}", tables.nodes.snapshot()),
        format!("{:#?}", tables.services.get(&ObjectKey::new("shop", "web"))),
        format!("{:#?}", tables.slices.get(&ObjectKey::new("shop", "web-abc"))),
        format!("{:#?}", tables.policies.snapshot()),
        format!("{:#?}", tables.identities.get(&IdentityId(4711))),
        format!("{:#?}", tables.node_endpoints.get(&Arc::from("a"))),
    ]
}

fn api_of(client: &Client, object: &DynamicObject) -> Result<Api<DynamicObject>> {
    let types = object.types.as_ref().context("the object says what it is")?;
    let kind = Kind::named(&types.kind);
    let (gvk, plural) = match kind {
        Some(kind) => (GroupVersionKind::gvk(kind.group(), kind.version(), kind.name()), kind.plural()),
        None => (
            GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition"),
            "customresourcedefinitions",
        ),
    };
    let resource = ApiResource::from_gvk_with_plural(&gvk, plural);
    Ok(match object.namespace() {
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

async fn create(client: &Client, object: &DynamicObject) -> Result<()> {
    let api = api_of(client, object)?;
    // A definition that was just created is served a moment later.
    for attempt in 0.. {
        match api.create(&PostParams::default(), object).await {
            Ok(_) => break,
            Err(kube::Error::Api(status)) if status.is_already_exists() => break,
            Err(kube::Error::Api(status)) if status.code == 404 && attempt < 100 => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("creating {}", object.name_any())),
        }
    }
    Ok(())
}

fn objects(yaml: &str) -> Result<Vec<DynamicObject>> {
    Ok(weir::yaml::read_all(yaml)?)
}

fn labels(app: &str) -> IdentityLabels {
    IdentityLabels {
        namespace: "shop".to_owned(),
        service_account: "default".to_owned(),
        pod_labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        ..IdentityLabels::default()
    }
}

fn endpoints(count: usize) -> NodeEndpoints {
    let endpoint = |number: usize| PublishedEndpoint {
        pod: ObjectKey::new("shop", format!("web-{number:04}")),
        addresses: vec![std::net::Ipv4Addr::from(0x0a00_0000 + number as u32).into()],
        identity: IdentityId(4711),
        workload: None,
        host_ports: Vec::new(),
    };
    let internal_addresses = vec![std::net::Ipv4Addr::new(10, 1, 0, 1).into()];
    NodeEndpoints { node: "b".to_owned(), internal_addresses, endpoints: (0..count).map(endpoint).collect() }
}

#[test]
fn the_api_server_s_objects_and_ours() -> Result<()> {
    let plane;
    let path = match std::env::var_os("WEIR_TEST_KUBECONFIG").map(PathBuf::from) {
        Some(path) => path,
        None => {
            let Some(started) = crate::control_plane::start("the_api_server_s_objects_and_ours")? else {
                return Ok(());
            };
            plane = started;
            plane.admin()?
        }
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(against(&path))
}

async fn against(kubeconfig: &Path) -> Result<()> {
    let options = kube::config::KubeConfigOptions::default();
    let config = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let client = Client::try_from(kube::Config::from_custom_kubeconfig(config, &options).await?)?;
    for definition in crds() {
        create(&client, &serde_json::from_value(serde_json::to_value(definition)?)?).await?;
    }
    // Nothing defines these groups here: a cluster may be without them.
    let undefined = ["cilium.io/", "policy.networking.k8s.io/"];
    let is_defined = |object: &DynamicObject| {
        let version = object.types.as_ref().map_or("", |types| &types.api_version);
        !undefined.iter().any(|group| version.starts_with(group))
    };
    for mut object in objects(EVERY_KIND)?.into_iter().filter(is_defined) {
        // The server gives these.
        object.metadata.uid = None;
        create(&client, &object).await?;
    }
    let following = Following::start(Source::Kubernetes(client.clone(), "a".to_owned())).await?;
    both_sources_say_the_same(&following.tables).await?;
    changes_are_followed(&client, &following).await?;
    numbers_are_claimed_once(&client, &following).await?;
    nobody_changes_an_identity(&client).await?;
    endpoints_come_and_go(&client, &following).await?;
    ensure!(following.health.reports().is_empty(), "{:?}", following.health.reports());
    a_kind_that_is_defined_late_is_found(&client, &following).await?;
    Ok(())
}

/// Until then the cluster has no such objects, and the agent is as ready as ever.
pub const CIDR_GROUPS: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: ciliumcidrgroups.cilium.io}
spec:
  group: cilium.io
  scope: Cluster
  names: {kind: CiliumCIDRGroup, plural: ciliumcidrgroups, singular: ciliumcidrgroup}
  versions:
  - name: v2
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
";

async fn a_kind_that_is_defined_late_is_found(client: &Client, following: &Following) -> Result<()> {
    let kind = Kind::named("CiliumCIDRGroup").context("it is a kind")?;
    ensure!(kind.count(&following.tables) == 0);
    let groups = "
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: office}
spec: {externalCIDRs: [198.51.100.0/24, 198.51.100.300/32]}
";
    for object in objects(CIDR_GROUPS)?.into_iter().chain(objects(groups)?) {
        create(client, &object).await?;
    }
    let found = async {
        while following.health.reports().is_empty() || kind.count(&following.tables) == 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.context("waiting for the group")?;
    let reports = following.health.reports();
    let said = "spec.externalCIDRs[1]: \"198.51.100.300/32\" is not a CIDR";
    ensure!(reports[0].reason.contains(said) && reports[0].reason.contains("closed"), "{reports:?}");
    Ok(())
}

async fn both_sources_say_the_same(tables: &Tables) -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("all.yaml"), EVERY_KIND)?;
    let manifests = Following::start(Source::Manifests(directory.path().to_owned())).await?;
    for (from_api, from_file) in shown(tables).iter().zip(shown(&manifests.tables)) {
        assert_eq!(*from_api, from_file);
    }
    Ok(())
}

async fn changes_are_followed(client: &Client, following: &Following) -> Result<()> {
    let namespace: DynamicObject = serde_json::from_value(
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "late"}}),
    )?;
    let api = api_of(client, &namespace)?;
    let is_there = |tables: &Tables| tables.namespaces.get(&Arc::from("late")).is_some();
    create(client, &namespace).await?;
    following.wait("the namespace", is_there).await?;
    // A namespace goes with its finalizers, which no controller removes here.
    let pod = |name: &str, node: &str| {
        serde_json::from_value::<DynamicObject>(json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "late"},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [{"name": "a", "image": "b"}]}}))
    };
    create(client, &pod("elsewhere", "b")?).await?;
    create(client, &pod("here", "a")?).await?;
    let here = ObjectKey::new("late", "here");
    following.wait("the pod", |tables| tables.pods.get(&here).is_some()).await?;
    ensure!(
        following.tables.pods.get(&ObjectKey::new("late", "elsewhere")).is_none(),
        "a pod of another node"
    );
    let pods = api_of(client, &pod("here", "a")?)?;
    for name in ["here", "elsewhere"] {
        pods.delete(name, &DeleteParams::default().grace_period(0)).await?;
    }
    following.wait("the pod's end", |tables| tables.pods.get(&here).is_none()).await?;
    api.delete("late", &DeleteParams::default()).await?;
    Ok(())
}

async fn numbers_are_claimed_once(client: &Client, following: &Following) -> Result<()> {
    let publisher =
        |node: &str| Publisher::new(&following.source, node, Arc::new(Tables::new())).map(Arc::new);
    let publishers = [publisher("a")?, publisher("b")?, publisher("c")?];
    // Somebody else's labels have the number that "taken" hashes to.
    let first = identity::number(&labels("taken"), 0);
    let taken: Api<Identity> = Api::all(client.clone());
    taken
        .create(&Default::default(), &Identity::new(&first.to_string(), IdentitySpec::from(&labels("other"))))
        .await?;
    for app in ["web", "api", "taken"] {
        let labels = labels(app);
        let claims = publishers.iter().map(|publisher| publisher.claim_identity(&labels));
        let ids = futures::future::try_join_all(claims.collect::<Vec<_>>()).await?;
        ensure!(ids.iter().all(|id| *id == ids[0]), "{app} has numbers {ids:?}");
        let attempt = u32::from(app == "taken");
        ensure!(ids[0] == identity::number(&labels, attempt), "{app} has number {}", ids[0]);
        let is_there = |tables: &Tables| tables.identities.get(&ids[0]).as_deref() == Some(&labels);
        following.wait("the identity", is_there).await?;
    }
    Ok(())
}

async fn nobody_changes_an_identity(client: &Client) -> Result<()> {
    let identities: Api<Identity> = Api::all(client.clone());
    let patch = Patch::Merge(json!({"spec": {"podLabels": {"app": "admin"}}}));
    let error =
        identities.patch("4711", &PatchParams::default(), &patch).await.err().context("the change passed")?;
    ensure!(error.to_string().contains("an identity never changes"), "{error}");
    let named = Identity::new("not-a-number", IdentitySpec::from(&labels("x")));
    let error = identities.create(&Default::default(), &named).await.err().context("the name passed")?;
    ensure!(error.to_string().contains("the name must be an identity's number"), "{error}");
    let endpoints: Api<NodeEndpointsObject> = Api::all(client.clone());
    let mut other = endpoints.get("a-0").await?;
    other.metadata = kube::core::ObjectMeta { name: Some("b-7".to_owned()), ..Default::default() };
    let error =
        endpoints.create(&Default::default(), &other).await.err().context("the other's name passed")?;
    ensure!(error.to_string().contains("the name must be the node's"), "{error}");
    Ok(())
}

async fn endpoints_come_and_go(client: &Client, following: &Following) -> Result<()> {
    let api: Api<NodeEndpointsObject> = Api::all(client.clone());
    let publisher = Publisher::new(&following.source, "b", following.tables.clone())?;
    let restarted = Publisher::new(&following.source, "b", following.tables.clone())?;
    for (publisher, count, objects) in [
        (&publisher, 0, 1),
        (&publisher, 450, 3),
        (&publisher, 449, 3),
        (&publisher, 3, 1),
        (&publisher, 401, 3),
        (&restarted, 1, 1),
    ] {
        publisher.publish_endpoints(&endpoints(count)).await?;
        let is_there = |tables: &Tables| {
            tables.node_endpoints.get(&Arc::from("b")).as_deref() == Some(&endpoints(count))
        };
        following.wait(&format!("{count} endpoints"), is_there).await?;
        let there = api.list(&ListParams::default()).await?;
        let there = there.iter().filter(|object| object.spec.node == "b").count();
        ensure!(there == objects, "{count} endpoints are in {there} objects");
    }
    Ok(())
}
