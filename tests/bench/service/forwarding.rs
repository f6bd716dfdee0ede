//! Node ports from outside: packets that a node passes on to another node's pod in a second of a processor.
//!
//! A node has one wire, at whose other end the client is, and the node that has the pod. Frames of one running flow
//! are made at that end by BPF_F_TEST_XDP_LIVE_FRAMES, go over the wire, are translated, come back over the wire, and
//! are counted and dropped. All of it is on one processor: the rate is the inverse of what a packet costs, with the
//! same making, wire and dropping for all. What a driver sends (XDP) crosses the wire as a frame, all else as a
//! packet.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, ObjectBuilder, ProgramInput};
use serde_json::{Value, json};
use weir::kube::crd::{Endpoint, Identity, IdentitySpec, NodeEndpoints, NodeEndpointsSpec};
use weir::model::IdentityLabels;

use super::kube_proxy::KubeProxy;
use crate::cluster::world::World;
use crate::frame::udp;
use crate::lab::{Lab, Setup, Space, node_addresses, pod_cidrs, wait_for};
use crate::load::{median, pin};
use crate::row::Row;
use crate::world::load_test_program;

/// Frames of one sample, and how often each path is measured.
const FRAMES: u32 = 100_000;
const ROUNDS: usize = 21;
/// Of the running flow: where the client is, what it asks, and who serves.
const CLIENT: (IpAddr, u16) = (IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7)), 40000);
const NODE_PORTS: [(&str, u16); 2] = [("snat", 30053), ("dsr", 30054)];
const BACKEND: &str = "10.1.2.5";
const BACKEND_PORT: u16 = 53;
/// Of the node's end of the wire, and of the other end.
const MACS: [[u8; 6]; 2] = [[0x0a, 0, 0, 0, 0x10, 1], [0x0a, 0, 0, 0, 0x10, 2]];
const LIVE_FRAMES: u32 = 1 << 1;
const NAMESPACE: &str = "default";

/// Measures every way.
pub fn rows() -> Result<Vec<Row>> {
    pin()?;
    let world = World::start("the section node_port", 1)?;
    let theirs = KubeProxyNode::start(&world)?;
    let ours = WeirNode::start(false)?;
    let early = WeirNode::start(true)?;
    let paths = [
        ("nftables", &theirs.wire, NODE_PORTS[0].1),
        ("snat", &ours.wire, NODE_PORTS[0].1),
        ("again", &ours.wire, NODE_PORTS[0].1),
        ("dsr", &ours.wire, NODE_PORTS[1].1),
        ("xdp", &early.wire, NODE_PORTS[0].1),
    ];
    let mut samples = vec![Vec::new(); paths.len()];
    for (name, wire, port) in &paths {
        wait_for(&format!("packets to node port {port} by {name}"), || Ok(wire.sample(*port, 64)?.1 > 0))?;
    }
    for round in 0..=ROUNDS {
        for turn in 0..paths.len() {
            let index = (turn + round) % paths.len();
            let (name, wire, port) = &paths[index];
            let (rate, arrived) = wire.sample(*port, FRAMES)?;
            ensure!(arrived >= u64::from(FRAMES) * 9 / 10, "{name}: {arrived} of {FRAMES} packets came back");
            // The first round warms up.
            if round > 0 {
                samples[index].push(rate);
            }
        }
    }
    let of =
        |name: &str| paths.iter().position(|path| path.0 == name).map_or(&[][..], |index| &samples[index]);
    let row = |name: &str, against: &str| {
        let (one, other) = (of(name), of(against));
        let ratios = one.iter().zip(other).map(|(one, other)| one / other).collect();
        let middle = |samples: &[f64]| median(samples.to_vec());
        Row::new(format!("node_port/{name}/vs_{against}"), "packets/cpu-s", middle(one))
            .against(middle(other), Some(median(ratios)))
    };
    let noise = (row("again", "snat").ratio.unwrap_or(1.0) - 1.0).abs();
    Ok(vec![
        row("snat", "nftables").noise(noise).at_least(1.0),
        row("dsr", "nftables").noise(noise).at_least(1.0),
        Row { row: "node_port/xdp/vs_tc".to_owned(), ..row("xdp", "snat").noise(noise).at_least(1.0) },
        row("xdp", "nftables").noise(noise),
        Row::skipped("node_port/snat/vs_ipvs", "packets/cpu-s", "this kernel has no IPVS (CONFIG_IP_VS)"),
    ])
}

