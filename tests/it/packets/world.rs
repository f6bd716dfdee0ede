//! The world that the packets live in: two pods of this node, one that is not
//! ready, one of another node, the nodes, somebody outside, and services; and
//! the real programs over private maps, run by BPF_PROG_TEST_RUN in a network
//! namespace of the test's own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, Object, ObjectBuilder, ProgramInput, ProgramMut};
use nix::sched::{CloneFlags, unshare};
use weir::datapath::abi::{
    Address, Backend, Connection, ConnectionKey, Ended, Endpoint, Event, L7Flow, L7FlowKey, NodeState,
    OwnAddresses, PolicyPeer, PolicyPeerKey, PolicyRule, PolicyRuleKey, Prefix, PrefixKey, ProxyDevice,
    Service, ServiceKey, Slot, SlotKey,
};
use weir::datapath::abi::{Fragment, Nat, NatKey, Plain};
use weir::datapath::types::{
    address_flags, direction as way, endpoint_flags, node_flags, policy_bits, policy_verdict, prefix_flags,
    service_flags, service_kind, service_scope,
};
use weir::datapath::{Datapath, EventReader, GarbageReport, MapSizes, Settings, addr_of};

use super::frame::Packet;

/// TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT.
pub const PASS: u32 = 0;
/// The packet is gone.
pub const SHOT: u32 = 2;
/// The packet goes out of another device.
pub const REDIRECT: u32 = 7;

/// `MARK_LEAVE`, under the default mask.
pub const MARK: u32 = 0x10;
/// `MARK_ANSWER`.
pub const ANSWER: u32 = 0x20;

/// The devices that lead out: where packets are, and what tests may make.
const NETWORK: [u32; 3] = [1, 2, 3];

/// A direction of policy.
pub const INGRESS: u32 = way::DIRECTION_INGRESS.0;
/// A direction of policy.
pub const EGRESS: u32 = way::DIRECTION_EGRESS.0;

/// Pods and the node's own sockets ask.
pub const INTERNAL: u8 = service_scope::SCOPE_INTERNAL.0 as u8;
/// Packets from the network ask.
pub const EXTERNAL: u8 = service_scope::SCOPE_EXTERNAL.0 as u8;

/// Identities.
pub const A: u32 = 301;
/// Identities.
pub const B: u32 = 302;
/// Identities.
pub const R: u32 = 303;
/// Identities.
pub const OUTSIDE: u32 = 2;

/// Who is where, in one family.
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    /// Pod of this node, endpoint 1.
    pub a: IpAddr,
    /// Pod of this node, endpoint 2.
    pub b: IpAddr,
    /// Pod of this node, endpoint 3, not ready.
    pub unready: IpAddr,
    /// Pod of this node, endpoint 4, on another device.
    pub elsewhere: IpAddr,
    /// Pod of the other node.
    pub remote: IpAddr,
    /// In the other node's pod CIDR; nobody has it.
    pub nobody: IpAddr,
    /// This node.
    pub node: IpAddr,
    /// The other node.
    pub other_node: IpAddr,
    /// One more node, without pods.
    pub third_node: IpAddr,
    /// Outside.
    pub world: IpAddr,
    /// Service: TCP and UDP 80 to b 8080; TCP 81 to a 8081; TCP 82 to nobody.
    pub service: IpAddr,
    /// Stands for a pod that reaches itself.
    pub loopback: IpAddr,
}

fn ip(address: &str) -> IpAddr {
    address.parse().expect("an address of the table")
}

/// Both families' casts.
pub fn casts() -> [Cast; 2] {
    let cast = |v: [&str; 12]| {
        let [
            a,
            b,
            unready,
            elsewhere,
            remote,
            nobody,
            node,
            other_node,
            third_node,
            world,
            service,
            loopback,
        ] = v.map(ip);
        Cast {
            a,
            b,
            unready,
            elsewhere,
            remote,
            nobody,
            node,
            other_node,
            third_node,
            world,
            service,
            loopback,
        }
    };
    [
        cast([
            "10.1.0.1",
            "10.1.0.2",
            "10.1.0.3",
            "10.1.0.4",
            "10.2.0.1",
            "10.2.0.99",
            "192.0.2.1",
            "192.0.2.2",
            "192.0.2.3",
            "198.51.100.9",
            "10.96.0.1",
            "169.254.42.1",
        ]),
        cast([
            "fd01::1",
            "fd01::2",
            "fd01::3",
            "fd01::4",
            "fd02::1",
            "fd02::99",
            "2001:db8:1::1",
            "2001:db8:1::2",
            "2001:db8:1::3",
            "2001:db8:ffff::9",
            "fd96::1",
            "fd57:6569:7200::2a:1",
        ]),
    ]
}

