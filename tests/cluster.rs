//! `make cluster`: real Kubernetes on this machine, in namespaces; it stays until `make cluster-down`.
//!
//! NODES=n gives it n nodes, LIKE=gke (eks, aks, k3s) nodes that are like that platform's. There is no
//! network for pods until Weir is deployed (`make deploy`).

#[path = "kubernetes/mod.rs"]
mod kubernetes;
#[path = "lab/mod.rs"]
mod lab;

use std::env;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use kubernetes::{Cluster, Platform, Setup, prober};

/// The cluster of `make cluster`; those of tests have the names of labs.
const NAME: &str = "weirlab-cluster";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        ["up"] => up(),
        ["down"] => {
            kubernetes::remove(NAME);
            Ok(())
        }
        ["load", cluster, archive] => load(cluster, Path::new(archive)),
        // What tests start.
        ["probe", group, probes] => probe(Path::new(group), probes),
        ["request", group, wanted] => request(Path::new(group), wanted),
        // What `up` starts.
        ["relay", target] => relay(target),
        ["machine", machine] => kubernetes::init::enter(machine),
        ["init", machine] => kubernetes::init::run(machine),
        _ => Err(anyhow::anyhow!("usage: cluster up | down | load CLUSTER ARCHIVE")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn up() -> Result<()> {
    if let Some(lack) = lab::machine_lacks() {
        bail!("the cluster {lack}");
    }
    let nodes = env::var("NODES").ok().filter(|nodes| !nodes.is_empty());
    let nodes = nodes.map_or(Ok(3), |nodes| nodes.parse()).context("NODES is no number")?;
    let like = env::var("LIKE").ok().filter(|like| !like.is_empty());
    let platform = like.map_or(Ok(Platform::Kubeadm), |like| Platform::named(&like)).context("LIKE")?;
    let began = Instant::now();
    let cluster = Cluster::start(NAME, &Setup { nodes, platform, has_controllers: true })?;
    let (kubeconfig, bin) = (cluster.kubeconfig(), cluster.programs().join("bin"));
    println!(
        "{nodes} nodes like those of {platform} after {:.1} s: make deploy",
        began.elapsed().as_secs_f32()
    );
    println!("\n  export KUBECONFIG={} PATH={}:$PATH", kubeconfig.display(), bin.display());
    println!("  kubectl get nodes");
    println!("\nOn a node: nsenter --all --target $(cat {}/node1/pid)", cluster.directory().display());
    println!("Logs: {}/*/*.log", cluster.directory().display());
    cluster.keep();
    Ok(())
}

/// Imports an archive of images into the runtime of every node.
fn load(cluster: &str, archive: &Path) -> Result<()> {
    let archive = archive.canonicalize().with_context(|| format!("finding {}", archive.display()))?;
    let nodes: Vec<PathBuf> = std::fs::read_dir(Path::new("/tmp").join(cluster))
        .with_context(|| format!("finding the cluster {cluster}"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<_>>()?;
    for node in nodes.iter().filter(|directory| directory.join(kubernetes::init::PID).exists()) {
        kubernetes::load(node, &archive)?;
    }
    Ok(())
}

/// Probes as a process of the pod in `group`, and prints what came of it.
fn probe(group: &Path, probes: &str) -> Result<()> {
    prober::enter(group)?;
    println!("{}", serde_json::to_string(&prober::probe_all(serde_json::from_str(probes)?))?);
    Ok(())
}

/// Makes requests as a process of the pod in `group` until standard input is closed, and prints their count.
fn request(group: &Path, wanted: &str) -> Result<()> {
    let (via, target) = serde_json::from_str(wanted)?;
    prober::enter(group)?;
    let stops = Arc::new(AtomicBool::new(false));
    let requests = thread::spawn({
        let stops = stops.clone();
        move || prober::request(via, target, &stops)
    });
    io::copy(&mut io::stdin(), &mut io::sink())?;
    stops.store(true, Ordering::Relaxed);
    let count = requests.join().map_err(|_| anyhow::anyhow!("the requests panicked"))?;
    println!("{}", serde_json::to_string(&count)?);
    Ok(())
}

/// Connects everybody who comes to the socket that is standard input with `target`.
fn relay(target: &str) -> Result<()> {
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    for client in listener.incoming() {
        let (client, target) = (client?, target.to_owned());
        thread::spawn(move || lab::relay(client, TcpStream::connect(target)?));
    }
    Ok(())
}
