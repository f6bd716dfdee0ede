//! ADD, CHECK and STATUS: many at once, one lock for allocation alone.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tracing::{debug, info, warn};

use super::store::Store;
use super::{Enforced, Progress, host_interface_name, is_host_interface_name, pod_mac};
use crate::cni::DeleteQueue;
use crate::ipam::Ipam;
use crate::model::cni::{self, AddResult, Attachment, Error, ErrorCode, Request};
use crate::model::{Endpoint, EndpointId, MacAddress, ObjectKey, PortMapping, Protocol};
use crate::netlink::{self, PodLinkSpec};
use crate::tables::Table;
use crate::telemetry::Parts;

/// Ids are 1 to 4095: the `endpoints` map has 4096 rows and 0 is nobody.
const LAST_ID: u16 = 4095;

/// Verifies that an endpoint's programs are attached; the error says what is not.
pub type VerifyPrograms = dyn Fn(&Endpoint) -> std::result::Result<(), String> + Send + Sync;

/// How a manager works.
pub struct Options {
    /// The agent's state directory.
    pub state_directory: PathBuf,
    /// An ADD gives up when the pod's policy is not enforced within this time.
    pub enforced_within: Duration,
    /// Asked by CHECK.
    pub verify_programs: Box<VerifyPrograms>,
    /// UDP port of the tunnels, which no pod can have.
    pub tunnel_port: u16,
    /// Says to STATUS why no pod can be connected now.
    pub parts: Parts,
}

/// The pods of this node. Shared; every method can run at the same time as any other.
pub struct Manager {
    pub(super) store: Store,
    pub(super) queue: DeleteQueue,
    pub(super) table: Arc<Table<EndpointId, Arc<Endpoint>>>,
    options: Options,
    progress: watch::Receiver<Progress>,
    allocations: Mutex<Allocations>,
}

/// Everything that must not be given twice.
struct Allocations {
    ipam: Ipam,
    mtu: u32,
    last_id: u16,
    by_attachment: HashMap<Attachment, EndpointId>,
    by_id: BTreeMap<EndpointId, Attachment>,
    port_mappings: BTreeMap<EndpointId, Vec<PortMapping>>,
    /// What is being worked on: one at a time per attachment.
    busy: HashMap<Attachment, Arc<Work>>,
}

/// An attachment that somebody works on.
#[derive(Default)]
struct Work {
    lock: Arc<tokio::sync::Mutex<()>>,
    /// Raised by a DEL, so that it need not wait for an ADD that waits for policy.
    deletions: watch::Sender<u32>,
}

