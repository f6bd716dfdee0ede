//! Load: TCP transactions, connections and streams between two namespaces.
//!
//! Client and server are processes of their own, and with the agents they are all on
//! one processor: what is measured is the processor time of the path, with little
//! noise. Paths alternate within a round, and every ratio is the median of the
//! ratios of single rounds.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::lab::Space;

/// Of the server that echoes bytes.
pub const ECHO_PORT: u16 = 7000;
const SINK_PORT: u16 = 7001;
/// Bytes that the kernel keeps for the receiver of a stream; it takes the double for its own.
const SINK_BUFFER: usize = 512 * 1024;

/// How often each path is measured, and for how long. What else the machine does comes and goes
/// within seconds, so many short samples: 15 streams of 0.3 s had four times the noise.
const ROUNDS: usize = 45;
const SAMPLE: Duration = Duration::from_millis(100);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// One byte each way on one connection, again and again.
    Transactions,
    /// Connect, one byte each way, close.
    Connections,
    /// As many bytes as go.
    Stream,
}

impl Load {
    /// All of them.
    pub const ALL: [Load; 3] = [Load::Transactions, Load::Connections, Load::Stream];

    /// The first part of its rows' names.
    pub fn name(self) -> &'static str {
        match self {
            Load::Transactions => "tcp_rr",
            Load::Connections => "tcp_crr",
            Load::Stream => "tcp_stream",
        }
    }

    /// Of its values.
    pub fn unit(self) -> &'static str {
        match self {
            Load::Transactions => "transactions/s",
            Load::Connections => "connections/s",
            Load::Stream => "Gbit/s",
        }
    }
}

/// Two ends between which load goes.
pub struct Path<'a> {
    /// By which rows name it.
    pub name: &'static str,
    /// Where the client is.
    pub client: &'a Space,
    /// Where the server is.
    pub server: &'a Space,
    /// The server's address.
    pub target: IpAddr,
    /// The port at which the address echoes bytes: `ECHO_PORT`, or that of a Service.
    pub port: u16,
}

/// One sample of connections to Services that are chosen at random.
#[derive(Clone, Copy, Debug)]
pub struct ServiceSample {
    /// The median time that `connect` took, in microseconds.
    pub connect: f64,
    /// Connections with one byte each way, in a second.
    pub rate: f64,
}

/// The samples of some paths: `samples[path][round]`.
pub struct Samples(Vec<(&'static str, Vec<f64>)>);

impl Samples {
    /// The median of a path.
    pub fn median(&self, path: &str) -> f64 {
        median(self.of(path).to_vec())
    }

    /// The median of the ratios of `path` to `others`, which are alike, within rounds: where the kernel
    /// happens to have put one pair's memory is worth a few hundredths.
    pub fn ratio(&self, path: &str, others: &[&str]) -> f64 {
        let against = |round: usize| {
            let samples = others.iter().map(|other| self.of(other)[round]);
            samples.sum::<f64>() / others.len() as f64
        };
        median(self.of(path).iter().enumerate().map(|(round, value)| value / against(round)).collect())
    }

    fn of(&self, path: &str) -> &[f64] {
        let found = self.0.iter().find(|(name, _)| *name == path);
        &found.expect("only measured paths are compared").1
    }
}

/// The processor for everything that is measured: the last one that this process may use. Called before
/// any namespace is made: threads, agents, servers and clients inherit it.
pub fn pin() -> Result<()> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("asking for the processors")?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut cpus = CpuSet::new();
    cpus.set(last.context("no processor")?)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("staying on one processor")
}

/// A server process, ended when dropped.
pub struct LoadServer(Child);

impl LoadServer {
    /// Starts the server of a path and readies its client.
    pub fn start(path: &Path<'_>) -> Result<Self> {
        ready_client(path.client)?;
        Self::start_in(path.server)
    }

    /// Starts a server in `space`.
    pub fn start_in(space: &Space) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = space.run(move || command.spawn()).context("starting a server of load")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(line == "listening\n", "the server of load in {} did not start", space.name());
        Ok(Self(child))
    }
}

/// Readies a namespace for many connections: else its ports run out within a few rounds.
pub fn ready_client(space: &Space) -> Result<()> {
    space.set_sysctls(&[("ipv4/tcp_max_tw_buckets", "64")])
}

impl Drop for LoadServer {
    fn drop(&mut self) {
        // One that has ended by itself is no matter.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// If this process was started as the server or the client of a load: is that, and ends.
pub fn run_if_asked() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => {
            pin()?;
            serve_all()?;
        }
        ["sample", load, target] => {
            pin()?;
            println!("{}", sample(load, target.parse()?)?);
        }
        ["services", count, seed] => {
            pin()?;
            let sample = connect_to_services(count.parse()?, seed.parse()?)?;
            println!("{} {}", sample.connect, sample.rate);
        }
        [crate::l7::server::WORD] => crate::l7::server::serve()?,
        ["generate", object, frame, count] => {
            pin()?;
            println!("{}", crate::service::generate(object, frame, count.parse()?)?);
        }
        _ => return Ok(()),
    }
    std::process::exit(0)
}

