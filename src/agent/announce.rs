//! What this node says of itself to the operator and to people: its WeirNode and its heartbeat.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::args::{Config, Routing};
use super::node::Devices;
use crate::backoff::Backoff;
use crate::encryption::Mode;
use crate::kube::Publisher;
use crate::kube::crd::{ClosedPolicy, NodeEncryption, OtherKey, Tunnel, WeirNodeStatus};
use crate::model::{KeyAt, Node, NodeKey, PolicyRef};
use crate::telemetry::{PartRow, Telemetry};

/// An agent that is started again is ready sooner than this: until then the node is what
/// it was before.
const QUIET_START: Duration = Duration::from_secs(10);
/// How often it is looked at what is awaited.
const LOOK: Duration = Duration::from_secs(1);
/// The condition of a WeirNode that says whether parts of its agent fail.
const DEGRADED: &str = "Degraded";
/// Characters of a condition's message, at most.
const MESSAGE_MAX: usize = 1000;
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// What is known of this node so far.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// As the cluster has it; its pod CIDRs are those that pods get addresses from.
    pub node: Option<Arc<Node>>,
    /// The programs are loaded.
    pub devices: Option<Devices>,
}

/// Says how this node is whenever that changes, and every so often that its agent lives.
/// Never returns.
pub async fn run(
    config: &Config,
    publisher: &Publisher,
    telemetry: &Telemetry,
    facts: watch::Receiver<Facts>,
) {
    if publisher.has_operator() {
        let every = Duration::from_secs(config.args.timing.node_stale_seconds.into()) / 4;
        futures::join!(announce(config, publisher, telemetry, facts), beat(publisher, telemetry, every));
    } else if config.args.encryption.encryption != Mode::Off {
        announce(config, publisher, telemetry, facts).await;
    }
    std::future::pending().await
}

async fn announce(
    config: &Config,
    publisher: &Publisher,
    telemetry: &Telemetry,
    facts: watch::Receiver<Facts>,
) {
    let _ = timeout(QUIET_START, telemetry.ready().wait()).await;
    let mut said = None;
    let mut retry = Backoff::new(FIRST_RETRY, LAST_RETRY);
    let mut degraded = Degraded::default();
    loop {
        let mut status = status(config, &facts.borrow(), &telemetry.pending());
        status.conditions = vec![degraded.condition(&telemetry.parts().faults())];
        status.closed_policies = telemetry.parts().closed().iter().map(closed).collect();
        if said.as_ref() == Some(&status) && !publisher.is_node_missing() {
            let ready = telemetry.ready();
            // Readiness is told at once, other changes with the next look.
            match status.ready || ready.is_ready() {
                true => sleep(LOOK).await,
                false => drop(timeout(LOOK, ready.wait()).await),
            }
            continue;
        }
        match publisher.publish_node(&status).await {
            Ok(()) => {
                tracing::info!(ready = status.ready, message = status.message, "said how this node is");
                said = Some(status);
                retry.reset();
                // What was just made is shown a moment later.
                sleep(LOOK).await;
            }
            Err(error) => {
                tracing::warn!(error = crate::error::chain(&error), "saying how this node is");
                sleep(retry.wait()).await;
            }
        }
    }
}

fn status(config: &Config, facts: &Facts, pending: &[String]) -> WeirNodeStatus {
    let text = |list: &[std::net::IpAddr]| list.iter().map(ToString::to_string).collect();
    let node = facts.node.as_deref();
    let tunnel = (config.args.network.routing == Routing::Tunnel)
        .then(|| Tunnel { protocol: "vxlan".to_owned(), port: config.args.network.tunnel_port });
    WeirNodeStatus {
        addresses: node.map_or_else(Vec::new, |node| text(&node.addresses)),
        pod_cidrs: node
            .map_or_else(Vec::new, |node| node.pod_cidrs.iter().map(ToString::to_string).collect()),
        mtu: facts.devices.as_ref().map(|devices| devices.mtu),
        tunnel,
        encryption: facts
            .devices
            .as_ref()
            .and_then(|devices| devices.encryption.as_ref()?.published())
            .map(|key| encryption(&key)),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ready: pending.is_empty(),
        message: match (pending, node) {
            ([], _) => String::new(),
            (_, None) => "waiting for the Node object, its addresses and its pod CIDRs".to_owned(),
            (pending, Some(_)) => format!("waiting for {}", pending.join(", ")),
        },
        conditions: Vec::new(),
        closed_policies: Vec::new(),
    }
}

