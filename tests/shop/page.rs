//! The shop's page: a relay on node 1 that asks both nodes, reached at an address of this machine.

use std::fs::File;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use anyhow::{Context, Result};

use crate::lab::{Lab, Node, Running, binary, relay, wait_for};

/// What the agents need so that a relay can ask them. Nobody but the lab reaches them.
pub const AGENT_ARGUMENTS: [&str; 4] = ["--hubble-listen", "[::]:4244", "--hubble-plain-text", "true"];
/// Where the relay serves the page, in its node's namespace.
const INSIDE: &str = "127.0.0.1:4246";

/// A running relay; it ends with this.
pub struct Page {
    address: SocketAddr,
    relay: Child,
    is_over: Arc<AtomicBool>,
    carrying: Option<Running<()>>,
}

impl Page {
    /// Starts the relay, and carries connections to it from `at`; port 0 takes any.
    pub fn serve(lab: &Lab, at: &str) -> Result<Self> {
        let node = lab.node(1);
        let relay = start_relay(node)?;
        let listener = TcpListener::bind(at).with_context(|| format!("listening at {at} for the page"))?;
        let is_over = Arc::new(AtomicBool::new(false));
        let mut page = Self { address: listener.local_addr()?, relay, is_over, carrying: None };
        wait_for("the page to be served", || Ok(node.space().http_get(INSIDE.parse()?, "/healthz").is_ok()))?;
        page.carrying = Some(carry(node, listener, page.is_over.clone()));
        Ok(page)
    }

    /// Where a browser finds it.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.relay.kill();
        let _ = self.relay.wait();
        // The threads inside would keep the node's cgroup: a last connection tells them.
        self.is_over.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(carrying) = self.carrying.take() {
            carrying.wait();
        }
    }
}

fn start_relay(node: &Node) -> Result<Child> {
    let socket = node.socket().with_file_name("hubble.sock");
    let log = File::create(node.directory().join("relay.log"))?;
    let mut command = Command::new(binary("weir")?);
    command.args(["relay", "--relay-peers", &format!("unix:{}", socket.display())]);
    command.args(["--relay-page-address", INSIDE]);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    node.space().run(move || command.spawn()).context("starting the relay")
}

/// Carries every connection to the relay until `is_over` is true and another one comes.
fn carry(node: &Node, listener: TcpListener, is_over: Arc<AtomicBool>) -> Running<()> {
    let (sender, clients) = mpsc::channel::<TcpStream>();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            if is_over.load(Ordering::Acquire) || sender.send(client).is_err() {
                return;
            }
        }
    });
    node.space().start(move || {
        let mut carried = Vec::new();
        for client in clients {
            let (Ok(own), Ok(server)) = (client.try_clone(), TcpStream::connect(INSIDE)) else { continue };
            carried.push((own, thread::spawn(move || relay(client, server))));
        }
        for (client, thread) in carried {
            // Whoever is still there has nothing to wait for: the relay has ended.
            let _ = client.shutdown(Shutdown::Both);
            let _ = thread.join();
        }
    })
}
