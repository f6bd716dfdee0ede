//! `weir agent`: the program of a node.
//!
//! Wires sources, compilers, the datapath and the flow recorder together, and is
//! the only place that starts long tasks. One task, `rounds`, owns everything
//! that is written to the kernel.
//!
//! ```text
//! kube::run ──> Tables ──┐
//! cni ──> endpoint::Manager ──> rounds ──> reconcile ──> kernel
//!                        ^────── Enforced ──┘               │
//! api, telemetry <── flow::Recorder <── flow::reader <──────┘
//! ```

mod announce;
mod answers;
mod args;
mod compute;
mod confirm;
mod devices;
mod election;
mod ends;
mod follow;
mod health_ports;
mod host;
mod ipsec;
mod layer7;
mod lead;
mod local;
mod mtu;
mod names;
mod node;
mod observer;
pub mod policy_diff;
mod ports;
mod proxy;
mod publish;
mod questions;
mod removed;
mod restart;
mod rotation;
mod rounds;
mod secret;
mod sinks;
mod upkeep;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

pub use args::{AgentArgs, Config, Routing};
pub use compute::{Compute, Desired, Rules, View};
pub use ends::Ends;
pub use names::NameArgs;
pub use node::Devices;
pub use proxy::JudgeArgs;
pub use proxy::end_left_behind;

use crate::api;
use crate::cni::install;
use crate::datapath::{Datapath, Options, Settings};
use crate::endpoint::{self, Enforced};
use crate::flow::reader::KernelEvents;
use crate::flow::{self, Names};
use crate::kube::bootstrap::Servers;
use crate::kube::{self, Collector, Publisher, Source, Tables};
use crate::model::{AddressPair, Node, NodeEndpoints};
use crate::netlink;
use crate::signals::stop_at_signal;
use crate::tables::Table;
use crate::telemetry::{self, ReadyGuard, Telemetry};
use answers::{Answers, Known};
use confirm::Confirming;
use node::OVERLAY_DEVICE;
use ports::Ports;
use restart::Restart;
use rounds::Rounds;
use sinks::DeviceSink;

/// An ADD that is not enforced within this time gives up; kubelet tries again.
const ENFORCED_WITHIN: Duration = Duration::from_secs(10);

/// What stops is waited for this long.
const FAREWELL_WITHIN: Duration = Duration::from_secs(4);

/// What is there before the node is known.
struct Start {
    config: Config,
    source: Source,
    known: Arc<Known>,
    manager: Arc<endpoint::Manager>,
    names: Arc<Names>,
    enforced: Enforced,
    programmed: ReadyGuard,
    /// Dropped by whoever has something to do when the agent stops, once it is done.
    farewell: mpsc::Sender<()>,
}

/// Runs the agent until SIGTERM or SIGINT. The datapath stays in force afterwards.
pub async fn run(config: Config) -> Result<()> {
    netlink::set_sysctl_root(&config.args.proc_sys);
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_at_signal(stop, "pods keep their connections"));
    let state_dir = &config.args.state_dir;
    std::fs::create_dir_all(state_dir).with_context(|| format!("making {}", state_dir.display()))?;

    let telemetry = Arc::new(Telemetry::new());
    let programmed = telemetry.ready().register("the datapath");
    let endpoints = Arc::new(Table::new());
    let enforced = Enforced::new();
    let known =
        Arc::new(Known::new(config.clone(), telemetry.clone(), endpoints.clone(), enforced.subscribe()));
    known.show();
    let source = source(&config, &known.tables).await?;
    let options = endpoint::Options {
        state_directory: state_dir.clone(),
        enforced_within: ENFORCED_WITHIN,
        verify_programs: known.clone().verify_programs(),
        tunnel_port: config.args.network.tunnel_port,
        parts: telemetry.parts().clone(),
    };
    let manager = endpoint::Manager::open(options, endpoints, &enforced)
        .context("reading the endpoints of this node back")?;
    let names = Arc::new(Names::new(config.args.node_name.as_str(), known.clone()));

    let answers = Arc::new(Answers::new(known.clone(), manager.clone(), names.clone()));
    let history = observer::keep_on_disk(&known);
    let observing = observer::serve(known.clone(), names.clone(), history, stopping.clone());
    let socket = config.args.socket.clone();
    let serving = api::serve(&socket, answers, stopping.clone());
    let metrics = telemetry::serve(config.args.metrics_address, telemetry, stopping.clone());
    let (farewell, mut farewells) = mpsc::channel(1);
    let start = Start { config, source, known, manager, names, enforced, programmed, farewell };
    let stops = stopping.clone();
    let working = work(start, stopping);
    let result = tokio::select! {
        served = serving => served.context("serving the API socket"),
        observed = observing => observed.context("serving Hubble's API"),
        served = metrics => served.context("serving metrics"),
        worked = working => worked,
    };
    if *stops.borrow() && timeout(FAREWELL_WITHIN, farewells.recv()).await.is_err() {
        tracing::warn!("stopping before everything was handed over");
    }
    result
}

