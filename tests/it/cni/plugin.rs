//! The real `weir-cni` against the socket server and endpoint manager.

use std::future::Future;
use std::net::UdpSocket;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weir::model::{EndpointId, MacAddress};
use weir::netlink;

use super::agent::{Agent, Enforcing, Runtime};
use super::netns::{Namespace, add_node_address, on_a_node, skip_without_root};

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
        let error = runtime.call_async("ADD").await.expect_err("the specification wants an error");
        let message = "this container is connected already: a DEL must come before another ADD";
        assert_eq!((&error["code"], &error["msg"]), (&json!(100), &json!(message)));
        assert_eq!(error["details"], "eth0 is shop/web-0's");
        let second = runtime.clone().with("CNI_IFNAME", "eth1").call_async("ADD").await;
        let error = second.expect_err("a second interface in one container");
        assert_eq!(
            (&error["msg"], &error["details"]),
            (
                &json!("a container has one interface of Weir's"),
                &json!(
                    "it is connected by eth0, and eth1 is wanted, too: another interface needs another plugin"
                )
            )
        );
        with_result.call_async("CHECK").await.expect("what is refused changes nothing");

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

#[test]
fn root_an_interface_that_somebody_else_made_is_not_taken_over() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let namespace = Namespace::new();
        namespace.run(|| {
            netlink::ensure_vxlan("eth0", 4789, 1450, None).map(drop).expect("another plugin's device");
        });
        let runtime = Runtime::new(&directory, "web-0", &namespace);
        let error = runtime.call_async("ADD").await.expect_err("eth0 is there");
        let message = "the container has an interface of this name, and it is not Weir's";
        assert_eq!(
            (&error["code"], &error["msg"], &error["details"]),
            (&json!(100), &json!(message), &json!("eth0"))
        );
        assert_eq!(traces(&directory), nothing());
        namespace.run(|| assert!(netlink::delete_link("eth0").expect("deleting")));
        runtime.call_async("ADD").await.expect("ADD when the name is free");
        agent.stop().await;
    });
}

#[test]
fn root_when_add_answers_packets_pass_both_ways() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        for (node, pod) in [("192.0.2.1", "10.0.1."), ("2001:db8::1", "fd00:1::")] {
            add_node_address(node.parse().expect("an address"));
            for place in 2..12 {
                let on_node = UdpSocket::bind((node, 0)).expect("binding on the node");
                on_node.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
                let from = on_node.local_addr().expect("its address");
                let namespace = Namespace::new();
                let runtime = Runtime::new(&directory, &format!("web-{place}"), &namespace);
                let result = runtime.call_async("ADD").await.expect("ADD");
                let ips = result["ips"].as_array().expect("a list");
                let address =
                    ips.iter().filter_map(|ip| ip["address"].as_str()).find(|ip| ip.starts_with(pod));
                let address = address.and_then(|address| address.split('/').next()).expect("an address");
                namespace.run(|| {
                    let in_pod = UdpSocket::bind((address, 0)).expect("binding in the pod");
                    in_pod.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
                    let to = in_pod.local_addr().expect("its address");
                    let mut buffer = [0; 16];
                    on_node.send_to(b"to the pod", to).expect("sending from the node");
                    let (length, _) = in_pod.recv_from(&mut buffer).expect("the first packet to the pod");
                    assert_eq!(&buffer[..length], b"to the pod");
                    in_pod.send_to(b"to the node", from).expect("sending from the pod");
                    let (length, sender) = on_node.recv_from(&mut buffer).expect("the pod's first packet");
                    assert_eq!((&buffer[..length], sender), (&b"to the node"[..], to));
                });
                runtime.call_async("DEL").await.expect("DEL");
            }
        }
        agent.stop().await;
    });
}

#[test]
fn root_versions_of_one_family() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS[..1], Enforcing::AtOnce).await;
        let namespace = Namespace::new();
        let runtime = Runtime::new(&directory, "web-0", &namespace).config("cniVersion", json!("0.3.1"));
        let result = runtime.call_async("ADD").await.expect("ADD");
        assert_eq!(
            result["ips"],
            json!([{"address": "10.0.1.2/32", "gateway": "169.254.1.1", "interface": 1, "version": "4"}])
        );
        agent.manager.check(request(&runtime)).await.expect("intact");
        runtime.call_async("DEL").await.expect("DEL");
        assert_eq!(traces(&directory), nothing());
        agent.stop().await;
    });
}

