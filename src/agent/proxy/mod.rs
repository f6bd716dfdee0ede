//! The agent's side of `weir proxy`: its namespace, its listeners, its process, its rules.
//!
//! ```text
//! sinks::policies ── wanted rule sets ──> here ──> the proxy      (difference by difference)
//!        ^───────── those that it has ─────┘ ^───── records, names of DNS
//! ```
//!
//! The agent owns all that must survive the proxy. The proxy goes on without the agent, and the next agent finds
//! it. Nothing is made before the first policy has rules of layer 7.

mod args;
mod counters;
mod envoy;
mod handle;
mod place;
mod process;
mod speak;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

pub use args::JudgeArgs;
pub use counters::Counters;
pub use handle::{Proxy, Wanted};
use place::Place;
use process::{Process, Program};
use speak::Said;
pub use speak::{Heard, Hears};

use super::names::DnsDenied;
use crate::backoff::Backoff;
use crate::datapath::{Datapath, RuleSets};
use crate::telemetry::Parts;

/// Ends the proxy that an agent has left behind; says whether there was one. Its namespace and its device go with it.
pub fn end_left_behind(state_dir: &Path) -> bool {
    let proxy = Program::proxy(state_dir, &control_of(state_dir)).find().inspect(Process::end);
    let envoy = find_envoy(state_dir).inspect(Process::end);
    proxy.or(envoy).is_some()
}

/// The Envoy that an agent has left behind.
fn find_envoy(state_dir: &Path) -> Option<Process> {
    envoy::program(state_dir, Path::new("")).find()
}

fn control_of(state_dir: &Path) -> PathBuf {
    state_dir.join("proxy.sock")
}

/// The part of the agent that looks after the proxy.
const PART: &str = "proxy";
/// A proxy that was just started connects within this time; one of a former agent, too.
const CONNECTS_WITHIN: Duration = Duration::from_secs(5);
/// The first pause after a failure; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// No pause is longer.
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How often it is looked whether the device is as it was made.
const COMPARE_EVERY: Duration = Duration::from_secs(10);

/// What the proxy is made of.
pub struct Options {
    /// The programs.
    pub datapath: Arc<Datapath>,
    /// Where the socket and the process's number are.
    pub state_dir: PathBuf,
    /// MTU of the pods' devices.
    pub mtu: u32,
    /// Rules by number.
    pub sets: RuleSets,
    /// Who hears what the proxy tells.
    pub hears: Arc<dyn Hears>,
    /// How the proxy is, for people.
    pub parts: Parts,
    /// What a question of DNS gets that no rule allows.
    pub denied: DnsDenied,
    /// The program of an Envoy that judges what it can.
    pub envoy: Option<PathBuf>,
}

/// Looks after the proxy for ever.
pub async fn run(options: Options, proxy: Proxy) {
    let mut wanted = proxy.wanted();
    let mut pause = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
    options.parts.add(PART);
    if wanted.wait_for(|sets| !sets.is_empty()).await.is_err() {
        return;
    }
    let keeper = loop {
        match Keeper::make(&options).await {
            Ok(keeper) => break keeper,
            Err(error) => options.say(&error),
        }
        tokio::time::sleep(pause.wait()).await;
    };
    match keeper.envoy(&options, &proxy) {
        Ok(Some(envoy)) => drop(tokio::spawn(envoy.run(proxy.wanted()))),
        Ok(None) => {}
        Err(error) => options.say(&error),
    }
    keeper.keep(&options, &proxy, &mut wanted).await;
}

impl Options {
    /// Tells people that the proxy is not as it should be.
    fn say(&self, error: &anyhow::Error) {
        let cause = crate::error::chain(error);
        if self.parts.fails(PART, vec![cause.clone()], false, true) {
            tracing::error!(error = cause, "looking after the proxy");
        }
    }
}

/// What is kept from one proxy to the next.
struct Keeper {
    control: PathBuf,
    listener: UnixListener,
    place: Arc<Mutex<Place>>,
    process: Option<Process>,
}

