//! Gives Services of type LoadBalancer their addresses, from the pools of the cluster.
//!
//! A round looks at all Services and pools and writes what differs. What was written is on the Service: the
//! addresses in `status.loadBalancer`, and a condition that says that they are ours, or why there is none.
//! A Service without that condition whose addresses are in no pool is somebody else's, and is left alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::core::{Selector, SelectorExt};
use kube::runtime::events::Recorder;
use kube::runtime::reflector::{Store, store};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{info, warn};

use super::addresses::{self, Outcome, Pool, Range, Wish};
use super::events::warning;
use super::metrics::Metrics;
use super::{BATCH, FIELD_MANAGER, RETRY, is_conflict, nodes, recorder};
use crate::kube::crd::{AddressBlock, CiliumLoadBalancerIPPool, LoadBalancerPool, LoadBalancerPoolSpec};

/// The condition of a Service whose address is looked after here.
pub const CONDITION: &str = "weir.dev/LoadBalancerAddress";
/// Without news a round all the same.
const IDLE: std::time::Duration = std::time::Duration::from_secs(60);
/// Classes of load balancers whose addresses come from here; those without a class do, too.
const CLASSES: [&str; 3] = ["weir.dev/pool", "io.cilium/l2-announcer", "io.cilium/bgp-control-plane"];
/// Addresses that a Service asks for, with commas between.
const ASKED: [&str; 3] = ["weir.dev/load-balancer-ips", "lbipam.cilium.io/ips", "io.cilium/lb-ipam-ips"];
const SHARING_KEY: [&str; 3] =
    ["weir.dev/sharing-key", "lbipam.cilium.io/sharing-key", "io.cilium/lb-ipam-sharing-key"];
const SHARES_WITH: [&str; 3] = [
    "weir.dev/sharing-cross-namespace",
    "lbipam.cilium.io/sharing-cross-namespace",
    "io.cilium/lb-ipam-sharing-cross-namespace",
];

/// Gives addresses until it is dropped.
pub async fn run(client: &Client, name: &str, metrics: &Metrics) {
    loop {
        if let Err(error) = work(client, name, metrics).await {
            metrics.errors.inc();
            warn!(error = crate::error::chain(&error), "beginning to give load-balancer addresses");
        }
        sleep(RETRY).await;
    }
}

async fn work(client: &Client, name: &str, metrics: &Metrics) -> Result<()> {
    let changed = Arc::new(Notify::new());
    let (services, to_services) = store();
    let (pools, to_pools) = store();
    let (cilium, to_cilium) = store();
    let all = |changed: &Arc<Notify>| Some(changed.clone());
    let mut filling: Vec<BoxFuture<'static, ()>> = vec![
        Box::pin(nodes::follow(Api::all(client.clone()), to_services, all(&changed), |_: &mut Service| {})),
        Box::pin(nodes::follow(
            Api::all(client.clone()),
            to_pools,
            all(&changed),
            |_: &mut LoadBalancerPool| {},
        )),
    ];
    // Without this kind the watch would never deliver.
    let of_cilium: Api<CiliumLoadBalancerIPPool> = Api::all(client.clone());
    let has_cilium = match of_cilium.list(&ListParams::default().limit(1)).await {
        Ok(_) => true,
        Err(kube::Error::Api(status)) if status.code == 404 => false,
        Err(error) => return Err(error).context("looking for Cilium's pools"),
    };
    if has_cilium {
        filling.push(Box::pin(nodes::follow(of_cilium, to_cilium, all(&changed), |_| {})));
    }
    let mut balancers = Balancers {
        client: client.clone(),
        recorder: recorder(client, name),
        said: HashMap::new(),
        metrics: metrics.clone(),
        services,
        pools,
        cilium,
    };
    let rounds = async {
        let told = "the watches are running";
        balancers.services.wait_until_ready().await.context(told)?;
        balancers.pools.wait_until_ready().await.context(told)?;
        if has_cilium {
            balancers.cilium.wait_until_ready().await.context(told)?;
        }
        loop {
            if let Err(error) = balancers.round().await {
                balancers.metrics.errors.inc();
                warn!(error = crate::error::chain(&error), "giving load-balancer addresses");
                sleep(RETRY).await;
            }
            tokio::select! {
                () = changed.notified() => sleep(BATCH).await,
                () = sleep(IDLE) => {}
            }
        }
    };
    tokio::select! {
        done = rounds => done,
        _ = futures::future::join_all(filling) => Ok(()),
    }
}

