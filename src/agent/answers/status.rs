//! What `weir status` says.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::Known;
use crate::agent::args::{AgentArgs, Routing};
use crate::agent::node::OVERLAY_DEVICE;
use crate::agent::sinks::few;
use crate::api::answers::{BrokenRow, FeatureRow, KindRow, StatusAnswer, WaitingRow};
use crate::datapath::{Datapath, Features, MapFill, UsageKind};
use crate::encryption::Device;
use crate::netlink;

impl Known {
    pub(super) fn status(&self) -> StatusAnswer {
        let progress = self.progress.borrow().clone();
        let waiting = progress.waiting.into_iter().map(|(endpoint, reason)| WaitingRow { endpoint, reason });
        let source = match &self.config.args.manifests {
            Some(directory) => directory.display().to_string(),
            None => "kubernetes".to_owned(),
        };
        StatusAnswer {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.config.args.node_name.clone(),
            kernel: self
                .loaded
                .get()
                .map(|loaded| loaded.datapath.features().kernel.clone())
                .unwrap_or_default(),
            uptime_seconds: self.started.elapsed().as_secs(),
            pending: self.telemetry.pending(),
            parts: self.telemetry.parts().rows(),
            source,
            kinds: self.kinds(),
            broken: self.broken(),
            features: self.features(),
            objects: self.counts(),
            waiting: waiting.collect(),
            announced: self.announced(),
            maps: self.maps(),
            flows: self.recorder.counts(),
            dropped_packets: self.dropped_packets(),
        }
    }

    pub(super) fn dropped_packets(&self) -> u64 {
        let Some(loaded) = self.loaded.get() else { return 0 };
        let rows = loaded.datapath.metrics().unwrap_or_else(|error| {
            tracing::warn!(error = crate::error::chain(&error), "reading the packet counters");
            Vec::new()
        });
        rows.iter().filter(|row| row.reason != 0).map(|row| row.packets).sum()
    }

    pub(super) fn maps(&self) -> Vec<MapFill> {
        let Some(loaded) = self.loaded.get() else { return Vec::new() };
        loaded.datapath.map_fill().unwrap_or_else(|error| {
            tracing::warn!(error = crate::error::chain(&error), "counting the rows of maps");
            Vec::new()
        })
    }

    pub(super) fn kinds(&self) -> Vec<KindRow> {
        let row = |(kind, health): (crate::kube::Kind, crate::kube::KindHealth)| KindRow {
            kind: kind.to_string(),
            objects: self.objects_of(kind),
            is_synced: health.is_synced,
            is_connected: health.is_connected,
            silent_seconds: health
                .last_event
                .and_then(|last| SystemTime::now().duration_since(last).ok())
                .map(|silence| silence.as_secs()),
            errors_total: health.errors_total,
        };
        self.health.kinds().into_iter().map(row).collect()
    }

    pub(super) fn broken(&self) -> Vec<BrokenRow> {
        let reports = self.health.reports().into_iter().map(|report| BrokenRow {
            source: report.source,
            document: report.document,
            line: report.line,
            object: report.object,
            reason: report.reason,
        });
        let current = self.current.load();
        let conflicts = current.conflicts.iter().map(|reason| BrokenRow {
            source: "objects".to_owned(),
            document: None,
            line: None,
            object: None,
            reason: reason.clone(),
        });
        reports.chain(conflicts).collect()
    }

