//! Which backend a client would get of a service and why, in words. Pure: tables in, an explanation out, by the
//! same choice that makes the frontends.

use std::net::{IpAddr, SocketAddr};

use super::choice::{Candidates, Fate, Topology};
use super::{Frontends, Place};
use crate::model::{
    Algorithm, EndpointSlice, Frontend, FrontendKey, FrontendKind, ObjectKey, Protocol, Scope, Service,
    ServicePort, ServiceQuestion, ServiceTrace, TracedBackend, TrafficPolicy,
};

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// A pod or a node's socket, or something in the network.
    pub scope: Scope,
    /// Its address, where it is known: its family and the source ranges ask for it.
    pub address: Option<IpAddr>,
    /// Its port, where it is known: Maglev asks for it.
    pub port: Option<u16>,
}

/// A flow, for whoever knows what the programs make of it under Maglev.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Its client; no port where all of a client's flows have one backend.
    pub client: (IpAddr, Option<u16>),
    /// The address and port that it asks for.
    pub frontend: SocketAddr,
    /// Its protocol's number.
    pub protocol: u8,
}

impl Frontends {
    /// What a new connection of `client` would meet; or why that cannot be said.
    pub fn trace(
        &self,
        client: Client,
        question: &ServiceQuestion,
        pick: impl Fn(&Frontend, Flow) -> Option<SocketAddr>,
    ) -> Result<ServiceTrace, String> {
        let (key, frontend) = self.find(client, question)?;
        let service = self.services.get(&*frontend.service);
        let port = service.and_then(|service| Some((service, port_of(service, key, frontend.kind)?)));
        let Some((service, port)) = port else {
            return Ok(ServiceTrace {
                facts: vec!["No Service has this port of its address".to_owned()],
                ..outline(key, frontend, "The connection is refused".to_owned())
            });
        };
        let slices = self.slices.values().filter(|slice| slice.service == service.key);
        let slices: Vec<&EndpointSlice> = slices.map(AsRef::as_ref).collect();
        let candidates = Candidates::of(port, key.address.is_ipv4(), &slices);
        let policy = policy_of(service, key.scope, frontend.kind);
        let mut facts = vec![policy_text(key, frontend.kind, policy, &self.place)];
        if policy == TrafficPolicy::Cluster {
            facts.push(topology_text(candidates.topology(&self.place), service, &self.place));
        }
        let redirect = self.place.redirects.get(&service.key).filter(|redirect| {
            frontend.kind == FrontendKind::ClusterIp
                && !redirect.backends(port, key.address.is_ipv4()).is_empty()
        });
        facts.extend(redirect.map(|redirect| {
            let policy = &redirect.policy.key;
            format!("CiliumLocalRedirectPolicy {policy} leads to pods of this node instead of the backends")
        }));
        facts.extend(manner(key, frontend));
        facts.extend(picked(client, key, frontend, pick));
        let backend = |(address, of, fate): (_, &crate::model::SliceBackend, Fate)| TracedBackend {
            address,
            node: of.node.as_deref().map(str::to_owned),
            zone: of.zone.as_deref().map(str::to_owned),
            is_chosen: fate.is_chosen(),
            why: fate_text(fate, of),
        };
        let mut backends: Vec<_> = candidates.fates(policy, &self.place).map(backend).collect();
        if let Some(redirect) = redirect {
            let why = format!("CiliumLocalRedirectPolicy {} leads elsewhere", redirect.policy.key);
            for other in &mut backends {
                (other.is_chosen, other.why) = (false, why.clone());
            }
            let of_node = |address: SocketAddr| TracedBackend {
                address,
                node: Some(self.place.node.to_string()),
                zone: self.place.zone.as_deref().map(str::to_owned),
                is_chosen: true,
                why: "a ready pod of this node that the policy selects".to_owned(),
            };
            backends.retain(|other| frontend.addresses().all(|address| address != other.address));
            backends.splice(0..0, frontend.addresses().map(of_node));
        }
        let verdict = verdict(client, frontend, slices.len());
        Ok(ServiceTrace { facts, backends, ..outline(key, frontend, verdict) })
    }