struct Balancers {
    client: Client,
    recorder: Recorder,
    /// What was said of a Service, by UID.
    said: HashMap<String, String>,
    metrics: Metrics,
    services: Store<Service>,
    pools: Store<LoadBalancerPool>,
    cilium: Store<CiliumLoadBalancerIPPool>,
}

/// A pool, and which Services it is for.
struct ReadPool {
    pool: Pool,
    selector: Option<LabelSelector>,
}

impl Balancers {
    async fn round(&mut self) -> Result<()> {
        let mut services = self.services.state();
        services.sort_by_key(|service| {
            (service.meta().creation_timestamp.clone(), service.namespace(), service.name_any())
        });
        let there: BTreeSet<String> = services.iter().filter_map(|service| service.uid()).collect();
        self.said.retain(|uid, _| there.contains(uid));
        let (pools, faults) = self.read_pools();
        let wishes: Vec<(Arc<Service>, Wish)> =
            services.iter().filter_map(|service| Some((service.clone(), wish(service, &pools)?))).collect();
        let reserved = services.iter().flat_map(|service| reserved(service)).collect();
        let just_pools: Vec<Pool> = pools.iter().map(|read| read.pool.clone()).collect();
        let just_wishes: Vec<Wish> = wishes.iter().map(|(_, wish)| wish.clone()).collect();
        let outcomes = addresses::give(&just_pools, &just_wishes, &reserved);
        let mut result = Ok(());
        for ((service, _), outcome) in wishes.iter().zip(&outcomes) {
            let written = self.write(service, outcome).await;
            result = result.and(written.with_context(|| format!("Service {}", named(service))));
        }
        for service in services.iter().filter(|service| !is_balanced(service) && condition(service).is_some())
        {
            let written = self.let_go(service).await;
            result = result.and(written.with_context(|| format!("Service {}", named(service))));
        }
        let without = outcomes.iter().filter(|outcome| !outcome.refusals.is_empty()).count();
        self.metrics.services_without_address.set(without as i64);
        let used: BTreeSet<IpAddr> = outcomes.iter().flat_map(|outcome| outcome.addresses.clone()).collect();
        result.and(self.say_of_pools(&just_pools, &faults, &used).await)
    }

    /// Older pools first; what is wrong with the others.
    fn read_pools(&self) -> (Vec<ReadPool>, BTreeMap<String, String>) {
        let own = self
            .pools
            .state()
            .into_iter()
            .map(|pool| (pool.meta().creation_timestamp.clone(), pool.name_any(), pool.spec.clone()));
        let cilium = self.cilium.state().into_iter().map(|pool| {
            let name = format!("cilium.io/{}", pool.name_any());
            (pool.meta().creation_timestamp.clone(), name, LoadBalancerPoolSpec::from(pool.spec.clone()))
        });
        let mut all: Vec<_> = own.chain(cilium).collect();
        all.sort_by(|(one_time, one, _), (two_time, two, _)| (one_time, one).cmp(&(two_time, two)));
        let (mut pools, mut faults) = (Vec::new(), BTreeMap::new());
        for (_, name, spec) in all {
            match ranges(&spec) {
                Ok(ranges) => {
                    let pool = Pool { name, ranges, is_disabled: spec.disabled };
                    pools.push(ReadPool { pool, selector: spec.service_selector });
                }
                Err(fault) => drop(faults.insert(name, fault)),
            }
        }
        (pools, faults)
    }

    async fn write(&mut self, service: &Service, outcome: &Outcome) -> Result<()> {
        let reasons: Vec<String> = outcome.refusals.iter().map(ToString::to_string).collect();
        let message = reasons.join("; ");
        let reason = outcome.refusals.first().map_or("Assigned", |refusal| refusal.reason());
        let status = if reasons.is_empty() { "True" } else { "False" };
        let there = condition(service);
        let is_said =
            there.is_some_and(|there| (there.status.as_str(), &there.message) == (status, &message));
        if is_said && ingress(service) == outcome.addresses {
            return Ok(());
        }
        let since =
            there.filter(|there| there.status == status).map(|there| there.last_transition_time.clone());
        let condition = Condition {
            type_: CONDITION.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.clone(),
            last_transition_time: since.unwrap_or_else(|| Time(jiff::Timestamp::now())),
            observed_generation: None,
        };
        let ingress: Vec<_> =
            outcome.addresses.iter().map(|address| json!({ "ip": address.to_string() })).collect();
        self.apply(service, json!({ "loadBalancer": { "ingress": ingress }, "conditions": [condition] }))
            .await?;
        info!(service = named(service), addresses = ?outcome.addresses, message, "gave load-balancer addresses");
        self.say(service, reason, message).await
    }