    pub(super) fn features(&self) -> Vec<FeatureRow> {
        let args = &self.config.args;
        let mut rows = vec![("routing", format!("{:?}", args.network.routing).to_lowercase())];
        if let Some(loaded) = self.loaded.get() {
            let features = loaded.datapath.features();
            rows.push(("attach", format!("{:?}", features.attach).to_lowercase()));
            let ended_by = if features.has_socket_destroy { "iterator" } else { "sock_diag" };
            rows.push(("limits of a pod", limits_text(&loaded.datapath)));
            rows.push(("stale sockets ended by", ended_by.to_owned()));
            rows.push(("mtu", self.mtu_text(loaded.mtu)));
            if args.network.routing == Routing::Tunnel {
                let way = match loaded.datapath.allows_past_stack() {
                    Ok(true) if args.network.tunnel_direct => "direct".to_owned(),
                    Ok(_) => format!("by {OVERLAY_DEVICE}"),
                    Err(error) => crate::error::chain(&error),
                };
                rows.push(("tunnel packets", way));
            }
            rows.extend(by_the_stack(&loaded.datapath));
            rows.extend(loaded.datapath.wires().into_iter().map(|device| ("xdp", device)));
            if args.nat.masquerade {
                rows.push(("masquerade ports", loaded.ports.to_string()));
            }
            let order = if features.fragments_wait { "wait for the first" } else { "dropped: no tbf queue" };
            rows.push(("fragments out of order", order.to_owned()));
            rows.push(("bandwidth", bandwidth_text(features)));
            rows.extend(self.current.load().devices.iter().map(|(index, device)| {
                ("priorities of pods", priorities_text(&device.name, netlink::queue_kinds(*index)))
            }));
            for (program, reason) in &features.not_loaded {
                rows.push(("left out", format!("{program}: {reason}")));
            }
        }
        let device = self.loaded.get().and_then(|loaded| loaded.encryption.as_ref());
        rows.push((
            "encryption",
            device.map_or_else(|| "off".to_owned(), |device| encryption_text(device, args)),
        ));
        rows.push(("names of DNS", self.learned.said()));
        rows.push(("socket load balancing", args.kernel.socket_lb.to_string()));
        rows.push(("masquerade", args.nat.masquerade.to_string()));
        rows.push(("flow events", args.flows.flow_events.to_string()));
        rows.into_iter().map(|(name, value)| FeatureRow { name: name.to_owned(), value }).collect()
    }

    /// The MTU of the way to other nodes' pods, and the pods that are older than it.
    pub(super) fn mtu_text(&self, mtu: u32) -> String {
        let links = match netlink::links() {
            Ok(links) => links,
            Err(error) => return format!("{mtu}; those of the pods are not known: {error}"),
        };
        let mtus: BTreeMap<u32, u32> = links.iter().map(|link| (link.index, link.mtu)).collect();
        let endpoints = self.endpoints.snapshot();
        let wider = endpoints.values().filter_map(|endpoint| {
            let own = mtus.get(&endpoint.host_ifindex).filter(|own| **own > mtu)?;
            Some(format!("{} ({own})", endpoint.pod))
        });
        let wider: Vec<String> = wider.collect();
        match wider.is_empty() {
            true => mtu.to_string(),
            false => format!(
                "{mtu}, less than that of {}: their TCP is told, other packets that are too long are cut on the way",
                few(&wider)
            ),
        }
    }
}

/// As `weir status` says it.
fn encryption_text(device: &Device, args: &AgentArgs) -> String {
    let mode = if args.encryption.encryption_strict { "strict" } else { "not strict" };
    let change = device.change().map(|change| format!("; keys change: {change}"));
    format!(
        "{} with MTU {}, {mode}, by {}{}",
        device.name(),
        device.mtu(),
        device.kind(),
        change.unwrap_or_default()
    )
}

/// What a pod may have.
fn limits_text(datapath: &Datapath) -> String {
    let limits = UsageKind::ALL.into_iter().zip(datapath.limits().of_one);
    let limits: Vec<_> =
        limits.map(|(kind, limit)| format!("{limit} {}", kind.name().replace('_', " "))).collect();
    limits.join(", ")
}

/// Which mechanism limits what pods send and receive.
fn bandwidth_text(features: &Features) -> String {
    let received = if features.pods_are_limited {
        "received: htb on weir_limit, a class for each pod with a limit"
    } else {
        "received: no limit, the kernel has no htb queue"
    };
    format!("sent: tbf on the pod's device; {received}")
}

/// Whether the queue of a device that leads out lets some pods go first.
fn priorities_text(device: &str, queues: netlink::Result<Vec<String>>) -> String {
    match queues {
        Err(error) => format!("{device}: not known: {error}"),
        Ok(queues) if queues.is_empty() => format!("{device} has no queue"),
        Ok(queues) => {
            let has_bands = queues.iter().any(|queue| BANDS.contains(&queue.as_str()));
            let count = if has_bands { "count" } else { "do not count" };
            format!("{count} on {device}, whose queue is {}", queues.join(" of "))
        }
    }
}

/// Queues with bands by the priority of packets.
const BANDS: [&str; 3] = ["fq", "prio", "pfifo_fast"];

/// Rules of the node's netfilter that pods' packets do not meet: they go past the stack.
fn by_the_stack(datapath: &Datapath) -> Option<(&'static str, String)> {
    let value = match (datapath.allows_past_stack(), netlink::forward_drops()) {
        (Ok(false), _) | (_, Ok(0)) => return None,
        (_, Ok(drops)) => format!(
            "{drops} rules and policies drop what is forwarded: what pods send out of the cluster meets them \
             only where it goes to --stack-cidrs"
        ),
        (_, Err(error)) => error.to_string(),
    };
    Some(("netfilter", value))
}
