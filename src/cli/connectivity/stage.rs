//! The test's life in the cluster: choose nodes, make the pods, try, ask for reasons, remove.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::future::{join_all, try_join_all};
use k8s_openapi::api::core::v1::{Event, Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use tokio::time::sleep;

use super::objects::{self, CLIENT, CONFINED, Image, LABEL, STRANGER, guarded, server};
use super::plan::{self, Asker, Check, Expected, Place, Plan, World};
use super::probe::{Outcome, Probe};
use super::reason::{self, Seen};
use super::report::{Report, Row, Verdict};
use super::{TestArgs, progress};
use crate::api::answers::{EndpointRow, ServiceRow};
use crate::cli::cluster::{Agent, Cluster, Limits, explained, problem_of};
use crate::hubble::json;
use crate::hubble::proto::flow::Flow;
use crate::hubble::proto::observer::GetFlowsResponse;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;

const POLL: Duration = Duration::from_millis(300);
/// Agents should need milliseconds.
const LEARNED_WITHIN: Duration = Duration::from_secs(15);
const DNS_WITHIN: Duration = Duration::from_secs(60);
const REMOVED_WITHIN: Duration = Duration::from_secs(60);
/// Agents read the kernel's records in batches.
const RECORDED_WITHIN: Duration = Duration::from_secs(3);
/// Slower than this, and a packet was lost and sent again.
const SLOW_MILLISECONDS: u64 = 900;
/// These do not get better by waiting.
const HOPELESS: [&str; 5] = [
    "ErrImageNeverPull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
    "ErrImagePull",
];

/// A test that is running.
pub struct Stage<'a> {
    cluster: &'a Cluster,
    args: &'a TestArgs,
    namespace: String,
    places: Vec<Place>,
    /// The agents of the places.
    agents: Vec<Agent>,
    image: Image,
}

impl<'a> Stage<'a> {
    /// Finds out where it can be, and makes nothing yet.
    pub async fn new(cluster: &'a Cluster, args: &'a TestArgs) -> Result<Self> {
        let agents = cluster.agents().await?;
        let nodes = Api::<Node>::all(cluster.client.clone()).list(&ListParams::default()).await;
        let nodes = nodes.map_err(explained).context("listing the nodes")?.items;
        let (places, agents) = choose(args, &nodes, &agents)?;
        let names: Vec<_> = places.iter().map(|place| place.node.as_str()).collect();
        progress(&format!("on {}", names.join(", ")));
        for namespace in left_behind(cluster).await? {
            progress(&format!(
                "an earlier test left the namespace {namespace}: `weir connectivity clean` deletes it"
            ));
        }
        let image = Image { name: agents[0].image.clone(), pull_policy: agents[0].pull_policy.clone() };
        let number = fastrand::u32(..1 << 20);
        let namespace = format!("weir-connectivity-{number:05x}");
        Ok(Self { cluster, args, namespace, places, agents, image })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Everything, from the first object to the last reason.
    pub async fn run(&self) -> Result<Report> {
        let world = self.build().await?;
        let open = plan::open(&world);
        progress(&format!("trying {} ways without policies", open.checks.len()));
        let mut rows = self.try_all(&world, open).await?;
        self.apply_policies().await?;
        let closed = plan::closed(&world);
        progress(&format!("trying {} ways with policies", closed.checks.len()));
        rows.extend(self.try_all(&world, closed).await?);
        Ok(Report {
            server: self.cluster.server.clone(),
            kubernetes: self.cluster.version.clone(),
            image: self.image.name.clone(),
            nodes: self.places.iter().map(|place| place.node.clone()).collect(),
            checks: rows,
        })
    }

    /// Deletes the namespace and waits until it is gone.
    pub async fn remove(&self) -> Result<()> {
        remove_namespace(self.cluster, &self.namespace).await
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.cluster.client.clone(), &self.namespace)
    }

