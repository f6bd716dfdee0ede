//! A server of DNS whose names have the addresses that a test gives them, and clients that ask it.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Running, Space};

const PORT: u16 = 53;
/// A longer answer is truncated over UDP.
const DATAGRAM_MAX: usize = 512;
/// No such name, in an answer.
pub const NXDOMAIN: u8 = 3;
/// The server does not answer this to the one who asks.
pub const REFUSED: u8 = 5;
/// How often servers look whether they are to stop.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a name has.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Its addresses, of both families.
    pub addresses: Vec<IpAddr>,
    /// How long they may be kept.
    pub ttl_s: u32,
}

#[derive(Debug, Default)]
struct Shared {
    rows: Mutex<BTreeMap<String, Row>>,
    asked: Mutex<Vec<String>>,
    stops: AtomicBool,
}

/// The server, on port 53 of all addresses of a namespace, by UDP and TCP; it ends with this value.
pub struct Zone {
    shared: Arc<Shared>,
    running: Vec<Running<()>>,
}

impl Zone {
    /// Starts it; it knows no name.
    pub fn start(space: &Space) -> Result<Self> {
        let (datagrams, listener) = space.run(|| -> Result<_> {
            let datagrams = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
            datagrams.set_read_timeout(Some(LOOK_EVERY))?;
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
            listener.set_nonblocking(true)?;
            Ok((datagrams, listener))
        })?;
        let shared = Arc::<Shared>::default();
        let by_datagrams = {
            let shared = shared.clone();
            space.start(move || shared.serve_datagrams(&datagrams))
        };
        let by_connections = {
            let shared = shared.clone();
            space.start(move || shared.serve_connections(&listener))
        };
        Ok(Self { shared, running: vec![by_datagrams, by_connections] })
    }

    /// From now on a name has these addresses.
    pub fn set(&self, name: &str, addresses: &[IpAddr], ttl_s: u32) {
        let row = Row { addresses: addresses.to_vec(), ttl_s };
        lock(&self.shared.rows).insert(name.to_owned(), row);
    }

    /// The names that it was asked for.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.shared.asked).clone()
    }
}

impl Drop for Zone {
    fn drop(&mut self) {
        self.shared.stops.store(true, Ordering::Relaxed);
        self.running.drain(..).for_each(Running::wait);
    }
}

impl Shared {
    fn stops(&self) -> bool {
        self.stops.load(Ordering::Relaxed)
    }

    fn serve_datagrams(&self, socket: &UdpSocket) {
        let mut buffer = [0; 4096];
        while !self.stops() {
            let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
            if let Some(mut answer) = self.answer(&buffer[..length]) {
                // Nobody gets fragments: who wants all asks by TCP.
                if answer.len() > DATAGRAM_MAX {
                    truncate(&mut answer);
                }
                // A client that has gone away needs no answer.
                let _ = socket.send_to(&answer, client);
            }
        }
    }

