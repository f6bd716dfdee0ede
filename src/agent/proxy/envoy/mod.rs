//! An Envoy in the proxy's place: it judges HTTP where one rule set judges alone and changes no header.
//!
//! ```text
//! rule sets ──> resources ──> discovery ──> Envoy listens, a port for each rule set
//!                                 its sockets <── taken from the process, given to the programs (l7_rule_listeners)
//! layer7 <── records ──────────── log <── Envoy
//! ```
//!
//! Everything else stays `weir proxy`'s: the programs bring a flow to the socket of its rule set where there is one. A
//! socket goes with its process, and `weir proxy` refuses what an Envoy is to judge: while none runs, that is closed.

mod bootstrap;
mod discovery;
mod log;
mod paths;
mod proto;
mod resources;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::handle::{Proxy, Wanted};
use super::process::Program;
use super::{FIRST_PAUSE, Hears, LAST_PAUSE, blocking, listen};
use crate::backoff::Backoff;
use crate::datapath::{Datapath, FlowsMap, RuleSets};
use crate::files::{self, Survives};
use crate::model::l7::{RuleSet, RuleSetId};
use crate::netlink::{self, LoopbackPort};
use crate::telemetry::Parts;
use discovery::{Answers, Discovery, Listeners};
use log::Log;
use proto::accesslog::access_log_service_server::AccessLogServiceServer;
use proto::discovery::Resource;
use proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;

/// The part of the agent that looks after an Envoy.
const PART: &str = "envoy";
/// The cluster by which an Envoy reaches the agent.
const CLUSTER_OF_AGENT: &str = "agent";
/// How soon it is looked for the sockets of a listener that an Envoy has; then ever less often.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often it is looked for connections whose rules have changed, and for rule sets that nobody needs.
const SETTLE_EVERY: Duration = Duration::from_secs(1);
/// A rule set that nobody asks for keeps its listener for so long.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// How long connections may go on whose listener was taken away.
const DRAIN_SECONDS: &str = "5";

/// True if an Envoy judges by the set where it judges alone.
pub fn judges_by(set: &RuleSet) -> bool {
    resources::port_of(set).is_some()
}

/// The Envoy of a node. One that an agent before has left is ended: it judges by that agent's rules.
pub fn program(state_dir: &Path, program: &Path) -> Program {
    let config = config_of(state_dir);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get().div_ceil(2)).to_string();
    let words = ["--disable-hot-restart", "--log-level", "warning", "--drain-time-s", DRAIN_SECONDS];
    let mut arguments = vec!["confined".into(), program.into(), "-c".into(), config.clone().into()];
    arguments.extend(words.map(Into::into));
    arguments.extend(["--concurrency".into(), threads.into()]);
    Program { name: "envoy", pid_file: state_dir.join("envoy.pid"), marker: config, arguments }
}

fn config_of(state_dir: &Path) -> PathBuf {
    state_dir.join("envoy.json")
}

/// What an Envoy is made of.
pub struct Envoy {
    /// The programs.
    pub datapath: Arc<Datapath>,
    /// Where socket, configuration and process number are.
    pub state_dir: PathBuf,
    /// The proxy's namespace.
    pub namespace: File,
    /// The namespace has IPv6.
    pub has_ipv6: bool,
    /// The program.
    pub program: PathBuf,
    /// Rules by number.
    pub sets: RuleSets,
    /// Who hears of requests.
    pub hears: Arc<dyn Hears>,
    /// How it is, for people.
    pub parts: Parts,
    /// What the rest of the agent has of the proxy.
    pub proxy: Proxy,
}

/// A listener that an Envoy shall have.
struct Given {
    listener: Resource,
    port: u16,
    /// Since when nobody asks for it.
    unwanted: Option<Instant>,
    /// The programs have its sockets.
    is_open: bool,
}

/// What was given to an Envoy.
struct Keeper {
    envoy: Envoy,
    given: BTreeMap<RuleSetId, Given>,
    listeners: watch::Sender<Listeners>,
    answers: watch::Receiver<Answers>,
    settled: Instant,
}

