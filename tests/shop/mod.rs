//! The shop of `deploy/demo`: its pods made real, and every verdict that its policies must give.
//!
//! Used by the demo, which shows it, and by the integration tests, which run it.

// The tests use what decides, the demo also what explains.
#![allow(dead_code)]

pub mod page;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::{
    Backend, Lab, OUTSIDE, Outcome, Pod, ServicePort, Setup, Space, Via, backend, probe, wait_for,
};

/// The shop on two nodes.
pub struct Shop {
    pods: Vec<Pod>,
    lab: Lab,
}

/// One attempt, what must come of it, and what did.
pub struct Attempt {
    /// `namespace/name`, or `customer` for the host outside.
    pub from: &'static str,
    /// `namespace/name` of a pod, or of a service with `service `before it.
    pub to: &'static str,
    /// Destination port.
    pub port: u16,
    /// The same, behind a service.
    pub backend_port: u16,
    /// Whether the policies let it.
    pub is_allowed: bool,
}

/// Everything that is tried.
pub const ATTEMPTS: [Attempt; 9] = [
    attempt("customer", "shop/frontend", 8080, true),
    attempt("customer", "shop/backend", 8080, false),
    through_service("shop/frontend", "service shop/backend", 80, 8080, true),
    attempt("shop/frontend", "service data/database", 5432, false),
    attempt("shop/backend", "service data/database", 5432, true),
    attempt("shop/backend", "data/database", 80, false),
    through_service("data/database", "service shop/frontend", 80, 8080, false),
    attempt("data/database", "customer", 80, false),
    attempt("shop/frontend", "customer", 80, true),
];

const fn attempt(from: &'static str, to: &'static str, port: u16, is_allowed: bool) -> Attempt {
    through_service(from, to, port, port, is_allowed)
}

const fn through_service(
    from: &'static str,
    to: &'static str,
    port: u16,
    backend_port: u16,
    is_allowed: bool,
) -> Attempt {
    Attempt { from, to, port, backend_port, is_allowed }
}

/// What the flows say about an attempt.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `FORWARDED` or `DROPPED`.
    pub verdict: String,
    /// Who decided: a policy, or that none allows it.
    pub why: String,
}

impl Shop {
    /// Builds the nodes, the pods and the services, and applies the policies.
    pub fn open() -> Result<Self> {
        Self::open_with(&[])
    }

    /// The same, with more arguments for the agents.
    pub fn open_with(arguments: &[&str]) -> Result<Self> {
        let agent_arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let lab = Lab::start(Setup { nodes: 2, agent_arguments, ..Setup::default() })?;
        let mut pods = Vec::new();
        let objects = objects("shop.yaml")?;
        for object in objects.iter().filter(|object| object["kind"] != "Pod") {
            lab.manifests().write(object)?;
        }
        for object in objects.iter().filter(|object| object["kind"] == "Pod") {
            pods.push(lab.pod_of(object)?.create()?);
        }
        for service in objects.iter().filter(|object| object["kind"] == "Service") {
            write_slices(&lab, service, &objects, &pods)?;
        }
        for policy in self::objects("policies.yaml")? {
            lab.manifests().write(&policy)?;
        }
        Ok(Self { pods, lab })
    }

    /// Its lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Its pods.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// Tries everything once.
    pub fn try_all(&self) -> Result<Vec<Outcome>> {
        let running: Vec<_> = ATTEMPTS
            .iter()
            .map(|attempt| {
                let target = self.target(attempt)?;
                Ok(self.space(attempt.from)?.start(move || probe(Via::Tcp, target)))
            })
            .collect::<Result<_>>()?;
        Ok(running.into_iter().map(|probe| probe.wait()).collect())
    }

