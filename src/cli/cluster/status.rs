//! `weir status --cluster`: one line for each node.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::{Context, Result};
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde::Serialize;

use super::operator::{self, OperatorStatus};
use super::{Agent, Cluster, ClusterArgs, explained};
use crate::api::answers::StatusAnswer;
use crate::cli::{Failure, Format, output, table};

/// Agents asked at the same time.
const AT_ONCE: usize = 16;
/// A map that is fuller is worth a word.
const FULL: f64 = 0.9;

/// A node as `-o json` shows it.
#[derive(Debug, Serialize)]
struct NodeRow {
    node: String,
    /// Kubernetes says that the node is ready.
    is_node_ready: bool,
    /// The agent's pod; none: nobody serves this node.
    agent: Option<String>,
    restarts: i32,
    /// The agent says that everything is in force.
    is_ready: bool,
    problems: Vec<String>,
    /// All that the agent says about itself.
    status: Option<StatusAnswer>,
}

/// What is seen of a cluster at one moment.
#[derive(Debug, Serialize)]
pub struct ClusterStatus {
    server: String,
    kubernetes: String,
    is_ready: bool,
    operator: OperatorStatus,
    nodes: Vec<NodeRow>,
}

impl ClusterStatus {
    /// True when every node has an agent that is ready.
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Prints it.
    pub fn write(&self, out: &mut impl Write, format: Format) -> io::Result<()> {
        match format {
            Format::Json => output::write_json(out, self),
            Format::Table => self.write_table(out),
        }
    }

    /// One sentence for the end of the command.
    pub fn outcome(&self) -> Result<(), Failure> {
        if self.is_ready {
            return Ok(());
        }
        let nodes: Vec<_> =
            self.nodes.iter().filter(|row| !row.is_ready).map(|row| row.node.as_str()).collect();
        Err(Failure::NotReady(format!("not ready: {}", nodes.join(", "))))
    }

    /// Each problem once, with where it is: every agent says the same of an object that all of them read.
    fn problems(&self) -> Vec<[String; 2]> {
        let of_operator = std::iter::once(("operator", &self.operator.problems));
        let of_nodes = self.nodes.iter().map(|row| (row.node.as_str(), &row.problems));
        let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut texts = Vec::new();
        for (place, problems) in of_operator.chain(of_nodes) {
            for problem in problems {
                let places = places.entry(problem).or_default();
                if places.is_empty() {
                    texts.push(problem);
                }
                places.push(place);
            }
        }
        let shown = |places: &[&str]| match places {
            [place] => (*place).to_owned(),
            places => format!("{} nodes", places.len()),
        };
        texts.into_iter().map(|text| [shown(&places[text.as_str()]), text.clone()]).collect()
    }

    fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let ready = self.nodes.iter().filter(|row| row.is_ready).count();
        writeln!(
            out,
            "{} of {} nodes ready; Kubernetes {} at {}\n{}\n",
            ready,
            self.nodes.len(),
            self.kubernetes,
            self.server,
            self.operator.line()
        )?;
        let rows: Vec<_> = self.nodes.iter().map(NodeRow::cells).collect();
        let header = [
            "NODE",
            "AGENT",
            "READY",
            "VERSION",
            "KERNEL",
            "ROUTING",
            "PODS",
            "IDENTITIES",
            "POLICIES",
            "DROPS",
            "PROBLEMS",
        ];
        table::write(out, header, &rows)?;
        let problems = self.problems();
        if !problems.is_empty() {
            writeln!(out)?;
            table::write(out, ["WHERE", "PROBLEM"], &problems)?;
        }
        Ok(())
    }
}

impl NodeRow {
    fn cells(&self) -> [String; 11] {
        let of = |cell: fn(&StatusAnswer) -> String| self.status.as_ref().map(cell).unwrap_or_default();
        [
            self.node.clone(),
            self.agent.clone().unwrap_or_else(|| "none".to_owned()),
            if self.is_ready { "yes" } else { "NO" }.to_owned(),
            of(|status| status.version.clone()),
            of(|status| status.kernel.clone()),
            of(|status| status.feature("routing").unwrap_or_default().to_owned()),
            of(|status| format!("{}/{}", status.objects.endpoints_enforced, status.objects.endpoints)),
            of(|status| status.objects.identities.to_string()),
            of(|status| status.objects.policies.to_string()),
            of(|status| status.dropped_packets.to_string()),
            match self.problems.len() {
                0 => String::new(),
                count => count.to_string(),
            },
        ]
    }
}

/// Asks every node of the cluster.
pub async fn ask(args: &ClusterArgs) -> Result<ClusterStatus> {
    let cluster = args.connect().await?;
    let nodes = Api::<Node>::all(cluster.client.clone()).list(&ListParams::default()).await;
    let nodes = nodes.map_err(explained).context("listing the nodes")?.items;
    let agents = cluster.agents().await?;
    let (mut operator, complaints) = futures::join!(operator::ask(&cluster), operator::complaints(&cluster));
    let mut complaints = complaints.unwrap_or_else(|error| {
        operator.problems.push(crate::error::chain(&error));
        BTreeMap::new()
    });
    let row = |node: Node| {
        let agent = agents.iter().find(|agent| agent.node == node.name_any()).cloned();
        let cluster = &cluster;
        async move { node_row(cluster, &node, agent).await }
    };
    let mut rows: Vec<NodeRow> = stream::iter(nodes).map(row).buffer_unordered(AT_ONCE).collect().await;
    rows.sort_by(|a, b| a.node.cmp(&b.node));
    for row in &mut rows {
        row.problems.extend(complaints.remove(&row.node).unwrap_or_default());
    }
    Ok(ClusterStatus {
        server: cluster.server.clone(),
        kubernetes: cluster.version.clone(),
        is_ready: rows.iter().all(|row| row.is_ready),
        operator,
        nodes: rows,
    })
}

