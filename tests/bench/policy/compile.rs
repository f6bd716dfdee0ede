//! What the compiler costs: everything at once, and then one change at a time, in a
//! cluster of 1,000 policies and 3,000 identities, on a node where every policy is in use,
//! and on one with as many pods as kubelet allows.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use weir::model::{
    Action, AddressKind, BaseAddress, EndpointId, IdentityId, IdentityLabels, Labels, NamedPort, ObjectKey,
    Peer, Policy, PolicyDirection, PolicyId, PolicyRef, PolicyRule, PortMatch, PortSelector, Protocol,
    Requirement, Selector, Subject, Tier,
};
use weir::policy::{Compiler, Input, Output};
use weir::tables::Snapshot;

use crate::row::Row;

const NAMESPACES: u32 = 50;
const APPS: u32 = 20;
const VERSIONS: u32 = 3;
const ROUNDS: usize = 21;

/// The rows of the suite.
pub fn rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (case, has_blocks, pods) in [
        ("labels", false, 1000),
        ("labels_and_blocks", true, 1000),
        ("labels_and_blocks_of_110_pods", true, 110),
    ] {
        let mut world = World::new(has_blocks);
        world.endpoints.retain(|id, _| id.0 <= pods);
        let full = median(5, || {
            let mut compiler = Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default());
            milliseconds(|| world.compile(&mut compiler))
        });
        rows.push(Row::new(format!("policy/full/{case}"), "ms", full?).at_most(1000.0));

        let mut compiler = Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default());
        let mut last = world.compile(&mut compiler)?;
        let unchanged = median(ROUNDS, || milliseconds(|| world.compile(&mut compiler)));
        rows.push(Row::new(format!("policy/unchanged/{case}"), "ms", unchanged?));

        let mut grown = world.clone();
        let mut count = 0;
        let identity = median(ROUNDS, || {
            grown.add_pod(count % NAMESPACES, count % APPS, VERSIONS + count);
            count += 1;
            // Who writes the maps still holds the last output.
            let (time, output) = timed(|| grown.compile(&mut compiler))?;
            last = output;
            Ok(time)
        });
        rows.push(Row::new(format!("policy/new_identity/{case}"), "ms", identity?).at_most(2.0));

        let mut port = 9000;
        let policy = median(ROUNDS, || {
            port += 1;
            grown.add_policy(3, 4, port, has_blocks);
            let (time, output) = timed(|| grown.compile(&mut compiler))?;
            last = output;
            Ok(time)
        });
        rows.push(Row::new(format!("policy/changed_policy/{case}"), "ms", policy?));
        let peers = |output: &Output| -> usize {
            let directions = |policy: &Arc<weir::model::CompiledPolicy>| {
                policy
                    .ingress
                    .iter()
                    .chain(&policy.egress)
                    .map(|direction| direction.peers.len())
                    .sum::<usize>()
            };
            output.policies.values().map(directions).sum()
        };
        rows.push(Row::new(format!("policy/peers/{case}"), "rows", peers(&last) as f64));
    }
    Ok(rows)
}

/// What a compiler is given.
#[derive(Clone, Default)]
pub struct World {
    /// Policies.
    pub policies: Snapshot<PolicyRef, Arc<Policy>>,
    /// Who is in the cluster.
    pub identities: Snapshot<IdentityId, Arc<IdentityLabels>>,
    /// The pods of this node.
    pub endpoints: BTreeMap<EndpointId, IdentityId>,
    /// Who has which address.
    pub addresses: Snapshot<IpAddr, BaseAddress>,
}

impl World {
    fn new(has_blocks: bool) -> Self {
        let mut world = Self::default();
        for namespace in 0..NAMESPACES {
            for app in 0..APPS {
                world.add_policy(namespace, app, 8080, has_blocks);
                for version in 0..VERSIONS {
                    let identity = world.add_pod(namespace, app, version);
                    if version == 0 {
                        world.endpoints.insert(EndpointId((namespace * APPS + app + 1) as u16), identity);
                    }
                }
            }
        }
        world
    }

