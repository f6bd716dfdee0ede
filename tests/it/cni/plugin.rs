//! The real `weir-cni` against the socket server and endpoint manager.

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weir::model::{EndpointId, MacAddress};
use weir::netlink;

use super::agent::{Agent, Enforcing, Runtime};
use super::netns::{Namespace, on_a_node, skip_without_root};

const CIDRS: [&str; 2] = ["10.0.1.0/24", "fd00:1::/64"];

/// Runs `test` on a node of its own with an empty directory.
fn on_a_node_with_directory<F: Future<Output = ()>>(test: impl FnOnce(std::path::PathBuf) -> F + Send) {
    if skip_without_root(std::thread::current().name().unwrap_or("a test of the plugin")) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_owned();
    on_a_node(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime of tasks").block_on(test(path));
    });
}

/// The node's devices, routes and endpoint files: what a pod leaves behind would show here.
fn traces(directory: &Path) -> (Vec<String>, Vec<String>) {
    let devices = netlink::links().expect("listing devices").into_iter().map(|link| link.name).collect();
    let files = std::fs::read_dir(directory.join("state/endpoints")).expect("listing endpoint files");
    (devices, files.map(|file| file.expect("a file").file_name().to_string_lossy().into_owned()).collect())
}

fn nothing() -> (Vec<String>, Vec<String>) {
    (vec!["lo".to_owned()], Vec::new())
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[test]
fn root_add_check_and_del() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let namespace = Namespace::new();
        let runtime = Runtime::new(&directory, "web-0", &namespace);
        runtime.call_async("STATUS").await.expect("STATUS");
        let result = runtime.call_async("ADD").await.expect("ADD");
        let endpoint = agent.manager.list().pop().expect("one endpoint");
        assert_eq!(
            result,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {
                        "name": endpoint.host_interface,
                        "mac": MacAddress::of_host_side(EndpointId(1)).to_string(),
                        "mtu": 1450,
                    },
                    {
                        "name": "eth0", "mac": endpoint.mac.to_string(), "mtu": 1450,
                        "sandbox": namespace.path(),
                    },
                ],
                "ips": [
                    {"address": "10.0.1.2/32", "gateway": "169.254.1.1", "interface": 1},
                    {"address": "fd00:1::2/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [
                    {"dst": "169.254.1.1/32"},
                    {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                    {"dst": "::/0", "gw": "fe80::1"},
                ],
                "dns": {},
            })
        );
        assert_eq!(endpoint.host_interface.len(), 14);
        assert_eq!(
            netlink::link_index(&endpoint.host_interface).expect("looking"),
            Some(endpoint.host_ifindex)
        );

        let with_result = runtime.clone().config("prevResult", result.clone());
        with_result.call_async("CHECK").await.expect("CHECK");
        assert_eq!(runtime.call_async("ADD").await.expect("ADD again"), result);

        let other = runtime.clone().with("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=other");
        assert_eq!(other.call_async("ADD").await.expect_err("another pod in one container")["code"], 100);

        for _ in 0..2 {
            assert_eq!(runtime.call_async("DEL").await.expect("DEL"), Value::Null);
            assert_eq!(traces(&directory), nothing());
            assert!(agent.endpoints.snapshot().is_empty());
        }
        let error = with_result.call_async("CHECK").await.expect_err("CHECK of nobody");
        assert_eq!(error["code"], 3);
        agent.stop().await;
    });
}