/// The right to work on one attachment.
pub(super) struct Turn<'a> {
    manager: &'a Manager,
    attachment: Attachment,
    work: Arc<Work>,
    held: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Manager {
    /// Reads the store, forgets endpoints whose device has gone and removes devices that belong to no endpoint.
    /// Every remaining endpoint is in `table` when this returns: before the agent's first round.
    pub fn open(
        options: Options,
        table: Arc<Table<EndpointId, Arc<Endpoint>>>,
        enforced: &Enforced,
    ) -> Result<Arc<Self>> {
        let store = Store::open(&options.state_directory)?;
        // Devices first: one that an agent before us makes meanwhile has its file already.
        let devices = netlink::links().context("listing devices")?;
        let mut devices: BTreeMap<String, netlink::Link> = devices
            .into_iter()
            .filter(|link| is_host_interface_name(&link.name))
            .map(|link| (link.name.clone(), link))
            .collect();
        let mut rows = BTreeMap::new();
        for endpoint in store.load()? {
            let device = devices.remove(&endpoint.host_interface);
            match device.filter(|device| device.mac == MacAddress::of_host_side(endpoint.id)) {
                Some(device) => {
                    rows.insert(endpoint.id, Endpoint { host_ifindex: device.index, ..endpoint });
                }
                None => {
                    info!(endpoint = %endpoint.id, pod = %endpoint.pod, "forgetting an endpoint without device");
                    store.remove(endpoint.id).context("removing an endpoint file")?;
                }
            }
        }
        for name in devices.keys() {
            // Its address could be given to another pod, and no packet of it passes anyway.
            warn!(device = %name, "removing a device without endpoint");
            netlink::delete_link(name)?;
        }
        table.reset(rows.iter().map(|(id, endpoint)| (*id, Arc::new(endpoint.clone()))));
        let queue = DeleteQueue::new(&options.state_directory);
        let allocations = Mutex::new(Allocations::of(rows.values()));
        let progress = enforced.subscribe();
        Ok(Arc::new(Self { store, queue, table, options, progress, allocations }))
    }

    /// Where pods' addresses come from and how long their packets may be: known when the Node is. Until
    /// then every ADD is put off.
    pub fn configure(&self, pod_cidrs: &[IpNet], mtu: u32) {
        let mut allocations = self.allocations();
        allocations.ipam.set_pod_cidrs(pod_cidrs);
        allocations.mtu = mtu;
    }

    /// Pods get addresses of these from now on; those of others keep theirs.
    pub fn set_pod_cidrs(&self, pod_cidrs: &[IpNet]) {
        self.allocations().ipam.set_pod_cidrs(pod_cidrs);
    }

    /// Connects a pod; answers when its policy is enforced. Goes on when the caller does not wait for it.
    pub async fn add(self: &Arc<Self>, request: Request) -> Result<AddResult, Error> {
        request.validate()?;
        let manager = Arc::clone(self);
        run_to_end(async move { manager.add_in_turn(request).await }).await
    }

    async fn add_in_turn(&self, request: Request) -> Result<AddResult, Error> {
        let turn = self.turn(&request.attachment).await;
        let deletions = turn.work.deletions.subscribe();
        if let Some(endpoint) = self.find(&request.attachment) {
            return Err(connected(&endpoint.interface, &endpoint.pod));
        }
        let (mut endpoint, mtu) = self.allocate(&request)?;
        let created = {
            let (store, endpoint) = (self.store.clone(), endpoint.clone());
            spawn_blocking(move || create(&store, &endpoint, mtu)).await
        };
        match created.unwrap_or_else(|panic| Err(internal(&panic))) {
            Ok(host_ifindex) => endpoint.host_ifindex = host_ifindex,
            Err(error) => {
                self.forget(&endpoint);
                return Err(error);
            }
        }
        self.table.apply(endpoint.id, Arc::new(endpoint.clone()));
        let outcome = match self.enforced(endpoint.id, deletions).await {
            Ok(()) => self.raise(&endpoint, mtu).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {
                debug!(endpoint = %endpoint.id, pod = %endpoint.pod, "pod connected");
                Ok(result_of(&endpoint, mtu))
            }
            Err(error) => {
                info!(pod = %endpoint.pod, %error, "pod not connected");
                if let Err(undoing) = self.remove(endpoint).await {
                    // It stays allocated, and its row in the table, until the runtime's DEL comes.
                    warn!(error = %undoing, "undoing an ADD");
                }
                Err(error)
            }
        }
    }

    /// Verifies a pod's connection: devices, addresses, routes, neighbours, programs, policy.
    pub async fn check(&self, request: Request) -> Result<AddResult, Error> {
        request.validate()?;
        let endpoint = self
            .find(&request.attachment)
            .ok_or_else(|| Error::new(ErrorCode::UnknownContainer, "there is no such pod on this node"))?;
        if request.netns.as_ref().is_some_and(|netns| *netns != endpoint.netns) {
            return Err(failed("the pod is connected in another network namespace")
                .with_details(endpoint.netns.display().to_string()));
        }
        // Some runtimes say them with an ADD only.
        if !request.port_mappings.is_empty() && request.port_mappings != endpoint.port_mappings {
            return Err(failed("the pod has other host ports").with_details(shown(&endpoint.port_mappings)));
        }
        self.verify(endpoint).await
    }

    /// An error when pods cannot be connected now.
    pub fn status(&self) -> Result<(), Error> {
        if !self.allocations().ipam.has_cidr() {
            return Err(Error::new(ErrorCode::NotAvailable, "this node has no pod CIDR yet"));
        }
        if !self.progress.borrow().is_started {
            return Err(Error::new(ErrorCode::NotAvailable, "the agent is still starting"));
        }
        if let Some(cause) = self.options.parts.stops_pods() {
            return Err(
                Error::new(ErrorCode::NotAvailable, "no pod can be connected now").with_details(cause)
            );
        }
        Ok(())
    }

    /// Every endpoint, by id.
    pub fn list(&self) -> Vec<Arc<Endpoint>> {
        self.table.snapshot().values().cloned().collect()
    }

    async fn verify(&self, endpoint: Arc<Endpoint>) -> Result<AddResult, Error> {
        if !self.progress.borrow().enforced.contains(&endpoint.id) {
            return Err(failed("the pod's policy is not enforced"));
        }
        (self.options.verify_programs)(&endpoint)
            .map_err(|reason| failed("the pod's programs are not attached").with_details(reason))?;
        let verified = spawn_blocking(move || {
            let host = netlink::verify_pod_link(&spec_of(&endpoint, 0), endpoint.host_ifindex)?;
            Ok(result_of(&endpoint, host.mtu))
        });
        verified.await.map_err(|panic| internal(&panic))?.map_err(|error: netlink::Error| {
            failed("the pod's connection is not intact").with_details(error.to_string())
        })
    }

    fn allocate(&self, request: &Request) -> Result<(Endpoint, u32), Error> {
        let missing = |what| Error::new(ErrorCode::InvalidEnvironment, format!("an ADD needs {what}"));
        let netns = request.netns.clone().ok_or_else(|| missing("CNI_NETNS"))?;
        let pod = request.pod.clone().ok_or_else(|| missing("the pod's namespace and name"))?;
        let attachment = &request.attachment;
        let mut allocations = self.allocations();
        self.refuse_second(attachment, &allocations)?;
        self.reserve(&request.port_mappings, &allocations)?;
        let id = allocations.free_id(&self.progress.borrow()).ok_or_else(|| {
            later("this node has as many pods as it can have").with_details(LAST_ID.to_string())
        })?;
        let addresses = allocations
            .ipam
            .allocate()
            .map_err(|error| later("there is no address for the pod").with_details(error.to_string()))?;
        allocations.last_id = id.0;
        allocations.by_attachment.insert(attachment.clone(), id);
        allocations.by_id.insert(id, attachment.clone());
        let endpoint = Endpoint {
            id,
            container_id: attachment.container_id.clone(),
            interface: attachment.interface.clone(),
            netns,
            pod,
            pod_uid: request.pod_uid.clone(),
            ipv4: addresses.ipv4,
            ipv6: addresses.ipv6,
            host_interface: host_interface_name(attachment),
            host_ifindex: 0,
            mac: pod_mac(attachment),
            port_mappings: request.port_mappings.clone(),
        };
        allocations.port_mappings.insert(id, endpoint.port_mappings.clone());
        Ok((endpoint, allocations.mtu))
    }

    /// Refuses another interface for a container that has one: both would want the same default routes.
    fn refuse_second(&self, wanted: &Attachment, allocations: &Allocations) -> Result<(), Error> {
        let of_container = |held: &&Attachment| held.container_id == wanted.container_id;
        let Some(held) = allocations.by_id.values().find(of_container) else { return Ok(()) };
        Err(failed("a container has one interface of Weir's").with_details(format!(
            "it is connected by {}, and {} is wanted, too: another interface needs another plugin",
            held.interface, wanted.interface
        )))
    }

    /// Refuses host ports that somebody has: the scheduler knows of pods only, and of those that are ending not.
    fn reserve(&self, wanted: &[PortMapping], allocations: &Allocations) -> Result<(), Error> {
        for mapping in wanted {
            if mapping.protocol == Protocol::Udp && mapping.host_port == self.options.tunnel_port {
                return Err(failed("the host port is the one that nodes' tunnels use")
                    .with_details(format!("{mapping}; set another tunnel port, or give the pod another")));
            }
            let holder = allocations
                .port_mappings
                .iter()
                .find(|(_, held)| held.iter().any(|held| held.conflicts_with(mapping)));
            if let Some((id, _)) = holder {
                let pod = self.table.get(id).map_or_else(|| id.to_string(), |holder| holder.pod.to_string());
                return Err(later("another pod of this node has the host port")
                    .with_details(format!("{mapping} is {pod}'s")));
            }
        }
        Ok(())
    }

    async fn enforced(&self, id: EndpointId, mut deletions: watch::Receiver<u32>) -> Result<(), Error> {
        let mut progress = self.progress.clone();
        let enforced =
            async { progress.wait_for(|progress| progress.enforced.contains(&id)).await.map(drop) };
        tokio::select! {
            outcome = tokio::time::timeout(self.options.enforced_within, enforced) => match outcome {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(later("the agent is stopping")),
                Err(_) => {
                    let reason = self.progress.borrow().waiting.get(&id).cloned();
                    let reason = reason.unwrap_or_else(|| "the agent has not come to it".to_owned());
                    Err(later("the pod's policy is not enforced yet").with_details(reason))
                }
            },
            _ = deletions.changed() => Err(later("the pod was deleted while it was connected")),
        }
    }

    async fn raise(&self, endpoint: &Endpoint, mtu: u32) -> Result<(), Error> {
        let (spec, ifindex) = (spec_of(endpoint, mtu), endpoint.host_ifindex);
        spawn_blocking(move || netlink::raise_pod_link(&spec, ifindex))
            .await
            .map_err(|panic| internal(&panic))?
            .map_err(|error| failed("raising the pod's link").with_details(error.to_string()))
    }

    /// Waits until nobody else works on the attachment.
    async fn turn(&self, attachment: &Attachment) -> Turn<'_> {
        let work = Arc::clone(self.allocations().busy.entry(attachment.clone()).or_default());
        let mut turn = Turn { manager: self, attachment: attachment.clone(), work, held: None };
        turn.held = Some(Arc::clone(&turn.work.lock).lock_owned().await);
        turn
    }

    /// As `turn`; an ADD in progress gives up at once.
    pub(super) async fn turn_to_delete(&self, attachment: &Attachment) -> Turn<'_> {
        if let Some(work) = self.allocations().busy.get(attachment) {
            work.deletions.send_modify(|deletions| *deletions += 1);
        }
        self.turn(attachment).await
    }

    pub(super) fn is_busy(&self, attachment: &Attachment) -> bool {
        self.allocations().busy.contains_key(attachment)
    }

    pub(super) fn find(&self, attachment: &Attachment) -> Option<Arc<Endpoint>> {
        let id = self.allocations().by_attachment.get(attachment).copied()?;
        self.table.get(&id)
    }

    /// Lets go of an endpoint that has no device and no row any more: its file, its addresses, its id.
    pub(super) fn forget(&self, endpoint: &Endpoint) {
        if let Err(error) = self.store.remove(endpoint.id) {
            // The next start forgets it: it has no device.
            warn!(endpoint = %endpoint.id, %error, "removing an endpoint file");
        }
        let mut allocations = self.allocations();
        allocations.ipam.release(endpoint.addresses());
        allocations.port_mappings.remove(&endpoint.id);
        if let Some(attachment) = allocations.by_id.remove(&endpoint.id) {
            allocations.by_attachment.remove(&attachment);
        }
    }

    fn allocations(&self) -> MutexGuard<'_, Allocations> {
        self.allocations.lock().expect("nothing panics while it holds the lock")
    }
}