/// A wire, and the end at which the node is not.
struct Wire {
    outside: Space,
    object: PathBuf,
    arrived: MapHandle,
    _links: Vec<Link>,
}

impl Wire {
    /// Puts `eth0` of `node` on a wire, in the place of the device of that name. Where its driver is to send, the
    /// other end takes frames; else that end takes packets, and the node's driver lets them pass.
    fn plug(node: &Space, directory: &Path, is_xdp: bool) -> Result<Self> {
        let outside = Space::create(&format!("{}-end", node.name()), None)?;
        let [own, other] = MACS.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
        let [own_address, other_address] = [node_addresses(1)?[0], node_addresses(2)?[0]];
        // There may be none.
        let _ = node.configure(&["link delete eth0"]);
        node.configure(&[
            &format!(
                "link add eth0 address {own} type veth peer name end address {other} netns {}",
                outside.name()
            ),
            &format!("addr add {own_address}/24 dev eth0"),
            "link set eth0 up",
            &format!("neigh replace {other_address} lladdr {other} dev eth0 nud permanent"),
            &format!("route add default via {other_address}"),
        ])?;
        outside.configure(&[&format!("addr add {other_address}/24 dev end"), "link set end up"])?;
        std::fs::create_dir_all(directory)?;
        let object = directory.join(format!("{}.bpf.o", outside.name()));
        let arrived = outside.run({
            let object = object.clone();
            move || {
                let end = nix::net::if_::if_nametoindex("end")?;
                let define = format!("-DDEVICE={end}");
                let loaded = load_test_program("tests/bench/forward.bpf.c", &object, &[&define])?;
                let name = if is_xdp { "sink_frames" } else { "sink_packets" };
                let sink = loaded.progs_mut().find(|program| program.name() == name).context("a sink")?;
                let link = match is_xdp {
                    true => sink.attach_xdp(i32::try_from(end)?)?,
                    false => weir::datapath::attach_tcx(&sink, end)?,
                };
                let map = loaded.maps().find(|map| map.name() == "arrived").context("a map")?;
                Ok::<_, anyhow::Error>((MapHandle::try_from(&map)?, link))
            }
        })?;
        let mut links = vec![arrived.1];
        if !is_xdp {
            let object = object.clone();
            links.push(node.run(move || {
                let loaded = ObjectBuilder::default().open_file(object)?.load()?;
                let pass = loaded.progs_mut().find(|program| program.name() == "pass").context("pass")?;
                let own = i32::try_from(nix::net::if_::if_nametoindex("eth0")?)?;
                Ok::<_, anyhow::Error>(pass.attach_xdp(own)?)
            })?);
        }
        Ok(Self { outside, object, arrived: arrived.0, _links: links })
    }

    fn arrived(&self) -> Result<u64> {
        let row = self.arrived.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?.context("a row")?;
        Ok(u64::from_ne_bytes(row.as_slice().try_into()?))
    }

    /// Sends frames to a node port: packets that came back in a second, and how many did.
    fn sample(&self, port: u16, count: u32) -> Result<(f64, u64)> {
        let mut packet = udp(CLIENT, (node_addresses(1)?[0], port));
        packet.macs = (MACS[0], MACS[1]);
        let frame: String = packet.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["generate", &self.object.display().to_string(), &frame, &count.to_string()]);
        let before = self.arrived()?;
        let seconds: f64 = self.outside.command(command, "")?.trim().parse()?;
        let arrived = self.arrived()? - before;
        Ok((arrived as f64 / seconds, arrived))
    }
}

