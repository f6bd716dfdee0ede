//! The proxy's memory, and what a port without rules pays.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit};

use super::server::PORT;
use super::world::{PATH, Pair, judge, proxy_of, resident};
use crate::lab::{Lab, Pod, Setup};
use crate::load::{self, Load, LoadServer, Path, measure};
use crate::row::Row;

/// Connections of the rows.
const SOME: usize = 1000;
const MANY: usize = 10_000;
/// Descriptors, in pairs, that are for other things.
const SPARE: usize = 200;
/// Of one pod, which may have 8192.
const OF_POD: usize = 2500;

/// The rows of memory.
pub fn rows() -> Result<Vec<Row>> {
    weir::netlink::raise_descriptor_limit()?;
    // The proxy has two descriptors for each connection, and the limit of this process.
    let limit = getrlimit(Resource::RLIMIT_NOFILE)?.1;
    let wanted = MANY.min(usize::try_from(limit)? / 2 - SPARE);
    let lab = Lab::start(Setup::default())?;
    let pair = Pair::create(&lab, 1)?;
    let clients = (0..wanted.div_ceil(OF_POD))
        .map(|number| lab.pod(1, &format!("bench/idle{number}")).create())
        .collect::<Result<Vec<_>>>()?;
    judge(&lab)?;
    pair.wait()?;
    let pid = proxy_of(lab.node(1), false)?;
    let idle = resident(pid)?;
    let target = SocketAddr::new(pair.address(), PORT);
    let mut connections = open(&clients[0], target, SOME)?;
    let some = resident(pid)?;
    for (number, client) in clients.iter().enumerate() {
        let count = OF_POD.min(wanted - number * OF_POD) - if number == 0 { SOME } else { 0 };
        connections.extend(open(client, target, count)?);
    }
    let many = resident(pid)?;
    // All of them are there still.
    let count = connections.len();
    for stream in &mut connections {
        ask(stream).context("asking on an idle connection")?;
    }
    Ok(vec![
        Row::new("proxy/rss_idle_mib", "MiB", idle).at_most(10.0),
        Row::new("proxy/rss_1000_mib", "MiB", some).at_most(40.0),
        Row::new("proxy/idle_connections", "connections", count as f64),
        Row::new("proxy/idle_connection_kib", "KiB", (many - idle) * 1024.0 / count as f64),
    ])
}

/// Opens connections in a pod, each of which has been asked once.
fn open(client: &Pod, target: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    client.space().run(move || {
        (0..count)
            .map(|number| {
                let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10))?;
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                ask(&mut stream).with_context(|| format!("on connection {number}"))?;
                Ok(stream)
            })
            .collect()
    })
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    write!(stream, "GET {PATH} HTTP/1.1\r\nHost: web\r\n\r\n")?;
    let mut buffer = [0; 4096];
    let mut filled = 0;
    while !buffer[..filled].ends_with(b"Hello, world\n") {
        match stream.read(&mut buffer[filled..])? {
            0 => anyhow::bail!("the answer ended early"),
            count => filled += count,
        }
    }
    Ok(())
}

/// Connections to a port without rules of layer 7, beside rules on another port, and on a node without any.
pub fn without_rule() -> Result<Vec<Row>> {
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    lab.manifests().apply(&format!(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: judged, namespace: bench}}
spec:
  endpointSelector: {{matchLabels: {{judged: 'yes'}}}}
  ingress:
  - fromEntities: [cluster]
    toPorts:
    - ports: [{{port: '{PORT}', protocol: TCP}}]
      rules: {{http: [{{path: '{PATH}'}}]}}
    - ports: [{{port: '{echo}', protocol: TCP}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: plain, namespace: bench}}
spec:
  endpointSelector: {{matchLabels: {{judged: 'no'}}}}
  ingress:
  - fromEntities: [cluster]
    toPorts:
    - ports: [{{port: '{PORT}', protocol: TCP}}]
    - ports: [{{port: '{echo}', protocol: TCP}}]
",
        echo = load::ECHO_PORT
    ))?;
    let pods = |node: usize, name: &str, judged: &str| -> Result<(Pod, Pod)> {
        let client = lab.pod(node, &format!("bench/{name}-client")).create()?;
        Ok((client, lab.pod(node, &format!("bench/{name}-server")).label("judged", judged).create()?))
    };
    let all = [
        ("judged", pods(1, "judged", "yes")?),
        ("plain", pods(2, "plain", "no")?),
        ("again", pods(2, "again", "no")?),
    ];
    let paths = all.each_ref().map(|(name, (client, server))| Path {
        name,
        client: client.space(),
        server: server.space(),
        target: server.address(true),
        port: load::ECHO_PORT,
    });
    let _servers = paths.iter().map(LoadServer::start).collect::<Result<Vec<_>>>()?;
    let samples = measure(Load::Connections, &paths)?;
    let row = Row::new("tcp_crr/without_rule/vs_before", Load::Connections.unit(), samples.median("judged"));
    let noise = (samples.ratio("again", &["plain"]) - 1.0).abs();
    let row = row.against(samples.median("plain"), Some(samples.ratio("judged", &["plain", "again"])));
    Ok(vec![row.noise(noise).at_least(1.0 - noise.max(0.02))])
}
