//! What the token of an agent is good for: its own node, and nothing else.

use std::sync::Arc;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{ListParams, Patch, PatchParams};
use weir::kube::crd::{Identity, IdentitySpec, UNUSED_SINCE, WeirNodeSpec, WeirNodeStatus};
use weir::kube::{Board, Publisher, Source, Tables};
use weir::model::{self, IdentityLabels, ObjectKey};

use super::*;

/// The agent of `token`'s node, speaking for `node`.
fn speaking_for(token: &Client, node: &str) -> Result<Publisher> {
    Publisher::new(&Source::Kubernetes(token.clone(), node.to_owned()), node, Arc::new(Tables::new()))
}

#[test]
fn an_agent_writes_for_its_own_node_only() -> Result<()> {
    with_plane("an_agent_writes_for_its_own_node_only", async |plane| {
        plane.apply_base().await?;
        for definition in weir::kube::crd::crds() {
            plane.apply(&weir::yaml::write(&definition)?).await?;
        }
        let admin = plane.client().await?;
        let agent = client_of(&plane.as_account("weir-agent", "a").await?).await?;
        let (own, other) = (speaking_for(&agent, "a")?, speaking_for(&agent, "b")?);
        let status = WeirNodeStatus { version: "1".to_owned(), ready: true, ..WeirNodeStatus::default() };
        let endpoints = |node: &str| model::NodeEndpoints {
            node: node.to_owned(),
            internal_addresses: vec![],
            endpoints: vec![],
        };
        // A policy is in force some moments after it was made.
        until("the policy to be in force", || async {
            Ok(format!("{:#}", other.publish_node(&status).await.err().context("b was written")?)
                .contains("may write its own WeirNode only")
                .then_some(()))
        })
        .await?;
        until("the definitions to be served", || async { own.publish_node(&status).await.map(Some) }).await?;
        own.beat().await?;
        own.publish_endpoints(&endpoints("a")).await?;
        let weir_nodes: Api<WeirNode> = Api::all(admin.clone());
        ensure!(weir_nodes.get("a").await?.status.is_some_and(|status| status.ready));

        // Of another node, that is there and that is not; what was written before the policy was in
        // force goes first.
        weir_nodes.delete("b", &Default::default()).await.ok();
        weir_nodes.create(&Default::default(), &WeirNode::new("b", WeirNodeSpec::default())).await.ok();
        for (refused, message) in [
            (other.publish_node(&status).await, "its own WeirNode only"),
            (other.beat().await, "its own heartbeat and leadership only"),
            (other.publish_endpoints(&endpoints("b")).await, "its own endpoints only"),
        ] {
            let error = format!("{:#}", refused.err().context("it was written")?);
            ensure!(error.contains(message), "{error}");
        }
        ensure!(weir_nodes.get("b").await?.status.is_none_or(|status| !status.ready));

        let of_agent: Api<WeirNode> = Api::all(agent.clone());
        let cidrs = Patch::Merge(json!({"spec": {"podCIDRs": ["10.0.0.0/24"]}}));
        ensure!(
            is_refused(of_agent.patch("a", &PatchParams::default(), &cidrs).await),
            "it gave itself pod CIDRs"
        );
        ensure!(is_forbidden(of_agent.delete("a", &Default::default()).await), "it deleted its WeirNode");
        identities(&agent).await?;
        leadership(&admin, &agent).await?;
        a6_addresses_outside_of_the_nodes_pod_cidrs_are_refused(&admin, &own).await?;

        ensure!(is_forbidden(Api::<Secret>::all(agent.clone()).list(&ListParams::default()).await));
        let pods: Api<Pod> = Api::namespaced(agent.clone(), "weir-system");
        let pod = serde_json::from_value(
            json!({"metadata": {"name": "x"}, "spec": {"containers": [{"name": "a", "image": "b"}]}}),
        )?;
        ensure!(is_forbidden(pods.create(&Default::default(), &pod).await));
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(agent.clone());
        let taint = Patch::Merge(json!({"spec": {"taints": []}}));
        ensure!(is_forbidden(nodes.patch("a", &PatchParams::default(), &taint).await));
        let leader: Api<Lease> = Api::namespaced(agent.clone(), "weir-system");
        let lease: Lease = serde_json::from_value(json!({"metadata": {"name": "weir-operator"}}))?;
        ensure!(is_refused(leader.create(&Default::default(), &lease).await), "it led");
        Ok(())
    })
}