/// The child process of a sample: how many seconds it took to send the frame `count` times.
pub fn generate(object: &str, frame: &str, count: u32) -> Result<f64> {
    let bytes: Vec<u8> = (0..frame.len() / 2)
        .map(|at| u8::from_str_radix(&frame[2 * at..2 * at + 2], 16))
        .collect::<Result<_, _>>()?;
    let loaded = ObjectBuilder::default().open_file(object)?.load()?;
    let beginnings = loaded.maps().find(|map| map.name() == "beginnings").context("beginnings")?;
    let beginning = bytes.get(..beginnings.value_size() as usize).context("a frame that is too short")?;
    beginnings.update(&0_u32.to_ne_bytes(), beginning, MapFlags::ANY)?;
    let generate = loaded.progs_mut().find(|program| program.name() == "generate").context("generate")?;
    let input =
        ProgramInput { data_in: Some(&bytes), flags: LIVE_FRAMES, repeat: count, ..ProgramInput::default() };
    let began = Instant::now();
    generate.test_run(input).context("sending live frames")?;
    Ok(began.elapsed().as_secs_f64())
}

/// A Service of the type NodePort.
fn service((name, port): (&str, u16)) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": {"weir.dev/forwarding": name}},
        "spec": {"type": "NodePort", "ports": [
            {"name": "query", "protocol": "UDP", "port": BACKEND_PORT, "targetPort": BACKEND_PORT, "nodePort": port}]},
    })
}

fn slice((name, _): (&str, u16)) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{name}-1"), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "ports": [{"name": "query", "protocol": "UDP", "port": BACKEND_PORT}],
        "endpoints": [{"addresses": [BACKEND], "nodeName": "node2",
            "conditions": {"ready": true, "serving": true, "terminating": false}}],
    })
}

/// What the agent of the other node would publish of the pod that serves.
fn backend_objects() -> Result<[Value; 2]> {
    let labels = IdentityLabels {
        namespace: NAMESPACE.to_owned(),
        service_account: "default".to_owned(),
        ..IdentityLabels::default()
    };
    let identity = weir::identity::number(&labels, 0);
    let endpoint = Endpoint {
        namespace: NAMESPACE.to_owned(),
        name: "server".to_owned(),
        addresses: vec![BACKEND.to_owned()],
        identity: identity.0,
        workload: None,
        host_ports: Vec::new(),
    };
    let spec = NodeEndpointsSpec {
        node: "node2".to_owned(),
        internal_addresses: Vec::new(),
        endpoints: vec![endpoint],
    };
    Ok([
        serde_json::to_value(Identity::new(&identity.to_string(), IdentitySpec::from(&labels)))?,
        serde_json::to_value(NodeEndpoints::new("node2-0", spec))?,
    ])
}

struct WeirNode {
    wire: Wire,
    _lab: Lab,
}

impl WeirNode {
    fn start(is_xdp: bool) -> Result<Self> {
        let xdp: &[&str] = if is_xdp { &["--xdp", "native", "--device", "eth0"] } else { &[] };
        let agent_arguments = xdp.iter().map(|argument| (*argument).to_owned()).collect();
        let routing = "native".to_owned();
        let setup = Setup { routing, starts_agents: false, agent_arguments, ..Setup::default() };
        let lab = Lab::start(setup)?;
        lab.manifests().node("node2", &node_addresses(2)?, &pod_cidrs(2))?;
        for object in backend_objects()? {
            lab.manifests().write(&object)?;
        }
        for (number, port) in NODE_PORTS.into_iter().enumerate() {
            let mut object = service(port);
            object["spec"]["clusterIP"] = json!(format!("10.96.0.{}", 10 + number));
            lab.manifests().write(&object)?;
            lab.manifests().write(&slice(port))?;
        }
        let wire = Wire::plug(lab.node(1).space(), lab.directory(), is_xdp)?;
        lab.start_agents()?;
        Ok(Self { wire, _lab: lab })
    }
}

struct KubeProxyNode {
    wire: Wire,
    _proxy: KubeProxy,
}

impl KubeProxyNode {
    fn start(world: &World) -> Result<Self> {
        for port in NODE_PORTS {
            let text =
                format!("{}\n---\n{}", weir::yaml::write(&service(port))?, weir::yaml::write(&slice(port))?);
            world.runtime.block_on(world.plane.apply(&text))?;
        }
        let client: IpAddr = "10.1.1.9".parse()?;
        let proxy = KubeProxy::start(world, "nftables", world.lab.node(1).name(), &[client])?;
        let wire = Wire::plug(&proxy.node, world.lab.directory(), false)?;
        proxy.node.configure(&[&format!("route add {} via {}", pod_cidrs(2)[0], node_addresses(2)?[0])])?;
        Ok(Self { wire, _proxy: proxy })
    }
}