impl Envoy {
    /// Looks after an Envoy for ever.
    pub async fn run(self, mut wanted: watch::Receiver<Wanted>) {
        self.parts.add(PART);
        let mut pause = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
        let (listeners, answers) = loop {
            match self.serve() {
                Ok(channels) => break channels,
                Err(error) => self.say(&error),
            }
            tokio::time::sleep(pause.wait()).await;
        };
        let mut keeper =
            Keeper { envoy: self, given: BTreeMap::new(), listeners, answers, settled: Instant::now() };
        loop {
            let began = Instant::now();
            if let Err(error) = keeper.keep(&mut wanted).await {
                keeper.envoy.say(&error);
            }
            if began.elapsed() > LAST_PAUSE {
                pause.reset();
            }
            tokio::time::sleep(pause.wait()).await;
        }
    }

    fn say(&self, error: &anyhow::Error) {
        let cause = crate::error::chain(error);
        if self.parts.fails(PART, vec![cause.clone()], false, true) {
            tracing::error!(error = cause, "looking after Envoy");
        }
    }

    /// Begins to answer an Envoy.
    fn serve(&self) -> Result<(watch::Sender<Listeners>, watch::Receiver<Answers>)> {
        let socket = self.state_dir.join("envoy.sock");
        let connections = UnixListenerStream::new(listen(&socket)?);
        let config = bootstrap::bootstrap(&socket);
        files::replace(&config_of(&self.state_dir), config.as_bytes(), 0o600, Survives::Process)
            .context("writing Envoy's configuration")?;
        let (listeners, listening) = watch::channel(Listeners::default());
        let (answers, answering) = watch::channel(Answers::default());
        self.datapath.attach_aliases().context("naming clients to Envoy")?;
        let flows = Arc::new(FlowsMap::new(self.datapath.flows_map()?)?);
        let log = Log { datapath: self.datapath.clone(), flows, hears: self.hears.clone() };
        let serving = Server::builder()
            .add_service(AggregatedDiscoveryServiceServer::new(Discovery { listeners: listening, answers }))
            .add_service(AccessLogServiceServer::new(log))
            .serve_with_incoming(connections);
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(error = crate::error::chain(&error.into()), "answering Envoy");
            }
        });
        Ok((listeners, answering))
    }
}

