//! The stock hubble command line, which knows nothing of Weir, against agents and a relay: by the Unix socket and by
//! mutual TLS.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use jiff::SignedDuration;
use serde_json::Value;
use weir::hubble::certs;

use crate::lab::{Lab, Node, Pod, Setup, Via, binary, wait_for};
use crate::require::{require_lab, say_skipped};
use crate::verdicts::{Expected, Row, expect_all};

const AGENT: &str = "node1.default.hubble-grpc.cilium.io";
const RELAY: &str = "ui.hubble-relay.cilium.io";
const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
";

/// What `scripts/hubble` has built.
fn program() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/hubble/hubble");
    program.is_file().then_some(program)
}

/// Files of a directory as the operator makes them for agents and relays.
fn certificates(directory: &Path) -> Result<()> {
    let lifetime = SignedDuration::from_hours(1);
    let authority = certs::authority("weir", lifetime)?;
    let names = [AGENT, "node2.default.hubble-grpc.cilium.io", RELAY].map(str::to_owned);
    let leaf = certs::leaf("weir", &authority.key, &names, lifetime)?;
    let files = [("ca.crt", authority.certificate), ("tls.crt", leaf.certificate), ("tls.key", leaf.key)];
    fs::create_dir_all(directory)?;
    files.into_iter().try_for_each(|(file, text)| Ok(fs::write(directory.join(file), text)?))
}

/// A process that ends with this.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_relay(node: &Node, tls: &Path) -> Result<Ending> {
    let socket = node.socket().with_file_name("hubble.sock");
    let log = File::create(node.directory().join("relay.log"))?;
    let mut command = Command::new(binary("weir")?);
    command.args(["relay", "--relay-peers", &format!("unix:{}", socket.display()), "--relay-tls-dir"]);
    command.arg(tls).arg("--relay-server-tls-dir").arg(tls);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    node.space().run(move || command.spawn()).context("starting the relay").map(Ending)
}

/// The program as somebody types it on node 1.
struct Hubble<'a> {
    program: PathBuf,
    node: &'a Node,
    home: PathBuf,
    /// Which server, and how it is reached.
    server: Vec<String>,
}

impl Hubble<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // Settings of whoever runs the test are not the test's.
        command.env_clear().env("HOME", &self.home).env("NO_COLOR", "1");
        command.args(arguments).args(&self.server);
        command
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        self.node.space().command(self.command(arguments), "")
    }

    fn flows(&self, filters: &[&str]) -> Result<Vec<Value>> {
        let written = self.ask(&[&["observe", "--last", "1000", "-o", "jsonpb"], filters].concat())?;
        let lines = written.lines().map(|line| {
            let answer: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            Ok(answer.get("flow").cloned())
        });
        lines.filter_map(Result::transpose).collect()
    }

    /// Reads lines of a command that does not end, until one is the one; `meanwhile` is done again and again.
    fn until(
        &self,
        arguments: &[&str],
        meanwhile: impl Fn() -> Result<()>,
        mut is_it: impl FnMut(&str) -> bool,
    ) -> Result<()> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut process = Ending(self.node.space().run(move || command.spawn())?);
        let out = process.0.stdout.take().context("its output")?;
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                // The test has what it waited for.
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        wait_for(&format!("the line by hubble {arguments:?}"), || {
            meanwhile()?;
            Ok(lines.try_iter().any(|line| is_it(&line)))
        })
    }
}

