//! `weir metrics` and `weir facts`: what the agent counts and what the node's kernel says, asked
//! from within the agent's container, where there is no other program that could.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::Failure;
use crate::netlink;

const ANSWER_WITHIN: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct MetricsArgs {
    /// Where the agent serves them.
    #[arg(long, env = "WEIR_METRICS_ADDRESS", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9962")]
    address: SocketAddr,
}

#[derive(Args)]
pub struct FactsArgs {
    /// Where the node's kernel settings are.
    #[arg(long, env = "WEIR_PROC_SYS", value_name = "DIR", default_value = "/proc/sys")]
    proc_sys: PathBuf,
}

pub fn metrics(args: &MetricsArgs) -> Result<(), Failure> {
    let text = fetch(reachable(args.address))?;
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Every address is this machine's as well.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

fn fetch(address: SocketAddr) -> Result<String> {
    let connecting = || format!("asking the agent for its metrics at {address}");
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN).with_context(connecting)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).with_context(connecting)?;
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).with_context(connecting)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(connecting)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is no HTTP")?;
    if head.split_whitespace().nth(1) != Some("200") {
        bail!("{address} answers {}", head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}

/// Files that are shown as they are.
const FILES: [&str; 14] = [
    "/proc/version",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/self/cgroup",
    "/proc/net/dev",
    "/proc/net/route",
    "/proc/net/ipv6_route",
    "/proc/net/if_inet6",
    "/proc/net/fib_trie",
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/netstat",
    "/proc/net/softnet_stat",
    "/proc/net/sockstat",
];

/// Settings that decide whether packets pass.
const SETTINGS: [&str; 12] = [
    "kernel/osrelease",
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_enable",
    "net/core/bpf_jit_limit",
    "net/core/devconf_inherit_init_net",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/default/rp_filter",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/all/forwarding",
];

pub fn facts(args: &FactsArgs) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for file in FILES {
        section(&mut out, file, fs::read_to_string(file))?;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").map(|text| {
        let ours =
            text.lines().filter(|line| [" bpf ", " cgroup", "/cni"].iter().any(|kind| line.contains(kind)));
        ours.map(|line| format!("{line}\n")).collect()
    });
    section(&mut out, "mounts", mounts)?;
    section(&mut out, "devices", devices(&args.proc_sys))?;
    section(&mut out, "settings", Ok(settings(&args.proc_sys)))?;
    Ok(out.flush()?)
}

fn section(out: &mut impl Write, name: &str, text: io::Result<String>) -> io::Result<()> {
    writeln!(out, "== {name}")?;
    match text {
        Ok(text) => writeln!(out, "{}", text.trim_end()),
        Err(error) => writeln!(out, "({error})"),
    }
}

fn devices(proc_sys: &Path) -> io::Result<String> {
    let links = netlink::links().map_err(io::Error::other)?;
    let mut text = String::new();
    for link in links {
        let filter = proc_sys.join(format!("net/ipv4/conf/{}/rp_filter", link.name));
        let filter = fs::read_to_string(filter).unwrap_or_default();
        let state = if link.is_up { "up" } else { "down" };
        let _infallible = writeln!(
            text,
            "{} {} {} mtu {} {state} {} rp_filter {}",
            link.index,
            link.name,
            link.kind,
            link.mtu,
            link.mac,
            filter.trim_end()
        );
    }
    Ok(text)
}

fn settings(proc_sys: &Path) -> String {
    let line = |name: &str| match fs::read_to_string(proc_sys.join(name)) {
        Ok(value) => format!("{name} = {}\n", value.trim_end()),
        Err(error) => format!("{name}: {error}\n"),
    };
    SETTINGS.iter().map(|name| line(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_everywhere_is_asked_here() {
        let ask = |text: &str| reachable(text.parse().expect("an address")).to_string();
        assert_eq!(ask("0.0.0.0:9962"), "127.0.0.1:9962");
        assert_eq!(ask("[::]:9962"), "[::1]:9962");
        assert_eq!(ask("10.0.0.1:9962"), "10.0.0.1:9962");
    }
}