    /// Of another type now: what was said of it is no longer so.
    async fn let_go(&self, service: &Service) -> Result<()> {
        self.apply(service, json!({})).await
    }

    /// Writes over exactly the Service that was seen; if it has changed, the next round looks again.
    async fn apply(&self, service: &Service, status: serde_json::Value) -> Result<()> {
        let name = service.name_any();
        let object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": name, "resourceVersion": service.resource_version() },
            "status": status,
        });
        let api: Api<Service> =
            Api::namespaced(self.client.clone(), &service.namespace().unwrap_or_default());
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        match api.patch_status(&name, &parameters, &Patch::Apply(&object)).await {
            Ok(_) => Ok(()),
            Err(error) if is_conflict(&error) => Ok(()),
            Err(error) => Err(error).context("writing the status"),
        }
    }

    /// Once for each text.
    async fn say(&mut self, service: &Service, reason: &str, message: String) -> Result<()> {
        let Some(uid) = service.uid() else { return Ok(()) };
        if message.is_empty() {
            self.said.remove(&uid);
            return Ok(());
        }
        if self.said.get(&uid) == Some(&message) {
            return Ok(());
        }
        let event = warning(reason, "GiveAddress", &message);
        self.recorder.publish(&event, &service.object_ref(&())).await.context("publishing an event")?;
        self.said.insert(uid, message);
        Ok(())
    }

    /// On each pool of our kind: whether it gives addresses, and how many are in use.
    async fn say_of_pools(
        &self,
        pools: &[Pool],
        faults: &BTreeMap<String, String>,
        used: &BTreeSet<IpAddr>,
    ) -> Result<()> {
        let overlapping = addresses::overlapping(pools);
        let api: Api<LoadBalancerPool> = Api::all(self.client.clone());
        for object in self.pools.state() {
            let name = object.name_any();
            let (status, reason, message) = match (faults.get(&name), overlapping.get(&name)) {
                (Some(fault), _) => ("False", "Malformed", fault.clone()),
                (None, Some(rival)) => {
                    ("False", "Conflict", format!("it overlaps the pool {rival}: nothing new is given of it"))
                }
                (None, None) if object.spec.disabled => {
                    ("False", "Disabled", "nothing new is given of it".to_owned())
                }
                (None, None) => ("True", "Ready", String::new()),
            };
            let pool = pools.iter().find(|pool| pool.name == name);
            let in_use =
                used.iter().filter(|address| pool.is_some_and(|pool| pool.has(**address))).count() as u64;
            let there = object.status.as_ref();
            let old =
                there.and_then(|there| there.conditions.iter().find(|condition| condition.type_ == "Ready"));
            let is_said = old.is_some_and(|old| (old.status.as_str(), &old.message) == (status, &message));
            if is_said && there.is_some_and(|there| there.in_use == in_use) {
                continue;
            }
            let since = old.filter(|old| old.status == status).map(|old| old.last_transition_time.clone());
            let condition = Condition {
                type_: "Ready".to_owned(),
                status: status.to_owned(),
                reason: reason.to_owned(),
                message,
                last_transition_time: since.unwrap_or_else(|| Time(jiff::Timestamp::now())),
                observed_generation: None,
            };
            let patch = json!({
                "apiVersion": LoadBalancerPool::api_version(&()),
                "kind": LoadBalancerPool::kind(&()),
                "metadata": { "name": name },
                "status": { "conditions": [condition], "inUse": in_use },
            });
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            match api.patch_status(&name, &parameters, &Patch::Apply(&patch)).await {
                Ok(_) => {}
                Err(error) if is_conflict(&error) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("writing the status of pool {name}"));
                }
            }
        }
        Ok(())
    }
}

fn named(service: &Service) -> String {
    format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any())
}