    /// The row that the client's packets meet.
    fn find(&self, client: Client, question: &ServiceQuestion) -> Result<(&FrontendKey, &Frontend), String> {
        let ServiceQuestion { service: wanted, port, protocol, .. } = question;
        let is_protocol = |key: &FrontendKey| protocol.is_none() || key.protocol == *protocol;
        if let Ok(address) = wanted.parse::<IpAddr>() {
            let number: u16 = port
                .as_deref()
                .and_then(|port| port.parse().ok())
                .ok_or("an address needs a port's number")?;
            let row = |scope| {
                let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
                let keys = protocols.map(|protocol| FrontendKey::new(address, number, protocol, scope));
                let mut rows = keys.iter().filter(|key| is_protocol(key)).filter_map(|key| self.row(key));
                rows.next().or_else(|| self.row(&FrontendKey { scope, ..FrontendKey::rest_of(address) }))
            };
            return row(client.scope).ok_or_else(|| match row(Scope::Internal) {
                Some(_) => format!("{address} port {number} leads to a service for pods and nodes only: for the network it is an address like any other"),
                None => format!("no service has {address} port {number}: packets go where the routes say"),
            });
        }
        let (namespace, name) = wanted.split_once('/').unwrap_or(("default", wanted));
        let name = ObjectKey::new(namespace, name);
        let service =
            self.services.get(&name).ok_or_else(|| format!("there is no Service {name} that Weir serves"))?;
        let port = named_port(service, port.as_deref(), *protocol)?;
        let keys = self.rows.get(&name).into_iter().flat_map(|keys| keys.iter());
        let is_family =
            |key: &&FrontendKey| client.address.is_none_or(|of| of.is_ipv4() == key.address.is_ipv4());
        let of_port =
            keys.filter(|key| key.scope == client.scope).filter(is_family).filter_map(|key| self.row(key));
        let found = of_port
            .filter(|(key, frontend)| port_of(service, key, frontend.kind) == Some(port))
            .filter(|(key, _)| !key.address.is_loopback())
            .min_by_key(|(key, frontend)| (frontend.kind, key.address));
        found.ok_or_else(|| match client.scope {
            Scope::Internal if service.addresses.is_empty() => {
                format!("{name} is headless: its name leads to its pods, and Weir translates nothing")
            }
            Scope::Internal => format!("{name} has no address of the client's family, or another Service has it"),
            Scope::External => {
                format!("{name} is not for the network: it has no node port, load balancer's address or external IP")
            }
        })
    }

    fn row(&self, key: &FrontendKey) -> Option<(&FrontendKey, &Frontend)> {
        self.output.frontends.get_key_value(key)
    }
}

fn outline(key: &FrontendKey, frontend: &Frontend, verdict: String) -> ServiceTrace {
    ServiceTrace {
        scope: key.scope,
        frontend: FrontendKey { scope: Scope::Internal, ..*key }.to_string(),
        kind: frontend.kind,
        service: ObjectKey::clone(&frontend.service),
        verdict,
        facts: Vec::new(),
        backends: Vec::new(),
    }
}

/// The port of the Service that a frontend is of.
fn port_of<'a>(service: &'a Service, key: &FrontendKey, kind: FrontendKind) -> Option<&'a ServicePort> {
    let number = |port: &ServicePort| match kind {
        FrontendKind::NodePort => port.node_port,
        FrontendKind::ClusterIp
        | FrontendKind::LoadBalancer
        | FrontendKind::ExternalIp
        | FrontendKind::HostPort
        | FrontendKind::LocalRedirect => Some(port.port),
    };
    service.ports.iter().find(|port| Some(port.protocol) == key.protocol && number(port) == Some(key.port))
}

fn named_port<'a>(
    service: &'a Service,
    wanted: Option<&str>,
    protocol: Option<Protocol>,
) -> Result<&'a ServicePort, String> {
    let is_it = |port: &&ServicePort| {
        let is_named = wanted.is_none_or(|wanted| port.name == wanted || port.port.to_string() == wanted);
        is_named && protocol.is_none_or(|protocol| port.protocol == protocol)
    };
    let mut ports = service.ports.iter().filter(is_it);
    match (ports.next(), ports.next(), wanted) {
        (Some(port), None, _) | (Some(port), Some(_), Some(_)) => Ok(port),
        (Some(_), Some(_), None) => {
            let all: Vec<_> =
                service.ports.iter().map(|port| format!("{}/{}", port.port, port.protocol)).collect();
            Err(format!("{} has several ports: {}; name one", service.key, all.join(", ")))
        }
        (None, ..) => Err(format!("{} has no port {}", service.key, wanted.unwrap_or("at all"))),
    }
}

fn policy_of(service: &Service, scope: Scope, kind: FrontendKind) -> TrafficPolicy {
    match (kind, scope) {
        (FrontendKind::ClusterIp, _) => service.internal_policy,
        (_, Scope::External) => service.external_policy,
        (_, Scope::Internal) => TrafficPolicy::Cluster,
    }
}

fn policy_text(key: &FrontendKey, kind: FrontendKind, policy: TrafficPolicy, place: &Place) -> String {
    let node = &place.node;
    match (kind, key.scope, policy) {
        (FrontendKind::ClusterIp, _, TrafficPolicy::Local) => {
            format!("internalTrafficPolicy Local: backends of {node} alone")
        }
        (FrontendKind::ClusterIp, _, TrafficPolicy::Cluster) => {
            "internalTrafficPolicy Cluster: backends of all nodes".to_owned()
        }
        (_, Scope::External, TrafficPolicy::Local) => {
            format!("externalTrafficPolicy Local: backends of {node} alone, which see the client's address")
        }
        (_, Scope::External, TrafficPolicy::Cluster) => {
            "externalTrafficPolicy Cluster: backends of all nodes".to_owned()
        }
        (_, Scope::Internal, _) => {
            "from within the cluster: backends of all nodes, whatever externalTrafficPolicy says".to_owned()
        }
    }
}

