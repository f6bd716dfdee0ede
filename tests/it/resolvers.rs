//! Resolvers that programs bring along, under rules of names: glibc, musl, Go, c-ares and dig. Each asks in its own
//! way (one socket or two, with EDNS or without, search lists, TCP after a truncated answer).
//! `scripts/setup resolvers` installs what builds them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::{Lab, Pod, Setup, wait_for};
use crate::names::allow_names;
use crate::names::zone::{By, NXDOMAIN, Zone, ask};
use crate::require::require_lab;

/// A resolver: how its program is made. `None`: what makes it is not installed.
struct Resolver {
    name: &'static str,
    compile: fn(source: &Path, program: &Path) -> Command,
    source: &'static str,
    /// It asks by TCP when an answer is truncated; musl does from 1.2.4 on.
    asks_by_tcp: bool,
    needs: &'static [&'static str],
}

fn compiler(program: &str, arguments: &[&str], source: &Path, output: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("-o").arg(output).arg(source).args(arguments);
    command
}

const RESOLVERS: [Resolver; 4] = [
    Resolver {
        name: "glibc",
        compile: |source, program| compiler("cc", &["-O1"], source, program),
        source: "libc.c",
        asks_by_tcp: true,
        needs: &["cc"],
    },
    Resolver {
        name: "musl",
        compile: |source, program| compiler("musl-gcc", &["-O1", "-static"], source, program),
        source: "libc.c",
        asks_by_tcp: false,
        needs: &["musl-gcc"],
    },
    Resolver {
        name: "c-ares",
        compile: |source, program| compiler("cc", &["-O1", "-lcares"], source, program),
        source: "ares.c",
        asks_by_tcp: true,
        needs: &["cc", "/usr/include/ares.h"],
    },
    Resolver {
        name: "go",
        compile: |source, program| {
            let mut command = Command::new("go");
            command.args(["build", "-o"]).arg(program).arg(source);
            command.envs([("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=mod"), ("GO111MODULE", "off")]);
            command
        },
        source: "look_up.go",
        asks_by_tcp: true,
        needs: &["go"],
    },
];

fn is_installed(what: &str) -> bool {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    Path::new(what).is_absolute() && Path::new(what).exists()
        || std::env::split_paths(&directories).any(|directory| directory.join(what).is_file())
}