async fn node_row(cluster: &Cluster, node: &Node, agent: Option<Agent>) -> NodeRow {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let is_node_ready = conditions.iter().any(|ready| ready.type_ == "Ready" && ready.status == "True");
    let mut row = NodeRow {
        node: node.name_any(),
        is_node_ready,
        agent: agent.as_ref().map(|agent| agent.pod.clone()),
        restarts: agent.as_ref().map_or(0, |agent| agent.restarts),
        is_ready: false,
        problems: Vec::new(),
        status: None,
    };
    let Some(agent) = agent else {
        row.problems.push("no agent runs here: new pods get no network from Weir".to_owned());
        return row;
    };
    row.problems.extend(agent.problem.clone());
    match cluster.ask_json::<StatusAnswer>(&agent, &["status", "--output", "json"]).await {
        Ok(status) => {
            row.is_ready = status.is_ready();
            row.problems.extend(problems(&status));
            row.status = Some(status);
        }
        Err(error) => row.problems.push(crate::error::chain(&error)),
    }
    row
}

/// What a person should look at.
fn problems(status: &StatusAnswer) -> Vec<String> {
    let pending = status.pending.iter().map(|task| format!("not ready: waiting for {task}"));
    let waiting = status.waiting.iter().map(|row| format!("endpoint {}: {}", row.endpoint, row.reason));
    let away = status.kinds.iter().filter(|kind| !kind.is_connected);
    let away = away.map(|kind| format!("the API server does not answer for {}", kind.kind));
    let broken = status.broken.iter().map(|broken| {
        let object = broken.object.as_deref().unwrap_or(&broken.source);
        format!("{object}: {}", broken.reason)
    });
    let is_full =
        |map: &&crate::datapath::MapFill| map.capacity > 0 && map.used as f64 > map.capacity as f64 * FULL;
    let full = status.maps.iter().filter(is_full);
    let full = full.map(|map| format!("the map {} has {} of {} rows", map.map, map.used, map.capacity));
    pending.chain(waiting).chain(away).chain(broken).chain(full).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::answers::{BrokenRow, FeatureRow};
    use crate::datapath::MapFill;

    fn row(node: &str, status: Option<StatusAnswer>) -> NodeRow {
        let problems = status.as_ref().map(problems).unwrap_or_default();
        let is_ready = status.as_ref().is_some_and(StatusAnswer::is_ready);
        let agent = status.as_ref().map(|_| format!("weir-agent-{node}"));
        NodeRow { node: node.to_owned(), is_node_ready: true, agent, restarts: 0, is_ready, problems, status }
    }

    #[test]
    fn a_line_for_every_node_and_its_problems() {
        let broken = BrokenRow {
            source: "kubernetes".to_owned(),
            document: None,
            line: None,
            object: Some("NetworkPolicy shop/web".to_owned()),
            reason: "no such port".to_owned(),
        };
        let status = StatusAnswer {
            version: "0.1.0".to_owned(),
            features: vec![FeatureRow { name: "routing".to_owned(), value: "native".to_owned() }],
            broken: vec![broken],
            maps: vec![MapFill { map: "nat".into(), used: 95, capacity: 100 }],
            dropped_packets: 7,
            ..StatusAnswer::default()
        };
        let cluster = ClusterStatus {
            server: "https://a".to_owned(),
            kubernetes: "v1.34.4".to_owned(),
            is_ready: false,
            operator: OperatorStatus {
                ready: 1,
                wanted: 2,
                leader: Some("one".to_owned()),
                problems: vec!["1 of 2 replicas are not ready".to_owned()],
            },
            nodes: vec![row("a", Some(status)), row("b", None)],
        };
        let mut out = Vec::new();
        cluster.write(&mut out, Format::Table).expect("memory");
        let text = String::from_utf8(out).expect("text");
        assert_eq!(
            text,
            "1 of 2 nodes ready; Kubernetes v1.34.4 at https://a\noperator: 1 of 2 ready, one leads\n\n\
             NODE  AGENT         READY  VERSION  KERNEL  ROUTING  PODS  IDENTITIES  POLICIES  DROPS  PROBLEMS\n\
             a     weir-agent-a  yes    0.1.0    -       native   0/0   0           0         7      2\n\
             b     none          NO     -        -       -        -     -           -         -      -\n\n\
             WHERE     PROBLEM\n\
             operator  1 of 2 replicas are not ready\n\
             a         NetworkPolicy shop/web: no such port\n\
             a         the map nat has 95 of 100 rows\n"
        );
        assert_eq!(cluster.outcome().expect_err("b").to_string(), "not ready: b");

        let mut same = row("c", None);
        same.problems = cluster.nodes[0].problems.clone();
        let all = ClusterStatus { nodes: cluster.nodes.into_iter().chain([same]).collect(), ..cluster };
        let said = |place: &str, text: &str| [place.to_owned(), text.to_owned()];
        assert_eq!(
            all.problems(),
            [
                said("operator", "1 of 2 replicas are not ready"),
                said("2 nodes", "NetworkPolicy shop/web: no such port"),
                said("2 nodes", "the map nat has 95 of 100 rows"),
            ]
        );
    }
}
