//! Requests for each second of the proxy's processor time, and how much later answers come.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::server::{PLAIN_PORT, PORT};
use super::world::{PATH, Pair, beside_envoy, judge, processor_time, proxy_of};
use crate::lab::Lab;
use crate::load::median;
use crate::row::Row;

/// How often each load is run on each node.
const ROUNDS: usize = 9;
/// Requests of one connection whose times are taken, in each round.
const REQUESTS: usize = 2000;
/// A message of gRPC for the client to send.
const MESSAGE: &[u8] = b"\0\0\0\0\x05hello";

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Http1,
    Http2,
    Grpc,
}

impl Load {
    /// Its row, and what must be reached.
    fn row(self) -> (&'static str, f64) {
        match self {
            Self::Http1 => ("http1/keep_alive/vs_envoy", 2.0),
            Self::Http2 => ("http2/vs_envoy", 1.5),
            Self::Grpc => ("grpc/vs_envoy", 1.5),
        }
    }

    /// `message` is a file with what a call sends.
    fn command(self, pair: &Pair, message: &Path) -> Command {
        let url = pair.url(true);
        if self == Self::Http1 {
            let mut command = Command::new("wrk");
            command.args(["-t1", "-c32", "-d1s", &url]);
            return command;
        }
        let mut command = Command::new("h2load");
        command.args(["-t1", "-c16", "-m4", "-n20000"]);
        if self == Self::Grpc {
            command.arg("-d").arg(message);
            command.args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
            command.arg(format!("http://{}:{PORT}/bench.Echo/Say", pair.address()));
        } else {
            command.arg(url);
        }
        command
    }
}

/// The rows of the three loads.
pub fn rows() -> Result<Vec<Row>> {
    for (program, package) in [("wrk", "wrk"), ("h2load", "nghttp2-client")] {
        let there = Command::new(program).arg("--version").output().is_ok();
        ensure!(there, "no {program}: apt-get install {package}");
    }
    let lab = beside_envoy()?;
    let pairs = [Pair::create(&lab, 1)?, Pair::create(&lab, 2)?];
    judge(&lab)?;
    pairs.iter().try_for_each(Pair::wait)?;
    [Load::Http1, Load::Http2, Load::Grpc].into_iter().map(|load| compare(&lab, &pairs, load)).collect()
}

fn compare(lab: &Lab, pairs: &[Pair; 2], load: Load) -> Result<Row> {
    let (mut ours, mut envoys) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let mut rates = [0.0; 2];
        // Nobody always goes first.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for index in order {
            let pid = proxy_of(lab.node(index + 1), index == 1)?;
            let before = processor_time(pid)?;
            let requests =
                run(load, &pairs[index]).with_context(|| format!("{load:?} on node {}", index + 1))?;
            let used = processor_time(pid)?.saturating_sub(before);
            rates[index] = requests / used.as_secs_f64();
        }
        // The first round warms up.
        if round > 0 {
            ours.push(rates[0]);
            envoys.push(rates[1]);
        }
    }
    let ratios: Vec<f64> = ours.iter().zip(&envoys).map(|(ours, envoys)| ours / envoys).collect();
    // What two halves of one proxy's rounds differ by.
    let half = |odd: usize| median(ours.iter().skip(odd).step_by(2).copied().collect());
    let noise = (half(0) / half(1) - 1.0).abs();
    let (name, aim) = load.row();
    let row =
        Row::new(name, "requests/s", median(ours.clone())).against(median(envoys), Some(median(ratios)));
    Ok(row.noise(noise).at_least(aim))
}

/// How many requests were answered with what the rule allows.
fn run(load: Load, pair: &Pair) -> Result<f64> {
    let message = tempfile::NamedTempFile::new()?;
    std::fs::write(message.path(), MESSAGE)?;
    let written = pair.client.space().command(load.command(pair, message.path()), "")?;
    let number = |text: &str| text.trim().parse::<f64>().ok();
    if load == Load::Http1 {
        ensure!(!written.contains("Non-2xx") && !written.contains("Socket errors"), "{written}");
        let line = written.lines().find(|line| line.contains(" requests in ")).context("no count of wrk")?;
        return line.split_whitespace().next().and_then(number).context("no number of wrk");
    }
    let line =
        written.lines().find_map(|line| line.strip_prefix("requests: ")).context("no count of h2load")?;
    let counts: Vec<f64> =
        line.split(',').filter_map(|part| number(part.split_whitespace().next()?)).collect();
    match counts[..] {
        // total, started, done, succeeded, failed, errored, timeout
        [total, _, _, succeeded, ..] if total == succeeded => Ok(total),
        _ => bail!("not all requests succeeded: {line}"),
    }
}

/// How much later an answer comes by the proxy than without it, on an idle machine.
pub fn latency() -> Result<Vec<Row>> {
    let lab = beside_envoy()?;
    let pairs = [Pair::create(&lab, 1)?, Pair::create(&lab, 2)?];
    judge(&lab)?;
    pairs.iter().try_for_each(Pair::wait)?;
    let mut added: [[Vec<f64>; 2]; 2] = Default::default();
    for round in 0..=ROUNDS {
        for (pair, added) in pairs.iter().zip(&mut added) {
            let judged = times(pair, PORT)?;
            let plain = times(pair, PLAIN_PORT)?;
            if round == 0 {
                continue;
            }
            for (part, added) in [0.5, 0.99].into_iter().zip(added.iter_mut()) {
                let at = |times: &[f64]| times[(times.len() as f64 * part) as usize];
                added.push(at(&judged) - at(&plain));
            }
        }
    }
    let names = ["http1/latency_p50_us", "http1/latency_p99_us"];
    let [ours, envoys] = added;
    let rows = names.into_iter().zip(ours.into_iter().zip(envoys));
    Ok(rows
        .map(|(name, (ours, envoys))| Row::new(name, "us", median(ours)).against(median(envoys), None))
        .collect())
}

/// The times of single requests on one connection, in microseconds and in order of size.
fn times(pair: &Pair, port: u16) -> Result<Vec<f64>> {
    let target = SocketAddr::new(pair.address(), port);
    let request = format!("GET {PATH} HTTP/1.1\r\nHost: web\r\n\r\n");
    pair.client.space().run(move || {
        let mut stream = TcpStream::connect(target)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut times = Vec::with_capacity(REQUESTS);
        let mut buffer = [0; 4096];
        for _ in 0..REQUESTS {
            let began = Instant::now();
            stream.write_all(request.as_bytes())?;
            let mut filled = 0;
            while !buffer[..filled].ends_with(b"Hello, world\n") {
                match stream.read(&mut buffer[filled..])? {
                    0 => bail!("the answer ended early"),
                    count => filled += count,
                }
            }
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    })
}
