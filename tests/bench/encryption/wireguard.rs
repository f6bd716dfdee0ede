//! `weir wireguard` beside wireguard-go: pods of two nodes that are plugged alike, all on one processor.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path as FilePath, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use boringtun::x25519::{PublicKey, StaticSecret};
use weir::encryption::protocol::{Client, Request, SideState};

use super::{Pair, ROUNDS, row, setup};
use crate::lab::{Lab, Space, output_of, wait_for};
use crate::load::{Load, LoadServer, Path, measure_rounds, pin};
use crate::reference::plug_pod;
use crate::row::Row;

const WIREGUARD: [&str; 4] = ["--encryption", "wireguard", "--wireguard-device", "user"];
const PORT: u16 = 51871;
/// As Weir has them on a wire of 1500.
const DEVICE_MTU: u32 = 1440;
const TUNNEL_MTU: u32 = 1390;

/// Where wireguard-go listens for its configuration.
const SOCKETS: &str = "/var/run/wireguard";

pub fn rows() -> Result<Vec<Row>> {
    pin()?;
    let program = output_of(&mut Command::new("scripts/wireguard-go"), "")?;
    let program = PathBuf::from(program.trim());
    let mut rows = case(&program, "native", &[Load::Stream, Load::Transactions])?;
    rows.extend(case(&program, "tunnel", &[Load::Stream])?);
    Ok(rows)
}

fn case(program: &FilePath, routing: &str, loads: &[Load]) -> Result<Vec<Row>> {
    let is_vxlan = routing == "tunnel";
    let weir = Pair::of(Lab::start(setup(routing, &WIREGUARD))?)?;
    let prefix = format!("weirlab-{}-wg{routing}", std::process::id());
    let go = Other::start(program, &format!("{prefix}-g"), ["wgweir1", "wgweir2"], is_vxlan)?;
    let again = Other::start(program, &format!("{prefix}-a"), ["wgweir3", "wgweir4"], is_vxlan)?;
    let paths = [go.path("go"), again.path("again"), weir.path("weir")];
    let _servers: Vec<LoadServer> = paths.iter().map(LoadServer::start).collect::<Result<_>>()?;
    for path in &paths {
        let target = SocketAddr::new(path.target, path.port);
        let connect = move || TcpStream::connect_timeout(&target, Duration::from_secs(1)).is_ok();
        wait_for(&format!("the way of {}", path.name), || Ok(path.client.run(connect)))?;
    }
    let mut rows = Vec::new();
    for load in loads {
        let samples = measure_rounds(*load, &paths, ROUNDS)?;
        let (name, aim) = match (load, is_vxlan) {
            (Load::Stream, false) => ("stream", 1.5),
            (Load::Stream, true) => ("stream_vxlan", 1.0),
            _ => ("rr", 1.0 / 1.2),
        };
        rows.push(row(format!("wireguard/{name}/vs_wireguard_go"), *load, &samples, "go").at_least(aim));
    }
    if is_vxlan {
        let other = go.resident_mebibytes()?;
        rows.push(Row::new("wireguard/rss_mib", "MiB", resident_of(&weir)?).at_most(10.0));
        rows.push(Row::new("wireguard/rss_mib/wireguard_go", "MiB", other));
    }
    Ok(rows)
}

/// Of the side process of the node that has sent the streams.
fn resident_of(weir: &Pair) -> Result<f64> {
    let mut client = Client::connect(&weir.lab.node(1).directory().join("run/wireguard.sock"))?;
    let state: SideState = client.call(&Request::Status, &[])?;
    resident(state.pid)
}

fn resident(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("reading what a process has")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes / 1024.0)
}

/// Two nodes on a wire whose pods reach each other by wireguard-go, with VXLAN inside if asked for.
struct Other {
    client: Space,
    server: Space,
    // Processes end before their namespaces.
    processes: Vec<Process>,
    _between: Vec<Space>,
}