async fn source(config: &Config, tables: &Arc<Tables>) -> Result<Source> {
    match &config.args.manifests {
        Some(directory) => Ok(Source::Manifests(directory.clone())),
        None => {
            let client = kubernetes(&config.args, tables).await?;
            Ok(Source::Kubernetes(client, config.args.node_name.clone()))
        }
    }
}

async fn kubernetes(args: &AgentArgs, tables: &Arc<Tables>) -> Result<::kube::Client> {
    let Some(file) = &args.api.kubeconfig else {
        let servers = Servers::new(&args.api.api_servers, &args.state_dir, |name| std::env::var(name).ok());
        let client = servers.client().context("there is neither --manifests nor --kubeconfig")?;
        tokio::spawn(servers.follow(tables.clone()));
        return Ok(client);
    };
    kube::bootstrap::client_from(file).await
}

/// The life of the agent: learn what this node is, load, then keep the kernel up to date.
async fn work(start: Start, mut stopping: watch::Receiver<bool>) -> Result<()> {
    let Start { config, source, known, manager, names, enforced, programmed, farewell } = start;
    let tables = known.tables.clone();
    let publisher = Arc::new(Publisher::new(&source, &config.args.node_name, tables.clone())?);
    if let Source::Manifests(directory) = &source {
        let grace = Duration::from_secs(config.args.timing.identity_grace_seconds.into());
        let health = known.health.clone();
        tokio::spawn(Collector::new(directory, &config.args.node_name, grace, health)?.run());
    }
    let lease = Duration::from_secs(config.args.services.announce_lease_seconds.into());
    let board = kube::Board::new(&source, &config.args.node_name, lease);
    tokio::spawn(kube::run(source, tables.clone(), known.health.clone()));
    let facts = watch::Sender::new(announce::Facts::default());
    let announcing = {
        let (config, publisher) = (config.clone(), publisher.clone());
        let (telemetry, facts) = (known.telemetry.clone(), facts.subscribe());
        async move { announce::run(&config, &publisher, &telemetry, facts).await }
    };
    tokio::spawn(announcing);
    let node = tokio::select! {
        node = node::discover(&config, &tables) => node?,
        _ = stopping.wait_for(|stop| *stop) => return Ok(()),
    };
    facts.send_modify(|facts| facts.node = Some(node.clone()));
    let ports = Ports::choose(config.args.nat.nat_port_min..=config.args.nat.nat_port_max);
    let node_ports = config.args.services.node_port_range;
    if let Err(error) = ports::reserve(node_ports.first..=node_ports.last) {
        tracing::warn!(%error, "keeping node ports from the node's own sockets");
    }
    let (devices, datapath) = tokio::task::block_in_place(|| load(&config, &node, &ports))?;
    facts.send_modify(|facts| facts.devices = Some(devices.clone()));
    let mut writers = datapath.writers().context("reading the maps back")?;
    let own = AddressPair::first_of(node.addresses.iter().copied());
    let compute = Compute::new(
        &config.args.node_name,
        devices.internal_addresses.clone(),
        own,
        config.args.network.stack_cidrs.clone(),
        writers.policies.next_free_id(),
        writers.next_free_local_identity(),
        compute::Rules {
            labels: Arc::new(config.args.rules.identity_labels.clone()),
            awaits_namespaces: config.args.manifests.is_none(),
            believes_any_address: config.args.rules.believe_any_address,
            rejects: config.args.rules.deny_response == args::DenyResponse::Reject,
            services: config.args.services.defaults(),
        },
    );
    let patience = Duration::from_secs(config.args.rules.host_policy_confirm_seconds.into());
    let confirming = Arc::new(Confirming::open(&config.args.state_dir, patience));
    let (compute, host_decided) = (compute.confirmed_by(confirming.clone()), confirming.decided());
    tokio::spawn(confirming.run(tables.clone(), known.telemetry.parts().clone()));
    let local = local::Follow {
        tables: tables.clone(),
        node: node.clone(),
        internal: devices.internal_addresses.clone(),
        names: config.args.network.device.clone(),
    };
    let local = local.start().context("listing the node's addresses and devices")?;
    sinks::bring_up(&datapath, &mut writers.devices, &own, &local.devices.snapshot())
        .context("attaching to the network devices")?;
    if config.args.services.announce {
        let lead = lead::Lead::new(
            (&config.args.node_name, lease),
            (tables.clone(), local.clone()),
            board,
            writers.announced.take().context("the writer of what is announced")?,
            known.leaders.clone(),
            known.telemetry.parts().clone(),
        );
        let (stopping, hands_over) = (stopping.clone(), config.args.services.announce_hand_over);
        tokio::spawn(async move {
            lead.run(stopping, hands_over).await;
            drop(farewell);
        });
    }
    // Before policies are counted for the first time, or one that comes in between would be missed.
    let ipsec = ipsec::follow();
    let encryption = devices.encryption.clone();
    known.loaded(datapath.clone(), &writers.policies, ports, encryption.clone(), devices.mtu);
    let (keys, keys_changed) = watch::channel(0);
    tokio::spawn(rotation::run(encryption, keys, known.telemetry.parts().clone()));

    let events = KernelEvents::open(datapath.clone()).context("opening the ring buffer of events")?;
    flow::reader::start(events, known.recorder.clone(), names, stopping.clone())
        .context("starting the reader of events")?;
    let (published, to_publish) = watch::channel(None);
    let telling = publish::publish_endpoints(
        publisher.clone(),
        to_publish,
        tables.clone(),
        known.telemetry.parts().clone(),
    );
    tokio::spawn(telling);
    let (removed_backends, ended_backends) = mpsc::unbounded_channel();
    tokio::spawn(upkeep::end_stale_sockets(datapath.clone(), known.endpoints.clone(), ended_backends));
    tokio::spawn(upkeep::collect_garbage(datapath.clone()));
    tokio::spawn(upkeep::settle_pods(datapath.clone()));
    tokio::spawn(upkeep::give_memory_back());

    manager.work_off_deletes().await;
    manager.configure(&node.pod_cidrs, devices.mtu);
    let parts = known.telemetry.parts().clone();
    let restart = Restart::default();
    tokio::spawn(follow::follow(
        node.clone(),
        tables.clone(),
        known.endpoints.clone(),
        manager.clone(),
        parts.clone(),
        restart.clone(),
        config.args.state_dir.clone(),
    ));
    tokio::spawn(async move {
        if let Err(error) = manager.watch_deletes(stopping).await {
            tracing::error!(error = crate::error::chain(&error), "queued deletions wait for the next start");
        }
    });
    known.learned.load();
    tokio::spawn(known.learned.clone().keep(datapath.clone()));
    let envoy = config.args.judge.envoy();
    let proxy = match &envoy {
        Some(_) => proxy::Proxy::beside_envoy(writers.policies.rule_sets()),
        None => proxy::Proxy::default(),
    };
    let of_proxy = proxy::Options {
        datapath: datapath.clone(),
        state_dir: config.args.state_dir.clone(),
        mtu: devices.mtu,
        sets: writers.policies.rule_sets(),
        hears: Arc::new(layer7::Told { known: known.clone(), learned: known.learned.clone() }),
        parts: parts.clone(),
        denied: config.args.names.dns_denied,
        envoy,
    };
    tokio::spawn(questions::read(
        datapath.clone(),
        proxy.clone(),
        of_proxy.hears.clone(),
        config.args.names.dns_denied.code(),
    ));
    tokio::spawn(proxy::run(of_proxy, proxy.clone()));
    let limits = sinks::Limits { policy_rows: config.args.rules.policy_rows_max };
    let device_sink = DeviceSink::new(
        datapath.clone(),
        devices.clone(),
        config.args.network.tunnel_port,
        config.args.kernel.socket_lb,
        restart.clone(),
    );
    let drivers = sinks::Drivers { xdp: config.args.network.xdp, named: config.args.network.device.clone() };
    let encryption = encryption_sink(&config, &datapath, &devices, &restart)?;
    let (health, service_health) = watch::channel(health_ports::HealthOf::default());
    answer_load_balancers(&config, &known, service_health);
    let rounds = Rounds {
        health,
        tables,
        endpoints: known.endpoints.clone(),
        learned: known.learned.clone(),
        layer7: (writers.policies.rule_sets(), proxy.clone()),
        local,
        ipsec: ipsec.clone(),
        host_decided,
        keys_changed,
        compute,
        sinks: sinks::all(
            &datapath,
            writers,
            device_sink,
            encryption,
            (limits, proxy),
            (ipsec, attaching_node(&datapath, &devices, config.args.kernel.socket_lb), drivers),
            parts,
        )
        .context("ordering the sinks")?,
        datapath,
        kernel_news: netlink::kernel_news(endpoint::is_host_interface_name)?,
        heard: netlink::Heard::default(),
        compiling: sinks::Retry::default(),
        claims: publish::Claims::new(publisher),
        enforced,
        published,
        current: known.current.clone(),
        removed_backends,
        leaving: removed::Leaving::default(),
        telemetry: known.telemetry.clone(),
        this_node: NodeEndpoints {
            node: config.args.node_name.clone(),
            internal_addresses: if devices.overlay.is_some() {
                devices.internal_addresses
            } else {
                Vec::new()
            },
            endpoints: Vec::new(),
        },
        is_first: true,
        started: Instant::now(),
    };
    let offering = offer_pods(config, known.telemetry.clone());
    tokio::select! {
        () = rounds.run(programmed) => Ok(()),
        failed = offering => failed.context("offering the node's network to the runtime"),
        error = restart.serve() => Err(error),
    }
}

