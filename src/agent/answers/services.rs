//! What is known of services, and which backend a client would get.

use std::net::{IpAddr, SocketAddr};

use super::{Known, refusal};
use crate::agent::lead::{Leader, Leaders};
use crate::api::Refusal;
use crate::api::answers::{AnnouncedRow, BackendPlace, ServiceRow};
use crate::datapath::maglev;
use crate::model::{Frontend, ObjectKey, Protocol, Scope, ServiceQuestion, ServiceTrace};
use crate::service::{Client, Flow};

impl Known {
    pub(super) fn service_rows(&self) -> Vec<ServiceRow> {
        let current = self.current.load();
        let leaders = self.leaders.load();
        let row = |(key, frontend): (&crate::model::FrontendKey, &crate::model::Frontend)| {
            let protocol: Protocol = key.protocol?;
            Some(ServiceRow {
                service: ObjectKey::clone(&frontend.service),
                kind: frontend.kind,
                scope: key.scope,
                address: key.address,
                port: key.port,
                protocol: protocol.to_string(),
                algorithm: frontend.algorithm,
                forwarding: frontend.forwarding,
                affinity_seconds: frontend.affinity,
                source_ranges: frontend.source_ranges.to_vec(),
                backends: frontend.addresses().collect(),
                places: frontend.backends.iter().map(place).collect(),
                draining: frontend.draining.to_vec(),
                has_others: frontend.has_others,
                leader: leader_of(&leaders, &frontend.service, key.address),
            })
        };
        current.frontends.iter().filter_map(row).collect()
    }

    /// The addresses that nodes answer for, with the node.
    pub(super) fn announced(&self) -> Vec<AnnouncedRow> {
        let leaders = self.leaders.load();
        let row = |(service, leader): (&ObjectKey, &Leader)| AnnouncedRow {
            service: service.clone(),
            addresses: leader.addresses.iter().copied().collect(),
            node: leader.node.clone(),
            devices: leader.devices.iter().cloned().collect(),
        };
        leaders.iter().map(row).collect()
    }

    /// Worked out anew from the tables: nothing is kept for whoever might ask.
    pub(super) fn service_trace(&self, question: &ServiceQuestion) -> Result<ServiceTrace, Refusal> {
        let current = self.current.load();
        let client = self.service_client(&question.client)?;
        let mut services = crate::service::Frontends::default();
        services.update(&self.tables.services.snapshot(), &self.tables.slices.snapshot(), &current.place);
        services.trace(client, question, |of, flow| self.maglev(of, flow)).map_err(refusal)
    }

    /// The backend that the programs choose for a flow by Maglev's table.
    pub(super) fn maglev(&self, frontend: &Frontend, flow: Flow) -> Option<SocketAddr> {
        let backends: Vec<_> =
            frontend.backends.iter().map(|backend| (backend.address, backend.weight)).collect();
        let table = maglev::table(&backends, self.config.args.services.maglev_table_size);
        let index = maglev::choose(&table, flow.client, flow.frontend, flow.protocol)?;
        backends.get(usize::try_from(index).ok()?).map(|(address, _)| *address)
    }

    /// Whoever is of the cluster asks from within.
    pub(super) fn service_client(&self, text: &str) -> Result<Client, Refusal> {
        let of = |scope, address| Ok(Client { scope, address, port: None });
        match text {
            "node" => return of(Scope::Internal, None),
            "world" => return of(Scope::External, None),
            _ => {}
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            let is_inside = self.current.load().addresses.contains_key(&address);
            return of(if is_inside { Scope::Internal } else { Scope::External }, Some(address));
        }
        if let Ok(from) = text.parse::<SocketAddr>() {
            let client = self.service_client(&from.ip().to_string())?;
            return Ok(Client { port: Some(from.port()), ..client });
        }
        let endpoints = self.endpoints.snapshot();
        let Some(endpoint) = endpoints.values().find(|endpoint| endpoint.pod.to_string() == text) else {
            let node = &self.config.args.node_name;
            return Err(refusal(format!(
                "{text} is no pod of the node {node}: the agent of its own node knows what it gets. A client is a \
                 pod as NAMESPACE/NAME, an address, node or world"
            )));
        };
        let addresses: Vec<IpAddr> = endpoint.addresses().collect();
        let address = if let [only] = *addresses { Some(only) } else { None };
        of(Scope::Internal, address)
    }
}

fn place(backend: &crate::model::Backend) -> BackendPlace {
    BackendPlace {
        node: backend.node.as_deref().map(str::to_owned),
        zone: backend.zone.as_deref().map(str::to_owned),
        is_terminating: backend.is_terminating,
        weight: backend.weight,
    }
}

fn leader_of(leaders: &Leaders, service: &ObjectKey, address: IpAddr) -> Option<String> {
    let leader = leaders.get(service).filter(|leader| leader.addresses.contains(&address))?;
    Some(leader.node.clone())
}