    async fn build(&self) -> Result<World> {
        progress(&format!("making pods in the namespace {}", self.namespace));
        let namespaces: Api<Namespace> = Api::all(self.cluster.client.clone());
        let namespace = objects::namespace(&self.namespace)?;
        let made = namespaces.create(&PostParams::default(), &namespace).await;
        made.map_err(explained).context("making the namespace")?;
        let mut pods = vec![(CLIENT.to_owned(), 0), (STRANGER.to_owned(), 0), (CONFINED.to_owned(), 0)];
        let mut services = BTreeMap::new();
        for number in 1..=self.places.len() {
            pods.extend([(server(number), number - 1), (guarded(number), number - 1)]);
            let service = objects::service(&server(number))?;
            let service = self.api::<Service>().create(&PostParams::default(), &service).await;
            let service = service.map_err(explained).context("making a service")?;
            services.insert(server(number), cluster_ips(&service));
        }
        try_join_all(pods.iter().map(|(name, place)| self.make_pod(name, *place))).await?;
        let pods = self.wait_for_pods(pods.len()).await?;
        self.wait_for_services(&services).await;
        Ok(World {
            namespace: self.namespace.clone(),
            places: self.places.clone(),
            pods,
            services,
            kubernetes: self.kubernetes().await,
            no_dns: self.no_dns().await,
            external: self.args.external.clone(),
        })
    }

    async fn make_pod(&self, name: &str, place: usize) -> Result<()> {
        let pod = objects::pod(name, &self.places[place].node, &self.image)?;
        let deadline = Instant::now() + LEARNED_WITHIN;
        loop {
            match self.api::<Pod>().create(&PostParams::default(), &pod).await {
                // A new namespace gets its service account a moment later.
                Err(kube::Error::Api(status))
                    if status.message.contains("serviceaccount") && Instant::now() < deadline =>
                {
                    sleep(POLL).await;
                }
                made => {
                    made.map_err(explained).with_context(|| format!("making the pod {name}"))?;
                    return Ok(());
                }
            }
        }
    }

    /// The addresses of the pods once all run.
    async fn wait_for_pods(&self, count: usize) -> Result<BTreeMap<String, Vec<IpAddr>>> {
        let deadline = Instant::now() + self.args.timeout;
        loop {
            let pods = self.api::<Pod>().list(&ListParams::default()).await;
            let pods = pods.map_err(explained).context("looking at the pods")?.items;
            let ready: BTreeMap<_, _> = pods.iter().filter_map(ready_pod).collect();
            if ready.len() == count {
                return Ok(ready);
            }
            let waiting: Vec<_> = pods.iter().filter(|pod| !ready.contains_key(&pod.name_any())).collect();
            let hopeless = waiting.iter().find_map(|pod| {
                let problem = problem_of(pod)?;
                let is_hopeless = HOPELESS.iter().any(|reason| problem.starts_with(reason));
                let has_failed = pod.status.as_ref()?.phase.as_deref() == Some("Failed");
                (is_hopeless || has_failed).then(|| (pod.name_any(), node_of(pod), problem))
            });
            if let Some((pod, node, problem)) = hopeless {
                bail!("the pod {pod} on {node} cannot run: {problem}");
            }
            if Instant::now() >= deadline {
                let reasons = join_all(waiting.iter().map(|pod| self.why_not(pod))).await;
                bail!("these pods do not run after {:?}:\n  {}", self.args.timeout, reasons.join("\n  "));
            }
            sleep(POLL).await;
        }
    }

    /// What the pod's status or its last warning says.
    async fn why_not(&self, pod: &Pod) -> String {
        let name = pod.name_any();
        let about = ListParams::default().fields(&format!("involvedObject.name={name},type=Warning"));
        let events = self.api::<Event>().list(&about).await.map(|list| list.items).unwrap_or_default();
        let last = events.iter().max_by_key(|event| event.metadata.creation_timestamp.clone());
        let warning = last.map(|event| {
            format!(
                "{}: {}",
                event.reason.as_deref().unwrap_or("Warning"),
                event.message.as_deref().unwrap_or("")
            )
        });
        let reason = problem_of(pod).into_iter().chain(warning).collect::<Vec<_>>().join("; ");
        let reason = if reason.is_empty() { "nobody says why".to_owned() } else { reason };
        format!("{name} on {}: {reason}", node_of(pod))
    }