/// As the other agents read it.
fn encryption(key: &NodeKey) -> NodeEncryption {
    let KeyAt { public_key, port, generation, receives } = key.active;
    let hexadecimal = |sum: u64| format!("{sum:016x}");
    NodeEncryption {
        protocol: key.protocol.name().to_owned(),
        public_key: public_key.to_string(),
        port,
        generation,
        receives: receives.map(hexadecimal),
        other: key.other.map(|other| OtherKey {
            public_key: other.public_key.to_string(),
            port: other.port,
            generation: other.generation,
            receives: other.receives.map(hexadecimal),
        }),
    }
}

/// As the operator reads it, which puts an event on the policy.
fn closed((policy, reason): &(PolicyRef, String)) -> ClosedPolicy {
    ClosedPolicy {
        kind: policy.kind.name().to_owned(),
        namespace: policy.namespace.as_deref().map(str::to_owned),
        name: policy.name.to_string(),
        reason: reason.chars().take(MESSAGE_MAX).collect(),
    }
}

/// The condition that says whether parts of the agent fail.
#[derive(Default)]
struct Degraded {
    /// As it was last, and since when.
    last: Option<(bool, Time)>,
}

impl Degraded {
    fn condition(&mut self, faults: &[PartRow]) -> Condition {
        let is_degraded = !faults.is_empty();
        let since = match self.last.take() {
            Some((last, since)) if last == is_degraded => since,
            _ => Time(jiff::Timestamp::now()),
        };
        self.last = Some((is_degraded, since.clone()));
        let texts: Vec<String> = faults.iter().map(PartRow::text).collect();
        Condition {
            type_: DEGRADED.to_owned(),
            status: if is_degraded { "True" } else { "False" }.to_owned(),
            reason: if is_degraded { "PartsFail" } else { "AllPartsWork" }.to_owned(),
            message: texts.join("; ").chars().take(MESSAGE_MAX).collect(),
            last_transition_time: since,
            observed_generation: None,
        }
    }
}

/// A main loop that is stuck is no life.
async fn beat(publisher: &Publisher, telemetry: &Telemetry, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_well = true;
    loop {
        ticks.tick().await;
        if telemetry.ready().is_ready() && telemetry.stuck_for().is_some() {
            continue;
        }
        let started = Instant::now();
        let sent = timeout(every, publisher.beat()).await;
        let sent = sent.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {:?}", started.elapsed())));
        match sent {
            Ok(()) => is_well = true,
            // Once an outage.
            Err(error) if is_well => {
                tracing::warn!(error = crate::error::chain(&error), "saying that this node's agent lives");
                is_well = false;
            }
            Err(error) => {
                tracing::debug!(error = crate::error::chain(&error), "saying that this node's agent lives")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_says_what_fails_and_since_when() {
        let mut degraded = Degraded::default();
        let fault = |part: &str| PartRow {
            part: part.to_owned(),
            failing_seconds: Some(5),
            causes: vec!["full".to_owned()],
            ..PartRow::default()
        };
        let well = degraded.condition(&[]);
        assert_eq!((well.status.as_str(), well.message.as_str()), ("False", ""));
        let one = degraded.condition(&[fault("policies")]);
        assert_eq!((one.status.as_str(), one.message.as_str()), ("True", "policies: full"));
        let two = degraded.condition(&[fault("policies"), fault("routes")]);
        assert_eq!(two.message, "policies: full; routes: full");
        assert_eq!(two.last_transition_time, one.last_transition_time);
    }
}
