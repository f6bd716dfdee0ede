//! Network namespaces that live as long as a thread: nothing to clean up, whatever happens.

use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

/// A pod's namespace, held by a parked thread.
pub struct Namespace {
    path: PathBuf,
    end: Option<mpsc::Sender<()>>,
    holder: Option<JoinHandle<()>>,
}

impl Namespace {
    pub fn new() -> Self {
        let (end, ended) = mpsc::channel::<()>();
        let (started, path) = mpsc::channel();
        let holder = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unsharing the network namespace");
            let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid());
            started.send(PathBuf::from(path)).expect("the test waits for it");
            let _ = ended.recv();
        });
        let path = path.recv().expect("the holder says where it is");
        Self { path, end: Some(end), holder: Some(holder) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = weir::netlink::open_namespace(&self.path).expect("opening the namespace");
        weir::netlink::within(&file, || Ok(work())).expect("entering the namespace")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(holder) = self.holder.take() {
            let _ = holder.join();
        }
    }
}

/// Runs `work` on a thread within a node's namespace that ends with it; threads it starts are in it too.
pub fn on_a_node<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unsharing the network namespace");
            weir::netlink::raise_link(1).expect("raising lo");
            work()
        });
        node.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives the node an address on lo that is there when this returns: the kernel inserts the local
/// route of an IPv6 address in its own time.
pub fn add_node_address(address: IpAddr) {
    weir::netlink::add_address(1, address.into()).expect("an address for the node");
    let socket = UdpSocket::bind((address, 0)).expect("binding to it");
    socket.set_nonblocking(true).expect("not blocking");
    let to = socket.local_addr().expect("its address");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        // Fails, or is lost, until there is a route.
        let _ = socket.send_to(b"own", to);
        if socket.recv_from(&mut [0; 8]).is_ok() {
            return;
        }
        assert!(Instant::now() < deadline, "{address} does not answer");
        thread::sleep(Duration::from_millis(1));
    }
}

/// True, loudly, where the test cannot run.
pub fn skip_without_root(test: &str) -> bool {
    let skip = !nix::unistd::geteuid().is_root();
    if skip {
        eprintln!("SKIPPED {test}: needs root");
    }
    skip
}
