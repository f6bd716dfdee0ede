//! Garbage collection of identities while agents claim, use and give them up: by the operator, and in a
//! directory of manifests by every agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use weir::kube::crd::Identity;
use weir::kube::{Collector, Health, Publisher, Source, Tables};
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

/// An agent less its datapath: tables that follow the source, and what publishes.
struct Agent {
    name: String,
    tables: Arc<Tables>,
    publisher: Publisher,
    identities: Identities,
    following: tokio::task::JoinHandle<()>,
}

/// Where identities are looked up, past the agents.
enum Identities {
    Objects(Box<Api<Identity>>),
    Files(PathBuf),
}

impl Identities {
    async fn get(&self, id: IdentityId) -> Result<Option<Identity>> {
        match self {
            Self::Objects(api) => Ok(api.get_opt(&id.to_string()).await?),
            Self::Files(directory) => {
                let read = || fs::read_to_string(directory.join(format!("identity-{id}.yaml"))).ok();
                let mut text = read();
                if text.is_none() {
                    // One that is taken away, looked at and put back is away for a moment.
                    sleep(Duration::from_millis(50)).await;
                    text = read();
                }
                Ok(text.map(|text| weir::yaml::read(&text)).transpose()?)
            }
        }
    }
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
        Self::follow(source, name, Identities::Objects(Box::new(Api::all(client)))).await
    }

    async fn follow(source: Source, name: &str, identities: Identities) -> Result<Self> {
        let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
        let following = tokio::spawn(weir::kube::run(source.clone(), tables.clone(), health));
        tokio::time::timeout(PATIENCE, tables.wait_synced()).await.context("waiting for the first lists")?;
        let publisher = Publisher::new(&source, name, tables.clone())?;
        Ok(Self { name: name.to_owned(), tables, publisher, identities, following })
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
            workload: None,
            host_ports: Vec::new(),
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
            let there = self.identities.get(id).await?;
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

/// Pods of `agent`, one after the other, until `end`; how many.
async fn run_pods(agent: &Agent, number: usize, end: Instant) -> Result<usize> {
    let (mut random, mut count) = (Random(number as u64 + 1), 0);
    while Instant::now() < end {
        agent.run_pod(&labels(random.below(LABEL_SETS as u64) as usize), &mut random).await?;
        count += 1;
    }
    Ok(count)
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
        let end = Instant::now() + RUN;
        let agents = (0..AGENTS).map(async |number| {
            let agent = Agent::start(&plane, &format!("node-{number}")).await?;
            let pods = run_pods(&agent, number, end).await?;
            anyhow::Ok((agent, pods))
        });
        let (agents, pods): (Vec<_>, Vec<_>) =
            futures::future::try_join_all(agents).await?.into_iter().unzip();
        let during = operator.metric("weir_operator_identities_deleted_total").await?;
        // Nobody has any now.
        let identities: Api<Identity> = Api::all(client.clone());
        until("every identity to be collected", || async {
            Ok(identities.list(&Default::default()).await?.items.is_empty().then_some(()))
        })
        .await?;
        ensure!(during > 5.0, "only {during} were collected while pods ran: the race was not run");
        println!("{} pods, {during} identities collected meanwhile", pods.iter().sum::<usize>());
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

/// Ten collectors and ten agents in one directory.
#[test]
fn identities_of_a_directory_in_use_are_never_collected() -> Result<()> {
    let directory = tempfile::Builder::new().prefix("weir-identities-").tempdir()?;
    let directory = directory.path();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let end = Instant::now() + RUN;
        let agents = (0..AGENTS).map(async |number| {
            let name = format!("node-{number}");
            let source = Source::Manifests(directory.to_owned());
            let agent = Agent::follow(source, &name, Identities::Files(directory.to_owned())).await?;
            let grace = Duration::from_secs(1);
            let collector = Collector::new(directory, &name, grace, Arc::new(Health::default()))?;
            tokio::spawn(collector.run());
            run_pods(&agent, number, end).await
        });
        let mut during = 0;
        let pods = tokio::select! {
            pods = futures::future::try_join_all(agents) => pods?,
            failed = count_deletions(directory, &mut during) => failed?,
        };
        until("every identity to be collected", || async {
            Ok(identity_files(directory)?.is_empty().then_some(()))
        })
        .await?;
        ensure!(during > 5, "only {during} were collected while pods ran: the race was not run");
        println!("{} pods, {during} identities collected meanwhile", pods.iter().sum::<usize>());
        Ok(())
    })
}

/// Counts until it is dropped.
async fn count_deletions(directory: &Path, count: &mut usize) -> Result<Vec<usize>> {
    let mut before = BTreeSet::new();
    loop {
        let now = identity_files(directory)?;
        *count += before.difference(&now).count();
        before = now;
        sleep(Duration::from_millis(20)).await;
    }
}

/// The files of identities, and those that were taken away.
fn identity_files(directory: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(Some(name).filter(|name| name.contains("identity-") || name.contains("taken")));
    }
    Ok(names)
}