impl Other {
    fn start(program: &FilePath, name: &str, devices: [&str; 2], is_vxlan: bool) -> Result<Self> {
        let space = |part: &str| Space::create(&format!("{name}-{part}"), None);
        let (client, server, wire) = (space("client")?, space("server")?, space("wire")?);
        wire.configure(&["link add wire type bridge", "link set wire up"])?;
        let secrets = [StaticSecret::from([7; 32]), StaticSecret::from([9; 32])];
        let (mut processes, mut between) = (Vec::new(), Vec::new());
        for (number, pod, device) in [(1_u8, &client, devices[0]), (2, &server, devices[1])] {
            let (own, other) = (usize::from(number - 1), 3 - number);
            let node = space(&format!("node{number}"))?;
            node.set_sysctls(&[("ipv4/ip_forward", "1")])?;
            wire.configure(&[
                &format!("link add node{number} type veth peer name eth0 netns {}", node.name()),
                &format!("link set node{number} master wire up"),
            ])?;
            node.configure(&[&format!("addr add 10.201.0.{number}/24 dev eth0"), "link set eth0 up"])?;
            processes.push(Process::start(program, &node, device)?);
            configure(device, &secrets[own], &PublicKey::from(&secrets[1 - own]), other)?;
            node.configure(&[
                &format!("addr add 10.202.0.{number}/24 dev {device}"),
                &format!("link set {device} mtu {DEVICE_MTU} up"),
            ])?;
            let way = if is_vxlan {
                node.configure(&[
                    &format!(
                        "link add vxlan0 type vxlan id 1 remote 10.202.0.{other} dev {device} dstport 8472"
                    ),
                    &format!("addr add 10.203.0.{number}/24 dev vxlan0"),
                    &format!("link set vxlan0 mtu {TUNNEL_MTU} up"),
                ])?;
                format!("via 10.203.0.{other}")
            } else {
                format!("dev {device}")
            };
            node.configure(&[&format!("route add 10.3.{other}.0/24 {way}")])?;
            plug_pod(
                &node,
                pod,
                &format!("10.3.{number}.1"),
                if is_vxlan { TUNNEL_MTU } else { DEVICE_MTU },
            )?;
            between.push(node);
        }
        between.push(wire);
        Ok(Self { client, server, processes, _between: between })
    }

    fn path(&self, name: &'static str) -> Path<'_> {
        let target = IpAddr::from([10, 3, 2, 1]);
        Path { name, client: &self.client, server: &self.server, target, port: crate::load::ECHO_PORT }
    }

    fn resident_mebibytes(&self) -> Result<f64> {
        resident(self.processes.first().context("no process")?.child.id())
    }
}

/// A process of wireguard-go, ended when dropped.
struct Process {
    child: Child,
    socket: PathBuf,
}

impl Process {
    fn start(program: &FilePath, node: &Space, device: &str) -> Result<Self> {
        let socket = FilePath::new(SOCKETS).join(format!("{device}.sock"));
        let mut command = Command::new(program);
        command.args(["-f", device]).env("WG_PROCESS_FOREGROUND", "1").env("LOG_LEVEL", "error");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = node.run(move || command.spawn()).context("starting wireguard-go")?;
        let process = Self { child, socket };
        wait_for("wireguard-go", || Ok(UnixStream::connect(&process.socket).is_ok()))?;
        Ok(process)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself is no matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// By wireguard-go's own protocol.
fn configure(device: &str, own: &StaticSecret, peer: &PublicKey, other: u8) -> Result<()> {
    let mut stream = UnixStream::connect(FilePath::new(SOCKETS).join(format!("{device}.sock")))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    write!(
        stream,
        "set=1\nprivate_key={}\nlisten_port={PORT}\npublic_key={}\nendpoint=10.201.0.{other}:{PORT}\n\
         persistent_keepalive_interval=25\nallowed_ip=10.3.{other}.0/24\nallowed_ip=10.202.0.{other}/32\n\n",
        hex(&own.to_bytes()),
        hex(peer.as_bytes()),
    )?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let Some(number) = line.trim().strip_prefix("errno=") else { bail!("wireguard-go says {line:?}") };
    ensure!(number == "0", "wireguard-go refuses its configuration: error {number}");
    Ok(())
}
