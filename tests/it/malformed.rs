//! Manifests that are wrong: said, skipped, and no reason to forget what was right.

use std::net::SocketAddr;

use anyhow::Result;

use crate::lab::{Lab, Setup, Via, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}
";

/// Files, and what is wrong in them.
const BROKEN: [(&str, &str); 6] = [
    ("not-yaml.yaml", "{[ this is no YAML"),
    ("no-kind.yaml", "apiVersion: v1\nmetadata: {name: x}\n"),
    ("no-name.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {}\n"),
    (
        "bad-selector.yaml",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: bad, namespace: shop}\nspec: {podSelector: {matchExpressions: [{key: a, operator: Sometimes}]}}\n",
    ),
    (
        "bad-cidr.yaml",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: cidr, namespace: shop}\nspec: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0/64}}]}]}\n",
    ),
    (
        "bad-type.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop}\nspec: {ports: seven}\n",
    ),
];

#[test]
fn broken_documents_are_reported_by_file_and_skipped() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").create()?;
    for (name, content) in BROKEN {
        lab.manifests().write_file(name, content)?;
    }
    // One good document among bad ones of its own file.
    lab.manifests().write_file("mixed.yaml", &format!("kind: Nonsense\n---{DENY}---\n- 1\n- 2\n"))?;
    let target = SocketAddr::new(server.address(true), 80);
    expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Denied)])?;
    for (name, _) in BROKEN {
        wait_for(&format!("a word about {name}"), || Ok(lab.node(1).log()?.contains(name)))?;
    }
    Ok(())
}

#[test]
fn the_last_good_version_of_a_broken_object_stays() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").create()?;
    let target = SocketAddr::new(server.address(true), 80);
    lab.manifests().write_file("deny.yaml", DENY)?;
    expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Denied)])?;
    lab.manifests().write_file("deny.yaml", &DENY.replace("policyTypes: [Ingress]", "policyTypes: 7"))?;
    wait_for("a word about deny.yaml", || Ok(lab.node(1).log()?.contains("deny.yaml")))?;
    expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Denied)])?;
    lab.manifests().remove_file("deny.yaml")?;
    expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Answered)])
}

/// Friends by TCP 80, and more that nobody can read.
const HALF_READ: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: half, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
  - from: [{podSelector: {matchLabels: {friend: 'yes'}}}, {ipBlock: {cidr: everywhere}}]
    ports: [{port: 80}, {port: eighty-one-and-more}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: for-whom, namespace: shop}
spec:
  podSelector: {matchLabels: {app: store}, matchExpressions: [{key: size, operator: Gt, values: ['3']}]}
  ingress: [{}]
";

#[test]
fn a5_a_policy_that_cannot_be_read_isolates_its_pods_also_after_a_restart() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let store = lab.pod(1, "shop/store").label("app", "store").create()?;
    let other = lab.pod(1, "shop/other").create()?;
    let friend = lab.pod(1, "shop/friend").label("friend", "yes").create()?;
    let target = SocketAddr::new(server.address(true), 80);
    lab.manifests().write_file("half.yaml", HALF_READ)?;
    let rows = [
        Row::new(&other, Via::Tcp, target, Expected::Denied),
        Row::new(&friend, Via::Tcp, target, Expected::Answered),
        Row::new(&friend, Via::Udp, target, Expected::Denied),
        Row::new(&friend, Via::Tcp, SocketAddr::new(other.address(true), 80), Expected::Answered),
        Row::new(&friend, Via::Tcp, SocketAddr::new(store.address(true), 80), Expected::Denied),
    ];
    expect_all(&rows)?;
    let listed = lab.node(1).weir(&["policy", "list"])?;
    assert!(listed.contains("spec.ingress[0].from[1].ipBlock.cidr"), "{listed}");
    lab.node(1).kill_agent()?;
    lab.node(1).start_agent()?;
    lab.node(1).wait_ready()?;
    expect_all(&rows)?;
    wait_for("a word about half.yaml", || Ok(lab.node(1).log()?.contains("isolates what it selects")))
}

#[test]
fn several_documents_of_one_file_come_and_go_with_it() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").label("friend", "yes").create()?;
    let other = lab.pod(1, "shop/other").create()?;
    let target = SocketAddr::new(server.address(false), 80);
    let friends = DENY.replace("name: deny", "name: friends").replace(
        "policyTypes: [Ingress]",
        "ingress: [{from: [{podSelector: {matchLabels: {friend: 'yes'}}}]}]",
    );
    lab.manifests().write_file("both.yaml", &format!("{DENY}---{friends}"))?;
    expect_all(&[
        Row::new(&client, Via::Tcp, target, Expected::Answered),
        Row::new(&other, Via::Tcp, target, Expected::Denied),
    ])?;
    lab.manifests().write_file("both.yaml", DENY)?;
    expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Denied)])?;
    lab.manifests().remove_file("both.yaml")?;
    expect_all(&[
        Row::new(&client, Via::Tcp, target, Expected::Answered),
        Row::new(&other, Via::Tcp, target, Expected::Answered),
    ])
}
