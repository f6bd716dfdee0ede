//! `weir connectivity probe`: tries targets from where it runs, all at the same time.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};

use super::dns;
use crate::cli::{Failure, output};

/// More than fits into a few packets: what only loses large packets shows.
const BODY_BYTES: usize = 20_000;
/// Fits into one packet of any link.
const DATAGRAM_BYTES: usize = 1_000;
/// A service whose backends are not known yet refuses; so long it may.
const REFUSED_MAX: Duration = Duration::from_secs(3);
/// So long a server that is connected may say nothing.
const SILENCE: Duration = Duration::from_secs(4);
const RETRY: Duration = Duration::from_millis(100);
/// A lost datagram is sent again.
const RESEND: Duration = Duration::from_secs(1);

/// What to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Probe {
    /// A server of ours: what was sent has to come back.
    TcpEcho { target: SocketAddr, seconds: u64 },
    /// Any server: connecting is enough.
    TcpConnect { target: SocketAddr, seconds: u64 },
    /// A server that hangs up when its client does, as one of TLS: it has to hear of that, and to say so.
    TcpHangUp { target: SocketAddr, seconds: u64 },
    /// A server of ours: what was sent has to come back.
    UdpEcho { target: SocketAddr, seconds: u64 },
    /// The servers of /etc/resolv.conf have to know `SERVICE.NAMESPACE`.
    Dns { service: String, is_ipv6: bool, seconds: u64 },
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Who answered: a server of ours its name, DNS the addresses.
    pub answer: Option<String>,
    /// Why nobody did.
    pub error: Option<String>,
    /// How long it took, or was waited.
    pub milliseconds: u64,
}

#[derive(Args)]
pub struct ProbeArgs {
    /// A JSON list of what to try.
    #[arg(value_parser = probes)]
    probes: Probes,
}

#[derive(Clone)]
struct Probes(Vec<Probe>);

fn probes(text: &str) -> Result<Probes, String> {
    serde_json::from_str(text).map(Probes).map_err(|error| error.to_string())
}

pub async fn run(args: ProbeArgs) -> Result<(), Failure> {
    let outcomes = futures::future::join_all(args.probes.0.iter().map(attempt)).await;
    let mut out = io::stdout().lock();
    output::write_json_line(&mut out, &outcomes)?;
    Ok(out.flush()?)
}

async fn attempt(probe: &Probe) -> Outcome {
    let start = Instant::now();
    let outcome = match probe {
        Probe::TcpEcho { target, seconds } => within(*seconds, tcp_echo(*target)).await,
        Probe::TcpConnect { target, seconds } => {
            within(*seconds, async { connect(*target).await.map(|_| "connected".to_owned()) }).await
        }
        Probe::TcpHangUp { target, seconds } => within(*seconds, tcp_hang_up(*target)).await,
        Probe::UdpEcho { target, seconds } => within(*seconds, udp_echo(*target)).await,
        Probe::Dns { service, is_ipv6, seconds } => within(*seconds, resolve(service, *is_ipv6)).await,
    };
    let milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    match outcome {
        Ok(answer) => Outcome { answer: Some(answer), error: None, milliseconds },
        Err(error) => Outcome { answer: None, error: Some(error), milliseconds },
    }
}

async fn within(seconds: u64, work: impl Future<Output = Result<String, String>>) -> Result<String, String> {
    let outcome = timeout(Duration::from_secs(seconds), work).await;
    outcome.unwrap_or_else(|_| Err(format!("no answer within {seconds} s")))
}

async fn connect(target: SocketAddr) -> Result<TcpStream, String> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(target).await {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && start.elapsed() < REFUSED_MAX =>
            {
                sleep(RETRY).await;
            }
            outcome => return outcome.map_err(|error| format!("connecting: {error}")),
        }
    }
}

async fn tcp_echo(target: SocketAddr) -> Result<String, String> {
    let mut stream = connect(target).await?;
    let body = body(BODY_BYTES);
    let head = format!(
        "POST / HTTP/1.0\r\nHost: {target}\r\nContent-Length: {BODY_BYTES}\r\nConnection: close\r\n\r\n"
    );
    let mut received = Vec::new();
    let exchange = async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await?;
        stream.read_to_end(&mut received).await
    };
    // Connected and then silence: a case of its own, as small packets pass.
    match timeout(SILENCE, exchange).await {
        Err(_) => return Err("connected, then no answer to 20 kB: are large packets lost (MTU)?".to_owned()),
        Ok(Err(error)) => return Err(format!("connected, then: {error}")),
        Ok(Ok(_)) => {}
    }
    let head_end = received.windows(4).position(|window| window == b"\r\n\r\n");
    let answer = head_end.map(|end| &received[end + 4..]).ok_or("the answer is no HTTP")?;
    name_in(answer, &body).ok_or_else(|| "the answer is not what was sent".to_owned())
}