    /// Until the first node's agent knows a backend of every service.
    async fn wait_for_services(&self, services: &BTreeMap<String, Vec<IpAddr>>) {
        let wanted: Vec<IpAddr> = services.values().flatten().copied().collect();
        let deadline = Instant::now() + LEARNED_WITHIN;
        while Instant::now() < deadline {
            let rows: Result<Vec<ServiceRow>> =
                self.cluster.ask_json(&self.agents[0], &["service", "list", "--output", "json"]).await;
            let is_known = |ip: &IpAddr, rows: &[ServiceRow]| {
                rows.iter().any(|row| row.address == *ip && !row.backends.is_empty())
            };
            if rows.is_ok_and(|rows| wanted.iter().all(|ip| is_known(ip, &rows))) {
                return;
            }
            sleep(POLL).await;
        }
        progress(&format!("the agent of {} does not know all services of the test", self.places[0].node));
    }

    async fn kubernetes(&self) -> Vec<SocketAddr> {
        let services: Api<Service> = Api::namespaced(self.cluster.client.clone(), "default");
        let Ok(service) = services.get("kubernetes").await else { return Vec::new() };
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
        let port = ports.first().and_then(|port| u16::try_from(port.port).ok()).unwrap_or(443);
        cluster_ips(&service).into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
    }

    /// Why there is no DNS to try; waits for one that is starting.
    async fn no_dns(&self) -> Option<String> {
        const SYSTEM: &str = "kube-system";
        let services: Api<Service> = Api::namespaced(self.cluster.client.clone(), SYSTEM);
        let is_dns = ListParams::default().labels("k8s-app=kube-dns");
        let name = match services.list(&is_dns).await.map_err(explained) {
            Err(error) => {
                return Some(format!("looking for the cluster's DNS: {}", crate::error::chain(&error)));
            }
            Ok(list) => match list.items.first() {
                None => return Some(format!("no Service in {SYSTEM} has the label k8s-app=kube-dns")),
                Some(service) => service.name_any(),
            },
        };
        let slices: Api<EndpointSlice> = Api::namespaced(self.cluster.client.clone(), SYSTEM);
        let of_dns = ListParams::default().labels(&format!("kubernetes.io/service-name={name}"));
        let deadline = Instant::now() + DNS_WITHIN;
        let mut is_told = false;
        while Instant::now() < deadline {
            let list = slices.list(&of_dns).await.map(|list| list.items).unwrap_or_default();
            let mut endpoints = list.iter().flat_map(|slice| &slice.endpoints);
            let is_ready = |conditions: &k8s_openapi::api::discovery::v1::EndpointConditions| {
                conditions.ready.unwrap_or(true)
            };
            if endpoints.any(|endpoint| endpoint.conditions.as_ref().is_none_or(is_ready)) {
                return None;
            }
            if !is_told {
                progress(&format!("waiting for a ready pod of {SYSTEM}/{name}"));
                is_told = true;
            }
            sleep(POLL).await;
        }
        Some(format!("{SYSTEM}/{name} has no ready pod"))
    }

    async fn apply_policies(&self) -> Result<()> {
        for policy in objects::policies()? {
            let made = self.api::<NetworkPolicy>().create(&PostParams::default(), &policy).await;
            made.map_err(explained).context("making a policy")?;
        }
        let deadline = Instant::now() + LEARNED_WITHIN;
        let numbers = 1..=self.agents.len();
        let mut wanted: Vec<(usize, String)> = numbers.map(|number| (number - 1, guarded(number))).collect();
        wanted.push((0, CONFINED.to_owned()));
        for (place, pod) in wanted {
            while !self.is_selected(place, &pod).await && Instant::now() < deadline {
                sleep(POLL).await;
            }
        }
        if Instant::now() >= deadline {
            progress("the agents do not say that the policies are in force");
        }
        Ok(())
    }