fn condition(service: &Service) -> Option<&Condition> {
    let conditions = service.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == CONDITION)
}

/// The addresses that it has.
fn ingress(service: &Service) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref());
    ingress.into_iter().flatten().filter_map(|ingress| ingress.ip.as_ref()?.parse().ok()).collect()
}

/// A load balancer whose class is none or one of ours.
fn is_balanced(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| {
        let class = spec.load_balancer_class.as_deref();
        spec.type_.as_deref() == Some("LoadBalancer") && class.is_none_or(|class| CLASSES.contains(&class))
    })
}

/// Addresses that the Service has otherwise: nobody's load balancer gets them.
fn reserved(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let spec = service.spec.iter();
    let lists =
        spec.flat_map(|spec| spec.external_ips.iter().flatten().chain(spec.cluster_ips.iter().flatten()));
    lists.filter_map(|text| text.parse().ok())
}

/// The first of these annotations that says something.
fn annotation<'a>(service: &'a Service, names: [&str; 3]) -> Option<&'a str> {
    let annotations = service.annotations();
    names
        .iter()
        .find_map(|name| annotations.get(*name))
        .map(|text| text.trim())
        .filter(|text| !text.is_empty())
}

fn listed(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.into_iter().flat_map(|text| text.split(',')).map(str::trim).filter(|text| !text.is_empty())
}

/// What a Service wants; `None` where that is nothing to us.
fn wish(service: &Service, pools: &[ReadPool]) -> Option<Wish> {
    if !is_balanced(service) || service.meta().deletion_timestamp.is_some() {
        return None;
    }
    let spec = service.spec.as_ref()?;
    let mut labels = service.labels().clone();
    labels.insert("io.kubernetes.service.namespace".to_owned(), service.namespace()?);
    labels.insert("io.kubernetes.service.name".to_owned(), service.name_any());
    let is_for = |read: &&ReadPool| read.selector.as_ref().is_none_or(|selector| selects(selector, &labels));
    let own: Vec<&Pool> = pools.iter().filter(is_for).map(|read| &read.pool).collect();
    let has = ingress(service);
    if condition(service).is_none() {
        let is_elsewhere =
            !has.is_empty() && !has.iter().any(|address| own.iter().any(|pool| pool.has(*address)));
        if own.is_empty() || is_elsewhere {
            return None;
        }
    }
    let asked = annotation(service, ASKED).or(spec.load_balancer_ip.as_deref());
    let families = spec.ip_families.clone().unwrap_or_default();
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let ports = spec.ports.iter().flatten();
    let protocol = |text: &Option<String>| text.clone().unwrap_or_else(|| "TCP".to_owned());
    Some(Wish {
        service: (service.namespace()?, service.name_any()),
        families: ["IPv4", "IPv6"].map(|family| families.iter().any(|wanted| wanted == family)),
        has,
        asks: listed(asked).filter_map(|text| text.parse().ok()).collect(),
        nonsense: listed(asked).find(|text| text.parse::<IpAddr>().is_err()).map(str::to_owned),
        pools: own.iter().map(|pool| pool.name.clone()).collect(),
        sharing_key: annotation(service, SHARING_KEY).map(str::to_owned),
        shares_with: listed(annotation(service, SHARES_WITH)).map(str::to_owned).collect(),
        ports: ports.map(|port| (protocol(&port.protocol), port.port as u16)).collect(),
        local_selector: is_local.then(|| spec.selector.clone().unwrap_or_default()),
    })
}

/// A selector that cannot be read selects nothing.
fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    Selector::try_from(selector.clone()).is_ok_and(|selector| selector.matches(labels))
}