    fn add_pod(&mut self, namespace: u32, app: u32, version: u32) -> IdentityId {
        let name = format!("namespace-{namespace}");
        let port = NamedPort { protocol: Protocol::Tcp, port: 8000 + app as u16 };
        let labels = IdentityLabels {
            namespace: name.clone(),
            namespace_labels: labels([
                ("kubernetes.io/metadata.name", name),
                ("team", format!("team-{}", namespace % 10)),
            ]),
            service_account: "default".to_owned(),
            pod_labels: labels([
                ("app", format!("app-{app}")),
                ("version", version.to_string()),
                ("tier", ["front", "back"][app as usize % 2].to_owned()),
            ]),
            named_ports: BTreeMap::from([("http".to_owned(), vec![port])]),
        };
        self.add(labels)
    }

    /// One more identity, with a pod of its own.
    pub fn add(&mut self, labels: IdentityLabels) -> IdentityId {
        let count = self.identities.len() as u32;
        let identity = IdentityId(IdentityId::FIRST_CLUSTER.0 + count);
        self.identities.insert(identity, Arc::new(labels));
        let address = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + count + 1));
        let entry = BaseAddress { identity, node: None, endpoint: None, kind: AddressKind::Pod };
        self.addresses.insert(address, entry);
        identity
    }

    fn add_policy(&mut self, namespace: u32, app: u32, port: u16, has_blocks: bool) {
        let own = |app: u32| Peer::Pods { namespaces: None, pods: is("app", format!("app-{}", app % APPS)) };
        let of_team = |app: u32| Peer::Pods {
            namespaces: Some(is("team", format!("team-{}", (namespace + app) % 10))),
            pods: is("app", format!("app-{}", app % APPS)),
        };
        let tcp = |port| vec![PortMatch { protocol: Protocol::Tcp.into(), port }];
        let rule = |peers, ports| PolicyRule::new(Action::Allow, Some(peers), ports);
        let mut egress = vec![
            rule(vec![own(app + 3)], Some(tcp(PortSelector::Named("http".to_owned())))),
            rule(vec![of_team(app + 4)], Some(tcp(PortSelector::Range(443, 443)))),
        ];
        if has_blocks {
            let net = |text: String| text.parse().expect("a prefix");
            let cidr = net(format!("10.{}.0.0/16", app % 2));
            egress
                .push(rule(vec![Peer::Block { cidr, except: vec![net(format!("10.0.{app}.0/26"))] }], None));
        }
        let ingress = vec![
            rule(vec![own(app + 1), own(app + 2)], Some(tcp(PortSelector::Range(port, port + 20)))),
            rule(vec![of_team(app + 1)], Some(tcp(PortSelector::Named("http".to_owned())))),
        ];
        let isolating = |rules| Some(PolicyDirection { default: Action::Deny, rules });
        let key = ObjectKey::new(format!("namespace-{namespace}"), format!("policy-{app}"));
        let pods = is("app", format!("app-{app}"));
        let policy = Policy {
            reference: PolicyRef::network_policy(&key),
            subject: Subject::Pods { namespaces: Selector::default(), pods },
            tier: Tier::Namespaced,
            priority: 0,
            ingress: isolating(ingress),
            egress: isolating(egress),
            marks: Default::default(),
            others: Vec::new(),
            doubts: Vec::new(),
        };
        self.policies.insert(policy.reference.clone(), Arc::new(policy));
    }

    /// What the maps should hold.
    pub fn compile(&self, compiler: &mut Compiler) -> Result<Output> {
        Ok(compiler.compile(&Input {
            policies: &self.policies,
            identities: &self.identities,
            endpoints: &self.endpoints,
            audited: &Default::default(),
            shown: &Default::default(),
            heard: &Default::default(),
            host: &Default::default(),
            addresses: &self.addresses,
            pod_cidrs: &["10.0.0.0/8".parse()?],
        })?)
    }
}

/// A label that must have a value.
pub fn is(key: &str, value: String) -> Selector {
    Selector { requirements: vec![Requirement::In(key.to_owned(), [value].into())] }
}

/// Labels out of pairs.
pub fn labels<const N: usize>(pairs: [(&str, String); N]) -> Labels {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let start = Instant::now();
    let value = work()?;
    Ok((start.elapsed().as_secs_f64() * 1000.0, value))
}

fn milliseconds<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    timed(work).map(|(time, _)| time)
}

fn median(rounds: usize, mut round: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut times = (0..rounds).map(|_| round()).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