    async fn is_selected(&self, place: usize, pod: &str) -> bool {
        let arguments = ["endpoint", "list", "--output", "json"];
        let rows: Result<Vec<EndpointRow>> = self.cluster.ask_json(&self.agents[place], &arguments).await;
        rows.is_ok_and(|rows| {
            let mut rows = rows.iter();
            rows.any(|row| {
                let is_pod = *row.pod.namespace == *self.namespace && *row.pod.name == *pod;
                is_pod && row.is_enforced && !row.policies.is_empty()
            })
        })
    }

    /// Tries a plan; every asker does its part at the same time.
    async fn try_all(&self, world: &World, plan: Plan) -> Result<Vec<Row>> {
        let start = Instant::now();
        let mut askers: Vec<&Asker> = plan.checks.iter().map(|check| &check.asker).collect();
        askers.sort();
        askers.dedup();
        let parts = askers.into_iter().map(|asker| async {
            let of_asker = plan.checks.iter().enumerate().filter(|(_, check)| check.asker == *asker);
            let (numbers, checks): (Vec<usize>, Vec<&Check>) = of_asker.unzip();
            let outcomes = self.ask(asker, &checks).await?;
            Ok::<_, anyhow::Error>(numbers.into_iter().zip(checks.into_iter().zip(outcomes)))
        });
        let tried: BTreeMap<usize, (&Check, Outcome)> =
            try_join_all(parts).await?.into_iter().flatten().collect();
        let tried: Vec<(&Check, Outcome)> = tried.into_values().collect();
        let is_wanting = |(check, outcome): &(&Check, Outcome)| {
            check.expected == Expected::Denied || verdict(check, outcome).is_err()
        };
        let wanting: Vec<&Check> =
            tried.iter().filter(|tried| is_wanting(tried)).map(|(check, _)| *check).collect();
        let seen = if wanting.is_empty() { Seen::new() } else { self.seen(world, &wanting, start).await };
        let rows = tried.iter().map(|(check, outcome)| self.row(world, check, outcome, &seen));
        Ok(rows.chain(plan.skipped).collect())
    }

    async fn ask(&self, asker: &Asker, checks: &[&Check]) -> Result<Vec<Outcome>> {
        let probes: Vec<&Probe> = checks.iter().map(|check| &check.probe).collect();
        let probes = serde_json::to_string(&probes).context("writing probes")?;
        let limits = Limits::within(60);
        let ran = match asker {
            Asker::Node => {
                self.cluster.ask(&self.agents[0], &["connectivity", "probe", &probes], limits).await?
            }
            Asker::Pod(pod) => {
                let command = ["/weir", "connectivity", "probe", &probes];
                self.cluster.exec(&self.namespace, pod, None, &command, limits).await?
            }
        };
        let outcomes: Vec<Outcome> = serde_json::from_slice(&ran.stdout)
            .with_context(|| format!("understanding the probe: {}", ran.complaint()))?;
        if outcomes.len() != checks.len() {
            bail!("{} of {} probes were made", outcomes.len(), checks.len());
        }
        Ok(outcomes)
    }

    /// The flows of the test's pods since `start`; waits a little for those that a denied
    /// check has to leave behind.
    async fn seen(&self, world: &World, checks: &[&Check], start: Instant) -> Seen {
        let deadline = Instant::now() + RECORDED_WITHIN;
        loop {
            sleep(POLL).await;
            let since = format!("{}s", start.elapsed().as_secs() + 1);
            let seen = self.agents.iter().map(|agent| async {
                let flows =
                    self.flows(world, agent, &since).await.map_err(|error| crate::error::chain(&error));
                (agent.node.clone(), flows)
            });
            let seen: Seen = join_all(seen).await.into_iter().collect();
            let mut denied = checks.iter().filter(|check| check.expected == Expected::Denied);
            if denied.all(|check| reason::policy_drop(check, world, &seen).is_some())
                || Instant::now() > deadline
            {
                return seen;
            }
        }
    }

