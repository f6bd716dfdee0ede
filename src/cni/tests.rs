use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::config::Config;
use super::environment::{Command, Environment};
use super::*;
use crate::model::{EndpointId, MacAddress, ObjectKey};

/// No agent listens at this socket.
fn config() -> Value {
    json!({"cniVersion": "1.1.0", "name": "weir", "type": "weir-cni", "socket": "/nonexistent/agent.sock"})
}

fn variables() -> HashMap<&'static str, String> {
    [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "0a1b2c"),
        ("CNI_NETNS", "/var/run/netns/cni-1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=8a-1;OTHER=x"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .into()
}

/// Code and message of the error object, after checking its form.
fn refused(variables: &HashMap<&'static str, String>, input: &[u8]) -> (u64, String) {
    let outcome = run(|name| variables.get(name).cloned(), input);
    assert_eq!(outcome.exit_code, 1, "{}", outcome.output);
    let error: Value = serde_json::from_str(&outcome.output).expect("an error object");
    for key in error.as_object().expect("an object").keys() {
        assert!(["cniVersion", "code", "msg", "details"].contains(&key.as_str()), "{key}");
    }
    assert!(VERSIONS.contains(&error["cniVersion"].as_str().expect("a version")));
    let message = error["msg"].as_str().expect("a message").to_owned();
    (error["code"].as_u64().expect("a code"), message)
}

fn result() -> AddResult {
    AddResult {
        host_interface: "weir0123456789".to_owned(),
        host_mac: MacAddress::of_host_side(EndpointId(0x0102)),
        interface: "eth0".to_owned(),
        mac: MacAddress([0x0a, 0, 0, 0, 0, 1]),
        netns: PathBuf::from("/var/run/netns/cni-1"),
        ipv4: Some(Ipv4Addr::new(10, 0, 1, 7)),
        ipv6: Some(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 7)),
        mtu: 1450,
    }
}

#[test]
fn the_environment_of_a_runtime_is_understood() {
    let variables = variables();
    let environment = Environment(|name: &str| variables.get(name).cloned());
    assert_eq!(environment.command(), Ok(Command::Add));
    let attachment = Attachment { container_id: "0a1b2c".to_owned(), interface: "eth0".to_owned() };
    let del = Request { attachment, netns: None, pod: None, pod_uid: None, port_mappings: Vec::new() };
    let check = Request { netns: Some(PathBuf::from("/var/run/netns/cni-1")), ..del.clone() };
    let add = Request {
        pod: Some(ObjectKey::new("shop", "web-0")),
        pod_uid: Some("8a-1".to_owned()),
        ..check.clone()
    };
    assert_eq!(environment.del(), Ok(del));
    assert_eq!(environment.check(), Ok(check));
    assert_eq!(environment.add(), Ok(add));
}