/// What tells the device that encrypts its peers.
fn encryption_sink(
    config: &Config,
    datapath: &Arc<Datapath>,
    devices: &Devices,
    restart: &Restart,
) -> Result<Option<sinks::Encryption>> {
    let Some(device) = &devices.encryption else { return Ok(None) };
    let args = &config.args;
    let sink = sinks::Encryption::new(
        device.clone(),
        datapath.clone(),
        args.encryption.encryption_strict,
        &args.state_dir,
        restart.clone(),
        sinks::SharedEncryption::default(),
    );
    sink.map(Some).context("reading whose keys were seen")
}

/// Begins to answer load balancers, as kube-proxy does.
fn answer_load_balancers(config: &Config, known: &Known, services: watch::Receiver<health_ports::HealthOf>) {
    let args = &config.args.services;
    let health = health_ports::NodeHealth {
        telemetry: known.telemetry.clone(),
        tables: known.tables.clone(),
        node: config.args.node_name.as_str().into(),
    };
    if let Some(address) = args.healthz_address.0 {
        tokio::spawn(health_ports::serve_proxy(address, health.clone()));
    }
    if let Some(address) = args.proxy_metrics_address.0 {
        tokio::spawn(health_ports::serve_proxy(address, health.clone()));
    }
    let addresses = args.node_port_addresses.clone();
    tokio::spawn(health_ports::serve_services(addresses, health, services));
}