fn topology_text(topology: Topology, service: &Service, place: &Place) -> String {
    let zone = place.zone.as_deref().unwrap_or("none");
    match (topology, service.distribution) {
        (Topology::SameNode, _) => {
            format!("hints: every ready backend has one for nodes, and one is for {}", place.node)
        }
        (Topology::SameZone, _) => {
            format!("hints: every ready backend has one for zones, and one is for the zone {zone}")
        }
        (Topology::Anywhere, None) => "hints: none that count".to_owned(),
        (Topology::Anywhere, Some(wanted)) => format!(
            "trafficDistribution asks for {wanted:?}, but the hints of the EndpointSlices leave nothing for the node {} \
             of zone {zone}, or some ready backend has none",
            place.node
        ),
    }
}

/// How one of several is chosen, and how it is reached.
fn manner(key: &FrontendKey, frontend: &Frontend) -> Vec<String> {
    let mut facts = vec![match frontend.algorithm {
        Algorithm::Random => "algorithm random: each connection gets any of them".to_owned(),
        Algorithm::Maglev => "algorithm maglev: the connection's addresses and ports say which".to_owned(),
    }];
    if let Some(seconds) = frontend.affinity {
        facts.push(format!(
            "sessionAffinity ClientIP: a client keeps its backend until it was silent for {seconds} s"
        ));
    }
    if key.scope == Scope::External && !frontend.keeps_source {
        facts.push(format!("backends of other nodes are reached by {}", frontend.forwarding));
    }
    facts
}

/// Which one Maglev gives, where that can be said.
fn picked(
    client: Client,
    key: &FrontendKey,
    frontend: &Frontend,
    pick: impl Fn(&Frontend, Flow) -> Option<SocketAddr>,
) -> Option<String> {
    if frontend.algorithm != Algorithm::Maglev || frontend.backends.len() < 2 {
        return None;
    }
    let (Some(address), true) = (client.address, frontend.affinity.is_some() || client.port.is_some()) else {
        return Some("maglev: name the client as ADDRESS:PORT to learn which".to_owned());
    };
    let port = client.port.filter(|_| frontend.affinity.is_none());
    let flow = Flow {
        client: (address, port),
        frontend: SocketAddr::new(key.address, key.port),
        protocol: key.protocol?.number(),
    };
    let backend = pick(frontend, flow)?;
    let socket = match key.scope {
        Scope::Internal => ", if its packets are translated and not its socket",
        Scope::External => "",
    };
    Some(format!(
        "maglev: a new connection from {} goes to {backend}{socket}",
        match port {
            Some(port) => SocketAddr::new(address, port).to_string(),
            None => address.to_string(),
        }
    ))
}

fn fate_text(fate: Fate, of: &crate::model::SliceBackend) -> String {
    let hinted = of.hints.as_ref().map(|hints| {
        let list = |names: &[std::sync::Arc<str>]| names.join(", ");
        match hints.nodes.is_empty() {
            true => format!("zones {}", list(&hints.zones)),
            false => format!("nodes {}", list(&hints.nodes)),
        }
    });
    match fate {
        Fate::Chosen => "ready".to_owned(),
        Fate::LastResort => "it ends, and serves because none is ready".to_owned(),
        Fate::NotReady if of.terminating => "it ends and serves no more".to_owned(),
        Fate::NotReady => "not ready".to_owned(),
        Fate::Ending => "it ends, and others are ready: running connections stay".to_owned(),
        Fate::OtherNode => "on another node, and the policy is Local".to_owned(),
        Fate::HintedElsewhere => format!("its hints are for {}", hinted.unwrap_or_default()),
    }
}

fn verdict(client: Client, frontend: &Frontend, slices: usize) -> String {
    let ranges = &frontend.source_ranges;
    if let Some(address) = client.address
        && !ranges.is_empty()
        && !ranges.iter().any(|range| range.contains(&address))
    {
        return format!("Dropped: {address} is in none of loadBalancerSourceRanges");
    }
    let doubt = match ranges.is_empty() || client.address.is_some() {
        true => "",
        false => ", if the client is in loadBalancerSourceRanges",
    };
    match &*frontend.backends {
        [] if frontend.has_others => {
            "Dropped: no backend is on this node, and those of other nodes are not for it".to_owned()
        }
        [] if slices == 0 => "Refused: no EndpointSlice is for this Service".to_owned(),
        [] => "Refused: no backend is ready".to_owned(),
        [only] => format!("To {}{doubt}", only.address),
        several => format!("To one of {} backends{doubt}", several.len()),
    }
}