impl Allocations {
    fn of<'a>(endpoints: impl Iterator<Item = &'a Endpoint> + Clone) -> Self {
        let attachment = |endpoint: &Endpoint| Attachment {
            container_id: endpoint.container_id.clone(),
            interface: endpoint.interface.clone(),
        };
        Self {
            ipam: Ipam::new(&[], endpoints.clone().flat_map(Endpoint::addresses)),
            mtu: 0,
            last_id: endpoints.clone().map(|endpoint| endpoint.id.0).max().unwrap_or(0),
            by_attachment: endpoints.clone().map(|endpoint| (attachment(endpoint), endpoint.id)).collect(),
            port_mappings: endpoints
                .clone()
                .map(|endpoint| (endpoint.id, endpoint.port_mappings.clone()))
                .collect(),
            by_id: endpoints.map(|endpoint| (endpoint.id, attachment(endpoint))).collect(),
            busy: HashMap::new(),
        }
    }

    /// Goes round, so that an id that was freed is the last to be given again; never one that the agent's
    /// last round still has.
    fn free_id(&self, progress: &Progress) -> Option<EndpointId> {
        (1..=LAST_ID).map(|step| EndpointId((self.last_id + step - 1) % LAST_ID + 1)).find(|id| {
            !self.by_id.contains_key(id)
                && !progress.enforced.contains(id)
                && !progress.waiting.contains_key(id)
        })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut allocations = self.manager.allocations();
        self.held = None;
        // Two: the map's and ours. Whoever else waits for it keeps it there.
        if Arc::strong_count(&self.work) == 2 {
            allocations.busy.remove(&self.attachment);
        }
    }
}

