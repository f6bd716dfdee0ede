//! `weir policy suggest`.

use std::io::{self, Write};

use anyhow::anyhow;
use clap::Args;

use crate::cli::observe::flows_of;
use crate::cli::{Connection, Failure};
use crate::hubble::proto::flow::Verdict;
use crate::hubble::proto::observer::GetFlowsRequest;
use crate::hubble::suggest::{own_labels, seen};
use crate::hubble::view::sides;
use crate::model::Labels;
use crate::policy::suggest::{Subject, Way, suggest};

#[derive(Args)]
pub struct SuggestArgs {
    #[command(flatten)]
    connection: Connection,
    /// For whom: NAMESPACE/POD, NAMESPACE/KEY=VALUE,..., or a NAMESPACE with all its pods.
    #[arg(value_name = "WHO")]
    who: String,
}

/// Whose flows are wanted.
enum Who<'a> {
    Pod(&'a str),
    Labelled(Labels),
    All,
}

pub fn run(args: &SuggestArgs) -> Result<(), Failure> {
    let (namespace, who) = match args.who.split_once('/') {
        None => (args.who.as_str(), Who::All),
        Some((namespace, pairs)) if pairs.contains('=') => {
            let pair =
                |pair: &str| pair.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
            let labels = pairs.split(',').filter_map(pair).collect();
            (namespace, Who::Labelled(labels))
        }
        Some((namespace, pod)) => (namespace, Who::Pod(pod)),
    };
    let mut subject = Subject { namespace: namespace.to_owned(), labels: Labels::new() };
    if let Who::Labelled(labels) = &who {
        subject.labels.clone_from(labels);
    }
    let mut found = Vec::new();
    let request = GetFlowsRequest { number: u64::MAX, ..GetFlowsRequest::default() };
    flows_of(&args.connection, request, |flow| {
        let [from, to] = sides(flow);
        for (way, own, other) in [(Way::In, &to, &from), (Way::Out, &from, &to)] {
            let labels = own_labels(own.labels());
            let is_wanted = own.namespace() == namespace
                && match &who {
                    Who::All => true,
                    Who::Pod(pod) => own.pod() == *pod,
                    Who::Labelled(wanted) => wanted.iter().all(|(key, value)| labels.get(key) == Some(value)),
                };
            if !is_wanted || flow.verdict() == Verdict::Dropped {
                continue;
            }
            if matches!(who, Who::Pod(_)) {
                subject.labels = labels;
            }
            found.extend(seen(flow, way, other, to.port));
        }
    })?;
    if found.is_empty() {
        return Err(Failure::Other(anyhow!("no flow of {} is kept: there is nothing to go by", args.who)));
    }
    Ok(io::stdout().lock().write_all(suggest(&subject, found).as_bytes())?)
}
