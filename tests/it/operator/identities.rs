//! Garbage collection of identities while agents claim, use and give them up.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use weir::kube::crd::Identity;
use weir::kube::{Health, Publisher, Source, Tables};
use weir::model::{IdentityId, IdentityLabels, NodeEndpoints, ObjectKey, PublishedEndpoint};

use super::*;

const AGENTS: usize = 10;
const LABEL_SETS: usize = 24;
const RUN: Duration = Duration::from_secs(25);

fn labels(number: usize) -> IdentityLabels {
    IdentityLabels {
        namespace: "shop".to_owned(),
        service_account: "default".to_owned(),
        pod_labels: BTreeMap::from([("app".to_owned(), format!("app-{number}"))]),
        ..IdentityLabels::default()
    }
}

/// An agent less its datapath: tables that follow the API server, and what publishes.
struct Agent {
    name: String,
    tables: Arc<Tables>,
    publisher: Publisher,
    identities: Api<Identity>,
    following: tokio::task::JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.following.abort();
    }
}

impl Agent {
    async fn start(plane: &ControlPlane, name: &str) -> Result<Self> {
        let client = client_of(&plane.as_account("weir-agent", name).await?).await?;
        let source = Source::Kubernetes(client.clone(), name.to_owned());
        let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
        let following = tokio::spawn(weir::kube::run(source.clone(), tables.clone(), health));
        tokio::time::timeout(PATIENCE, tables.wait_synced()).await.context("waiting for the first lists")?;
        let publisher = Publisher::new(&source, name, tables.clone())?;
        Ok(Self { name: name.to_owned(), tables, publisher, identities: Api::all(client), following })
    }

    fn hold(&self, held: Option<(IdentityId, &IdentityLabels)>) {
        self.tables
            .hold_identities(held.map(|(id, labels)| (id, Arc::new(labels.clone()))).into_iter().collect());
    }

    async fn publish(&self, identity: Option<IdentityId>) -> Result<()> {
        let endpoint = |identity| PublishedEndpoint {
            pod: ObjectKey::new("shop", "web"),
            addresses: vec![Ipv4Addr::new(10, 1, 0, 2).into()],
            identity,
        };
        let endpoints = identity.map(endpoint).into_iter().collect();
        let all = NodeEndpoints { node: self.name.clone(), internal_addresses: vec![], endpoints };
        self.publisher.publish_endpoints(&all).await
    }

    /// A pod's life: its identity is claimed, it runs, the others hear of it, it ends. While it runs its
    /// identity is there, with its labels.
    async fn run_pod(&self, labels: &IdentityLabels, random: &mut Random) -> Result<()> {
        let id = self.publisher.claim_identity(labels).await?;
        self.hold(Some((id, labels)));
        sleep(Duration::from_millis(random.below(60))).await;
        self.publish(Some(id)).await?;
        let end = Instant::now() + Duration::from_millis(random.below(1200));
        loop {
            let there = self.identities.get_opt(&id.to_string()).await?;
            let is_right = there.is_some_and(|there| there.spec.pod_labels == labels.pod_labels);
            ensure!(is_right, "identity {id} of a running pod of {} is gone or another's", self.name);
            ensure!(self.tables.identities.get(&id).as_deref() == Some(labels), "the row of {id} is gone");
            if Instant::now() > end {
                break;
            }
            sleep(Duration::from_millis(50)).await;
        }
        self.publish(None).await?;
        self.hold(None);
        sleep(Duration::from_millis(random.below(1200))).await;
        Ok(())
    }
}

/// Enough to mix things up, and the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn identities_in_use_are_never_collected() -> Result<()> {
    with_plane("identities_in_use_are_never_collected", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        let operator = Replica::start(&plane, "one", &["--identity-grace-seconds", "1"]).await?;
        until("the definitions", || async {
            Ok(operator.log().contains("looking after nodes").then_some(()))
        })
        .await?;
        let lives = AtomicUsize::new(0);
        let end = Instant::now() + RUN;
        let agents = (0..AGENTS).map(async |number| {
            let agent = Agent::start(&plane, &format!("node-{number}")).await?;
            let mut random = Random(number as u64 + 1);
            while Instant::now() < end {
                agent.run_pod(&labels(random.below(LABEL_SETS as u64) as usize), &mut random).await?;
                lives.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(agent)
        });
        let agents = futures::future::try_join_all(agents).await?;
        let during = operator.metric("weir_operator_identities_deleted_total").await?;
        // Nobody has any now.
        let identities: Api<Identity> = Api::all(client.clone());
        until("every identity to be collected", || async {
            Ok(identities.list(&Default::default()).await?.items.is_empty().then_some(()))
        })
        .await?;
        ensure!(during > 5.0, "only {during} were collected while pods ran: the race was not run");
        println!("{} pods, {during} identities collected meanwhile", lives.load(Ordering::Relaxed));
        a_cut_off_agent_gets_its_identity_back(&agents[0], &identities).await
    })
}

/// Somebody deletes what pods of a node have: the row stays, and the object is made again.
async fn a_cut_off_agent_gets_its_identity_back(agent: &Agent, identities: &Api<Identity>) -> Result<()> {
    let labels = labels(99);
    let id = agent.publisher.claim_identity(&labels).await?;
    agent.hold(Some((id, &labels)));
    agent.publish(Some(id)).await?;
    identities.delete(&id.to_string(), &Default::default()).await?;
    until("the agent to hear of it", || async { Ok(agent.tables.to_claim.get(&id)) }).await?;
    ensure!(agent.tables.identities.get(&id).as_deref() == Some(&labels), "the row must stay");
    ensure!(agent.publisher.claim_identity(&labels).await? == id, "it has another number now");
    ensure!(identities.get_opt(&id.to_string()).await?.is_some(), "the object is not there again");
    ensure!(agent.tables.to_claim.get(&id).is_none(), "it is still to be claimed");
    Ok(())
}