    async fn flows(&self, world: &World, agent: &Agent, since: &str) -> Result<Vec<Flow>> {
        let ips: Vec<String> = world.pods.values().flatten().map(IpAddr::to_string).collect();
        let mut arguments = vec!["observe", "--output", "json", "--all", "--since", since];
        arguments.extend(ips.iter().flat_map(|ip| ["--ip", ip.as_str()]));
        let ran = self.cluster.ask(agent, &arguments, Limits::within(20)).await?;
        if ran.code != 0 {
            bail!("{}", ran.complaint());
        }
        let text = String::from_utf8(ran.stdout).context("understanding flows")?;
        let answers = text.lines().map(json::from_str::<GetFlowsResponse>);
        let flows = answers.filter_map(|answer| match answer.map(|answer| answer.response_types) {
            Ok(Some(ResponseTypes::Flow(flow))) => Some(Ok(flow)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        });
        flows.collect::<Result<_, _>>().context("understanding flows")
    }

    fn row(&self, world: &World, check: &Check, outcome: &Outcome, seen: &Seen) -> Row {
        let mut row = Row {
            test: check.test.to_owned(),
            family: check.family().to_owned(),
            protocol: check.protocol.to_owned(),
            from: match check.asker {
                Asker::Pod(name) => name.to_owned(),
                Asker::Node => "the node".to_owned(),
            },
            to: check.to.clone(),
            node: check.place.map(|number| self.places[number - 1].node.clone()).unwrap_or_default(),
            address: check.target().map(|target| target.to_string()).unwrap_or_default(),
            milliseconds: Some(outcome.milliseconds),
            ..Row::new(Verdict::Passed)
        };
        match verdict(check, outcome) {
            Ok(()) if check.expected == Expected::Denied => match reason::policy_drop(check, world, seen) {
                Some(drop) => row.reason = drop,
                None => {
                    row.verdict = Verdict::Failed;
                    row.reason = "nobody answered, but no node recorded that a policy dropped it".to_owned();
                }
            },
            Ok(()) if outcome.milliseconds > SLOW_MILLISECONDS => {
                row.reason = "slow: a first packet was lost".to_owned();
            }
            Ok(()) => {}
            Err(error) if check.expected == Expected::Denied || check.target().is_none() => {
                row.verdict = Verdict::Failed;
                row.reason = error;
            }
            Err(error) => {
                row.verdict = Verdict::Failed;
                row.reason = format!("{error}; {}", reason::of_failure(check, world, seen));
            }
        }
        row
    }
}

/// What was expected, or how it was otherwise.
fn verdict(check: &Check, outcome: &Outcome) -> Result<(), String> {
    match (&check.expected, &outcome.answer) {
        (Expected::Denied, None) => Ok(()),
        (Expected::Denied, Some(_)) => Err("answered, although a policy denies it".to_owned()),
        (Expected::Answer(_), None) => Err(outcome.error.clone().unwrap_or_else(|| "no answer".to_owned())),
        (Expected::Answer(wanted), Some(_)) if wanted.is_empty() => Ok(()),
        (Expected::Answer(wanted), Some(answer)) if wanted.contains(answer) => Ok(()),
        (Expected::Answer(wanted), Some(answer)) => {
            Err(format!("the answer was {answer} instead of {}", wanted.join(" or ")))
        }
    }
}

/// The nodes that take part, with their agents, the asking one first.
fn choose(args: &TestArgs, nodes: &[Node], agents: &[Agent]) -> Result<(Vec<Place>, Vec<Agent>)> {
    let mut usable = Vec::new();
    let mut reasons = Vec::new();
    for node in nodes {
        match usable_agent(node, agents) {
            Ok(agent) => usable.push((node, agent)),
            Err(reason) => reasons.push(format!("{}: {reason}", node.name_any())),
        }
    }
    // Where pods usually run, first.
    usable.sort_by_key(|(node, _)| (has_taint(node), node.name_any()));
    if !args.nodes.is_empty() {
        let named = args.nodes.iter().map(|name| {
            let found = usable.iter().find(|(node, _)| node.name_any() == *name).copied();
            let why = reasons.iter().find(|reason| reason.starts_with(&format!("{name}: ")));
            found.with_context(|| why.cloned().unwrap_or_else(|| format!("there is no node {name}")))
        });
        usable = named.collect::<Result<_>>()?;
    } else if !args.all_nodes {
        usable.truncate(2);
    }
    for reason in reasons.iter().filter(|_| args.nodes.is_empty()) {
        progress(&format!("leaving out {reason}"));
    }
    if usable.is_empty() {
        bail!("no node can be tried: {}", reasons.join("; "));
    }
    Ok(usable.into_iter().map(|(node, agent)| (place(node), agent.clone())).unzip())
}

fn usable_agent<'a>(node: &Node, agents: &'a [Agent]) -> Result<&'a Agent, String> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    if !conditions.iter().any(|ready| ready.type_ == "Ready" && ready.status == "True") {
        return Err("Kubernetes says that the node is not ready".to_owned());
    }
    let agent = agents.iter().find(|agent| agent.node == node.name_any()).ok_or("no agent runs there")?;
    match (agent.is_ready, &agent.problem) {
        (true, _) => Ok(agent),
        (false, Some(problem)) => Err(format!("its agent is not ready: {problem}")),
        (false, None) => Err("its agent is not ready".to_owned()),
    }
}

