//! What each agent says about its node.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::{Entry, within};
use crate::cli::cluster::{Agent, Cluster, Limits};
use crate::datapath::MAP_NAMES;

/// Of one answer.
const BYTES_MAX: usize = 16 * 1024 * 1024;
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Asks an agent for everything. When its pod cannot be asked at all, that is the one answer.
pub async fn collect(cluster: &Cluster, agent: Agent, flows: u64, deadline: Instant) -> (String, Vec<Entry>) {
    let directory = format!("nodes/{}", agent.node);
    let flows = flows.to_string();
    let json = ["--output", "json"];
    let questions: [(&str, Vec<&str>); 11] = [
        ("status.json", [&["status"], &json[..]].concat()),
        ("facts.txt", vec!["facts"]),
        ("endpoints.json", [&["endpoint", "list"], &json[..]].concat()),
        ("identities.json", [&["identity", "list"], &json[..]].concat()),
        ("policies.json", [&["policy", "list"], &json[..]].concat()),
        ("services.json", [&["service", "list"], &json[..]].concat()),
        ("metrics.txt", vec!["metrics"]),
        ("flows.jsonl", [&["observe", "--last", &flows], &json[..]].concat()),
        ("drops.jsonl", [&["observe", "--verdict", "dropped", "--last", &flows], &json[..]].concat()),
        ("maps.json", [&["map", "list"], &json[..]].concat()),
        ("verify.json", [&["verify"], &json[..]].concat()),
    ];
    let maps = MAP_NAMES.iter().map(|name| (format!("maps/{name}.jsonl"), vec!["map", "dump", *name]));
    let questions = questions.into_iter().map(|(file, arguments)| (file.to_owned(), arguments));
    let mut entries = Vec::new();
    for (index, (file, arguments)) in questions.chain(maps).enumerate() {
        let answer = within(deadline, ask(cluster, &agent, &arguments)).await;
        let is_silent = index == 0 && answer.as_ref().is_err_and(|error| !error.is::<Cut>());
        if is_silent {
            entries.push(Entry::new(directory, answer));
            break;
        }
        let path = format!("{directory}/{file}");
        match answer {
            Err(error) => match error.downcast::<Cut>() {
                Ok(Cut(text)) => {
                    entries.push(Entry::new(&path, Err(anyhow!("cut after {BYTES_MAX} bytes"))));
                    entries.push(Entry::new(format!("{path}.cut"), Ok(text)));
                }
                Err(error) => entries.push(Entry::new(path, Err(error))),
            },
            answer => entries.push(Entry::new(path, answer)),
        }
    }
    (agent.node, entries)
}

/// An answer that was longer than wanted.
#[derive(Debug, thiserror::Error)]
#[error("too long")]
struct Cut(Vec<u8>);

async fn ask(cluster: &Cluster, agent: &Agent, arguments: &[&str]) -> Result<Vec<u8>> {
    let limits = Limits { within: ANSWER_WITHIN, bytes: BYTES_MAX };
    let ran = cluster.ask(agent, arguments, limits).await?;
    if ran.is_cut {
        return Err(Cut(ran.stdout).into());
    }
    // Status says by its code that the agent is not ready: what it prints is the more welcome.
    if ran.code != 0 && ran.stdout.is_empty() {
        bail!("{}", ran.complaint());
    }
    Ok(ran.stdout)
}