/// The ranges of a pool, or what is wrong with it.
fn ranges(spec: &LoadBalancerPoolSpec) -> Result<Vec<Range>, String> {
    let keeps_ends_free = spec.allow_first_last_ips.as_deref() == Some("No");
    let address = |text: &str| text.parse::<IpAddr>().map_err(|_| format!("{text:?} is not an address"));
    spec.blocks
        .iter()
        .map(|block| match block {
            AddressBlock { cidr: Some(cidr), .. } if !cidr.is_empty() => {
                let parsed = cidr.parse::<IpNet>().map_err(|_| format!("{cidr:?} is not a CIDR"))?;
                Ok(Range::of(parsed, keeps_ends_free))
            }
            AddressBlock { start: Some(start), stop, .. } => {
                let first = address(start)?;
                Range::new(first, stop.as_deref().filter(|stop| !stop.is_empty()).map_or(Ok(first), address)?)
            }
            AddressBlock { .. } => Err("a block has neither cidr nor start".to_owned()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(yaml: &str) -> Service {
        crate::yaml::read(yaml).expect("a Service")
    }

    fn pools(selector: &str) -> Vec<ReadPool> {
        let spec = format!(
            "{{blocks: [{{cidr: 192.0.2.0/30}}, {{start: 'fd00::1', stop: 'fd00::9'}}], serviceSelector: {selector}}}"
        );
        let spec: LoadBalancerPoolSpec = crate::yaml::read(&spec).expect("a pool");
        let ranges = ranges(&spec).expect("two ranges");
        let pool = Pool { name: "a".to_owned(), ranges, is_disabled: false };
        vec![ReadPool { pool, selector: spec.service_selector }]
    }

    const WEB: &str = "{metadata: {name: web, namespace: shop, labels: {tier: front}, annotations: {lbipam.cilium.io/ips: \
        '192.0.2.1, fd00::2', weir.dev/sharing-key: k, weir.dev/sharing-cross-namespace: 'a,b'}}, spec: {type: LoadBalancer, \
        ipFamilies: [IPv4], ports: [{port: 80}, {port: 53, protocol: UDP}], externalTrafficPolicy: Local, selector: {app: web}}}";

    #[test]
    fn a_wish_is_what_the_service_says() {
        let expected = Wish {
            service: ("shop".to_owned(), "web".to_owned()),
            families: [true, false],
            has: vec![],
            asks: ["192.0.2.1", "fd00::2"].map(|text| text.parse().expect("an address")).to_vec(),
            nonsense: None,
            pools: ["a".to_owned()].into(),
            sharing_key: Some("k".to_owned()),
            shares_with: ["a".to_owned(), "b".to_owned()].into(),
            ports: [("TCP".to_owned(), 80), ("UDP".to_owned(), 53)].into(),
            local_selector: Some([("app".to_owned(), "web".to_owned())].into()),
        };
        assert_eq!(wish(&service(WEB), &pools("null")), Some(expected));
    }

    #[test]
    fn others_services_are_left_alone() {
        let is_ours = |yaml: &str, selector: &str| wish(&service(yaml), &pools(selector)).is_some();
        assert!(is_ours(WEB, "{matchLabels: {tier: front}}"));
        assert!(is_ours(WEB, "{matchLabels: {io.kubernetes.service.namespace: shop}}"));
        assert!(!is_ours(WEB, "{matchExpressions: [{key: tier, operator: NotIn, values: [front]}]}"));
        assert!(!is_ours(WEB, "{matchExpressions: [{key: tier, operator: Near}]}"));
        assert!(!is_ours(&WEB.replace("LoadBalancer", "NodePort"), "null"));
        assert!(!is_ours(&WEB.replace("spec: {", "spec: {loadBalancerClass: example.com/lb, "), "null"));
        assert!(is_ours(&WEB.replace("spec: {", "spec: {loadBalancerClass: weir.dev/pool, "), "null"));
        // A cloud has given it an address; Cilium has given one of a pool that is Weir's now.
        let with = |ip: &str| {
            format!("{}, status: {{loadBalancer: {{ingress: [{{ip: {ip}}}]}}}}}}", &WEB[..WEB.len() - 1])
        };
        assert!(!is_ours(&with("203.0.113.1"), "null"));
        assert!(is_ours(&with("192.0.2.2"), "null"));
    }

    #[test]
    fn what_is_wrong_with_a_pool_is_said() {
        let fault = |blocks: &str| {
            let spec = crate::yaml::read(&format!("{{blocks: {blocks}}}")).expect("a pool");
            ranges(&spec).expect_err("a fault")
        };
        assert_eq!(fault("[{cidr: 192.0.2}]"), "\"192.0.2\" is not a CIDR");
        assert_eq!(
            fault("[{start: 192.0.2.2, stop: 192.0.2.1}]"),
            "192.0.2.2 to 192.0.2.1 is no range of addresses"
        );
        assert_eq!(fault("[{}]"), "a block has neither cidr nor start");
    }
}