fn has_taint(node: &Node) -> bool {
    let spec = node.spec.as_ref();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let is_cordoned = spec.and_then(|spec| spec.unschedulable).unwrap_or_default();
    is_cordoned || taints.iter().any(|taint| taint.effect != "PreferNoSchedule")
}

fn place(node: &Node) -> Place {
    let status = node.status.clone().unwrap_or_default();
    let internal = status.addresses.into_iter().flatten().filter(|address| address.type_ == "InternalIP");
    let kubelet = status.daemon_endpoints.and_then(|endpoints| endpoints.kubelet_endpoint);
    Place {
        node: node.name_any(),
        addresses: internal.filter_map(|address| address.address.parse().ok()).collect(),
        kubelet_port: kubelet.and_then(|kubelet| u16::try_from(kubelet.port).ok()).unwrap_or(10250),
    }
}

fn ready_pod(pod: &Pod) -> Option<(String, Vec<IpAddr>)> {
    let status = pod.status.as_ref()?;
    let mut conditions = status.conditions.iter().flatten();
    let is_ready = conditions.any(|ready| ready.type_ == "Ready" && ready.status == "True");
    let ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
    (is_ready && !ips.is_empty()).then(|| (pod.name_any(), ips))
}

fn node_of(pod: &Pod) -> String {
    pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default()
}

fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let ips = service.spec.as_ref().and_then(|spec| spec.cluster_ips.as_deref()).unwrap_or_default();
    ips.iter().filter_map(|ip| ip.parse().ok()).collect()
}

/// Namespaces of tests that did not clean up, or still run.
pub async fn left_behind(cluster: &Cluster) -> Result<Vec<String>> {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let list = namespaces.list(&ListParams::default().labels(LABEL)).await;
    let list = list.map_err(explained).context("looking for namespaces of earlier tests")?;
    let is_staying = |namespace: &&Namespace| namespace.metadata.deletion_timestamp.is_none();
    Ok(list.items.iter().filter(is_staying).map(ResourceExt::name_any).collect())
}

/// Deletes a test's namespace and waits until it is gone.
pub async fn remove_namespace(cluster: &Cluster, name: &str) -> Result<()> {
    progress(&format!("deleting the namespace {name}"));
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let is_absent = |error: &kube::Error| matches!(error, kube::Error::Api(status) if status.code == 404);
    if let Err(error) = namespaces.delete(name, &DeleteParams::background()).await
        && !is_absent(&error)
    {
        return Err(explained(error)).context("deleting the namespace");
    }
    let deadline = Instant::now() + REMOVED_WITHIN;
    while Instant::now() < deadline {
        if namespaces.get_opt(name).await.map_err(explained).context("looking at the namespace")?.is_none() {
            return Ok(());
        }
        sleep(POLL).await;
    }
    bail!("the namespace {name} is still being deleted after {} s", REMOVED_WITHIN.as_secs())
}