/// How a packet arrives, beside its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrival {
    /// skb->mark.
    pub mark: u32,
    /// Sent by the node's own stack: came from no device.
    pub is_from_stack: bool,
    /// Came by the tunnel: from this node, with this VNI.
    pub tunnel: Option<(Option<IpAddr>, u32)>,
    /// The outer packet was for this address; `None`: the node's.
    pub tunnel_to: Option<IpAddr>,
    /// The frame is addressed to another machine.
    pub is_for_another_machine: bool,
    /// Has this VLAN tag.
    pub vlan: u16,
    /// Was merged of, or will be cut into, packets with so many bytes each; 0: it was not.
    pub gso_size: u32,
}

/// What became of a packet.
#[derive(Debug)]
pub struct Outcome {
    /// What the program answered.
    pub action: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// skb->mark afterwards.
    pub mark: u32,
    /// What it reported.
    pub events: Vec<Event>,
    /// What it counted: reason and direction.
    pub counted: Vec<(u8, u8)>,
}

/// The programs and the world in their maps.
pub struct World {
    /// The programs and their maps.
    pub datapath: Arc<Datapath>,
    events: EventReader,
    backends: RefCell<BTreeMap<(IpAddr, u16, u8), u32>>,
    arrive: Object,
    _directory: tempfile::TempDir,
}

/// The settings of the tests: this node of the cast, tunnels unless told otherwise.
pub fn settings() -> Settings {
    Settings { tunnel_ifindex: Some(1), nat_ports: 20000..=20003, ..Settings::default() }
}

/// Runs `work` with a fresh world, in a network namespace of its own.
pub fn within(
    settings: Settings,
    work: impl FnOnce(&mut World) -> Result<()> + Send + 'static,
) -> Result<()> {
    within_empty(settings, |world| {
        world.populate()?;
        work(world)
    })
}

/// Runs `work` in both families, each with a fresh world.
pub fn in_both_families(work: impl Fn(&mut World, Cast) -> Result<()> + Copy + Send + 'static) -> Result<()> {
    in_both_families_with(settings(), work)
}

/// The same with other settings.
pub fn in_both_families_with(
    settings: Settings,
    work: impl Fn(&mut World, Cast) -> Result<()> + Copy + Send + 'static,
) -> Result<()> {
    for cast in casts() {
        within(settings.clone(), move |world| work(world, cast))?;
    }
    Ok(())
}