/// The third packet of a connection and those after it are not carried as the first two are.
async fn tcp_hang_up(target: SocketAddr) -> Result<String, String> {
    let mut stream = connect(target).await?;
    let mut received = Vec::new();
    let exchange = async {
        stream.shutdown().await?;
        stream.read_to_end(&mut received).await
    };
    match timeout(SILENCE, exchange).await {
        Err(_) => Err("connected, then nothing passes: does the node drop what its connection tracking \
            calls invalid (kube-proxy)?"
            .to_owned()),
        Ok(Err(error)) if error.kind() != io::ErrorKind::ConnectionReset => {
            Err(format!("connected, then: {error}"))
        }
        Ok(_) => Ok("connected".to_owned()),
    }
}

async fn udp_echo(target: SocketAddr) -> Result<String, String> {
    let socket = socket_to(target).await?;
    let body = body(DATAGRAM_BYTES);
    let mut answer = vec![0; 65_536];
    loop {
        match exchange(&socket, &body, &mut answer).await {
            Some(Ok(length)) => {
                return name_in(&answer[..length], &body)
                    .ok_or_else(|| "the answer is not what was sent".to_owned());
            }
            Some(Err(error)) if error.kind() != io::ErrorKind::ConnectionRefused => {
                return Err(error.to_string());
            }
            Some(Err(_)) => sleep(RETRY).await,
            None => {}
        }
    }
}

async fn resolve(service: &str, is_ipv6: bool) -> Result<String, String> {
    let conf =
        std::fs::read_to_string("/etc/resolv.conf").map_err(|error| format!("/etc/resolv.conf: {error}"))?;
    let conf = dns::ResolvConf::parse(&conf);
    let server = conf.servers.first().ok_or("/etc/resolv.conf names no server")?;
    let id = u16::try_from(std::process::id() & 0xffff).unwrap_or_default();
    let question = dns::question(id, &conf.service_name(service), is_ipv6);
    let socket = socket_to(SocketAddr::new(*server, 53)).await?;
    let mut answer = vec![0; 4_096];
    loop {
        match exchange(&socket, &question, &mut answer).await {
            Some(Ok(length)) => {
                let found = dns::addresses(&answer[..length], id)?;
                return Ok(found.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","));
            }
            Some(Err(error)) => return Err(format!("asking {server}: {error}")),
            None => {}
        }
    }
}

/// Sends, and waits a while for an answer: `None` if there is none.
async fn exchange(socket: &UdpSocket, sent: &[u8], answer: &mut [u8]) -> Option<io::Result<usize>> {
    if let Err(error) = socket.send(sent).await {
        return Some(Err(error));
    }
    timeout(RESEND, socket.recv(answer)).await.ok()
}

async fn socket_to(target: SocketAddr) -> Result<UdpSocket, String> {
    let any = if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any).await.map_err(|error| error.to_string())?;
    socket.connect(target).await.map_err(|error| format!("connecting: {error}"))?;
    Ok(socket)
}

/// Bytes of which each is different from its neighbours.
fn body(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| b'a' + u8::try_from(index % 23).unwrap_or_default()).collect()
}

/// Who answered, if it gave back what was sent.
fn name_in(answer: &[u8], sent: &[u8]) -> Option<String> {
    let end = answer.iter().position(|byte| *byte == b'\n')?;
    (&answer[end + 1..] == sent).then(|| String::from_utf8_lossy(&answer[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::connectivity::serve::answer_to;

    #[test]
    fn only_the_same_bytes_are_an_answer() {
        let sent = body(100);
        assert_eq!(name_in(&answer_to("web", &sent), &sent), Some("web".to_owned()));
        assert_eq!(name_in(&answer_to("web", &sent[1..]), &sent), None);
        assert_eq!(name_in(b"web", &sent), None);
    }

    #[tokio::test]
    async fn a_connection_that_carries_nothing_is_none() {
        let listen = || std::net::TcpListener::bind("127.0.0.1:0").expect("listening");
        // Nobody accepts: the kernel opens the connection, and nobody hears of its end.
        let deaf = listen();
        let error = tcp_hang_up(deaf.local_addr().expect("an address")).await.expect_err("nobody hangs up");
        assert!(error.starts_with("connected, then nothing passes"), "{error}");

        let polite = listen();
        let target = polite.local_addr().expect("an address");
        std::thread::spawn(move || polite.accept().map(drop));
        assert_eq!(tcp_hang_up(target).await, Ok("connected".to_owned()));
    }

    #[test]
    fn probes_are_json() {
        let probe = Probe::TcpEcho { target: "[fd00::1]:80".parse().expect("an address"), seconds: 5 };
        let text = serde_json::to_string(std::slice::from_ref(&probe)).expect("JSON");
        assert_eq!(probes(&text).map(|probes| probes.0), Ok(vec![probe]));
        assert!(probes("{}").is_err());
    }
}
