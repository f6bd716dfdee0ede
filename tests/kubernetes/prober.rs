//! Probes by a process of a pod: one that the test starts, in the pod's network namespace and
//! in its cgroup, so that the kernel sees it as it sees the pod's own.
//!
//! The servers are those of Kubernetes's own tests (agnhost netexec): HTTP on a TCP port, a
//! line for a line on a UDP one.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

/// How long a probe waits; a denied one takes as long.
const PATIENCE: Duration = Duration::from_millis(1000);

/// How long a request of running traffic waits: longer than a SYN takes to be sent again.
const REQUEST_PATIENCE: Duration = Duration::from_millis(3000);

/// What a probe sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Via {
    /// GET /hostname.
    Http,
    /// GET /clientip: the answer is the address that the server saw.
    ClientAddress,
    /// `hostname` in a datagram.
    Udp,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The server's answer.
    Answered(String),
    /// Refused at once.
    Refused,
    /// Nothing came.
    TimedOut,
    /// Something else went wrong.
    Failed(String),
}

impl Outcome {
    /// Somebody answered.
    pub fn is_answered(&self) -> bool {
        matches!(self, Self::Answered(_))
    }
}

/// What came of requests, one after the other.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Count {
    /// Requests made.
    pub made: u64,
    /// Those that were not answered, or not in time.
    pub failed: u64,
    /// The longest time from the end of one answered request to that of the next.
    pub longest_gap: Duration,
}

/// Makes this process one of the pod in the cgroup `group` (v2).
pub fn enter(group: &Path) -> Result<()> {
    let processes = fs::read_to_string(group.join("cgroup.procs"))
        .with_context(|| format!("looking for the pod's processes in {}", group.display()))?;
    let first = processes.lines().next().context("the pod has no process")?;
    let netns = File::open(PathBuf::from(format!("/proc/{first}/ns/net")))?;
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
        .context("joining the pod's cgroup")?;
    setns(netns, CloneFlags::CLONE_NEWNET).context("entering the pod's network")
}

/// Runs all probes at once.
pub fn probe_all(probes: Vec<(Via, SocketAddr)>) -> Vec<Outcome> {
    let running: Vec<_> =
        probes.into_iter().map(|(via, target)| thread::spawn(move || probe(via, target, PATIENCE))).collect();
    running
        .into_iter()
        .map(|thread| thread.join().unwrap_or_else(|_| Outcome::Failed("panicked".to_owned())))
        .collect()
}

/// Makes requests one after the other, a new connection each, until `stops`; one that fails is said at once.
pub fn request(via: Via, target: SocketAddr, stops: &AtomicBool) -> Count {
    let mut count = Count::default();
    let mut last = Instant::now();
    while !stops.load(Ordering::Relaxed) {
        let outcome = probe(via, target, REQUEST_PATIENCE);
        count.made += 1;
        if outcome.is_answered() {
            count.longest_gap = count.longest_gap.max(last.elapsed());
            last = Instant::now();
        } else {
            count.failed += 1;
            eprintln!("{via:?} {target}: {outcome:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    count
}

fn probe(via: Via, target: SocketAddr, patience: Duration) -> Outcome {
    let answered = match via {
        Via::Http => get(target, "/hostname", patience),
        Via::ClientAddress => get(target, "/clientip", patience),
        Via::Udp => ask(target, patience),
    };
    match answered {
        Ok(answer) => Outcome::Answered(answer),
        Err(error) => match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
            Some(ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) => Outcome::Refused,
            Some(ErrorKind::TimedOut | ErrorKind::WouldBlock) => Outcome::TimedOut,
            _ => Outcome::Failed(format!("{error:#}")),
        },
    }
}

fn get(target: SocketAddr, path: &str, patience: Duration) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{head}");
    }
    Ok(body.trim().to_owned())
}

fn ask(target: SocketAddr, patience: Duration) -> Result<String> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(target)?;
    socket.send(b"hostname")?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).trim().to_owned())
}