    /// Tries everything until every attempt ends as it must; what the last try gave, if none did.
    pub fn try_until_right(&self) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        let settled = wait_for("the expected verdicts", || {
            outcomes = self.try_all()?;
            Ok(ATTEMPTS.iter().zip(&outcomes).all(|(attempt, outcome)| attempt.is_as_expected(outcome)))
        });
        if outcomes.is_empty() {
            settled?;
        }
        Ok(outcomes)
    }

    /// What the flows of the nodes say about an attempt: the newest record of it, of the node that judged if there is one.
    pub fn seen(&self, attempt: &Attempt, flows: &[Value]) -> Option<Seen> {
        let is_of = |flow: &&Value| {
            let port = ["TCP", "UDP"].iter().find_map(|name| flow["l4"][*name]["destination_port"].as_u64());
            self.is_party(attempt.from, &flow["source"], &flow["IP"]["source"])
                && port == Some(attempt.backend_port.into())
                && self.is_party(attempt.to, &flow["destination"], &flow["IP"]["destination"])
                && (flow["verdict"] == "FORWARDED") == attempt.is_allowed
        };
        // Of the records of a connection, that of the node which judged says who decided.
        let judged = flows.iter().rfind(|flow| is_of(flow) && decided_by(flow).is_some());
        let matching = judged.or_else(|| flows.iter().rfind(is_of));
        matching.map(|flow| Seen { verdict: text(&flow["verdict"]), why: why(flow) })
    }

    /// Every flow that the nodes remember, oldest first.
    pub fn flows(&self) -> Result<Vec<Value>> {
        let mut flows = Vec::new();
        for node in self.lab.nodes() {
            flows.extend(node.flows(&[])?);
        }
        flows.sort_by_key(|flow| text(&flow["time"]));
        Ok(flows)
    }

    fn is_party(&self, name: &str, party: &Value, ip: &Value) -> bool {
        match name.strip_prefix("service ").unwrap_or(name).split_once('/') {
            Some((namespace, pod)) => party["namespace"] == namespace && party["pod_name"] == pod,
            None => *ip == OUTSIDE[0],
        }
    }

    fn space(&self, name: &str) -> Result<&Space> {
        if name == "customer" {
            return Ok(self.lab.outside());
        }
        Ok(self.pod(name)?.space())
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        let found = self.pods.iter().find(|pod| format!("{}/{}", pod.namespace(), pod.name()) == name);
        found.with_context(|| format!("no pod {name}"))
    }

    fn target(&self, attempt: &Attempt) -> Result<SocketAddr> {
        let address = match attempt.to.strip_prefix("service ") {
            Some("shop/frontend") => "10.96.0.1".parse()?,
            Some("shop/backend") => "10.96.0.2".parse()?,
            Some(_) => "10.96.0.3".parse()?,
            None if attempt.to == "customer" => OUTSIDE[0].parse()?,
            None => self.pod(attempt.to)?.address(true),
        };
        Ok(SocketAddr::new(address, attempt.port))
    }
}

impl Attempt {
    /// Answered where it must be, and not where it must not.
    pub fn is_as_expected(&self, outcome: &Outcome) -> bool {
        if self.is_allowed { outcome.is_answered() } else { *outcome == Outcome::TimedOut }
    }
}

/// The documents of a file of the demo.
pub fn objects(file: &str) -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/demo").join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    weir::yaml::read_all(&text).with_context(|| format!("parsing {}", path.display()))
}

/// What the EndpointSlice controller does in a cluster.
fn write_slices(lab: &Lab, service: &Value, objects: &[Value], pods: &[Pod]) -> Result<()> {
    let namespace = text(&service["metadata"]["namespace"]);
    let selector = service["spec"]["selector"].as_object().context("a Service without selector")?;
    let backends: Vec<Backend> = pods
        .iter()
        .filter(|pod| pod.namespace() == namespace)
        .filter(|pod| {
            let manifest = objects.iter().find(|object| {
                object["kind"] == "Pod"
                    && object["metadata"]["name"] == pod.name()
                    && object["metadata"]["namespace"] == namespace
            });
            let labels = manifest.map(|manifest| &manifest["metadata"]["labels"]);
            selector.iter().all(|(key, value)| labels.is_some_and(|labels| labels[key] == *value))
        })
        .map(|pod| backend(pod, true))
        .collect();
    let ports = service["spec"]["ports"].as_array().context("a Service without ports")?;
    let ports: Vec<ServicePort> = ports
        .iter()
        .map(|port| {
            Ok(ServicePort {
                name: text(&port["name"]),
                protocol: "TCP",
                port: u16::try_from(port["port"].as_u64().context("a port")?)?,
                target: u16::try_from(port["targetPort"].as_u64().context("a targetPort")?)?,
            })
        })
        .collect::<Result<_>>()?;
    lab.manifests().slices((&namespace, &text(&service["metadata"]["name"])), &ports, &backends)
}

fn why(flow: &Value) -> String {
    let direction = text(&flow["traffic_direction"]).to_lowercase();
    let policy = decided_by(flow);
    match (flow["verdict"] == "FORWARDED", policy) {
        (true, Some(policy)) => format!("allowed by {policy} ({direction})"),
        (true, None) => "no policy says otherwise".to_owned(),
        (false, Some(policy)) => format!("{} by {policy} ({direction})", text(&flow["drop_reason_desc"])),
        (false, None) => format!("{}: no policy allows this {direction}", text(&flow["drop_reason_desc"])),
    }
}

/// The policy whose rule decided.
fn decided_by(flow: &Value) -> Option<String> {
    let lists = ["ingress_allowed_by", "egress_allowed_by", "ingress_denied_by", "egress_denied_by"];
    let policy = lists.iter().map(|list| &flow[*list][0]).find(|policy| policy.is_object())?;
    Some(format!("{}/{}", text(&policy["namespace"]), text(&policy["name"])))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