/// Filters by the stock command line's names, and the flows that they must and must not let through.
fn filters_are_understood(
    hubble: &Hubble<'_>,
    client: &Pod,
    server: &Pod,
    speak: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let (from, to) = (client.address(true).to_string(), server.address(true).to_string());
    let port = |flow: &Value| flow["l4"]["TCP"]["destination_port"].as_u64();
    let dropped = |flow: &Value| flow["verdict"] == "DROPPED" && port(flow) == Some(81);
    let forwarded = |flow: &Value| flow["verdict"] == "FORWARDED" && port(flow) == Some(80);
    // Each pair is a filter that only dropped flows pass, or only forwarded ones, or both.
    let all: [(&[&str], bool, bool); 22] = [
        (&["--verdict", "DROPPED"], true, false),
        (&["--verdict", "FORWARDED"], false, true),
        (&["--type", "drop"], true, false),
        (&["--drop-reason-desc", "POLICY_DENIED"], true, false),
        (&["--to-port", "81"], true, false),
        (&["--port", "80"], false, true),
        (&["--pod", "shop/client"], true, true),
        (&["--from-pod", "shop/client", "--to-pod", "shop/server"], true, true),
        (&["--from-pod", "shop/server", "--to-pod", "shop/client"], false, false),
        (&["--not", "--to-port", "80"], true, false),
        (&["--namespace", "shop"], true, true),
        (&["--to-namespace", "kube-system"], false, false),
        (&["--from-label", "app=client"], true, true),
        (&["--from-label", "app=server"], false, false),
        (&["--from-ip", &from, "--to-ip", &to], true, true),
        (&["--to-ip", "203.0.113.0/24"], false, false),
        (&["--protocol", "tcp"], true, true),
        (&["--protocol", "icmp"], false, false),
        (&["--ipv4", "--tcp-flags", "SYN"], true, true),
        (&["--ipv6"], false, false),
        (&["--from-identity", "world"], false, false),
        (&["--cel-expression", "_flow.verdict == Verdict.DROPPED"], true, false),
    ];
    for (filters, may_be_dropped, may_be_forwarded) in all {
        let pair = [filters, &["--since", "10m"]].concat();
        let mut flows = Vec::new();
        let found = wait_for(&format!("flows by {filters:?}"), || {
            flows = hubble.flows(&pair)?;
            let is_there = |is: &dyn Fn(&Value) -> bool, may: bool| !may || flows.iter().any(is);
            let is_found = is_there(&dropped, may_be_dropped) && is_there(&forwarded, may_be_forwarded);
            // A policy that came in the midst of a connection drops what has no SYN any more.
            if is_found { Ok(true) } else { speak().map(|()| false) }
        });
        found.with_context(|| format!("the last ones were {flows:?}"))?;
        let strange =
            |flow: &&Value| dropped(flow) && !may_be_dropped || forwarded(flow) && !may_be_forwarded;
        ensure!(!flows.iter().any(|flow| strange(&flow)), "{filters:?}: {flows:?}");
    }
    Ok(())
}

/// Every output that the program has names both pods.
fn outputs_are_printed(hubble: &Hubble<'_>) -> Result<()> {
    for output in ["compact", "dict", "table", "jsonpb"] {
        let written = hubble.ask(&["observe", "--verdict", "DROPPED", "-o", output])?;
        let names = ["client", "server", "81", "DROPPED"];
        ensure!(names.iter().all(|name| written.contains(name)), "-o {output}: {written}");
    }
    Ok(())
}