    fn serve_connections(self: &Arc<Self>, listener: &TcpListener) {
        while !self.stops() {
            match listener.accept() {
                Ok((stream, _)) => {
                    let shared = self.clone();
                    std::thread::spawn(move || shared.serve_connection(stream));
                }
                Err(_) => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn serve_connection(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        loop {
            let query = read_framed(&mut stream)?;
            let answer = self.answer(&query).context("a query")?;
            stream.write_all(&framed(&answer)?)?;
        }
    }

    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let (name, kind, end) = question(query)?;
        lock(&self.asked).push(name.clone());
        let row = lock(&self.rows).get(&name).cloned();
        let mut answer = query.get(..end)?.to_vec();
        answer[2] |= 0x80;
        answer[3] = 0x80 | if row.is_some() { 0 } else { NXDOMAIN };
        answer[4..12].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        let Row { addresses, ttl_s } = row.unwrap_or_default();
        let fitting = addresses.iter().filter(|address| kind == if address.is_ipv4() { 1 } else { 28 });
        let mut count: u16 = 0;
        for address in fitting {
            count += 1;
            let octets = match address {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            answer.extend_from_slice(&[0xc0, 12]);
            answer.extend_from_slice(&kind.to_be_bytes());
            answer.extend_from_slice(&[0, 1]);
            answer.extend_from_slice(&ttl_s.to_be_bytes());
            answer.extend_from_slice(&u16::try_from(octets.len()).ok()?.to_be_bytes());
            answer.extend_from_slice(&octets);
        }
        answer[6..8].copy_from_slice(&count.to_be_bytes());
        Some(answer)
    }
}

/// Leaves the question, and says that there is more.
fn truncate(answer: &mut Vec<u8>) {
    if let Some((_, _, end)) = question(answer) {
        answer.truncate(end);
        answer[2] |= 2;
        answer[6..8].fill(0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics with the lock")
}

/// The name of a query, its type, and where the question ends.
fn question(query: &[u8]) -> Option<(String, u16, usize)> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*query.get(at)?);
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at + 1..=at + length)?).to_ascii_lowercase());
        at += length + 1;
    }
    let kind = u16::from_be_bytes([*query.get(at + 1)?, *query.get(at + 2)?]);
    Some((labels.join("."), kind, at + 5))
}

fn framed(message: &[u8]) -> Result<Vec<u8>> {
    Ok([&u16::try_from(message.len())?.to_be_bytes()[..], message].concat())
}

fn read_framed(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// A query for the addresses of a name.
fn query(id: u16, name: &str, is_ipv4: bool) -> Vec<u8> {
    let mut query = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).expect("a short label"));
        query.extend_from_slice(label.as_bytes());
    }
    let kind: u16 = if is_ipv4 { 1 } else { 28 };
    query.extend_from_slice(&[0]);
    query.extend_from_slice(&kind.to_be_bytes());
    query.extend_from_slice(&[0, 1]);
    query
}

/// How a name is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Datagram,
    Connection,
}

/// The code of the server's answer, and how many addresses it has; `None`: there is none in time.
pub fn ask(space: &Space, server: IpAddr, by: By, name: &str) -> Result<Option<(u8, u16)>> {
    let query = query(0x4711, name, true);
    let server = SocketAddr::new(server, PORT);
    let asked = space.run(move || match by {
        By::Datagram => ask_by_datagram(server, &query),
        By::Connection => ask_by_connection(server, &query),
    });
    let answer = match asked {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(None),
        answer => answer.with_context(|| format!("asking {server} for {name}"))?,
    };
    ensure!(answer.len() >= 12 && answer[..2] == 0x4711_u16.to_be_bytes(), "{answer:?}");
    Ok(Some((answer[3] & 15, u16::from_be_bytes([answer[6], answer[7]]))))
}

const PATIENCE: Duration = Duration::from_secs(3);

fn ask_by_datagram(server: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr =
        if server.is_ipv4() { ([0; 4], 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(query)?;
    let mut buffer = vec![0; 4096];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

fn ask_by_connection(server: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&framed(query).map_err(std::io::Error::other)?)?;
    read_framed(&mut stream)
}

/// What glibc's resolver says in a namespace where `server` is the resolver: the addresses of a name.
pub fn look_up(lab: &Lab, space: &Space, server: IpAddr, by: By, name: &str) -> Result<Vec<IpAddr>> {
    let options = if by == By::Connection { "options use-vc\n" } else { "" };
    let path = lab.directory().join(format!("resolv.conf-{}", space.name()));
    std::fs::write(&path, format!("nameserver {server}\n{options}"))?;
    // A mount namespace of its own: the machine's resolv.conf stays as it is.
    let mut command = Command::new("unshare");
    let script = format!("mount --bind {} /etc/resolv.conf && getent ahosts {name}; echo", path.display());
    command.args(["--mount", "sh", "-c", &script]);
    let written = space.command(command, "")?;
    let mut found: Vec<IpAddr> = written
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|address| Ok(address.parse::<IpAddr>()?))
        .collect::<Result<_>>()?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}