/// The file, then the link: a crash between leaves a file without device, which the next start forgets.
fn create(store: &Store, endpoint: &Endpoint, mtu: u32) -> Result<u32, Error> {
    store.write(endpoint).map_err(|error| {
        Error::new(ErrorCode::Io, "writing the endpoint to disk").with_details(error.to_string())
    })?;
    match netlink::create_pod_link(&spec_of(endpoint, mtu)) {
        Ok(link) => Ok(link.host_ifindex),
        Err(netlink::Error::Namespace { path, reason, .. }) => {
            Err(Error::new(ErrorCode::InvalidEnvironment, "CNI_NETNS is no network namespace of a pod")
                .with_details(format!("{}: {reason}", path.display())))
        }
        Err(netlink::Error::Taken(interface)) => {
            Err(failed("the container has an interface of this name, and it is not Weir's")
                .with_details(interface))
        }
        Err(error) => Err(failed("making the pod's link").with_details(error.to_string())),
    }
}

/// The specification: "If the requested interface name is already present, the plugin MUST return an error".
fn connected(interface: &str, pod: &ObjectKey) -> Error {
    failed("this container is connected already: a DEL must come before another ADD")
        .with_details(format!("{interface} is {pod}'s"))
}

fn spec_of(endpoint: &Endpoint, mtu: u32) -> PodLinkSpec {
    PodLinkSpec {
        netns: endpoint.netns.clone(),
        interface: endpoint.interface.clone(),
        host_interface: endpoint.host_interface.clone(),
        host_mac: MacAddress::of_host_side(endpoint.id),
        pod_mac: endpoint.mac,
        ipv4: endpoint.ipv4,
        ipv6: endpoint.ipv6,
        mtu,
    }
}

fn result_of(endpoint: &Endpoint, mtu: u32) -> AddResult {
    AddResult {
        host_interface: endpoint.host_interface.clone(),
        host_mac: MacAddress::of_host_side(endpoint.id),
        interface: endpoint.interface.clone(),
        mac: endpoint.mac,
        netns: endpoint.netns.clone(),
        ipv4: endpoint.ipv4,
        ipv6: endpoint.ipv6,
        mtu,
    }
}

/// Runs to its end whether or not the caller waits: half an ADD would be a leak.
pub(super) async fn run_to_end<T: Send + 'static>(
    work: impl Future<Output = cni::Result<T>> + Send + 'static,
) -> cni::Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|panic| Err(internal(&panic)))
}

fn shown(mappings: &[PortMapping]) -> String {
    mappings.iter().map(PortMapping::to_string).collect::<Vec<_>>().join(", ")
}

pub(super) fn later(message: &str) -> Error {
    Error::new(ErrorCode::TryAgainLater, message)
}

pub(super) fn failed(message: &str) -> Error {
    Error::new(ErrorCode::Failed, message)
}

pub(super) fn internal(error: &tokio::task::JoinError) -> Error {
    failed("the agent gave up on it").with_details(error.to_string())
}
