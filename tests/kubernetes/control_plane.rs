//! The host with etcd, API server, controller manager and scheduler, and the way to it.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result};

use super::Setup;
use super::certificates::{Authority, Pair};
use super::daemon::Daemon;
use super::platform::Facts;
use crate::lab::{Space, Wire, binary};

/// Its address on the wire.
pub const ADDRESSES: [&str; 2] = ["10.200.0.200", "fd00:200::200"];

/// Another one there, where nodes that have no way to the first find it.
const BALANCED: &str = "10.200.0.201";

/// Addresses of Services, IPv4 first, and those of the API server.
const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd02::/112"];
const API_SERVER_SERVICE: [&str; 2] = ["10.96.0.1", "fd02::1"];

/// Addresses of pods; each node gets a /24 and a /64.
const POD_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/56"];

/// The plugin of that name, set so that a pod of these classes needs a quota of its namespace.
const LIMITS: &str = "
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: ResourceQuota
  configuration:
    apiVersion: apiserver.config.k8s.io/v1
    kind: ResourceQuotaConfiguration
    limitedResources:
    - resource: pods
      matchScopes:
      - {scopeName: PriorityClass, operator: In, values: [system-node-critical, system-cluster-critical]}
";

/// The daemons of the control plane.
#[derive(Debug)]
pub struct ControlPlane {
    cluster: String,
    space: Space,
    directory: PathBuf,
    programs: PathBuf,
    api_server_arguments: Vec<String>,
    api_server: Mutex<Daemon>,
    /// Where kubectl finds the API server, in the machine's own network.
    port: u16,
}

impl ControlPlane {
    /// Starts them, and the relay to the API server.
    pub(super) fn start(
        cluster: &str,
        wire: &Wire,
        directory: &Path,
        programs: &Path,
        authority: &Authority,
        setup: &Setup,
    ) -> Result<Self> {
        let addresses = ADDRESSES.map(|address| address.parse().expect("these are addresses"));
        let mut space = wire.host("control", &addresses, None)?;
        space.keep();
        space.configure(&[&format!("addr add {BALANCED}/24 dev eth0")])?;
        let own = directory.join("control");
        fs::create_dir(&own)?;
        let start = |name: &str, arguments: Vec<String>| {
            let mut command = Command::new(programs.join("bin").join(name));
            command.args(arguments).stdin(Stdio::null()).current_dir(&own);
            Daemon::start(&space, cluster, name, command, &own.join(format!("{name}.log")))
        };
        start("etcd", etcd_arguments(&own))?;
        let api_server_arguments = api_server_arguments(authority, &own, setup)?;
        let api_server = start("kube-apiserver", api_server_arguments.clone())?;
        if setup.has_controllers {
            start("kube-controller-manager", controller_manager_arguments(authority, &own, setup)?)?;
            start("kube-scheduler", scheduler_arguments(authority, &own)?)?;
        }
        let port = start_relay(&space, cluster, &own)?;
        Ok(Self {
            cluster: cluster.to_owned(),
            directory: own,
            programs: programs.to_owned(),
            api_server_arguments,
            api_server: Mutex::new(api_server),
            port,
            space,
        })
    }

    /// Its namespace.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Ends the API server as a crash does.
    pub fn kill_api_server(&self) -> Result<()> {
        self.api_server.lock().expect("no test panics while it holds this").kill()
    }

    /// Starts the API server again.
    pub fn start_api_server(&self) -> Result<()> {
        let name = "kube-apiserver";
        let mut command = Command::new(self.programs.join("bin").join(name));
        command.args(&self.api_server_arguments).stdin(Stdio::null()).current_dir(&self.directory);
        let log = self.directory.join(format!("{name}.log"));
        let started = Daemon::start(&self.space, &self.cluster, name, command, &log)?;
        *self.api_server.lock().expect("no test panics while it holds this") = started;
        Ok(())
    }

    /// Writes an administrator's kubeconfig.
    pub(super) fn write_kubeconfig(&self, context: &str, path: &Path, authority: &Authority) -> Result<()> {
        let server = format!("https://127.0.0.1:{}", self.port);
        authority.write_kubeconfig(path, context, &server, "/O=system:masters/CN=admin")
    }
}

/// The relay takes connections in the machine's own network and makes them in the control plane's: the
/// listening socket is its standard input, whichever namespace it runs in.
fn start_relay(space: &Space, cluster: &str, directory: &Path) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening for kubectl")?;
    let port = listener.local_addr()?.port();
    let mut relay = Command::new(binary("examples/cluster")?);
    relay.args(["relay", "127.0.0.1:6443"]).stdin(Stdio::from(OwnedFd::from(listener)));
    Daemon::start(space, cluster, "relay", relay, &directory.join("relay.log"))?;
    Ok(port)
}

