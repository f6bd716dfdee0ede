//! `weir observe --cluster`: the flows of every node, by way of the agents' own `weir`.

use anyhow::Result;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Cluster, ClusterArgs};
use crate::cli::Failure;
use crate::hubble::json;
use crate::hubble::proto::observer::GetFlowsResponse;

/// Lines that wait to be printed; a slow reader slows the agents' answers down, not the agents.
const WAITING_MAX: usize = 1024;

/// What is wanted of every node.
pub struct Wanted {
    /// Arguments of `weir observe` for each agent.
    pub arguments: Vec<String>,
    /// Go on with new flows as they come.
    pub follow: bool,
    /// At most the newest so many of all nodes together; `None`: all that the agents send.
    pub last: Option<usize>,
}

impl Wanted {
    /// From the arguments that were typed: those that only this side understands are left out.
    pub fn typed(typed: impl IntoIterator<Item = String>, follow: bool, last: Option<u64>) -> Self {
        const WITH_VALUE: [&str; 8] = [
            "--kubeconfig",
            "--context",
            "--weir-namespace",
            "--output",
            "-o",
            "--socket",
            "--color",
            "--time-format",
        ];
        let mut arguments = vec!["observe".to_owned()];
        let mut typed = typed.into_iter().skip_while(|word| word != "observe").skip(1);
        while let Some(word) = typed.next() {
            let flag = word.split('=').next().unwrap_or_default();
            if flag == "--cluster" || (flag.starts_with("-o") && !flag.starts_with("--") && flag.len() > 2) {
                continue;
            }
            if WITH_VALUE.contains(&flag) {
                if !word.contains('=') {
                    typed.next();
                }
                continue;
            }
            arguments.push(word);
        }
        arguments.extend(["--output".to_owned(), "json".to_owned()]);
        let last = last.map(|last| usize::try_from(last).unwrap_or(usize::MAX));
        Self { arguments, follow, last }
    }
}

/// Shows what the agents send. Without `follow` in the order of time; an agent that cannot be asked is
/// named, and the others' flows are shown all the same.
pub async fn run(
    args: &ClusterArgs,
    wanted: Wanted,
    mut show: impl FnMut(&GetFlowsResponse) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let cluster = args.connect().await?;
    let (lines, mut received) = mpsc::channel(WAITING_MAX);
    let mut asked = ask_all(&cluster, &wanted.arguments, &lines).await?;
    drop(lines);
    let mut kept = Vec::new();
    while let Some(line) = received.recv().await {
        let Ok(answer) = json::from_str::<GetFlowsResponse>(&line) else { continue };
        match wanted.follow {
            true => show(&answer)?,
            false => kept.push(answer),
        }
    }
    kept.sort_by_key(|answer| answer.time.map(|time| (time.seconds, time.nanos)));
    let first = wanted.last.map_or(0, |last| kept.len().saturating_sub(last));
    kept[first..].iter().try_for_each(show)?;
    let mut failed = Vec::new();
    while let Some(ended) = asked.join_next().await {
        if let Ok(Err(error)) = ended {
            failed.push(crate::error::chain(&error));
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Failure::NotReady(format!("these nodes are missing: {}", failed.join("; ")))),
    }
}

async fn ask_all(
    cluster: &Cluster,
    arguments: &[String],
    lines: &mpsc::Sender<String>,
) -> Result<JoinSet<Result<()>>> {
    let mut asked = JoinSet::new();
    for agent in cluster.agents().await? {
        let (cluster, arguments, lines) = (cluster.clone(), arguments.to_vec(), lines.clone());
        asked.spawn(async move { cluster.lines(&agent, &arguments, lines).await });
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_get_the_filters_and_nothing_of_this_side() {
        let typed =
            "weir observe --cluster --context kind --verdict dropped -o compact --weir-namespace=w --last 5";
        let wanted = Wanted::typed(typed.split(' ').map(str::to_owned), false, Some(5));
        let arguments = ["observe", "--verdict", "dropped", "--last", "5", "--output", "json"];
        assert_eq!((wanted.arguments, wanted.last), (arguments.map(str::to_owned).to_vec(), Some(5)));
    }
}