#[test]
fn hostile_environments_are_refused() {
    let long = "a".repeat(256);
    let many = format!("K8S_POD_NAMESPACE=a;K8S_POD_NAME={}", "b.".repeat(200));
    let huge = format!("IgnoreUnknown=1;X={}", "y".repeat(20_000));
    let deep = format!("/{}", "x/".repeat(3000));
    let rows: &[(&'static str, &str)] = &[
        ("CNI_COMMAND", ""),
        ("CNI_COMMAND", "add"),
        ("CNI_COMMAND", "ADD;DEL"),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "../../etc/passwd"),
        ("CNI_CONTAINERID", "a/b"),
        ("CNI_CONTAINERID", "-rf"),
        ("CNI_CONTAINERID", ".hidden"),
        ("CNI_CONTAINERID", "a b"),
        ("CNI_CONTAINERID", "a\nb"),
        ("CNI_CONTAINERID", "é"),
        ("CNI_CONTAINERID", &long),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "."),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "eth 0"),
        ("CNI_IFNAME", "eth\t0"),
        ("CNI_IFNAME", "eth:0"),
        ("CNI_IFNAME", "eth%d"),
        ("CNI_IFNAME", "sixteencharacter"),
        ("CNI_IFNAME", "et\u{7}h0"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "relative"),
        ("CNI_NETNS", "/var/run/../../etc/shadow"),
        ("CNI_NETNS", "/var/run/netns/a\nb"),
        ("CNI_NETNS", &deep),
        ("CNI_ARGS", ""),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop"),
        ("CNI_ARGS", "K8S_POD_NAME=web-0"),
        ("CNI_ARGS", "nonsense"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;OTHER=x"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;OTHER=x;IgnoreUnknown=0"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=a;K8S_POD_NAME=b"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=../kube-system;K8S_POD_NAME=web-0"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=../../x"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=Shop;K8S_POD_NAME=web-0"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web..0"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=../x"),
        ("CNI_ARGS", &many),
        ("CNI_ARGS", &huge),
    ];
    for (name, value) in rows {
        let mut variables = variables();
        variables.insert(name, (*value).to_owned());
        let (code, message) = refused(&variables, config().to_string().as_bytes());
        assert_eq!(
            (code, message.contains(name) || name == &"CNI_ARGS"),
            (4, true),
            "{name}={value}: {message}"
        );
    }
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"] {
        let mut variables = variables();
        variables.remove(name);
        assert_eq!(refused(&variables, config().to_string().as_bytes()).0, 4, "without {name}");
    }
}

#[test]
fn hostile_configurations_are_refused() {
    let with = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        config.to_string().into_bytes()
    };
    let without = |key: &str| {
        let mut config = config();
        config.as_object_mut().expect("an object").remove(key);
        config.to_string().into_bytes()
    };
    let rows: &[(&str, Vec<u8>, u64)] = &[
        ("empty", Vec::new(), 6),
        ("no JSON", b"{\"cniVersion\":".to_vec(), 6),
        ("no UTF-8", b"{\"name\":\"\xff\"}".to_vec(), 6),
        ("deep", "[".repeat(100_000).into_bytes(), 6),
        ("a list", b"[]".to_vec(), 7),
        ("a number", b"1".to_vec(), 7),
        ("too long", vec![b' '; 1024 * 1024 + 1], 7),
        ("no version", without("cniVersion"), 1),
        ("an old version", with("cniVersion", json!("0.2.0")), 1),
        ("a version between", with("cniVersion", json!("0.3.0")), 1),
        ("a new version", with("cniVersion", json!("2.0.0")), 1),
        ("a version of the wrong kind", with("cniVersion", json!(1)), 7),
        ("no name", without("name"), 7),
        ("a name like a path", with("name", json!("../weir")), 7),
        ("a name of the wrong kind", with("name", json!({})), 7),
        ("a relative socket", with("socket", json!("agent.sock")), 7),
        ("a socket that climbs", with("socket", json!("/run/weir/../../tmp/x")), 7),
        ("a socket of the wrong kind", with("socket", json!(7)), 7),
        ("a relative state directory", with("stateDir", json!("var")), 7),
        ("attachments of the wrong kind", with("cni.dev/valid-attachments", json!("all")), 7),
        ("attachments without id", with("cni.dev/valid-attachments", json!([{"ifname": "eth0"}])), 7),
    ];
    for (name, input, code) in rows {
        assert_eq!(refused(&variables(), input).0, *code, "{name}");
    }
}

#[test]
fn without_an_agent_each_command_says_what_helps() {
    for (command, code) in [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
        let mut variables = variables();
        variables.insert("CNI_COMMAND", command.to_owned());
        let mut config = config();
        config["cni.dev/valid-attachments"] = json!([]);
        let (code_given, message) = refused(&variables, config.to_string().as_bytes());
        assert_eq!(code_given, code, "{command}");
        assert_eq!(message, "the Weir agent of this node is not available");
    }
}

#[test]
fn a_gc_without_list_removes_nothing() {
    let mut variables = variables();
    variables.insert("CNI_COMMAND", "GC".to_owned());
    assert_eq!(refused(&variables, config().to_string().as_bytes()).0, 7);
}