impl Keeper {
    /// Starts an Envoy, or finds one, and gives it what is wanted until it ends.
    async fn keep(&mut self, wanted: &mut watch::Receiver<Wanted>) -> Result<()> {
        let program = program(&self.envoy.state_dir, &self.envoy.program);
        let mut process = match program.find() {
            Some(process) => process,
            None => {
                loop {
                    self.want(&wanted.borrow_and_update().clone());
                    if !self.given.is_empty() {
                        break;
                    }
                    wanted.changed().await.context("waiting for rule sets")?;
                }
                let namespace =
                    self.envoy.namespace.try_clone().context("opening the proxy's namespace once more")?;
                blocking(move || program.start(&namespace)).await?
            }
        };
        // The sockets of the one before have gone with it.
        self.given.values_mut().for_each(|given| given.is_open = false);
        let mut looks = Backoff::new(LOOK_EVERY, SETTLE_EVERY);
        loop {
            self.want(&wanted.borrow_and_update().clone());
            self.open(process.pid()).await?;
            if self.settled.elapsed() >= SETTLE_EVERY {
                self.settled = Instant::now();
                self.settle().await?;
            }
            self.tell_people();
            let pause = if self.is_opening() { looks.wait() } else { SETTLE_EVERY };
            tokio::select! {
                () = process.ended() => anyhow::bail!("Envoy has ended"),
                changed = wanted.changed() => changed.context("waiting for rule sets")?,
                changed = self.answers.changed() => {
                    changed.context("waiting for what Envoy says")?;
                    looks.reset();
                    // Many come at once.
                    tokio::time::sleep(looks.wait()).await;
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Envoy has listeners whose sockets the programs have not.
    fn is_opening(&self) -> bool {
        let answers = self.answers.borrow();
        self.given.values().any(|given| !given.is_open && answers.has(&given.listener))
    }

    fn tell_people(&self) {
        let answers = self.answers.borrow();
        let is_wanted = |given: &&Given| !given.is_open && given.unwanted.is_none();
        let is_waiting = self
            .given
            .values()
            .filter(is_wanted)
            .any(|given| !answers.refused.contains_key(&given.listener.name));
        let causes: Vec<String> = answers
            .refused
            .iter()
            .map(|(name, why)| format!("Envoy refuses {name}, so it allows nothing: {why}"))
            .collect();
        match causes.is_empty() {
            true if is_waiting => {}
            true => self.envoy.parts.works(PART),
            false => drop(self.envoy.parts.fails(PART, causes, false, false)),
        }
    }

    /// Keeps a listener for each rule set that is wanted.
    fn want(&mut self, wanted: &Wanted) {
        let before = self.given.len();
        for (id, given) in &mut self.given {
            match wanted.contains(id) {
                true => given.unwanted = None,
                false => given.unwanted = given.unwanted.or_else(|| Some(Instant::now())),
            }
        }
        self.given.retain(|_, given| given.unwanted.is_none_or(|since| since.elapsed() < KEPT_FOR));
        let mut is_changed = self.given.len() != before;
        for id in wanted.iter().filter(|id| !self.given.contains_key(id)).copied().collect::<Vec<_>>() {
            let Some(set) = self.envoy.sets.get(id) else { continue };
            let port = resources::port_of(&set);
            let listener = resources::listener(&set, self.envoy.has_ipv6);
            if let (Some(port), Some(listener)) = (port, listener) {
                let listener = discovery::resource(resources::name_of(id), listener);
                self.given.insert(id, Given { listener, port, unwanted: None, is_open: false });
                is_changed = true;
            }
        }
        if is_changed {
            let listeners = self.given.values().map(|given| &given.listener);
            let all = listeners.map(|listener| (listener.name.clone(), listener.clone()));
            self.listeners.send_replace(Arc::new(all.collect()));
        }
    }

    /// Gives the programs the sockets that Envoy has opened, of listeners that it has as they are.
    async fn open(&mut self, pid: i32) -> Result<()> {
        let families: &[bool] = if self.envoy.has_ipv6 { &[false, true] } else { &[false] };
        let answers = self.answers.borrow_and_update().clone();
        let is_opening = |given: &Given| !given.is_open && answers.has(&given.listener);
        let waiting = self.given.values().filter(|given| is_opening(given));
        let ports: BTreeSet<LoopbackPort> = waiting
            .flat_map(|given| {
                families.iter().map(|is_ipv6| LoopbackPort { port: given.port, is_ipv6: *is_ipv6 })
            })
            .collect();
        if ports.is_empty() {
            return Ok(());
        }
        let sockets = blocking(move || Ok(netlink::listening_sockets(pid, &ports)?)).await?;
        let mut opened = BTreeSet::new();
        for (id, given) in self.given.iter_mut().filter(|(_, given)| is_opening(given)) {
            let port = |is_ipv6: &bool| sockets.get(&LoopbackPort { port: given.port, is_ipv6: *is_ipv6 });
            let Some(found) = families.iter().map(port).collect::<Option<Vec<_>>>() else { continue };
            for (socket, is_ipv6) in found.into_iter().zip(families) {
                self.envoy.datapath.set_rule_listener(*id, *is_ipv6, socket.as_fd())?;
            }
            given.is_open = true;
            opened.insert(*id);
        }
        self.envoy.proxy.envoy_has(opened);
        Ok(())
    }

    /// Ends the connections that an Envoy judges by other rules than those of now.
    async fn settle(&self) -> Result<()> {
        let datapath = self.envoy.datapath.clone();
        let stale = blocking(move || datapath.flows_of_other_rules()).await?;
        if stale.is_empty() {
            return Ok(());
        }
        tracing::info!(connections = stale.len(), "ending connections whose rules have changed");
        let namespace =
            self.envoy.namespace.try_clone().context("opening the proxy's namespace once more")?;
        let end = move || {
            for (client, server) in &stale {
                netlink::destroy_connection(*server, *client)?;
                netlink::destroy_connection(*client, *server)?;
            }
            Ok(())
        };
        blocking(move || Ok(netlink::within(&namespace, end)?)).await
    }
}