#[test]
fn the_stock_command_line_reads_agents_and_the_relay() -> Result<()> {
    require_lab!();
    let Some(program) = program() else {
        say_skipped("needs the stock hubble program: scripts/hubble");
        return Ok(());
    };
    let home = tempfile::Builder::new().prefix("weir-hubble-").tempdir()?;
    let tls = home.path().join("tls");
    certificates(&tls)?;
    let agent_arguments = ["--hubble-listen", "[::]:4244", "--hubble-tls-dir", &tls.display().to_string()];
    let agent_arguments = agent_arguments.map(str::to_owned).into();
    let lab = Lab::start(Setup { nodes: 2, agent_arguments, ..Setup::default() })?;
    let node = lab.node(1);
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    lab.manifests().apply(POLICY)?;
    let rows = |server: &Pod| {
        let target = |port| SocketAddr::new(server.address(true), port);
        [(80, Expected::Answered), (81, Expected::Denied)].map(|(port, expected)| (target(port), expected))
    };
    let speak = || -> Result<()> {
        let rows = rows(&server).map(|(target, expected)| Row::new(&client, Via::Tcp, target, expected));
        expect_all(&rows)
    };
    speak()?;
    let _relay = start_relay(node, &tls)?;

    let by_tls = |address: &str, name: &str| {
        let file = |name: &str| tls.join(name).display().to_string();
        let given = ["--server", &format!("tls://{address}"), "--tls-server-name", name];
        let files = ["--tls-ca-cert-files", &file("ca.crt"), "--tls-client-cert-file", &file("tls.crt")];
        let key = ["--tls-client-key-file", &file("tls.key")];
        given.into_iter().chain(files).chain(key).map(str::to_owned).collect::<Vec<String>>()
    };
    let hubble =
        |server: Vec<String>| Hubble { program: program.clone(), node, home: home.path().to_owned(), server };
    let socket = node.socket().with_file_name("hubble.sock");
    let socket = hubble(vec!["--server".to_owned(), format!("unix://{}", socket.display())]);
    let agent = hubble(by_tls("127.0.0.1:4244", AGENT));
    let relay = hubble(by_tls("127.0.0.1:4245", RELAY));
    wait_for("the relay to have both nodes", || {
        let Ok(nodes) = relay.ask(&["list", "nodes"]) else { return Ok(false) };
        Ok(["node1", "node2"]
            .iter()
            .all(|name| nodes.lines().any(|line| line.contains(name) && line.contains("Connected"))))
    })?;
    for (who, hubble) in [("socket", &socket), ("agent", &agent), ("relay", &relay)] {
        let asked = || -> Result<()> {
            let status = hubble.ask(&["status"])?;
            ensure!(status.contains("Healthcheck") && status.contains("Ok"), "{status}");
            ensure!(status.contains("Current/Max Flows"), "{status}");
            ensure!(hubble.ask(&["list", "nodes"])?.contains("node1"));
            ensure!(hubble.ask(&["list", "namespaces"])?.contains("shop"));
            filters_are_understood(hubble, &client, &server, &speak)?;
            outputs_are_printed(hubble)?;
            // Flows that come while somebody watches.
            let arguments = ["observe", "--follow", "--last", "0", "--verdict", "DROPPED", "-o", "compact"];
            hubble.until(&arguments, speak, |line| line.contains("shop/server"))
        };
        asked().with_context(|| format!("the stock command line by the {who}"))?;
    }
    // Ours takes the same flags for the server and writes the same times.
    // Each reader turns the kernel's clock into the wall's for itself: nanoseconds may differ.
    for format in ["YearMonthDay", "YearMonthDayHour", "YearMonthDayHourMinute", "RFC3339", "RFC1123Z"] {
        let arguments = ["observe", "--verdict", "DROPPED", "--first", "1", "--time-format", format];
        let mut ours = Command::new(binary("weir")?);
        ours.args(arguments).args(&agent.server);
        let (ours, stock) = (node.space().command(ours, "")?, agent.ask(&arguments)?);
        let time = |line: &str| line.split(": shop/").next().unwrap_or_default().to_owned();
        ensure!(!time(&stock).is_empty() && time(&ours) == time(&stock), "{format}: {ours} {stock}");
    }
    let mut missing = vec!["node1", "node2"];
    agent.until(
        &["watch", "peers"],
        || Ok(()),
        |line| {
            missing.retain(|name| !line.contains(name));
            missing.is_empty()
        },
    )?;
    ensure!(!agent.ask(&["observe", "agent-events", "--last", "10"])?.is_empty(), "the agent has started");

    // Without a certificate nobody reads anything.
    let ca = tls.join("ca.crt").display().to_string();
    for (address, name) in [("127.0.0.1:4244", AGENT), ("127.0.0.1:4245", RELAY)] {
        let server = ["--server", &format!("tls://{address}"), "--tls-server-name", name];
        let without = server.into_iter().chain(["--tls-ca-cert-files", &ca]).map(str::to_owned).collect();
        let refused = hubble(without).ask(&["observe"]);
        ensure!(refused.is_err(), "{address} answered a client without a certificate: {refused:?}");
    }
    Ok(())
}