#[test]
fn commands_are_refused_in_versions_that_do_not_have_them() {
    for (command, version, code) in [
        ("CHECK", "0.3.1", 1),
        ("CHECK", "0.4.0", 11),
        ("GC", "1.0.0", 1),
        ("STATUS", "1.0.0", 1),
        ("STATUS", "1.1.0", 50),
    ] {
        let mut variables = variables();
        variables.insert("CNI_COMMAND", command.to_owned());
        let mut config = config();
        config["cniVersion"] = json!(version);
        assert_eq!(refused(&variables, config.to_string().as_bytes()).0, code, "{command} {version}");
    }
}

#[test]
fn version_answers_in_the_version_asked() {
    for (input, version) in [
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"9.9.9"}"#, "1.1.0"),
        ("", "1.1.0"),
        ("nonsense", "1.1.0"),
    ] {
        let outcome = run(|name| (name == "CNI_COMMAND").then(|| "VERSION".to_owned()), input.as_bytes());
        let answer: Value = serde_json::from_str(&outcome.output).expect("JSON");
        let wanted =
            json!({"cniVersion": version, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]});
        assert_eq!((outcome.exit_code, answer), (0, wanted), "{input}");
    }
}

#[test]
fn a_del_without_agent_is_queued_once_and_succeeds() {
    let directory = tempfile::tempdir().expect("a directory");
    let state = directory.path().join("not/yet/there");
    let mut config = config();
    config["stateDir"] = json!(state);
    let mut variables = variables();
    variables.insert("CNI_COMMAND", "DEL".to_owned());
    variables.remove("CNI_NETNS");
    variables.remove("CNI_ARGS");
    for _ in 0..2 {
        let outcome = run(|name| variables.get(name).cloned(), config.to_string().as_bytes());
        assert_eq!(outcome, Outcome { output: String::new(), exit_code: 0 });
    }
    let queue = DeleteQueue::new(&state);
    let queued = queue.list().expect("listing");
    let [(path, Ok(request))] = queued.as_slice() else { panic!("{queued:?}") };
    let attachment = Attachment { container_id: "0a1b2c".to_owned(), interface: "eth0".to_owned() };
    assert_eq!(
        *request,
        Request { attachment, netns: None, pod: None, pod_uid: None, port_mappings: Vec::new() }
    );
    queue.remove(path).expect("removing");
    queue.remove(path).expect("removing again");
    assert_eq!(std::fs::read_dir(state.join("deletes")).expect("listing").count(), 0);
}

#[test]
fn results_are_in_the_words_of_each_version() {
    let rendered = |version: &str| {
        let mut config = config();
        config["cniVersion"] = json!(version);
        let config = Config::parse(config.to_string().as_bytes()).expect("a configuration");
        super::result::render(&config, &result()).expect("a result")
    };
    let mut newest = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "weir0123456789", "mac": "02:57:65:69:01:02", "mtu": 1450},
            {"name": "eth0", "mac": "0a:00:00:00:00:01", "mtu": 1450, "sandbox": "/var/run/netns/cni-1"},
        ],
        "ips": [
            {"address": "10.0.1.7/32", "gateway": "169.254.1.1", "interface": 1},
            {"address": "fd00:1::7/128", "gateway": "fe80::1", "interface": 1},
        ],
        "routes": [
            {"dst": "169.254.1.1/32"}, {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"},
        ],
        "dns": {},
    });
    assert_eq!(rendered("1.1.0"), newest);
    newest["cniVersion"] = json!("1.0.0");
    for interface in newest["interfaces"].as_array_mut().expect("a list") {
        interface.as_object_mut().expect("an object").remove("mtu");
    }
    assert_eq!(rendered("1.0.0"), newest);
    for version in ["0.4.0", "0.3.1"] {
        newest["cniVersion"] = json!(version);
        newest["ips"][0]["version"] = json!("4");
        newest["ips"][1]["version"] = json!("6");
        assert_eq!(rendered(version), newest);
    }
}