fn etcd_arguments(directory: &Path) -> Vec<String> {
    vec![
        format!("--data-dir={}", directory.join("etcd").display()),
        "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
        "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        // What is in it lives no longer than the cluster.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ]
}

fn api_server_arguments(authority: &Authority, directory: &Path, setup: &Setup) -> Result<Vec<String>> {
    let facts = setup.platform.facts();
    let addresses = ADDRESSES.iter().chain(&API_SERVER_SERVICE).chain(&["127.0.0.1", "::1"]);
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    let names = addresses
        .map(|address| format!("IP:{address}"))
        .chain(names.iter().map(|name| format!("DNS:{name}")));
    let own = authority.sign("api-server", "/CN=kube-apiserver", &names.collect::<Vec<_>>())?;
    let kubelets =
        authority.sign("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", &[])?;
    let key = authority.service_account_key();
    let mut arguments = vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        "--secure-port=6443".to_owned(),
        format!("--advertise-address={}", ADDRESSES[0]),
        format!("--service-cluster-ip-range={}", families(SERVICE_CIDRS, facts)),
        "--allow-privileged=true".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        // Else exec and logs would try to resolve the nodes' names.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--client-ca-file={}", authority.certificate().display()),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", key.display()),
        format!("--service-account-signing-key-file={}", key.display()),
    ];
    arguments.extend(files(&own, "--tls-cert-file", "--tls-private-key-file"));
    arguments.extend(files(&kubelets, "--kubelet-client-certificate", "--kubelet-client-key"));
    if !setup.has_controllers {
        arguments.push("--disable-admission-plugins=ServiceAccount".to_owned());
    }
    if facts.limits_critical_pods {
        let path = directory.join("admission.yaml");
        fs::write(&path, LIMITS)?;
        arguments.push(format!("--admission-control-config-file={}", path.display()));
    }
    Ok(arguments)
}

fn controller_manager_arguments(
    authority: &Authority,
    directory: &Path,
    setup: &Setup,
) -> Result<Vec<String>> {
    let kubeconfig = local_kubeconfig(authority, directory, "kube-controller-manager")?;
    let facts = setup.platform.facts();
    let mut arguments = vec![
        kubeconfig,
        "--controllers=*".to_owned(),
        "--use-service-account-credentials".to_owned(),
        "--leader-elect=false".to_owned(),
        format!("--service-cluster-ip-range={}", families(SERVICE_CIDRS, facts)),
        format!("--root-ca-file={}", authority.certificate().display()),
        format!("--service-account-private-key-file={}", authority.service_account_key().display()),
        format!("--cluster-signing-cert-file={}", authority.certificate().display()),
        format!("--cluster-signing-key-file={}", authority.key().display()),
    ];
    if facts.gives_pod_cidrs {
        arguments.push("--allocate-node-cidrs=true".to_owned());
        arguments.push(format!("--cluster-cidr={}", families(POD_CIDRS, facts)));
        if facts.has_ipv6 {
            arguments.push("--node-cidr-mask-size-ipv4=24".to_owned());
            arguments.push("--node-cidr-mask-size-ipv6=64".to_owned());
        }
    }
    Ok(arguments)
}

fn scheduler_arguments(authority: &Authority, directory: &Path) -> Result<Vec<String>> {
    Ok(vec![local_kubeconfig(authority, directory, "kube-scheduler")?, "--leader-elect=false".to_owned()])
}

fn local_kubeconfig(authority: &Authority, directory: &Path, name: &str) -> Result<String> {
    let path = directory.join(format!("{name}.kubeconfig"));
    authority.write_kubeconfig(&path, "local", "https://127.0.0.1:6443", &format!("/CN=system:{name}"))?;
    Ok(format!("--kubeconfig={}", path.display()))
}

fn files(pair: &Pair, certificate: &str, key: &str) -> [String; 2] {
    [format!("{certificate}={}", pair.certificate.display()), format!("{key}={}", pair.key.display())]
}

/// IPv4's, and IPv6's where the cluster has it.
fn families(both: [&str; 2], facts: &Facts) -> String {
    both[..if facts.has_ipv6 { 2 } else { 1 }].join(",")
}

/// Where nodes find the API server, as it says itself.
pub(super) fn api_server() -> SocketAddr {
    SocketAddr::new(ADDRESSES[0].parse().expect("this is an address"), 6443)
}

/// Where nodes' own balancers find it.
pub(super) fn balanced_api_server() -> SocketAddr {
    SocketAddr::new(BALANCED.parse().expect("this is an address"), 6443)
}