impl Keeper {
    async fn make(options: &Options) -> Result<Self> {
        let control = control_of(&options.state_dir);
        let listener = listen(&control)?;
        // It judges by the rules of an agent before, under numbers that this agent may give to other rules.
        if let Some(envoy) = find_envoy(&options.state_dir) {
            blocking(move || envoy.end_wholly().context("ending the Envoy that an agent has left")).await?;
        }
        if options.envoy.is_none() {
            options.datapath.detach_aliases()?;
        }
        let process = Program::proxy(&options.state_dir, &control).find();
        let (datapath, mtu) = (options.datapath.clone(), options.mtu);
        let namespace = process.as_ref().and_then(Process::namespace);
        let place = blocking(move || Place::make(datapath, namespace, mtu)).await?;
        Ok(Self { control, listener, place: Arc::new(Mutex::new(place)), process })
    }

    /// The Envoy beside the proxy, where the settings want one.
    fn envoy(&self, options: &Options, proxy: &Proxy) -> Result<Option<envoy::Envoy>> {
        let Some(program) = options.envoy.clone() else { return Ok(None) };
        let place = self.place.lock().expect("nobody panics with the lock");
        Ok(Some(envoy::Envoy {
            datapath: options.datapath.clone(),
            state_dir: options.state_dir.clone(),
            namespace: place.namespace()?,
            has_ipv6: place.has_ipv6(),
            program,
            sets: options.sets.clone(),
            hears: options.hears.clone(),
            parts: options.parts.clone(),
            proxy: proxy.clone(),
        }))
    }

    /// Starts one proxy after the other, and speaks with each until it ends.
    async fn keep(mut self, options: &Options, proxy: &Proxy, wanted: &mut watch::Receiver<Wanted>) {
        let mut pause = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
        loop {
            let began = Instant::now();
            let outcome = match self.connect(options).await {
                Ok(stream) => self.speak(options, proxy, wanted, stream).await,
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                options.say(&error);
            }
            if began.elapsed() > LAST_PAUSE {
                pause.reset();
            }
            tokio::time::sleep(pause.wait()).await;
        }
    }

    /// The connection of the proxy that runs, or of a new one.
    async fn connect(&mut self, options: &Options) -> Result<UnixStream> {
        let mut running = match self.process.take().filter(Process::is_alive) {
            Some(process) => process,
            None => {
                let namespace = self.place.lock().expect("nobody panics with the lock").namespace()?;
                let program = Program::proxy(&options.state_dir, &self.control);
                blocking(move || program.start(&namespace)).await?
            }
        };
        let stream = tokio::select! {
            accepted = accept(&self.listener) => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    self.process = Some(running);
                    return Err(error);
                }
            },
            () = tokio::time::sleep(CONNECTS_WITHIN) => {
                running.end();
                bail!("the proxy did not connect within {CONNECTS_WITHIN:?}");
            }
            () = running.ended() => bail!("the proxy ended before it connected"),
        };
        self.process = Some(running);
        Ok(stream)
    }

    /// Speaks with one proxy until the connection ends, and looks after its device meanwhile.
    async fn speak(
        &self,
        options: &Options,
        proxy: &Proxy,
        wanted: &mut watch::Receiver<Wanted>,
        stream: UnixStream,
    ) -> Result<()> {
        let descriptors = self.place.lock().expect("nobody panics with the lock").descriptors()?;
        let deny_with_nxdomain = options.denied == DnsDenied::Nxdomain;
        let said = Said { sets: &options.sets, hears: &options.hears, proxy, wanted, deny_with_nxdomain };
        let speaking = said.speak(stream, descriptors);
        tokio::pin!(speaking);
        options.parts.works(PART);
        loop {
            tokio::select! {
                ended = &mut speaking => return ended.context("speaking with the proxy"),
                () = tokio::time::sleep(COMPARE_EVERY) => {
                    let place = self.place.clone();
                    blocking(move || place.lock().expect("nobody panics with the lock").mend()).await?;
                }
            }
        }
    }
}

fn listen(path: &std::path::Path) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listening at {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("closing {} to others", path.display()))?;
    Ok(listener)
}

/// The next connection of somebody who may be the proxy.
async fn accept(listener: &UnixListener) -> Result<UnixStream> {
    loop {
        let (stream, _) = listener.accept().await.context("accepting the proxy's connection")?;
        let peer = stream.peer_cred().context("asking who connects")?;
        if peer.uid() == 0 {
            return Ok(stream);
        }
        tracing::warn!(uid = peer.uid(), "refusing a connection that is not the proxy's");
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("waiting for work on the proxy")?
}