#[test]
fn in_a_chain_earlier_results_stay_in_front() {
    let mut config = config();
    config["prevResult"] = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo", "sandbox": "/var/run/netns/cni-1"}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "dns": {"nameservers": ["10.96.0.10"]},
    });
    let parsed = Config::parse(config.to_string().as_bytes()).expect("a configuration");
    let only_ipv4 = AddResult { ipv6: None, ..result() };
    let rendered = super::result::render(&parsed, &only_ipv4).expect("a result");
    assert_eq!(
        rendered["ips"],
        json!([
            {"address": "127.0.0.1/8", "interface": 0},
            {"address": "10.0.1.7/32", "gateway": "169.254.1.1", "interface": 2},
        ])
    );
    assert_eq!(rendered["interfaces"][2]["name"], "eth0");
    assert_eq!(rendered["dns"], config["prevResult"]["dns"]);

    for broken in [json!([]), json!({"ips": 1}), json!({"interfaces": {}}), json!("x")] {
        config["prevResult"] = broken;
        let parsed = Config::parse(config.to_string().as_bytes()).expect("a configuration");
        let error = super::result::render(&parsed, &only_ipv4).expect_err("a broken prevResult");
        assert_eq!(error.0.code, 7);
    }
}

#[test]
fn a_check_compares_with_what_the_runtime_remembers() {
    let compare = |previous: Value| {
        let mut config = config();
        config["prevResult"] = previous;
        let config = Config::parse(config.to_string().as_bytes()).expect("a configuration");
        super::result::compare(&config, &result()).map_err(|error| error.0.code)
    };
    let ips = |addresses: &[&str]| json!({"ips": addresses.iter().map(|address| json!({"address": address})).collect::<Vec<_>>()});
    assert_eq!(compare(ips(&["10.0.1.7/32", "fd00:1::7/128"])), Ok(()));
    assert_eq!(compare(ips(&["10.0.1.7/32"])), Err(100));
    assert_eq!(compare(ips(&["10.0.1.8/32", "fd00:1::7/128"])), Err(100));
    assert_eq!(compare(json!({})), Err(100));
    assert_eq!(compare(Value::Null), Err(7));
}

#[test]
fn host_ports_are_read_as_runtimes_write_them() {
    let mut config = config();
    config["runtimeConfig"] = json!({"portMappings": [
        {"hostPort": 8000, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
        // containerd
        {"HostPort": 8000, "ContainerPort": 81, "Protocol": "udp", "HostIP": "fd00::1"},
        {"hostPort": 0, "containerPort": 82},
        {"hostPort": 8001, "containerPort": 83},
    ]});
    let config = Config::parse(config.to_string().as_bytes()).expect("a configuration");
    let shown: Vec<String> = config
        .port_mappings()
        .expect("host ports")
        .iter()
        .map(|mapping| format!("{mapping} {}", mapping.container_port))
        .collect();
    assert_eq!(shown, ["*:8000/TCP 80", "[fd00::1]:8000/UDP 81", "*:8001/TCP 83"]);
}

#[test]
fn lo_needs_no_agent() {
    let mut config = config();
    config["type"] = json!("loopback");
    config["name"] = json!("cni-loopback");
    let input = config.to_string();
    let mut variables = variables();
    variables.insert("CNI_IFNAME", "lo".to_owned());
    for command in ["DEL", "STATUS", "GC"] {
        variables.insert("CNI_COMMAND", command.to_owned());
        let outcome = run(|name| variables.get(name).cloned(), input.as_bytes());
        assert_eq!((outcome.exit_code, outcome.output.as_str()), (0, ""), "{command}");
    }
    for command in ["ADD", "CHECK"] {
        variables.insert("CNI_COMMAND", command.to_owned());
        assert_eq!(refused(&variables, input.as_bytes()), (100, "the pod's lo is not up".to_owned()));
    }
    variables.insert("CNI_NETNS", "../escape".to_owned());
    assert_eq!(refused(&variables, input.as_bytes()).0, 4);
}