async fn a6_addresses_outside_of_the_nodes_pod_cidrs_are_refused(
    admin: &Client,
    own: &Publisher,
) -> Result<()> {
    let cidrs = json!({"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24", "fd09::/64"]});
    create_node(admin, "a", cidrs).await?;
    let publish = async |internal: &str, address: &str| {
        let endpoint = model::PublishedEndpoint {
            pod: model::ObjectKey::new("shop", "web"),
            addresses: vec![address.parse()?],
            identity: model::IdentityId(4711),
            workload: None,
            host_ports: Vec::new(),
        };
        let (internal_addresses, endpoints) = (vec![internal.parse()?], vec![endpoint]);
        own.publish_endpoints(&model::NodeEndpoints { node: "a".to_owned(), internal_addresses, endpoints })
            .await
    };
    until("the Node to be known to the policy", || async {
        let refused = publish("10.9.0.1", "203.0.113.9").await.err();
        Ok(refused.filter(|error| format!("{error:#}").contains("must be within its pod CIDRs")).map(drop))
    })
    .await?;
    ensure!(publish("172.16.0.1", "10.9.0.2").await.is_err(), "an address of its own outside");
    ensure!(publish("10.9.0.1", "fd08::2").await.is_err(), "a pod outside");
    publish("fd09::1", "fd09::2").await?;
    publish("10.9.0.1", "10.9.0.2").await
}

/// It claims identities, and cannot end them.
async fn identities(agent: &Client) -> Result<()> {
    let labels = IdentityLabels {
        namespace: "shop".to_owned(),
        service_account: "x".to_owned(),
        ..Default::default()
    };
    let id = speaking_for(agent, "a")?.claim_identity(&labels).await?.to_string();
    let identities: Api<Identity> = Api::all(agent.clone());
    let mark = Patch::Merge(json!({"metadata": {"annotations": {UNUSED_SINCE: "1"}}}));
    ensure!(is_refused(identities.patch(&id, &PatchParams::default(), &mark).await), "it marked an identity");
    let owner = json!({"apiVersion": "v1", "kind": "Node", "name": "gone", "uid": "1"});
    let owned = Patch::Merge(json!({"metadata": {"ownerReferences": [owner]}}));
    ensure!(is_refused(identities.patch(&id, &PatchParams::default(), &owned).await), "it gave one an owner");
    ensure!(is_forbidden(identities.delete(&id, &Default::default()).await), "it deleted an identity");
    ensure!(identities.get(&id).await?.spec == IdentitySpec::from(&labels));
    Ok(())
}

/// The admission policy said no.
fn is_refused<T>(answer: Result<T, kube::Error>) -> bool {
    matches!(answer, Err(kube::Error::Api(status)) if matches!(status.code, 403 | 422))
}

/// An agent makes its own node the leader of a Service's addresses, and no other node.
async fn leadership(admin: &Client, agent: &Client) -> Result<()> {
    let source = Source::Kubernetes(agent.clone(), "a".to_owned());
    let board = Arc::new(Board::new(&source, "a", Duration::from_secs(10)));
    let following = board.clone();
    let following = tokio::spawn(async move { following.follow().await });
    until("the first list of Leases", || board.read()).await?;
    board.renew().await?;
    let service = ObjectKey::new("shop", "web");
    let posted = |holder: &'static str| {
        let (board, service) = (&board, &service);
        until("the watch to say so", move || async move {
            let all = board.read().await?.context("a list")?;
            Ok(all.services.get(service).filter(|posted| posted.holder == holder).cloned())
        })
    };
    let refused = |outcome: Result<bool>| {
        let error = format!("{:#}", outcome.err().context("it was written")?);
        ensure!(error.contains("its own heartbeat and leadership only"), "{error}");
        anyhow::Ok(())
    };
    refused(board.post(&service, None, "b").await)?;
    ensure!(board.post(&service, None, "a").await?, "it leads");
    ensure!(!board.post(&service, None, "a").await?, "there is a leader already");
    refused(board.post(&service, Some(&posted("a").await?), "b").await)?;
    ensure!(board.post(&service, Some(&posted("a").await?), "").await?, "it gives back");
    let old = posted("").await?;
    let leases: Api<k8s_openapi::api::coordination::v1::Lease> =
        Api::namespaced(admin.clone(), "weir-system");
    let other = Patch::Merge(json!({"spec": {"holderIdentity": "b"}}));
    leases.patch("announce-shop.web", &PatchParams::default(), &other).await?;
    ensure!(!board.post(&service, Some(&old), "a").await?, "b was first");
    let new = posted("b").await?;
    refused(board.remove(&service, &new).await)?;
    ensure!(board.post(&service, Some(&new), "a").await?, "it takes over");
    ensure!(board.remove(&service, &posted("a").await?).await?, "it takes its Lease away");
    ensure!(board.read().await?.context("a list")?.nodes.contains_key("a"), "the node's own Lease is seen");
    following.abort();
    Ok(())
}