fn request(runtime: &Runtime) -> weir::model::cni::Request {
    let variable = |name: &str| runtime.variables.get(name).cloned().expect("it is set");
    weir::model::cni::Request {
        attachment: weir::model::cni::Attachment {
            container_id: variable("CNI_CONTAINERID"),
            interface: variable("CNI_IFNAME"),
        },
        netns: Some(variable("CNI_NETNS").into()),
        pod: None,
        pod_uid: None,
        port_mappings: Vec::new(),
    }
}

#[test]
fn root_what_is_not_enforced_in_time_is_undone() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::Never).await;
        let namespace = Namespace::new();
        let runtime = Runtime::new(&directory, "web-0", &namespace);
        let error = runtime.call_async("ADD").await.expect_err("nothing is ever enforced");
        assert_eq!(
            error,
            json!({
                "cniVersion": "1.1.0", "code": 11, "msg": "the pod's policy is not enforced yet",
                "details": "the test never enforces",
            })
        );
        assert_eq!(traces(&directory), nothing());
        assert!(agent.endpoints.snapshot().is_empty());
        let inside = namespace.run(|| netlink::links().expect("listing").len());
        assert_eq!(inside, 1, "only lo is left in the pod");
        agent.stop().await;
    });
}

#[test]
fn root_a_del_ends_an_add_that_waits() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::Never).await;
        let namespace = Namespace::new();
        let runtime = Runtime::new(&directory, "web-0", &namespace);
        let adding = tokio::spawn({
            let runtime = runtime.clone();
            async move { runtime.call_async("ADD").await }
        });
        eventually("the ADD waits for policy", || !agent.endpoints.snapshot().is_empty()).await;
        runtime.call_async("DEL").await.expect("DEL");
        assert_eq!(traces(&directory), nothing());
        let error = adding.await.expect("it ends").expect_err("it was deleted");
        assert_eq!(
            (&error["code"], &error["msg"]),
            (&json!(11), &json!("the pod was deleted while it was connected"))
        );
        agent.stop().await;
    });
}

#[test]
fn root_del_works_when_the_namespace_is_gone() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        for without_netns in [false, true] {
            let namespace = Namespace::new();
            let mut runtime = Runtime::new(&directory, "web-0", &namespace);
            runtime.call_async("ADD").await.expect("ADD");
            drop(namespace);
            if without_netns {
                runtime = runtime.without("CNI_NETNS");
            }
            runtime.call_async("DEL").await.expect("DEL");
            assert!(agent.endpoints.snapshot().is_empty());
            // The kernel takes a namespace apart in its own time.
            eventually("nothing is left", || traces(&directory) == nothing()).await;
        }
        agent.stop().await;
    });
}

#[test]
fn root_without_an_agent_add_fails_at_once_and_del_is_carried_out_later() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let namespaces = [Namespace::new(), Namespace::new(), Namespace::new()];
        let runtimes = ["web-0", "web-1", "web-2"]
            .into_iter()
            .zip(&namespaces)
            .map(|(name, namespace)| Runtime::new(&directory, name, namespace))
            .collect::<Vec<_>>();
        for runtime in &runtimes[..2] {
            runtime.call_async("ADD").await.expect("ADD");
        }
        let kept = agent.manager.list()[1].clone();
        agent.stop().await;
        assert!(!directory.join("run/agent.sock").exists());

        let started = Instant::now();
        let error = runtimes[2].call_async("ADD").await.expect_err("no agent");
        assert!(started.elapsed() < Duration::from_secs(1));
        assert_eq!(
            (&error["code"], &error["msg"]),
            (&json!(11), &json!("the Weir agent of this node is not available"))
        );
        assert_eq!(runtimes[2].call_async("STATUS").await.expect_err("no agent")["code"], 50);
        for _ in 0..2 {
            runtimes[0].call_async("DEL").await.expect("DEL without agent");
        }
        assert_eq!(std::fs::read_dir(directory.join("state/deletes")).expect("listing").count(), 1);

        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        assert_eq!(agent.manager.list(), [kept], "what was queued is done before the socket is there");
        assert_eq!(std::fs::read_dir(directory.join("state/deletes")).expect("listing").count(), 0);

        // Queued although an agent runs: the runtime asked before the agent listened.
        weir::cni::DeleteQueue::new(&directory.join("state")).push(&request(&runtimes[1])).expect("queueing");
        eventually("the agent watches the queue", || traces(&directory) == nothing()).await;
        agent.stop().await;
    });
}