impl Resolver {
    /// Its program, made if it was not; `None` if it cannot be made here.
    fn program(&self) -> Result<Option<PathBuf>> {
        if let Some(missing) = self.needs.iter().find(|what| !is_installed(what)) {
            eprintln!("SKIPPED: resolver {}: no {missing}: scripts/setup resolvers", self.name);
            return Ok(None);
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = root.join("target/resolvers");
        std::fs::create_dir_all(&directory)?;
        let (source, program) =
            (root.join("tests/it/resolvers").join(self.source), directory.join(self.name));
        let modified = |path: &Path| path.metadata().and_then(|file| file.modified()).ok();
        if modified(&program).is_some_and(|made| Some(made) >= modified(&source)) {
            return Ok(Some(program));
        }
        let output = (self.compile)(&source, &program).output().context(self.name)?;
        ensure!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        Ok(Some(program))
    }
}

/// Runs a command in a pod whose resolv.conf is this.
fn run(lab: &Lab, pod: &Pod, resolv_conf: &str, command: &str) -> Result<String> {
    let path = lab.directory().join("resolv.conf");
    std::fs::write(&path, resolv_conf)?;
    let mut shell = Command::new("unshare");
    let script = format!("mount --bind {} /etc/resolv.conf && {command}", path.display());
    shell.args(["--mount", "sh", "-c", &script]);
    pod.space().command(shell, "")
}

/// The addresses that a resolver finds, sorted.
fn look_up(lab: &Lab, pod: &Pod, resolv_conf: &str, program: &Path, name: &str) -> Result<Vec<IpAddr>> {
    let written = run(lab, pod, resolv_conf, &format!("{} {name}", program.display()))?;
    let Some(lines) = written.trim_end().strip_suffix("done") else { bail!("{name}: {written:?}") };
    let mut found = lines.lines().map(|line| Ok(line.parse()?)).collect::<Result<Vec<IpAddr>>>()?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn address(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [IpAddr::from([198, 18, high, low]), IpAddr::from([0x2001, 0xdb8, 0xaaaa, 0, 0, 0, 0, number])]
}

struct World {
    lab: Lab,
    client: Pod,
    server: Pod,
    zone: Zone,
}

impl World {
    fn start() -> Result<Self> {
        let arguments = vec!["--dns-denied=nxdomain".to_owned()];
        let lab = Lab::start(Setup { agent_arguments: arguments, ..Setup::default() })?;
        let client = lab.pod(1, "shop/client").label("app", "client").create()?;
        let server = lab.pod(1, "kube-system/dns").create()?;
        let zone = Zone::start(server.space())?;
        zone.set("a.sub.test", &address(1), 60);
        zone.set("named.sub.test", &address(2), 60);
        zone.set("denied.example", &address(3), 60);
        let many: Vec<IpAddr> = (100..200).flat_map(address).collect();
        zone.set("many.sub.test", &many, 60);
        // One name's answers are the proxy's.
        let named = "  - toFQDNs: [{matchName: named.sub.test}]\n";
        allow_names(&lab, "[{matchPattern: '**.test'}]", named)?;
        let world = Self { lab, client, server, zone };
        for server in world.server.addresses() {
            for by in [By::Datagram, By::Connection] {
                let is_denied =
                    || Ok(ask(world.client.space(), *server, by, "denied.example")? == Some((NXDOMAIN, 0)));
                wait_for("the policy to be in force", is_denied)?;
            }
        }
        Ok(world)
    }

    fn expect(&self, resolver: &Resolver, program: &Path) -> Result<()> {
        for server in self.server.addresses() {
            // The first of the search list is denied, and the resolver goes on with the next one.
            let conf = format!("nameserver {server}\nsearch denied.example sub.test\noptions timeout:3\n");
            let what = |name: &str| format!("{} at {server}: {name}", resolver.name);
            let find = |name: &str| {
                look_up(&self.lab, &self.client, &conf, program, name).with_context(|| what(name))
            };
            for (name, expected) in
                [("a.sub.test", address(1)), ("a", address(1)), ("named.sub.test", address(2))]
            {
                let found = find(name)?;
                ensure!(found == expected, "{}: {found:?}", what(name));
            }
            // Truncated over UDP; whole over TCP, which is the proxy's.
            let found = find("many.sub.test")?;
            ensure!(
                !resolver.asks_by_tcp || found.len() == 200,
                "{}: {} addresses",
                what("many.sub.test"),
                found.len()
            );
            for name in ["denied.example.", "absent.sub.test."] {
                let found = find(name)?;
                ensure!(found.is_empty(), "{}: {found:?}", what(name));
            }
        }
        let asked = self.zone.asked();
        let strays: Vec<_> = asked.iter().filter(|name| !name.ends_with(".test")).collect();
        // Before the policy was in force somebody may have been asked.
        ensure!(strays.iter().all(|name| *name == "denied.example"), "{}: {strays:?}", resolver.name);
        Ok(())
    }
}

#[test]
fn resolvers_find_what_rules_allow() -> Result<()> {
    require_lab!();
    let mut programs = Vec::new();
    for resolver in &RESOLVERS {
        programs.extend(resolver.program()?.map(|program| (resolver, program)));
    }
    let world = World::start()?;
    programs.iter().try_for_each(|(resolver, program)| world.expect(resolver, program))
}

#[test]
fn dig_reads_every_answer_without_a_warning() -> Result<()> {
    require_lab!();
    if !is_installed("dig") {
        eprintln!("SKIPPED: no dig: scripts/setup resolvers");
        return Ok(());
    }
    let world = World::start()?;
    for server in world.server.addresses() {
        for options in [
            "",
            "+noedns",
            "+bufsize=512",
            "+bufsize=4096",
            "+tcp",
            "+norecurse",
            "+nocookie",
            "+subnet=192.0.2.0/24",
        ] {
            for (name, status, count) in [
                ("a.sub.test", "NOERROR", 1),
                ("named.sub.test", "NOERROR", 1),
                ("absent.sub.test", "NXDOMAIN", 0),
                ("denied.example", "NXDOMAIN", 0),
                ("many.sub.test", "NOERROR", 100),
            ] {
                for kind in ["A", "AAAA"] {
                    let command = format!("dig @{server} {kind} {name} {options} +tries=1 +time=3");
                    let text = run(&world.lab, &world.client, "", &command)?;
                    let said = format!("{command}:\n{text}");
                    ensure!(text.contains(&format!("status: {status}")), "{said}");
                    ensure!(text.contains(&format!("ANSWER: {count},")), "{said}");
                    let is_wrong = |text: &str| text.contains("malformed") || text.contains("mismatch");
                    ensure!(!is_wrong(&text), "{said}");
                }
            }
        }
    }
    Ok(())
}
