//! Traffic that goes on while a test does something: streams and datagrams that are echoed.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::probe::hold_many_datagrams;
use super::space::{Running, Space};

/// Traffic on a thread of its own.
pub struct Traffic {
    shared: Arc<Shared>,
    running: Running<Result<Report>>,
}

#[derive(Default)]
struct Shared {
    stops: AtomicBool,
    answered: AtomicU64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Messages sent.
    pub sent: u64,
    /// Messages that came back.
    pub answered: u64,
    /// Segments that were sent again by TCP, of all connections in the namespace meanwhile.
    pub repeated: u64,
    /// The longest time between two answers.
    pub longest_gap: Duration,
}

impl Traffic {
    /// One TCP connection, a message a millisecond, each awaited.
    pub fn tcp(space: &Space, target: SocketAddr) -> Self {
        Self::start(space, move |shared| run_tcp(target, shared))
    }

    /// One UDP socket, a datagram a millisecond, whether or not one comes back.
    pub fn udp(space: &Space, target: SocketAddr) -> Self {
        Self::start(space, move |shared| run_udp(target, shared))
    }

    fn start(space: &Space, run: impl FnOnce(&Shared) -> Result<Report> + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let running = space.start({
            let shared = shared.clone();
            move || run(&shared)
        });
        Self { shared, running }
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Waits until `more` further answers have come.
    pub fn wait_for_answers(&self, more: u64) -> Result<()> {
        let wanted = self.answered() + more;
        super::wait_for("answers to running traffic", || Ok(self.answered() >= wanted))
    }

    /// Waits until no answer has come for half a second.
    pub fn wait_for_silence(&self) -> Result<()> {
        let (mut last, mut since) = (self.answered(), Instant::now());
        super::wait_for("running traffic to stop", || {
            let now = self.answered();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            Ok(since.elapsed() > Duration::from_millis(500))
        })
    }

    /// Ends it.
    pub fn stop(self) -> Result<Report> {
        self.shared.stops.store(true, Ordering::Relaxed);
        self.running.wait()
    }
}

impl Report {
    /// An error unless every message was answered, and TCP sent nothing twice.
    pub fn check_nothing_lost(&self) -> Result<()> {
        if self.sent != self.answered || self.repeated > 0 {
            super::noting_failure(Err(anyhow!("lost or repeated: {self:?}")))?;
        }
        Ok(())
    }
}

fn run_tcp(target: SocketAddr, shared: &Shared) -> Result<Report> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2)).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    read_greeting(&mut stream)?;
    let mut report = Report::default();
    let repeated_before = repeated_segments()?;
    let mut last = Instant::now();
    while !shared.stops.load(Ordering::Relaxed) {
        stream.write_all(&report.sent.to_be_bytes())?;
        report.sent += 1;
        let mut answer = [0; 8];
        let mut filled = 0;
        while filled < answer.len() {
            match stream.read(&mut answer[filled..]) {
                Ok(0) => bail!("the connection was closed after {report:?}"),
                Ok(length) => filled += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if shared.stops.load(Ordering::Relaxed) {
                        report.longest_gap = report.longest_gap.max(last.elapsed());
                        report.repeated = repeated_segments()? - repeated_before;
                        return Ok(report);
                    }
                }
                Err(error) => return Err(error).with_context(|| format!("reading after {report:?}")),
            }
        }
        report.answered += 1;
        report.longest_gap = report.longest_gap.max(last.elapsed());
        last = Instant::now();
        shared.answered.store(report.answered, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
    report.repeated = repeated_segments()? - repeated_before;
    Ok(report)
}

/// Segments sent again in the calling thread's namespace, less those that open connections.
fn repeated_segments() -> Result<u64> {
    let all = counter("/proc/thread-self/net/snmp", "Tcp: ", "RetransSegs")?;
    Ok(all - counter("/proc/thread-self/net/netstat", "TcpExt: ", "TCPSynRetrans")?)
}

/// A counter of the kernel: names are in the first line of a kind, values in the second.
fn counter(file: &str, kind: &str, name: &str) -> Result<u64> {
    let counters = std::fs::read_to_string(file)?;
    let mut lines = counters.lines().filter_map(|line| line.strip_prefix(kind));
    let (names, values) = (lines.next().context(kind.to_owned())?, lines.next().context(kind.to_owned())?);
    let found = names.split(' ').zip(values.split(' ')).find(|(known, _)| *known == name);
    Ok(found.context(name.to_owned())?.1.parse()?)
}

fn read_greeting(stream: &mut TcpStream) -> Result<()> {
    let mut byte = [0];
    let deadline = Instant::now() + Duration::from_secs(2);
    while byte[0] != b'\n' {
        match stream.read(&mut byte) {
            Ok(0) => bail!("the connection was closed before the greeting"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
            Err(error) => return Err(error).context("reading the greeting"),
        }
    }
    Ok(())
}

fn run_udp(target: SocketAddr, shared: &Shared) -> Result<Report> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    hold_many_datagrams(&socket)?;
    socket.set_nonblocking(true)?;
    let mut report = Report::default();
    let mut last = Instant::now();
    let mut buffer = [0; 256];
    let mut receive = |report: &mut Report| {
        // Refused and nothing there are both "no answer".
        while socket.recv(&mut buffer).is_ok() {
            report.answered += 1;
            report.longest_gap = report.longest_gap.max(last.elapsed());
            last = Instant::now();
            shared.answered.store(report.answered, Ordering::Relaxed);
        }
    };
    while !shared.stops.load(Ordering::Relaxed) {
        // A pending ICMP error is reported here; the datagram is then not sent.
        if socket.send(&report.sent.to_be_bytes()).is_ok() {
            report.sent += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
        receive(&mut report);
    }
    // A busy machine may not have run the server for a while.
    let deadline = Instant::now() + Duration::from_secs(3);
    while report.answered < report.sent && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
        receive(&mut report);
    }
    Ok(report)
}