/// Runs `work` with the programs over empty maps, in a network namespace of its own.
pub fn within_empty(
    settings: Settings,
    work: impl FnOnce(&mut World) -> Result<()> + Send + 'static,
) -> Result<()> {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
        work(&mut World::new(&settings)?)
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl World {
    fn new(settings: &Settings) -> Result<Self> {
        // Room for two rows a port, and for what an LRU map cannot use.
        let nat = u32::try_from(settings.nat_ports.len())? * 4;
        let sizes = MapSizes::default().with("connections", 4096).with("nat", nat.max(4096));
        let datapath = Arc::new(Datapath::open_private(settings, &sizes)?);
        let events = datapath.events()?;
        let directory = tempfile::tempdir()?;
        let arrive = load_arrive(directory.path(), datapath.features().has_tcx)?;
        Ok(Self { datapath, events, backends: RefCell::default(), arrive, _directory: directory })
    }

    /// The addresses of this node, and the devices that lead out.
    pub fn be_this_node(&self) -> Result<()> {
        let [four, six] = casts();
        let own = OwnAddresses { ipv4: addr_of(four.node), ipv6: addr_of(six.node) };
        self.put("this_node", &0_u32, &own)?;
        for ifindex in NETWORK {
            self.put("devices", &ifindex, &own)?;
        }
        Ok(())
    }

    fn populate(&self) -> Result<()> {
        let [four, six] = casts();
        let pods = [
            (1_u32, A, four.a, six.a),
            (2, B, four.b, six.b),
            (3, 304, four.unready, six.unready),
            (4, 305, four.elsewhere, six.elsewhere),
        ];
        for (id, identity, ipv4, ipv6) in pods {
            let row = Endpoint {
                epoch: 1,
                ipv4: addr_of(ipv4),
                ipv6: addr_of(ipv6),
                ifindex: if id == 4 { 77 } else { 1 },
                identity,
                flags: if id == 3 { 0 } else { endpoint_flags::ENDPOINT_READY.0 as u16 },
                ..Endpoint::default()
            };
            self.put("endpoints", &id, &row)?;
            for address in [ipv4, ipv6] {
                self.address(address, identity, id as u16, 0b101, None)?;
            }
        }
        self.be_this_node()?;
        for cast in [four, six] {
            let (pod, node) = (address_flags::ADDRESS_POD.0 as u16, address_flags::ADDRESS_NODE.0 as u16);
            self.address(cast.remote, R, 0, pod, Some(cast.other_node))?;
            self.address(cast.node, 1, 0, node | address_flags::ADDRESS_LOCAL.0 as u16, None)?;
            self.address(cast.other_node, 6, 0, node, Some(cast.other_node))?;
            self.address(cast.third_node, 6, 0, node, Some(cast.third_node))?;
        }
        // In the order of casts: this node's pod CIDRs, the other node's.
        for (prefix, length, node) in [
            ("10.1.0.0", 96 + 16, None),
            ("10.2.0.0", 96 + 16, Some(four.other_node)),
            ("fd01::", 16, None),
            ("fd02::", 16, Some(six.other_node)),
        ] {
            self.prefix((ip(prefix), length), prefix_flags::PREFIX_POD_CIDR, node)?;
        }
        for (number, cast) in [four, six].into_iter().enumerate() {
            let first = number as u32 * 10;
            self.service((cast.service, 80, 6), first + 1, 1, &[(cast.b, 8080)])?;
            self.service((cast.service, 80, 17), first + 2, 1, &[(cast.b, 8080)])?;
            self.service((cast.service, 81, 6), first + 3, 1, &[(cast.a, 8081)])?;
            self.service((cast.service, 82, 6), first + 4, 1, &[])?;
            self.service((cast.service, 82, 17), first + 5, 1, &[])?;
            self.service((cast.service, 0, 0), first + 6, 1, &[])?;
        }
        Ok(())
    }

    /// Back to the beginning: no policy, no flows, everybody known.
    pub fn reset(&self) -> Result<()> {
        self.forget_flows()?;
        self.forget_rules()?;
        self.populate()
    }

    fn put<K: Plain, V: Plain>(&self, map: &str, key: &K, value: &V) -> Result<()> {
        Ok(self.datapath.typed::<K, V>(map)?.insert(key, value)?)
    }

    /// Says who has an address.
    pub fn address(
        &self,
        address: IpAddr,
        identity: u32,
        endpoint_id: u16,
        flags: u16,
        node: Option<IpAddr>,
    ) -> Result<()> {
        let node = node.map(addr_of).unwrap_or_default();
        self.put("addresses", &addr_of(address), &Address { node, identity, endpoint_id, flags })
    }

    /// Says what lives in a prefix, whose length counts from IPv6's first bit.
    pub fn prefix(
        &self,
        (address, prefix_length): (IpAddr, u32),
        flags: prefix_flags,
        node: Option<IpAddr>,
    ) -> Result<()> {
        let key = PrefixKey { prefix_length, addr: addr_of(address) };
        let node = node.map(addr_of).unwrap_or_default();
        self.put("prefixes", &key, &Prefix { node, identity: OUTSIDE, flags: flags.0 })
    }

    /// Says that nobody has an address.
    pub fn forget_address(&self, address: IpAddr) -> Result<()> {
        let map = self.datapath.typed::<_, Address>("addresses")?;
        ensure!(map.remove(&addr_of(address))?, "nobody has {address}");
        Ok(())
    }

    /// Writes a service for pods with its backends as one generation.
    pub fn service(
        &self,
        frontend: (IpAddr, u16, u8),
        service_id: u32,
        generation: u32,
        backends: &[(IpAddr, u16)],
    ) -> Result<()> {
        let flags = if frontend.1 == 0 { service_flags::SERVICE_WILDCARD.0 as u16 } else { 0 };
        let row = Service { service_id, generation, flags, ..Service::default() };
        self.frontend(frontend, INTERNAL, row, backends)
    }

    /// Writes a row of `services` with its backends.
    pub fn frontend(
        &self,
        (address, port, protocol): (IpAddr, u16, u8),
        scope: u8,
        row: Service,
        backends: &[(IpAddr, u16)],
    ) -> Result<()> {
        let mut backends = backends.to_vec();
        backends.sort();
        let Service { service_id, generation, .. } = row;
        for (slot, backend) in backends.iter().enumerate() {
            let key = SlotKey { service_id, generation, slot: slot as u32 };
            self.put("slots", &key, &Slot { backend: self.backend(*backend, protocol)?, service_id })?;
        }
        let key = ServiceKey { addr: addr_of(address), port: port.to_be(), protocol, scope };
        self.put("services", &key, &Service { backend_count: backends.len() as u32, ..row })
    }

    /// The id of a backend.
    pub fn backend(&self, (address, port): (IpAddr, u16), protocol: u8) -> Result<u32> {
        let mut ids = self.backends.borrow_mut();
        let next = ids.len() as u32 + 1;
        let id = *ids.entry((address, port, protocol)).or_insert(next);
        let row = Backend { addr: addr_of(address), id, port: port.to_be(), protocol, ..Backend::default() };
        self.put("backends", &id, &row)?;
        Ok(id)
    }

    /// A service's port for clients outside.
    pub fn outside(
        &self,
        frontend: (IpAddr, u16, u8),
        service_id: u32,
        generation: u32,
        backends: &[(IpAddr, u16)],
    ) -> Result<()> {
        let kind = service_kind::SERVICE_NODE_PORT.0 as u8;
        let row = Service { service_id, generation, kind, ..Service::default() };
        self.frontend(frontend, EXTERNAL, row, backends)
    }

    /// Gives a port of this node to a pod.
    pub fn host_port(&self, frontend: (IpAddr, u16, u8), service_id: u32, pod: (IpAddr, u16)) -> Result<()> {
        let loopback = if frontend.0.is_loopback() { service_flags::SERVICE_LOOPBACK.0 as u16 } else { 0 };
        let kind = service_kind::SERVICE_HOST_PORT.0 as u8;
        let row = Service { service_id, generation: 1, flags: loopback, kind, ..Service::default() };
        self.frontend(frontend, INTERNAL, row, &[pod])?;
        self.frontend(frontend, EXTERNAL, Service { service_id: service_id + 10_000, ..row }, &[pod])
    }

    /// Changes an endpoint's row and raises its epoch.
    pub fn change_endpoint(&self, id: u32, change: impl FnOnce(&mut Endpoint)) -> Result<()> {
        let map = self.datapath.typed::<u32, Endpoint>("endpoints")?;
        let mut row = map.get(&id)?.context("no such endpoint")?;
        change(&mut row);
        row.epoch += 1;
        Ok(map.insert(&id, &row)?)
    }

    /// Puts an endpoint under a policy of its own, number 10 + id, for these directions.
    pub fn enforce(&self, id: u32, directions: &[u32]) -> Result<()> {
        self.change_endpoint(id, |row| {
            row.policy = if directions.is_empty() { 0 } else { 10 + id };
            for direction in directions {
                row.policy |= match *direction {
                    INGRESS => policy_bits::POLICY_ENFORCE_INGRESS.0,
                    _ => policy_bits::POLICY_ENFORCE_EGRESS.0,
                };
            }
        })
    }

    /// Adds a rule to an endpoint's policy: this peer, protocol (0: any), port (0: any).
    pub fn rule(
        &self,
        id: u32,
        direction: u32,
        peer: u32,
        what: (u8, u16),
        verdict: policy_verdict,
    ) -> Result<()> {
        self.rule_of(id, direction, peer, what, (verdict, 0))
    }

    fn rule_of(
        &self,
        id: u32,
        direction: u32,
        peer: u32,
        (protocol, port): (u8, u16),
        (verdict, l7_set): (policy_verdict, u16),
    ) -> Result<()> {
        let policy_id = 10 + id;
        // Each peer is a class of its own here.
        let key = PolicyPeerKey { policy_id, identity: peer, direction };
        self.put("policy_peers", &key, &PolicyPeer { class: peer })?;
        let key = PolicyRuleKey {
            prefix_length: match (protocol, port) {
                (0, _) => 72,
                (_, 0) => 80,
                _ => 96,
            },
            policy_id: policy_id.to_be(),
            class: peer.to_be(),
            direction: direction as u8,
            protocol,
            port: port.to_be(),
        };
        let rule_id = 1000 + u32::from(port);
        let row = PolicyRule { rule_id, verdict: verdict.0 as u8, l7_set, ..PolicyRule::default() };
        self.put("policy_rules", &key, &row)
    }

    /// A rule that allows what the proxy lets pass by the rules of `l7_set`.
    pub fn leave_to_proxy(
        &self,
        id: u32,
        direction: u32,
        peer: u32,
        what: (u8, u16),
        l7_set: u16,
    ) -> Result<()> {
        self.rule_of(id, direction, peer, what, (policy_verdict::POLICY_ALLOW, l7_set))
    }

    /// Where the proxy is; `None`: there is none.
    pub fn proxy(&self, ifindex: Option<u32>) -> Result<()> {
        let ifindex = ifindex.unwrap_or(0);
        let row = ProxyDevice { netns_cookie: 0, ifindex, mac: [2; 6], pad: [0; 6] };
        self.put("proxy", &0_u32, &row)
    }

    /// Of what the proxy is told.
    pub fn l7_flows(&self) -> Result<Vec<(L7FlowKey, L7Flow)>> {
        let mut rows = Vec::new();
        self.datapath.typed::<L7FlowKey, L7Flow>("l7_flows")?.for_each(|key, row| rows.push((key, row)))?;
        Ok(rows)
    }

    /// The one flow that the proxy is told of has come to the listener of these rules, as `proxy_listen` says it.
    pub fn listens(&self, l7_set: u16) -> Result<()> {
        let (key, row) = self.l7_flows()?.into_iter().next().context("the proxy is told of a flow")?;
        self.put("l7_flows", &key, &L7Flow { listener_set: l7_set, alias: 7, ..row })
    }

    /// How many flows have a listener of other rules than those of now.
    pub fn flows_of_other_rules(&self) -> Result<usize> {
        Ok(self.datapath.flows_of_other_rules()?.len())
    }

    /// A rule that allows.
    pub fn allow(&self, id: u32, direction: u32, peer: u32, what: (u8, u16)) -> Result<()> {
        self.rule(id, direction, peer, what, policy_verdict::POLICY_ALLOW)
    }

    /// Takes every rule away, and every peer.
    pub fn forget_rules(&self) -> Result<()> {
        self.datapath.typed::<PolicyRuleKey, PolicyRule>("policy_rules")?.sync(&Default::default())?;
        self.datapath.typed::<PolicyPeerKey, PolicyPeer>("policy_peers")?.sync(&Default::default())?;
        Ok(())
    }

    /// Whether packets may go past the node's stack.
    pub fn past_stack(&self, may: bool) -> Result<()> {
        let map = self.datapath.typed::<u32, NodeState>("node_state")?;
        let mut row = map.get(&0)?.context("an array has every row")?;
        row.flags = if may { node_flags::NODE_PAST_STACK.0 } else { 0 };
        Ok(map.insert(&0, &row)?)
    }

    /// As after the identity of an address has changed.
    pub fn raise_address_epoch(&self) -> Result<()> {
        let map = self.datapath.typed::<u32, NodeState>("node_state")?;
        let mut row = map.get(&0)?.context("an array has every row")?;
        row.address_epoch += 1;
        Ok(map.insert(&0, &row)?)
    }

    /// Forgets every flow.
    pub fn forget_flows(&self) -> Result<()> {
        self.datapath.typed::<ConnectionKey, Connection>("connections")?.sync(&Default::default())?;
        self.change_ended(|row| *row = Ended::default())?;
        self.datapath.typed::<NatKey, Nat>("nat")?.sync(&Default::default())?;
        self.datapath.typed::<L7FlowKey, L7Flow>("l7_flows")?.sync(&Default::default())?;
        self.forget_fragments()?;
        Ok(())
    }

    /// Every first fragment that is known.
    pub fn fragments(&self) -> Result<Vec<Fragment>> {
        let rows = self.datapath.typed::<u32, Fragment>("fragments")?.rows()?;
        Ok(rows.into_values().filter(|row| row.check != 0).collect())
    }

    /// Forgets every first fragment.
    pub fn forget_fragments(&self) -> Result<()> {
        let map = self.datapath.typed::<u32, Fragment>("fragments")?;
        for (slot, _) in map.rows()?.into_iter().filter(|(_, row)| row.check != 0) {
            map.insert(&slot.0, &Fragment::default())?;
        }
        Ok(())
    }

    /// Forgets the connections of a kind.
    pub fn forget_flows_of_kind(&self, kind: u8) -> Result<()> {
        let map = self.datapath.typed::<ConnectionKey, Connection>("connections")?;
        let mut rows = map.rows()?;
        rows.retain(|key, _| key.0.kind != kind);
        map.sync(&rows)?;
        Ok(())
    }

    /// Every connection of a kind, with its key.
    pub fn connections(&self, kind: u8) -> Result<Vec<(ConnectionKey, Connection)>> {
        let rows = self.datapath.typed::<ConnectionKey, Connection>("connections")?.rows()?;
        Ok(rows.into_iter().map(|(key, row)| (key.0, row)).filter(|(key, _)| key.kind == kind).collect())
    }

    /// Changes what is written down of every connection that has ended.
    pub fn change_ended(&self, change: impl Fn(&mut Ended)) -> Result<()> {
        let map = self.datapath.typed::<u32, Ended>("ended")?;
        for (slot, mut row) in map.rows()?.into_iter().filter(|(_, row)| row.check != 0) {
            change(&mut row);
            map.insert(&slot.0, &row)?;
        }
        Ok(())
    }

    /// Changes every mapping of a masqueraded flow.
    pub fn change_mappings(&self, change: impl Fn(&mut Nat)) -> Result<()> {
        let map = self.datapath.typed::<NatKey, Nat>("nat")?;
        for (key, mut row) in map.rows()? {
            change(&mut row);
            map.insert(&key.0, &row)?;
        }
        Ok(())
    }

    /// Changes every connection.
    pub fn change_connections(&self, change: impl Fn(&ConnectionKey, &mut Connection)) -> Result<()> {
        let map = self.datapath.typed::<ConnectionKey, Connection>("connections")?;
        for (key, mut row) in map.rows()? {
            change(&key.0, &mut row);
            map.insert(&key.0, &row)?;
        }
        Ok(())
    }

    /// Collects what has expired; the report, and what was reported.
    pub fn collect_garbage(&mut self) -> Result<(GarbageReport, Vec<Event>)> {
        self.events.consume(|_| {})?;
        let report = self.datapath.collect_garbage()?;
        let mut events = Vec::new();
        self.events.consume(|event| events.push(*event))?;
        Ok((report, events))
    }

    /// Runs a program on a packet.
    pub fn send(&mut self, program: &str, packet: &Packet) -> Result<Outcome> {
        self.send_bytes(program, &packet.bytes(), Arrival::default())
    }

    /// Runs a program on a packet that arrives in some way.
    pub fn send_as(&mut self, program: &str, packet: &Packet, arrival: Arrival) -> Result<Outcome> {
        self.send_bytes(program, &packet.bytes(), arrival)
    }

    /// Sends a frame by a device, as the node's stack does, but of no socket; it came by no device either.
    pub fn send_without_socket(&mut self, ifindex: u32, packet: &Packet) -> Result<Vec<(u8, u8)>> {
        let before = self.datapath.metrics()?;
        let mut row = [0_u8; ARRIVAL_BYTES];
        row[56..60].copy_from_slice(&ifindex.to_ne_bytes());
        self.set_for_arrive("arrivals", &row)?;
        let (mut context, bytes) = ([0; 192], packet.bytes());
        let output = self.helper("resend")?.test_run(ProgramInput {
            context_in: Some(&mut context),
            data_in: Some(&bytes),
            ..ProgramInput::default()
        });
        let output = output.context("running resend")?;
        // What the program on the device drops counts as sent.
        ensure!(output.return_value <= 2, "bpf_clone_redirect: {}", output.return_value as i32);
        let changed = self.datapath.metrics()?.into_iter().filter(|row| !before.contains(row));
        Ok(changed.map(|row| (row.reason, row.direction)).collect())
    }

    /// What runs a program on frames that arrive in one way, asking for nothing but the action and the mark.
    pub fn actor<'a>(
        &'a self,
        program: &'a str,
        arrival: Arrival,
    ) -> Result<impl Fn(&[u8]) -> Result<(u32, u32)> + 'a> {
        let needs_help = arrival.tunnel.is_some();
        if needs_help {
            self.prepare_arrival(program, arrival)?;
        }
        Ok(move |bytes: &[u8]| {
            let bytes = &addressed(program, bytes, arrival)[..];
            let (mut context, mut context_out) = ([0; 192], [0; 192]);
            context[36..40].copy_from_slice(&u32::from(!arrival.is_from_stack).to_ne_bytes());
            let program = if needs_help { self.helper("arrive")? } else { self.datapath.program(program)? };
            let output = program.test_run(ProgramInput {
                context_in: Some(&mut context),
                context_out: Some(&mut context_out),
                data_in: Some(bytes),
                ..ProgramInput::default()
            })?;
            let action = output.return_value;
            let mark = [context_out[8], context_out[9], context_out[10], context_out[11]];
            Ok((action, u32::from_ne_bytes(mark)))
        })
    }

    /// The action and the mark of a program on a packet, and nothing of what it counted and reported.
    pub fn act(&self, program: &str, packet: &Packet, arrival: Arrival) -> Result<(u32, u32)> {
        self.actor(program, arrival)?(&packet.bytes())
    }

    /// Runs a program on a frame many times.
    pub fn repeat(&self, program: &str, bytes: &[u8], repeat: u32) -> Result<()> {
        let mut context = [0; 192];
        context[36..40].copy_from_slice(&1_u32.to_ne_bytes());
        self.datapath.program(program)?.test_run(ProgramInput {
            context_in: Some(&mut context),
            data_in: Some(bytes),
            repeat,
            ..ProgramInput::default()
        })?;
        Ok(())
    }

    /// Calls `each` for everything that was reported.
    pub fn read_events(&mut self, each: impl FnMut(&Event)) -> Result<()> {
        self.events.consume(each)?;
        Ok(())
    }

    /// Reads what was reported and forgets it.
    pub fn forget_events(&mut self) -> Result<()> {
        self.events.consume(|_| {})?;
        Ok(())
    }

    /// A program of `arrive.bpf.c`.
    pub fn helper(&self, name: &str) -> Result<ProgramMut<'_>> {
        self.arrive.progs_mut().find(|program| program.name() == name).context("no such program")
    }

    /// Runs a program on a frame.
    pub fn send_bytes(&mut self, program: &str, bytes: &[u8], arrival: Arrival) -> Result<Outcome> {
        let before = self.datapath.metrics()?;
        self.forget_events()?;
        let sent = addressed(program, bytes, arrival);
        let mut context = [0; 192];
        context[8..12].copy_from_slice(&arrival.mark.to_ne_bytes());
        context[36..40].copy_from_slice(&u32::from(!arrival.is_from_stack).to_ne_bytes());
        context[176..180].copy_from_slice(&arrival.gso_size.to_ne_bytes());
        let (mut context_out, mut frame) = ([0; 192], vec![0; bytes.len() + 512]);
        let needs_help = arrival.tunnel.is_some() || arrival.vlan != 0;
        let program = if needs_help {
            self.prepare_arrival(program, arrival)?;
            self.helper("arrive")?
        } else {
            self.datapath.program(program)?
        };
        let output = program
            .test_run(ProgramInput {
                context_in: Some(&mut context),
                context_out: Some(&mut context_out),
                data_in: Some(&sent),
                data_out: Some(&mut frame),
                ..ProgramInput::default()
            })
            .with_context(|| format!("running on {} bytes", bytes.len()))?;
        let action = output.return_value;
        let length = output.data.map_or(0, |data| data.len());
        frame.truncate(length);
        if sent != bytes && frame.get(..6) == Some(&LOOPBACK_MAC) {
            frame[..6].copy_from_slice(&bytes[..6]);
        }
        let mut events = Vec::new();
        self.events.consume(|event| events.push(*event))?;
        let counted = self
            .datapath
            .metrics()?
            .into_iter()
            .filter(|row| !before.contains(row))
            .map(|row| (row.reason, row.direction))
            .collect();
        let mark = u32::from_ne_bytes([context_out[8], context_out[9], context_out[10], context_out[11]]);
        Ok(Outcome { action, frame, mark, events, counted })
    }

    fn prepare_arrival(&self, program: &str, arrival: Arrival) -> Result<()> {
        let mut row = [0_u8; ARRIVAL_BYTES];
        if let Some((node, vni)) = arrival.tunnel {
            row[0..4].copy_from_slice(&vni.to_ne_bytes());
            let own = casts().map(|cast| cast.node);
            let own = own.into_iter().find(|own| node.is_some_and(|node| node.is_ipv4() == own.is_ipv4()));
            match arrival.tunnel_to.or(own) {
                Some(IpAddr::V4(to)) => row[4..8].copy_from_slice(&to.to_bits().to_ne_bytes()),
                Some(IpAddr::V6(to)) => row[4..20].copy_from_slice(&to.octets()),
                None => {}
            }
            match node {
                Some(IpAddr::V4(node)) => row[28..32].copy_from_slice(&node.to_bits().to_ne_bytes()),
                Some(IpAddr::V6(node)) => {
                    row[28..44].copy_from_slice(&node.octets());
                    row[48] = 1;
                }
                None => {}
            }
            row[44] = u8::from(node.is_some());
        }
        row[52..54].copy_from_slice(&arrival.vlan.to_ne_bytes());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&self.datapath.program(program)?));
        self.set_for_arrive("arrivals", &row)?;
        self.set_for_arrive("next", &fd.to_ne_bytes())
    }

    /// Writes the row of a map of arrive.bpf.c.
    fn set_for_arrive(&self, map: &str, row: &[u8]) -> Result<()> {
        let map = self.arrive.maps().find(|found| found.name() == map).context("no such map")?;
        Ok(map.update(&0_u32.to_ne_bytes(), row, MapFlags::ANY)?)
    }
}