/// Puts the plugin and, once pods can be connected, its configuration where the
/// container runtime looks; returns only if that does not work.
async fn offer_pods(config: Config, telemetry: Arc<Telemetry>) -> Result<()> {
    let args = &config.args;
    if let (Some(binaries), Some(configurations)) = (&args.cni.cni_bin_dir, &args.cni.cni_config_dir) {
        let directories =
            install::Directories { binaries: binaries.clone(), configurations: configurations.clone() };
        install::install_binary(&directories)?;
        telemetry.ready().wait().await;
        install::write_configuration(
            &directories,
            &install::Configuration {
                socket: &args.socket,
                state_dir: &args.state_dir,
                is_exclusive: args.cni.cni_exclusive,
            },
        )?;
    }
    std::future::pending().await
}

/// Loads everything, and attaches everything but the pods' programs, which the rounds attach. A former
/// agent's programs stay until the first round replaces all of them at once.
fn load(config: &Config, node: &Node, ports: &Ports) -> Result<(Devices, Arc<Datapath>)> {
    let devices = node::prepare(config, node)?;
    let secret = secret::of(&config.args.state_dir)?;
    let options = options(config, &devices, ports, secret);
    let datapath = Datapath::load(&options).context("loading the datapath")?;
    if !datapath.is_succeeding() {
        attach_node(&datapath, &devices, config.args.kernel.socket_lb)?;
    }
    if devices.vxlan.is_none()
        && netlink::delete_link(OVERLAY_DEVICE).context("removing the tunnel device")?
    {
        tracing::info!(device = OVERLAY_DEVICE, "removed the tunnel device: routing is native now");
    }
    let zombies = datapath.collect_zombie_links().context("collecting links of devices that are gone")?;
    tracing::info!(node = node.name, mtu = devices.mtu, zombies, "loaded the datapath");
    Ok((devices, Arc::new(datapath)))
}

