//! From a file of a policy in the directory of manifests to the first packet that is judged by it: the whole
//! system, in the lab.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::quantiles;
use crate::cluster::latency::Probe;
use crate::lab::{Lab, Setup};
use crate::row::Row;

/// Each closes the pod and opens it again.
const ROUNDS: usize = 60;
/// Between two changes.
const APART: Duration = Duration::from_millis(150);

/// Changes of one policy, each way.
pub fn rows() -> Result<Vec<Row>> {
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "bench/server").label("app", "server").create()?;
    let client = lab.pod(1, "bench/client").label("app", "client").create()?;
    let write = |who: &str| -> Result<Instant> {
        lab.manifests().write(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "server", "namespace": "bench"},
            "spec": {"podSelector": {"matchLabels": {"app": "server"}},
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": who}}}]}]},
        }))?;
        Ok(Instant::now())
    };
    let probe = Probe::start(&client, &server)?;
    let mut samples = Vec::new();
    thread::sleep(APART);
    for _ in 0..ROUNDS {
        samples.push(probe.silent_after(write("nobody")?)?);
        thread::sleep(APART);
        samples.push(probe.heard_after(write("client")?)?);
        thread::sleep(APART);
    }
    Ok(quantiles("file/change", &samples, 10.0, 50.0).into())
}
