//! What a pod may send.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Pod, Setup, wait_for};
use crate::require::require_lab;

/// Bits a second.
const LIMIT: f64 = 20e6;
const MEASURED_FOR: Duration = Duration::from_secs(3);

/// Bits a second of payload that arrive over so many connections.
fn measure(from: &Pod, to: &Pod, streams: usize, port: u16) -> Result<f64> {
    let target = SocketAddr::new(to.address(true), port);
    let listener = to.space().run(move || TcpListener::bind(target))?;
    let received = to.space().start(move || -> Result<(u64, Duration)> {
        let mut readers = Vec::new();
        for _ in 0..streams {
            let (mut stream, _) = listener.accept()?;
            readers.push(std::thread::spawn(move || -> std::io::Result<u64> {
                let (mut bytes, mut buffer) = (0, vec![0; 65536]);
                loop {
                    match stream.read(&mut buffer)? {
                        0 => return Ok(bytes),
                        length => bytes += length as u64,
                    }
                }
            }));
        }
        let began = Instant::now();
        let mut all = 0;
        for reader in readers {
            all += reader.join().ok().context("a reader has panicked")??;
        }
        Ok((all, began.elapsed()))
    });
    let senders: Vec<_> = (0..streams)
        .map(|_| {
            from.space().start(move || -> Result<()> {
                let mut stream = TcpStream::connect(target)?;
                let (began, part) = (Instant::now(), vec![0; 16384]);
                while began.elapsed() < MEASURED_FOR {
                    stream.write_all(&part)?;
                }
                Ok(())
            })
        })
        .collect();
    senders.into_iter().try_for_each(|sender| sender.wait())?;
    let (bytes, time) = received.wait()?;
    Ok(bytes as f64 * 8.0 / time.as_secs_f64())
}

fn limit(lab: &Lab, pod: &str, limit: Option<&str>) -> Result<()> {
    let (namespace, name) = pod.split_once('/').context("namespace/name")?;
    let annotations = limit.map_or_else(String::new, |limit| {
        format!("  annotations: {{kubernetes.io/egress-bandwidth: \"{limit}\"}}\n")
    });
    lab.manifests().apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n{annotations}spec:\n  \
         nodeName: node1\n  containers: [{{name: main, image: none}}]\n"
    ))
}

#[test]
fn a_pod_sends_no_more_than_its_annotation_says() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let c = lab.pod(1, "shop/c").create()?;
    let queue = || a.space().ip("-details link show dev eth0");
    ensure!(!queue()?.contains("qdisc tbf"), "limited by nobody's word");
    limit(&lab, "shop/a", Some("20M"))?;
    wait_for("the limit", || Ok(queue()?.contains("qdisc tbf")))?;
    // To another node, and on this one; with one connection, with several, with many.
    let mut shares = Vec::new();
    for (port, (to, streams)) in (5000..).zip([(&b, 1), (&b, 4), (&b, 32), (&c, 1), (&c, 4)]) {
        shares.push(measure(&a, to, streams, port)? / LIMIT);
    }
    // Headers count, which are a twentieth; what waits in buffers when the time is over comes later.
    ensure!(shares.iter().all(|share| (0.85..=1.02).contains(share)), "shares of the limit: {shares:?}");
    println!("shares of the limit: {shares:.3?}");
    ensure!(measure(&b, &a, 1, 6000)? > 2.0 * LIMIT, "what it receives is not limited");
    limit(&lab, "shop/a", None)?;
    wait_for("the end of the limit", || Ok(!queue()?.contains("qdisc tbf")))?;
    limit(&lab, "shop/a", Some("fast"))?;
    wait_for("the word on a limit that cannot be read", || {
        Ok(lab.node(1).status()?["broken"].to_string().contains("fast"))
    })
}