/// Attaches the programs of the node's own devices, and of sockets if they translate services.
fn attach_node(datapath: &Datapath, devices: &Devices, socket_lb: bool) -> Result<()> {
    if let Some(overlay) = devices.vxlan {
        datapath.attach_overlay(overlay).context("attaching to the tunnel device")?;
    }
    if let Some(device) = &devices.encryption {
        for ifindex in device.ifindices() {
            datapath.attach_encrypted(ifindex).context("attaching to the device that encrypts")?;
        }
    }
    if let Some([_, comes_out]) = devices.wait {
        datapath.attach_wait(comes_out).context("attaching to the device of waiting fragments")?;
    }
    if let Some([_, comes_out]) = devices.limit {
        datapath.attach_limit(comes_out)?;
    }
    if socket_lb {
        datapath.attach_sockets().context("attaching to sockets")
    } else {
        datapath.detach_sockets().context("detaching from sockets")
    }
}

fn attaching_node(datapath: &Arc<Datapath>, devices: &Devices, socket_lb: bool) -> sinks::AttachNode {
    let (datapath, devices) = (datapath.clone(), devices.clone());
    Box::new(move || attach_node(&datapath, &devices, socket_lb))
}

fn options(config: &Config, devices: &Devices, ports: &Ports, secret: [u64; 2]) -> Options {
    let args = &config.args;
    Options {
        pins: config.pins.clone(),
        cgroup_root: args.kernel.cgroup_root.clone(),
        attach: args.kernel.attach,
        map_sizes: args.maps.sizes(),
        settings: Settings {
            secret,
            netns_cookie: netlink::namespace_cookie(),
            tunnel_ifindex: devices.overlay,
            gateway_ifindex: devices.vxlan,
            encrypt_ifindex: devices.encryption.as_ref().map(|device| device.ifindices()[0]),
            encrypt_second: devices.encryption.as_ref().map(|device| device.ifindices()[1]),
            encrypt_strict: args.encryption.encryption_strict,
            dns_denied: args.names.dns_denied.code(),
            path_mtu: devices.mtu,
            wait_ifindex: devices.wait.map(|[given, _]| given),
            limit_ifindex: devices.limit.map(|[given, _]| given),
            tunnel_port: args.network.tunnel_port,
            flow_report: args.flows.report_every(),
            nat_ports: ports.range.clone(),
            masquerade_ipv4: args.nat.masquerade,
            masquerade_ipv6: args.nat.masquerade,
            flow_events: args.flows.flow_events,
            socket_lb: args.kernel.socket_lb,
            tunnel_direct: args.network.tunnel_direct,
            mark_mask: args.kernel.mark_mask.0,
            quotas: args.quotas.quotas(),
            maglev_size: args.services.maglev_table_size,
            ..Settings::default()
        },
    }
}
