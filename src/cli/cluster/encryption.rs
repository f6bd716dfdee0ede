//! `weir encryption status --cluster`: one line for each node, and what does not fit together.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use anyhow::Result;
use futures::{StreamExt, stream};
use serde::Serialize;

use super::{Agent, Cluster, ClusterArgs};
use crate::api::answers::{EncryptionAnswer, EncryptionPeerRow};
use crate::cli::{Failure, Format, output, table};

/// Agents asked at the same time.
const AT_ONCE: usize = 16;
/// A peer has a keepalive, so a handshake that is older means that the way is broken.
const HANDSHAKE_SECONDS_MAX: u64 = 180;

/// A node as `-o json` shows it.
#[derive(Debug, Serialize)]
struct NodeRow {
    node: String,
    problems: Vec<String>,
    /// What its agent says; none: it does not answer.
    encryption: Option<EncryptionAnswer>,
}

/// What is seen of a cluster at one moment.
#[derive(Debug, Serialize)]
pub struct ClusterEncryption {
    nodes: Vec<NodeRow>,
}

/// Asks every agent.
pub async fn ask(of: &ClusterArgs) -> Result<ClusterEncryption> {
    let cluster = of.connect().await?;
    let agents = cluster.agents().await?;
    let asking = agents.iter().map(|agent| ask_one(&cluster, agent));
    let answers: Vec<_> = stream::iter(asking).buffered(AT_ONCE).collect().await;
    Ok(ClusterEncryption::of(answers))
}

async fn ask_one(cluster: &Cluster, agent: &Agent) -> (String, Result<EncryptionAnswer, String>) {
    let asked = cluster.ask_json(agent, &["encryption", "status", "--output", "json"]).await;
    (agent.node.clone(), asked.map_err(|error| crate::error::chain(&error)))
}

impl ClusterEncryption {
    fn of(answers: Vec<(String, Result<EncryptionAnswer, String>)>) -> Self {
        let keys: BTreeMap<&str, Option<String>> = answers
            .iter()
            .filter_map(|(node, answer)| Some((node.as_str(), answer.as_ref().ok()?)))
            .map(|(node, answer)| (node, answer.device.as_ref().map(|it| it.public_key.to_string())))
            .collect();
        let rows = answers.iter().map(|(node, answer)| {
            let problems = match answer {
                Ok(answer) => problems(node, answer, &keys),
                Err(error) => vec![error.clone()],
            };
            NodeRow { node: node.clone(), problems, encryption: answer.as_ref().ok().cloned() }
        });
        Self { nodes: rows.collect() }
    }

    /// Prints it.
    pub fn write(&self, out: &mut impl Write, format: Format) -> io::Result<()> {
        if format == Format::Json {
            return output::write_json(out, self);
        }
        let rows: Vec<_> = self.nodes.iter().map(NodeRow::cells).collect();
        let header = ["NODE", "BY", "MODE", "PEERS", "OLDEST HANDSHAKE", "ERRORS", "KEY"];
        table::write(out, header, &rows)?;
        let problem = |row: &NodeRow| -> Vec<[String; 2]> {
            row.problems.iter().map(|text| [row.node.clone(), text.clone()]).collect()
        };
        let problems: Vec<[String; 2]> = self.nodes.iter().flat_map(problem).collect();
        if problems.is_empty() {
            return Ok(());
        }
        writeln!(out)?;
        table::write(out, ["WHERE", "PROBLEM"], &problems)
    }

    /// One sentence for the end of the command.
    pub fn outcome(&self) -> Result<(), Failure> {
        let nodes: Vec<&str> =
            self.nodes.iter().filter(|row| !row.problems.is_empty()).map(|row| row.node.as_str()).collect();
        match nodes.is_empty() {
            true => Ok(()),
            false => {
                Err(Failure::NotReady(format!("not all is encrypted as it should be: {}", nodes.join(", "))))
            }
        }
    }
}

impl NodeRow {
    fn cells(&self) -> [String; 7] {
        let Some(answer) = &self.encryption else {
            return [self.node.as_str(), "no answer", "", "", "", "", ""].map(str::to_owned);
        };
        let Some(device) = &answer.device else {
            return [self.node.as_str(), "off", "", "", "", "", ""].map(str::to_owned);
        };
        let ages = answer.peers.iter().map(age);
        let oldest = ages.clone().max_by_key(|age| age.unwrap_or(u64::MAX)).flatten();
        let well = ages.clone().flatten().filter(|age| *age <= HANDSHAKE_SECONDS_MAX).count();
        let is_never = device.port > 0 && ages.clone().any(|age| age.is_none());
        let errors: u64 = answer.peers.iter().filter_map(|peer| Some(peer.state.as_ref()?.errors)).sum();
        [
            self.node.clone(),
            // The reason is the agent's to tell.
            device.kind.split(',').next().unwrap_or_default().to_owned(),
            if answer.is_strict { "strict" } else { "not strict" }.to_owned(),
            format!("{well}/{}", answer.peers.len()),
            match oldest {
                _ if is_never => "never".to_owned(),
                Some(seconds) => format!("{seconds} s ago"),
                None => String::new(),
            },
            errors.to_string(),
            device.public_key.to_string(),
        ]
    }
}