#[test]
fn root_a_restart_keeps_pods_and_forgets_the_dead() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let mut namespaces: Vec<_> = (0..3).map(|_| Namespace::new()).collect();
        let runtimes: Vec<_> = namespaces
            .iter()
            .enumerate()
            .map(|(place, namespace)| Runtime::new(&directory, &format!("web-{place}"), namespace))
            .collect();
        for runtime in &runtimes {
            runtime.call_async("ADD").await.expect("ADD");
        }
        let before = agent.manager.list();
        agent.stop().await;
        drop(namespaces.remove(0));
        eventually("the device of the dead pod goes", || {
            netlink::link_index(&before[0].host_interface).expect("looking").is_none()
        })
        .await;
        // A device of nobody: its file is lost.
        std::fs::remove_file(directory.join("state/endpoints/3.json")).expect("removing a file");

        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        assert_eq!(agent.manager.list(), before[1..2]);
        let ready = || agent.manager.status().is_ok();
        eventually("the agent's first round", ready).await;
        agent.manager.check(request(&runtimes[1])).await.expect("intact");
        assert_eq!(netlink::link_index(&before[2].host_interface).expect("looking"), None);

        let namespace = Namespace::new();
        let result = Runtime::new(&directory, "web-9", &namespace).call_async("ADD").await.expect("ADD");
        assert_eq!(result["ips"][0]["address"], "10.0.1.4/32", "behind what is in use");
        agent.stop().await;
    });
}

#[test]
fn root_check_sees_what_is_missing() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        type Damage = fn(&Namespace, &weir::model::Endpoint);
        let rows: [(&str, Damage); 5] = [
            ("the neighbour entry of 169.254.1.1 is gone", |namespace, _| {
                namespace.run(|| {
                    let device = netlink::link_index("eth0").expect("looking").expect("eth0");
                    netlink::sync_neighbours(device, &Default::default()).expect("removing neighbours");
                });
            }),
            ("the neighbour entry of 10.0.1.", |_, endpoint| {
                netlink::sync_neighbours(endpoint.host_ifindex, &Default::default())
                    .expect("removing neighbours");
            }),
            ("address fd00:1::", |namespace, _| {
                namespace
                    .run(|| netlink::set_sysctl("net/ipv6/conf/eth0/disable_ipv6", "1").expect("no IPv6"));
            }),
            ("is gone", |_, endpoint| {
                assert!(netlink::delete_link(&endpoint.host_interface).expect("deleting"));
            }),
            ("eth0 is gone from the pod", |namespace, endpoint| {
                // The pair goes with its end in the pod; another device takes the name on the node.
                namespace.run(|| assert!(netlink::delete_link("eth0").expect("deleting")));
                assert_eq!(netlink::link_index(&endpoint.host_interface).expect("looking"), None);
            }),
        ];
        for (place, (wanted, damage)) in rows.into_iter().enumerate() {
            let namespace = Namespace::new();
            let runtime = Runtime::new(&directory, &format!("web-{place}"), &namespace);
            let result = runtime.call_async("ADD").await.expect("ADD");
            let runtime = runtime.config("prevResult", result);
            runtime.call_async("CHECK").await.expect("intact");
            let endpoint = agent.manager.list().pop().expect("one endpoint");
            damage(&namespace, &endpoint);
            let error = runtime.call_async("CHECK").await.expect_err(wanted);
            let details = error["details"].as_str().expect("details");
            let wanted = if place == 4 { "is gone" } else { wanted };
            assert!(error["code"] == 100 && details.contains(wanted), "{wanted}: {error}");
            let error = runtime.call_async("ADD").await.expect_err("not intact");
            assert_eq!(error["code"], 100, "{error}");
            runtime.call_async("DEL").await.expect("DEL");
        }
        assert_eq!(traces(&directory), nothing());
        agent.stop().await;
    });
}