/// Measures `load` on all `paths` in alternating rounds.
pub fn measure(load: Load, paths: &[Path<'_>]) -> Result<Samples> {
    measure_rounds(load, paths, ROUNDS)
}

/// The same in so many rounds.
pub fn measure_rounds(load: Load, paths: &[Path<'_>], rounds: usize) -> Result<Samples> {
    let mut samples: Vec<(&'static str, Vec<f64>)> =
        paths.iter().map(|path| (path.name, Vec::new())).collect();
    let mut random = 1_u64;
    for round in 0..=rounds {
        // Nobody always follows the same neighbour.
        let mut order: Vec<usize> = (0..paths.len()).collect();
        for left in (1..order.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            order.swap(left, (random >> 33) as usize % (left + 1));
        }
        for index in order {
            let path = &paths[index];
            let mut command = Command::new(std::env::current_exe()?);
            let target = SocketAddr::new(path.target, path.port);
            command.args(["sample", load.name(), &target.to_string()]);
            let written = path.client.command(command, "").with_context(|| format!("on {}", path.name))?;
            let sample: f64 = written.trim().parse()?;
            // The first round warms up.
            if round > 0 {
                samples[index].1.push(sample);
            }
        }
    }
    Ok(Samples(samples))
}

fn sample(load: &str, target: SocketAddr) -> Result<f64> {
    let load = Load::ALL.into_iter().find(|known| known.name() == load).context("an unknown load")?;
    match load {
        Load::Transactions => transactions(target),
        Load::Connections => connections(target),
        Load::Stream => stream(SocketAddr::new(target.ip(), SINK_PORT)),
    }
}

fn transactions(target: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let began = Instant::now();
    let mut count = 0;
    while began.elapsed() < SAMPLE {
        transact(&mut stream)?;
        count += 1;
    }
    Ok(f64::from(count) / began.elapsed().as_secs_f64())
}

fn connections(target: SocketAddr) -> Result<f64> {
    let began = Instant::now();
    let mut count = 0;
    while began.elapsed() < SAMPLE {
        let mut stream = TcpStream::connect(target)?;
        transact(&mut stream)?;
        count += 1;
    }
    Ok(f64::from(count) / began.elapsed().as_secs_f64())
}

/// The cluster IP of Service `number` of a suite, and its port.
pub fn service_address(number: usize) -> SocketAddr {
    let [high, low] = [number / 250, number % 250].map(|part| part as u8);
    SocketAddr::from(([10, 96, 8 + high, 1 + low], 80))
}

/// Takes a sample in `space` of Services 0 to `count`.
pub fn sample_services(space: &Space, count: usize, seed: usize) -> Result<ServiceSample> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["services", &count.to_string(), &seed.to_string()]);
    let written = space.command(command, "")?;
    let (connect, rate) = written.trim().split_once(' ').context("a sample is two numbers")?;
    Ok(ServiceSample { connect: connect.parse()?, rate: rate.parse()? })
}

fn connect_to_services(count: usize, seed: u64) -> Result<ServiceSample> {
    let (mut random, mut connects) = (seed, Vec::new());
    let began = Instant::now();
    while began.elapsed() < SAMPLE {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let target = service_address((random >> 33) as usize % count.max(1));
        let connecting = Instant::now();
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))
            .with_context(|| format!("connecting to {target}"))?;
        connects.push(connecting.elapsed().as_secs_f64() * 1e6);
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        transact(&mut stream)?;
    }
    let rate = connects.len() as f64 / began.elapsed().as_secs_f64();
    Ok(ServiceSample { connect: median(connects), rate })
}

fn transact(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

fn stream(target: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    // What nodes have by default. A pacing one (BBR) measures the clock, not the path.
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::TcpCongestion, &"cubic".into())
        .context("choosing cubic")?;
    let chunk = vec![0; 128 * 1024];
    let began = Instant::now();
    while began.elapsed() < SAMPLE {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    stream.read_exact(&mut total)?;
    Ok(u64::from_be_bytes(total) as f64 * 8.0 / 1e9 / began.elapsed().as_secs_f64())
}

fn serve_all() -> Result<()> {
    let any = Ipv6Addr::UNSPECIFIED;
    let (echo, sink) = (TcpListener::bind((any, ECHO_PORT))?, TcpListener::bind((any, SINK_PORT))?);
    // Else the receiver's buffer grows beyond the processor's cache on one path and not on another.
    nix::sys::socket::setsockopt(&sink, nix::sys::socket::sockopt::RcvBuf, &SINK_BUFFER)?;
    println!("listening");
    thread::spawn(move || serve(&sink, swallow));
    serve(&echo, echo_bytes);
    Ok(())
}

fn serve(listener: &TcpListener, answer: fn(TcpStream) -> std::io::Result<()>) {
    for stream in listener.incoming() {
        // A client that went away ends its own sample with an error.
        let _ = stream.and_then(answer);
    }
}

fn echo_bytes(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn swallow(mut stream: TcpStream) -> std::io::Result<()> {
    let mut chunk = vec![0; 256 * 1024];
    let mut total = 0u64;
    loop {
        match stream.read(&mut chunk)? {
            0 => return stream.write_all(&total.to_be_bytes()),
            length => total += length as u64,
        }
    }
}

/// The middle of some values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[length / 2],
        length => (values[length / 2 - 1] + values[length / 2]) / 2.0,
    }
}
