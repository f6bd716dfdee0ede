//! The agent's half of CNI in this process: the real socket server and endpoint manager on a
//! node's namespace of the test's own.
//!
//! There is no datapath here: what says "enforced" is a task that takes every row of the table
//! for enforced at once. That is right only for these tests, which are about the plugin, the
//! manager and the devices; that ADD waits for real enforcement is what the lab's tests show.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use weir::api::{self, Reply, Request};
use weir::endpoint::{Enforced, Manager, Options};
use weir::model::{Endpoint, EndpointId};
use weir::tables::Table;

use super::netns::Namespace;

pub type Endpoints = Arc<Table<EndpointId, Arc<Endpoint>>>;

/// One agent; gone when it is stopped.
pub struct Agent {
    pub manager: Arc<Manager>,
    pub endpoints: Endpoints,
    shutdown: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

/// What the loop of this agent does with a new row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Enforcing {
    AtOnce,
    Never,
}

struct Handler(Arc<Manager>);

impl api::Handler for Handler {
    async fn handle(&self, request: Request, reply: Reply) {
        let _ = match request {
            Request::CniAdd(request) => reply.finish(self.0.add(request).await).await,
            Request::CniDel(request) => reply.finish(self.0.delete(request).await).await,
            Request::CniCheck(request) => reply.finish(self.0.check(request).await).await,
            Request::CniGc { valid } => reply.finish(self.0.gc(valid).await).await,
            Request::CniStatus => reply.finish(self.0.status()).await,
            _ => Ok(()),
        };
    }
}

impl Agent {
    /// Starts an agent on the calling thread's node; CIDRs leave place for `pods` at least.
    pub async fn start(directory: &Path, cidrs: &[&str], enforcing: Enforcing) -> Self {
        let endpoints = Endpoints::default();
        let enforced = Enforced::new();
        let options = Options {
            state_directory: directory.join("state"),
            enforced_within: Duration::from_millis(500),
            verify_programs: Box::new(|_| Ok(())),
            tunnel_port: 8472,
            parts: weir::telemetry::Parts::default(),
        };
        let manager = Manager::open(options, Arc::clone(&endpoints), &enforced).expect("opening the manager");
        let cidrs: Vec<_> = cidrs.iter().map(|cidr| cidr.parse().expect("a CIDR")).collect();
        manager.configure(&cidrs, 1450);
        let (shutdown, stop) = watch::channel(false);
        let table = Arc::clone(&endpoints);
        let looping = tokio::spawn(async move {
            let mut changes = table.subscribe();
            loop {
                changes.mark_unchanged();
                let rows = table.snapshot();
                let ids = rows.keys().copied();
                match enforcing {
                    Enforcing::AtOnce => enforced.publish(ids.collect(), BTreeMap::new()),
                    Enforcing::Never => {
                        let waiting = ids.map(|id| (id, "the test never enforces".to_owned()));
                        enforced.publish(Default::default(), waiting.collect());
                    }
                }
                if changes.changed().await.is_err() {
                    return;
                }
            }
        });
        manager.work_off_deletes().await;
        let listener = api::bind(&directory.join("run/agent.sock")).expect("binding the socket");
        let socket = directory.join("run/agent.sock");
        let handler = Arc::new(Handler(Arc::clone(&manager)));
        let serving = tokio::spawn({
            let stop = stop.clone();
            async move {
                api::serve_on(listener, &socket, handler, stop).await.expect("serving");
            }
        });
        let watching = tokio::spawn({
            let manager = Arc::clone(&manager);
            async move { manager.watch_deletes(stop).await.expect("watching deletions") }
        });
        Self { manager, endpoints, shutdown, tasks: vec![serving, watching, looping] }
    }

    /// Stops it as a clean shutdown does.
    pub async fn stop(self) {
        self.shutdown.send_replace(true);
        for task in &self.tasks[..2] {
            while !task.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        self.tasks[2].abort();
    }
}

/// A runtime's way to call the real plugin.
#[derive(Clone)]
pub struct Runtime {
    pub config: Value,
    pub variables: BTreeMap<String, String>,
}

impl Runtime {
    /// For one container with a network namespace.
    pub fn new(directory: &Path, container: &str, namespace: &Namespace) -> Self {
        let config = json!({
            "cniVersion": "1.1.0",
            "name": "weir",
            "type": "weir-cni",
            "socket": directory.join("run/agent.sock"),
            "stateDir": directory.join("state"),
        });
        let variables = [
            ("CNI_CONTAINERID", container.to_owned()),
            ("CNI_NETNS", namespace.path().display().to_string()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
            (
                "CNI_ARGS",
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={container};K8S_POD_UID=u-1"),
            ),
        ];
        Self { config, variables: variables.map(|(name, value)| (name.to_owned(), value)).into() }
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.variables.remove(name);
        self
    }

    pub fn config(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Runs the plugin; its result, or its error object.
    pub fn call(&self, command: &str) -> Result<Value, Value> {
        self.call_with(command, self.config.to_string().as_bytes())
    }

    pub fn call_with(&self, command: &str, input: &[u8]) -> Result<Value, Value> {
        use std::io::Write;
        let mut child = Command::new(plugin())
            .env_clear()
            .env("CNI_COMMAND", command)
            .envs(&self.variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starting weir-cni");
        // A plugin that refuses early need not read all of it.
        let _ = child.stdin.take().expect("it is piped").write_all(input);
        let output = child.wait_with_output().expect("waiting for weir-cni");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "weir-cni is silent");
        let text = String::from_utf8(output.stdout).expect("weir-cni writes UTF-8");
        let value = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
        };
        if output.status.success() { Ok(value) } else { Err(value) }
    }

    /// `call` from within a runtime of tasks.
    pub async fn call_async(&self, command: &'static str) -> Result<Value, Value> {
        let runtime = self.clone();
        tokio::task::spawn_blocking(move || runtime.call(command)).await.expect("it does not panic")
    }
}

/// The plugin that cargo built with this test.
pub fn plugin() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_weir-cni"))
}
