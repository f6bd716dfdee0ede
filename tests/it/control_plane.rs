//! A real API server over a real etcd, on this machine's loopback, for tests and benchmarks that write into it.
//!
//! The programs are looked for in `$WEIR_CLUSTER_PROGRAMS`, in PATH, and where `make cluster` and kind's
//! helper keep what they built. Where there are none, a test says that it was skipped. There are no
//! controllers: what a test creates stays as it is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::json;

const PROGRAMS: [&str; 2] = ["etcd", "kube-apiserver"];
const STARTED_WITHIN: Duration = Duration::from_secs(60);
/// The token of the test itself.
const ADMIN: &str = "weir-test-admin";

/// etcd and an API server, ended with this.
pub struct ControlPlane {
    directory: tempfile::TempDir,
    port: u16,
    programs: BTreeMap<&'static str, PathBuf>,
    etcd_port: u16,
    children: Vec<Child>,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // The API server first: it waits for etcd.
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts one, or says that `test` is skipped.
pub fn start(test: &str) -> Result<Option<ControlPlane>> {
    static ONE: Mutex<()> = Mutex::new(());
    let mut programs = BTreeMap::new();
    for name in PROGRAMS {
        match find(name) {
            Some(path) => drop(programs.insert(name, path)),
            None => {
                let text = format!(
                    "SKIPPED (no {name}: make cluster builds it; WEIR_CLUSTER_PROGRAMS names its folder): {test}"
                );
                writeln!(std::io::stderr().lock(), "{text}")?;
                return Ok(None);
            }
        }
    }
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    ControlPlane::start(programs, one).map(Some)
}

/// Where a program is.
pub fn find(name: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("WEIR_CLUSTER_PROGRAMS").map(PathBuf::from).into_iter().collect();
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    if let Some(home) = std::env::var_os("HOME").map(PathBuf::from) {
        let caches = fs::read_dir(home.join(".cache/weir")).into_iter().flatten().flatten();
        folders.extend(caches.flat_map(|entry| [entry.path(), entry.path().join("bin")]));
        folders.push(home.join(".cache/kindlab/bin"));
    }
    folders.into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl ControlPlane {
    fn start(programs: BTreeMap<&'static str, PathBuf>, one: MutexGuard<'static, ()>) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("weir-control-plane-").tempdir()?;
        let key = Command::new("openssl")
            .args(["genrsa", "-out"])
            .arg(directory.path().join("sa.key"))
            .arg("2048")
            .stderr(Stdio::null())
            .status()
            .context("running openssl")?;
        anyhow::ensure!(key.success(), "making a key with openssl");
        fs::write(directory.path().join("tokens.csv"), format!("{ADMIN},admin,admin,\"system:masters\"\n"))?;
        let mut plane = Self {
            directory,
            port: free_port()?,
            programs,
            etcd_port: free_port()?,
            children: Vec::new(),
            _one_at_a_time: one,
        };
        plane.start_etcd()?;
        plane.start_api_server()?;
        plane.wait_ready()?;
        Ok(plane)
    }

    fn spawn(&mut self, program: &'static str, arguments: &[String]) -> Result<()> {
        let log = File::create(self.path(&format!("{program}.log")))?;
        let child = Command::new(&self.programs[program])
            .args(arguments)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        self.children.push(child);
        Ok(())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let (peer, url) = (free_port()?, format!("http://127.0.0.1:{}", self.etcd_port));
        self.spawn(
            "etcd",
            &[
                format!("--data-dir={}", self.path("etcd").display()),
                format!("--listen-client-urls={url}"),
                format!("--advertise-client-urls={url}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                "--unsafe-no-fsync".to_owned(),
                "--log-level=warn".to_owned(),
            ],
        )
    }

    fn start_api_server(&mut self) -> Result<()> {
        let path = |name: &str| self.path(name).display().to_string();
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            format!("--secure-port={}", self.port),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", path("certificates")),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("sa.key")),
            format!("--service-account-signing-key-file={}", path("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16,fd02::/112".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--advertise-address=192.0.2.1".to_owned(),
        ];
        self.spawn("kube-apiserver", &arguments)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let deadline = Instant::now() + STARTED_WITHIN;
        runtime.block_on(async {
            let client = self.client().await?;
            loop {
                let request = axum::http::Request::get("/readyz").body(Vec::new())?;
                if client.request_text(request).await.is_ok() {
                    return Ok(());
                }
                for child in &mut self.children {
                    if let Some(status) = child.try_wait()? {
                        bail!("a program ended with {status}: {}", self.logs());
                    }
                }
                if Instant::now() > deadline {
                    bail!("the API server is not ready: {}", self.logs());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    }

    fn logs(&self) -> String {
        let tail = |program: &str| {
            let text = fs::read_to_string(self.path(&format!("{program}.log"))).unwrap_or_default();
            text.lines().rev().take(5).collect::<Vec<_>>().join("\n")
        };
        PROGRAMS.map(tail).join("\n")
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A file in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A kubeconfig of the bearer of `token`, in namespace weir-system.
    pub fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.port()), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {
                "cluster": "test", "user": "test", "namespace": "weir-system"}}],
        });
        let path = self.path(&format!("{name}.kubeconfig"));
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// The kubeconfig with all rights.
    pub fn admin(&self) -> Result<PathBuf> {
        self.kubeconfig("admin", ADMIN)
    }

    /// With all rights.
    pub async fn client(&self) -> Result<Client> {
        client(&self.admin()?).await
    }

    /// As a pod of `account` in weir-system on `node`: with the rights of deploy/base and nothing else.
    pub async fn as_account(&self, account: &str, node: &str) -> Result<PathBuf> {
        let admin = self.client().await?;
        let name = format!("{account}-{node}");
        let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(admin.clone(), "weir-system");
        let pod = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"serviceAccountName": account, "nodeName": node,
                "containers": [{"name": "a", "image": "weir"}]},
        }))?;
        let uid = match pods.create(&Default::default(), &pod).await {
            Ok(pod) => pod.metadata.uid,
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                pods.get(&name).await?.metadata.uid
            }
            Err(error) => return Err(error).context("making the pod"),
        };
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(admin, "weir-system");
        let request = serde_json::from_value(json!({
            "metadata": {},
            "spec": {"audiences": [], "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}},
        }))?;
        let answer = accounts.create_token_request(account, &Default::default(), &request).await?;
        self.kubeconfig(&name, &answer.status.context("a token request has an answer")?.token)
    }

    /// Applies the documents of `text`, as kubectl does; a kind that was just defined is awaited.
    pub async fn apply(&self, text: &str) -> Result<()> {
        let client = self.client().await?;
        for object in weir::yaml::read_all::<DynamicObject>(text)? {
            let api = api_of(&client, &object)?;
            let name = object.metadata.name.clone().context("an object has a name")?;
            let parameters = PatchParams::apply("test").force();
            api.patch(&name, &parameters, &Patch::Apply(&object))
                .await
                .with_context(|| format!("applying {name}"))?;
        }
        Ok(())
    }

    /// The namespace, rights and policies of deploy/base.
    pub async fn apply_base(&self) -> Result<()> {
        for text in [
            include_str!("../../deploy/base/namespace.yaml"),
            include_str!("../../deploy/base/access.yaml"),
            include_str!("../../deploy/base/operator-access.yaml"),
            include_str!("../../deploy/base/own-node-only.yaml"),
        ] {
            self.apply(text).await?;
        }
        Ok(())
    }
}

/// A client by a kubeconfig.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn api_of(client: &Client, object: &DynamicObject) -> Result<Api<DynamicObject>> {
    let types = object.types.as_ref().context("the object says what it is")?;
    let gvk = GroupVersionKind::try_from(types)?;
    let kind = gvk.kind.to_lowercase();
    let plural = match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if kind.ends_with('s') => kind,
        None => format!("{kind}s"),
    };
    let resource = ApiResource::from_gvk_with_plural(&gvk, &plural);
    Ok(match &object.metadata.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}