/// `struct arrival` of arrive.bpf.c.
const ARRIVAL_BYTES: usize = 60;

/// BPF_PROG_TEST_RUN's device is the loopback device: what is addressed to it is for this machine.
const LOOPBACK_MAC: [u8; 6] = [0; 6];

/// The frame as the network device sees it: for this machine, unless it says whose it is.
fn addressed(program: &str, bytes: &[u8], arrival: Arrival) -> Vec<u8> {
    let mut frame = bytes.to_vec();
    let is_anyones = matches!(bytes, [0x0a, 0, ..] | [0x02, 0x57, ..]);
    if program == "from_network" && is_anyones && !arrival.is_for_another_machine {
        frame[..6].copy_from_slice(&LOOPBACK_MAC);
    }
    frame
}

fn load_arrive(directory: &Path, has_tcx: bool) -> Result<Object> {
    // A kernel calls only programs of the same attach type, and older ones have none for tcx.
    let section = if has_tcx { "-DSECTION=\"tcx/ingress\"" } else { "-DSECTION=\"tc\"" };
    load_test_program("tests/it/packets/arrive.bpf.c", &directory.join("arrive.bpf.o"), &[section])
}

/// Compiles a program that is no part of the datapath, and loads it.
pub fn load_test_program(source: &str, object: &Path, arguments: &[&str]) -> Result<Object> {
    let clang = (15..=22).rev().map(|version| format!("clang-{version}")).chain(["clang".to_owned()]);
    let clang = std::env::var("CLANG").into_iter().chain(clang).find(|clang| {
        Command::new(clang).arg("--version").output().is_ok_and(|output| output.status.success())
    });
    let output = Command::new(clang.context("no clang")?)
        .args(["-g", "-O2", "-target", "bpf", "-mcpu=v3", "-c", "-o"])
        .args([object, &Path::new(env!("CARGO_MANIFEST_DIR")).join(source)])
        .args(arguments)
        .output()?;
    ensure!(output.status.success(), "compiling {source}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(ObjectBuilder::default().open_file(object)?.load()?)
}