#[test]
fn root_gc_removes_what_is_not_listed() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let namespaces: Vec<_> = (0..4).map(|_| Namespace::new()).collect();
        let runtimes: Vec<_> = namespaces
            .iter()
            .enumerate()
            .map(|(place, namespace)| Runtime::new(&directory, &format!("web-{place}"), namespace))
            .collect();
        for runtime in &runtimes {
            runtime.call_async("ADD").await.expect("ADD");
        }
        let valid = json!([
            {"containerID": "web-1", "ifname": "eth0"}, {"containerID": "web-2", "ifname": "eth1"},
            {"containerID": "unknown", "ifname": "eth0"},
        ]);
        let collecting = runtimes[0].clone().config("cni.dev/valid-attachments", valid);
        for _ in 0..2 {
            collecting.call_async("GC").await.expect("GC");
            let left: Vec<_> =
                agent.manager.list().iter().map(|endpoint| endpoint.container_id.clone()).collect();
            assert_eq!(left, ["web-1"]);
        }
        runtimes[1].call_async("DEL").await.expect("DEL");
        assert_eq!(traces(&directory), nothing());
        agent.stop().await;
    });
}

#[test]
fn root_failures_on_the_way_leave_nothing() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &["10.0.1.0/29"], Enforcing::AtOnce).await;
        let namespace = Namespace::new();
        let file = directory.join("no-namespace");
        std::fs::write(&file, "").expect("a file");
        let own = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
        let rows = [
            ("CNI_NETNS", "/var/run/netns/there-is-none", 4),
            ("CNI_NETNS", file.to_str().expect("UTF-8"), 4),
            ("CNI_NETNS", "/proc/self/ns/mnt", 4),
            ("CNI_NETNS", own.as_str(), 4),
            ("CNI_NETNS", "/etc", 4),
            ("CNI_IFNAME", "lo", 100),
            ("CNI_CONTAINERID", "../web-0", 4),
        ];
        for (name, value, code) in rows {
            let runtime = Runtime::new(&directory, "web-0", &namespace).with(name, value);
            let error = runtime.call_async("ADD").await.expect_err(value);
            assert_eq!(error["code"], code, "{name}={value}: {error}");
            assert_eq!(traces(&directory), nothing(), "{name}={value}");
        }
        // Five addresses; every failure above gave its own back.
        let namespaces: Vec<_> = (0..6).map(|_| Namespace::new()).collect();
        for (place, namespace) in namespaces.iter().enumerate() {
            let runtime = Runtime::new(&directory, &format!("web-{place}"), namespace);
            match runtime.call_async("ADD").await {
                Ok(_) => assert!(place < 5),
                Err(error) => {
                    assert_eq!((place, &error["code"]), (5, &json!(11)));
                    assert_eq!(error["details"], "every address of 10.0.1.0/29 is in use");
                }
            }
        }
        agent.stop().await;
    });
}

#[test]
fn root_many_at_once_get_addresses_of_their_own() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let namespaces: Vec<_> = (0..40).map(|_| Namespace::new()).collect();
        let runtimes: Vec<_> = namespaces
            .iter()
            .enumerate()
            .map(|(place, namespace)| Runtime::new(&directory, &format!("web-{place}"), namespace))
            .collect();
        for command in ["ADD", "DEL"] {
            let calls: Vec<_> = runtimes
                .iter()
                .map(|runtime| {
                    let runtime = runtime.clone();
                    tokio::spawn(async move { runtime.call_async(command).await })
                })
                .collect();
            for call in calls {
                call.await.expect("it does not panic").expect(command);
            }
            if command == "ADD" {
                let endpoints = agent.manager.list();
                let addresses: std::collections::BTreeSet<_> =
                    endpoints.iter().flat_map(|endpoint| endpoint.addresses()).collect();
                assert_eq!((endpoints.len(), addresses.len()), (40, 80));
            }
        }
        assert_eq!(traces(&directory), nothing());
        agent.stop().await;
    });
}

#[test]
fn root_three_hundred_in_a_row_leave_nothing() {
    on_a_node_with_directory(|directory| async move {
        let agent = Agent::start(&directory, &CIDRS, Enforcing::AtOnce).await;
        let mut times = [Vec::new(), Vec::new()];
        for place in 0..300 {
            let namespace = Namespace::new();
            let runtime = Runtime::new(&directory, &format!("web-{place}"), &namespace);
            for (command, times) in ["ADD", "DEL"].into_iter().zip(&mut times) {
                let started = Instant::now();
                runtime.call_async(command).await.expect(command);
                times.push(started.elapsed());
            }
        }
        for (command, times) in ["ADD", "DEL"].into_iter().zip(&mut times) {
            times.sort();
            eprintln!("{command}: p50 {:?}, p90 {:?}, max {:?}", times[150], times[270], times[299]);
        }
        assert_eq!(traces(&directory), nothing());
        assert!(agent.endpoints.snapshot().is_empty());
        agent.stop().await;
    });
}
