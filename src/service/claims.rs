//! Whose an address and port is where several Services want it.
//!
//! A cluster IP is the first Service's by name, with all of its ports. Of anything else the port counts:
//! first a node port, then a load balancer's address, then an external one; of equals the first by name. No
//! address from outside may be a cluster IP or within the pods' CIDRs: whoever may write a Service must not
//! get what others send to pods and Services.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use serde::Serialize;

use super::place::Place;
use super::rows::{Claim, EVERY_NODE};
use crate::model::{FrontendKey, FrontendKind, ObjectKey, Protocol};

/// An address or port that a Service wants and does not get.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// The Service that does not get it.
    pub service: ObjectKey,
    /// What it would be.
    pub kind: FrontendKind,
    /// The address; the unspecified one for a port of every node.
    pub address: IpAddr,
    /// The port; `None` for the whole address.
    pub port: Option<u16>,
    /// Why not.
    pub reason: Reason,
}

/// Why a Service does not get an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Reason {
    /// Another Service has it.
    OwnedBy(ObjectKey),
    /// It is within the pods' CIDRs.
    IsPods,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, kind, address, port, reason } = self;
        match (kind, port) {
            (FrontendKind::ClusterIp, _) | (_, None) => {
                write!(f, "Service {service} has the cluster IP {address}")
            }
            (FrontendKind::NodePort, Some(port)) => write!(f, "Service {service} has the node port {port}"),
            (FrontendKind::LoadBalancer, Some(port)) => {
                write!(f, "Service {service} has port {port} of the load balancer's address {address}")
            }
            (FrontendKind::ExternalIp | FrontendKind::HostPort | FrontendKind::LocalRedirect, Some(port)) => {
                write!(f, "Service {service} has port {port} of the external IP {address}")
            }
        }?;
        match reason {
            Reason::OwnedBy(owner) => write!(f, ", which is Service {owner}'s"),
            Reason::IsPods => f.write_str(", which is an address of pods: it is not served"),
        }
    }
}

/// Who wants what, in order of rank at each place.
#[derive(Default)]
pub(super) struct Claims(BTreeSet<Claim>);

/// Before every name.
static NOBODY: LazyLock<Arc<ObjectKey>> = LazyLock::new(|| Arc::new(ObjectKey::new("", "")));

/// Address, port and protocol of a claim.
type Spot = (IpAddr, u16, Option<Protocol>);

/// The first of all claims at a spot.
fn least((address, port, protocol): Spot) -> Claim {
    Claim { address, port, protocol, kind: FrontendKind::ClusterIp, service: NOBODY.clone() }
}

impl Claims {
    pub fn insert(&mut self, claim: Claim) {
        self.0.insert(claim);
    }

    pub fn remove(&mut self, claim: &Claim) {
        self.0.remove(claim);
    }

    /// Everybody who wants this place, the first one first.
    fn at(&self, (address, port, protocol): Spot) -> impl Iterator<Item = &Claim> {
        let same =
            move |claim: &&Claim| (claim.address, claim.port, claim.protocol) == (address, port, protocol);
        self.0.range(least((address, port, protocol))..).take_while(same)
    }

    /// The Service that has the whole address, because it is a cluster IP.
    pub fn owner_of(&self, address: IpAddr) -> Option<&Arc<ObjectKey>> {
        let first = self.at((address, 0, None)).next();
        first.filter(|claim| claim.kind == FrontendKind::ClusterIp).map(|claim| &claim.service)
    }

    /// Whoever may gain or lose when this claim comes or goes.
    pub fn rivals<'a>(&'a self, claim: &Claim) -> impl Iterator<Item = &'a Arc<ObjectKey>> + use<'a> {
        let (address, port, protocol) = (claim.address, claim.port, claim.protocol);
        let same = move |claim: &&Claim| {
            claim.address == address
                && (protocol.is_none() || (claim.port, claim.protocol) == (port, protocol))
        };
        self.0.range(least((address, port, protocol))..).take_while(same).map(|claim| &claim.service)
    }

    /// Who wants, from outside, a node's address with the port of this claim on every node's.
    pub fn rivals_at_nodes<'a>(
        &'a self,
        claim: &'a Claim,
        place: &'a Place,
    ) -> impl Iterator<Item = &'a Arc<ObjectKey>> + use<'a> {
        let is_node_port = claim.kind == FrontendKind::NodePort;
        let addresses = place.own.iter().chain(&place.others).filter(move |_| is_node_port);
        addresses
            .flat_map(|address| self.at((*address, claim.port, claim.protocol)))
            .map(|claim| &claim.service)
    }

    /// Why `service` does not get a row; `None` if the row is its.
    pub fn obstacle(
        &self,
        service: &Arc<ObjectKey>,
        key: &FrontendKey,
        kind: FrontendKind,
        place: &Place,
    ) -> Option<Conflict> {
        let (address, port) = match kind {
            FrontendKind::ClusterIp => (key.address, None),
            FrontendKind::NodePort => (EVERY_NODE, Some(key.port)),
            FrontendKind::LoadBalancer
            | FrontendKind::ExternalIp
            | FrontendKind::HostPort
            | FrontendKind::LocalRedirect => (key.address, Some(key.port)),
        };
        let refuse =
            |reason| Some(Conflict { service: ObjectKey::clone(service), kind, address, port, reason });
        let owned_by = |owner: &Arc<ObjectKey>| refuse(Reason::OwnedBy(ObjectKey::clone(owner)));
        let protocol = port.and(key.protocol);
        let is_outer = matches!(kind, FrontendKind::LoadBalancer | FrontendKind::ExternalIp);
        if is_outer {
            if let Some(owner) = self.owner_of(key.address) {
                return owned_by(owner);
            }
            if place.is_a_pods(&key.address) && !place.is_a_nodes(&key.address) {
                return refuse(Reason::IsPods);
            }
            if place.is_a_nodes(&key.address)
                && let Some(first) = self.at((EVERY_NODE, key.port, key.protocol)).next()
                && first.service != *service
            {
                return owned_by(&first.service);
            }
        }
        let first = self.at((address, port.unwrap_or(0), protocol)).next()?;
        match first.service == *service {
            true => None,
            false => owned_by(&first.service),
        }
    }
}