fn age(peer: &EncryptionPeerRow) -> Option<u64> {
    peer.state.as_ref()?.last_handshake_seconds
}

/// What is wrong with what a node says, where `keys` are the nodes' own.
fn problems(node: &str, answer: &EncryptionAnswer, keys: &BTreeMap<&str, Option<String>>) -> Vec<String> {
    let others = keys.iter().filter(|(other, _)| **other != node);
    if answer.device.is_none() {
        let encrypts = others.filter(|(_, key)| key.is_some()).count();
        return if encrypts > 0 {
            vec![format!("encrypts nothing, and {encrypts} nodes do")]
        } else {
            vec![]
        };
    }
    let mut problems: Vec<String> = answer.error.iter().cloned().collect();
    // IPsec has no port, and no handshakes.
    let has_handshakes = answer.device.as_ref().is_some_and(|device| device.port > 0);
    for peer in &answer.peers {
        let name = &peer.node;
        let Some(known) = &peer.public_key else {
            problems.push(format!("knows no key of {name}"));
            continue;
        };
        match keys.get(name.as_str()) {
            Some(Some(own)) if *own != known.to_string() => {
                problems.push(format!("knows another key of {name} than {name} has"));
            }
            _ if !has_handshakes => {}
            _ => match age(peer) {
                None => problems.push(format!("has had no handshake with {name}")),
                Some(seconds) if seconds > HANDSHAKE_SECONDS_MAX => {
                    problems.push(format!("has had no handshake with {name} for {seconds} s"));
                }
                Some(_) => {}
            },
        }
    }
    let known: BTreeSet<&str> = answer.peers.iter().map(|peer| peer.node.as_str()).collect();
    for other in keys.iter().filter(|(other, key)| **other != node && key.is_some()).map(|(other, _)| other) {
        if !known.contains(other) {
            problems.push(format!("does not know {other}"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::answers::EncryptionDevice;
    use crate::model::{PeerState, PublicKey};

    fn answer(own: u8, peers: &[(&str, u8, Option<u64>)]) -> EncryptionAnswer {
        let peer = |(node, key, since): &(&str, u8, Option<u64>)| {
            let public_key = PublicKey([*key; 32]);
            let state = PeerState {
                public_key,
                endpoint: None,
                last_handshake_seconds: *since,
                received_bytes: 0,
                sent_bytes: 0,
                errors: 0,
            };
            EncryptionPeerRow { node: (*node).to_owned(), public_key: Some(public_key), state: Some(state) }
        };
        let device = EncryptionDevice {
            name: "weir_wg".to_owned(),
            kind: "the kernel's WireGuard".to_owned(),
            mtu: 1440,
            pid: None,
            public_key: PublicKey([own; 32]),
            port: 51871,
            generation: 0,
            change: None,
        };
        EncryptionAnswer {
            device: Some(device),
            is_strict: true,
            peers: peers.iter().map(peer).collect(),
            error: None,
        }
    }

    fn found(answers: Vec<(&str, Result<EncryptionAnswer, String>)>) -> Vec<(String, String)> {
        let answers = answers.into_iter().map(|(node, answer)| (node.to_owned(), answer)).collect();
        let cluster = ClusterEncryption::of(answers);
        let all = cluster.nodes.iter();
        all.flat_map(|row| row.problems.iter().map(|text| (row.node.clone(), text.clone()))).collect()
    }

    #[test]
    fn nodes_that_know_one_another_have_no_problem() {
        let both =
            vec![("a", Ok(answer(1, &[("b", 2, Some(30))]))), ("b", Ok(answer(2, &[("a", 1, Some(120))])))];
        assert_eq!(found(both), []);
    }

    #[test]
    fn what_does_not_fit_together_is_said_of_the_node_that_is_wrong() {
        let off = EncryptionAnswer { device: None, is_strict: true, peers: vec![], error: None };
        let nodes = vec![
            ("a", Ok(answer(1, &[("b", 9, Some(3)), ("c", 3, None)]))),
            ("b", Ok(answer(2, &[("a", 1, Some(200))]))),
            ("c", Err("the agent of c: it said nothing".to_owned())),
            ("d", Ok(off)),
        ];
        let found = found(nodes);
        let found: Vec<String> = found.into_iter().map(|(node, text)| format!("{node} {text}")).collect();
        assert_eq!(
            found,
            [
                "a knows another key of b than b has",
                "a has had no handshake with c",
                "b has had no handshake with a for 200 s",
                "c the agent of c: it said nothing",
                "d encrypts nothing, and 2 nodes do",
            ]
        );
    }
}
