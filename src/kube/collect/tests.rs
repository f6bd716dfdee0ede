//! Passes over a directory, one after the other, by collectors of one node or two.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::kube::{Publisher, Source, Tables};
use crate::model::{IdentityLabels, NodeEndpoints, ObjectKey, PublishedEndpoint};

const HOUR: Duration = Duration::from_secs(3600);

/// A directory, and an agent of node `a`.
struct Lab {
    directory: TempDir,
    tables: Arc<Tables>,
    publisher: Publisher,
}

impl Lab {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("making a directory");
        let (source, tables) = (Source::Manifests(directory.path().to_owned()), Arc::new(Tables::new()));
        let publisher = Publisher::new(&source, "a", tables.clone()).expect("the node's name is good");
        Self { directory, tables, publisher }
    }

    fn collector(&self, node: &str, grace: Duration) -> Collector {
        let health = Arc::new(Health::default());
        Collector::new(self.directory.path(), node, grace, health).expect("the node's name is good")
    }

    async fn claim(&self, app: &str) -> IdentityId {
        self.publisher.claim_identity(&labels(app)).await.expect("claiming")
    }

    /// Says that a pod has each of these identities.
    async fn publish(&self, used: &[IdentityId]) {
        let endpoint = |id: &IdentityId| PublishedEndpoint {
            pod: ObjectKey::new("shop", id.to_string()),
            addresses: vec![],
            identity: *id,
            workload: None,
            host_ports: Vec::new(),
        };
        let endpoints = used.iter().map(endpoint).collect();
        let all = NodeEndpoints { node: "a".to_owned(), internal_addresses: vec![], endpoints };
        self.publisher.publish_endpoints(&all).await.expect("publishing");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("writing a file");
    }

    /// Every file with its content.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.directory.path()).expect("listing the directory");
        let file = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("our names are UTF-8");
            (name, fs::read(entry.path()).expect("reading a file"))
        };
        entries.map(file).collect()
    }

    /// The file of an identity.
    fn text(&self, id: IdentityId) -> Option<String> {
        fs::read_to_string(self.path(&format!("identity-{id}.yaml"))).ok()
    }

    fn is_marked(&self, id: IdentityId) -> bool {
        self.text(id).is_some_and(|text| text.contains(UNUSED_SINCE))
    }
}

fn labels(app: &str) -> IdentityLabels {
    IdentityLabels {
        namespace: "shop".to_owned(),
        service_account: "default".to_owned(),
        pod_labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        ..IdentityLabels::default()
    }
}

fn passes(collector: &mut Collector, count: usize) {
    for _ in 0..count {
        collector.pass().expect("nothing is broken");
    }
}

/// An Identity, as a person writes one.
fn identity(number: u32) -> String {
    let spec = "spec: {namespace: shop, serviceAccount: default}";
    format!("apiVersion: weir.dev/v1alpha1\nkind: Identity\nmetadata: {{name: '{number}'}}\n{spec}\n")
}

/// A NodeEndpoints with one pod.
fn endpoints(node: &str, id: IdentityId) -> String {
    let pod = format!("{{namespace: shop, name: web, addresses: [10.1.0.2], identity: {id}}}");
    let spec = format!("spec: {{node: {node}, endpoints: [{pod}]}}");
    format!("apiVersion: weir.dev/v1alpha1\nkind: NodeEndpoints\nmetadata: {{name: {node}-0}}\n{spec}\n")
}

#[tokio::test]
async fn what_nobody_uses_is_marked_and_then_deleted() {
    let lab = Lab::new();
    let (used, elsewhere, unused) =
        (lab.claim("used").await, lab.claim("elsewhere").await, lab.claim("x").await);
    lab.publish(&[used]).await;
    lab.write("by-hand.yaml", identity(300) + "---\n" + &endpoints("b", elsewhere));
    let before = lab.files();
    let mut collector = lab.collector("a", Duration::ZERO);
    passes(&mut collector, 1);
    assert_eq!(lab.files(), before, "one pass says nothing");
    passes(&mut collector, 1);
    assert!(lab.is_marked(unused));
    passes(&mut collector, 1);
    assert_eq!(lab.text(unused), None);
    passes(&mut collector, 5);
    let mut rest = before;
    rest.remove(&format!("identity-{unused}.yaml"));
    assert_eq!(lab.files(), rest);
}

#[tokio::test]
async fn the_grace_time_is_the_collectors_own() {
    let lab = Lab::new();
    let id = lab.claim("web").await;
    let mut patient = lab.collector("a", HOUR);
    passes(&mut patient, 10);
    let marked = lab.text(id);
    assert!(lab.is_marked(id), "marked once, and there");
    passes(&mut patient, 10);
    assert_eq!(lab.text(id), marked);
    // Another has seen the mark as long as its own grace time wants.
    passes(&mut lab.collector("b", Duration::ZERO), 1);
    assert_eq!(lab.text(id), None);
    passes(&mut patient, 1);
}

#[tokio::test]
async fn what_is_claimed_again_loses_its_mark_and_stays() {
    let lab = Lab::new();
    let id = lab.claim("web").await;
    let fresh = lab.text(id);
    let mut collector = lab.collector("b", HOUR);
    passes(&mut collector, 2);
    assert!(lab.is_marked(id));
    // As the source shows it.
    lab.tables.apply_identity(id, Arc::new(labels("web")), true);
    assert_eq!(lab.claim("web").await, id);
    assert_eq!(lab.text(id), fresh);
    assert!(lab.tables.to_claim.get(&id).is_none());
    lab.publish(&[id]).await;
    let mut hasty = lab.collector("c", Duration::ZERO);
    passes(&mut hasty, 5);
    assert_eq!(lab.text(id), fresh);
    lab.publish(&[]).await;
    passes(&mut hasty, 3);
    assert_eq!(lab.text(id), None);
}

#[tokio::test]
async fn what_is_claimed_right_before_it_is_taken_away_is_put_back() {
    let lab = Lab::new();
    let id = lab.claim("web").await;
    let fresh = lab.text(id);
    let collector = lab.collector("a", HOUR);
    passes(&mut lab.collector("a", HOUR), 2);
    let due = Version { id, text: lab.text(id).expect("it is marked and there") };
    lab.tables.apply_identity(id, Arc::new(labels("web")), true);
    lab.claim("web").await;
    assert!(!collector.take_away(&due).expect("taking it away"));
    assert_eq!(lab.files(), BTreeMap::from([(format!("identity-{id}.yaml"), fresh.unwrap().into_bytes())]));
    // Deleted by another.
    fs::remove_file(lab.path(&format!("identity-{id}.yaml"))).expect("removing it");
    assert!(!collector.take_away(&due).expect("taking away what is gone"));
    assert_eq!(lab.files(), BTreeMap::new());
}

#[tokio::test]
async fn a_stale_look_neither_marks_nor_deletes() {
    let lab = Lab::new();
    let id = lab.claim("web").await;
    let stale = Version { id, text: identity(id.0) };
    let (collector, before) = (lab.collector("a", HOUR), lab.files());
    assert!(!collector.mark(&stale).expect("marking"));
    assert!(!collector.delete(&stale).expect("deleting"));
    assert_eq!(lab.files(), before);
}

#[tokio::test]
async fn what_was_left_by_a_crash_is_put_back_or_was_made_anew() {
    let lab = Lab::new();
    let id = lab.claim("web").await;
    let (name, fresh) = (format!("identity-{id}.yaml"), lab.text(id).expect("it is there"));
    let taken = lab.path(&format!(".weir-taken-{id}-node-1.example"));
    // Each pass is the first of an agent: a second one would mark it.
    let pass = || passes(&mut lab.collector("node-1.example", HOUR), 1);
    for is_made_anew in [false, true] {
        fs::rename(lab.path(&name), &taken).expect("taking it away");
        if is_made_anew {
            fs::write(&taken, "as it was").expect("writing a file");
            lab.write(&name, &fresh);
        }
        pass();
        assert_eq!(lab.files(), BTreeMap::from([(name.clone(), fresh.clone().into_bytes())]));
    }
    // Killed while it was putting it back.
    fs::hard_link(lab.path(&name), &taken).expect("linking it");
    pass();
    assert_eq!(lab.files(), BTreeMap::from([(name, fresh.into_bytes())]));
}

#[tokio::test]
async fn what_another_agent_takes_away_is_let_alone_for_a_pass() {
    let lab = Lab::new();
    let id = lab.claim("web").await;
    let name = format!("identity-{id}.yaml");
    fs::rename(lab.path(&name), lab.path(&format!(".weir-taken-{id}-b"))).expect("taking it away");
    let (before, mut collector) = (lab.files(), lab.collector("a", HOUR));
    passes(&mut collector, 1);
    assert_eq!(lab.files(), before);
    passes(&mut collector, 1);
    assert_eq!(lab.files(), BTreeMap::from([(name, before.into_values().next().expect("it was away"))]));
}

#[tokio::test]
async fn a_pass_that_cannot_read_everything_deletes_nothing() {
    let lab = Lab::new();
    let (id, due) = (lab.claim("web").await, lab.claim("due").await);
    lab.publish(&[id]).await;
    let mut collector = lab.collector("a", Duration::ZERO);
    passes(&mut collector, 2);
    assert!(lab.is_marked(due));
    let (no_number, no_name) = (endpoints("b", IdentityId(7)), identity(1000).replace("shop", "7"));
    let rows: [(&str, &[u8], &str); 7] = [
        ("endpoints-b.yaml", b"kind: [", "is not YAML"),
        ("endpoints-b.yaml", b"", "is empty"),
        ("nodes.yaml", no_number.as_bytes(), "must be an identity's number"),
        ("nodes.yaml", b"a: {kind: NodeEndpoints", "is not YAML"),
        ("nodes.yaml", b"\xff", "is not UTF-8"),
        ("identity-1000.yaml", b"a: [", "is not YAML"),
        ("identity-1000.yaml", no_name.as_bytes(), "must be a string"),
    ];
    for (name, content, reason) in rows {
        lab.write(name, content);
        let before = lab.files();
        let error = collector.pass().expect_err(reason);
        let (error, path) = (format!("{error:#}"), lab.path(name));
        assert!(error.contains(reason) && error.contains(&path.display().to_string()), "{error}");
        assert_eq!(lab.files(), before, "{name}: {reason}");
        fs::remove_file(path).expect("removing a file");
    }
    // What is broken and has no endpoints is the business of others.
    lab.write("pods.yaml", "kind: [");
    passes(&mut collector, 1);
    assert!(lab.text(due).is_none() && lab.text(id).is_some());
}

#[tokio::test]
async fn files_of_others_are_not_touched() {
    let lab = Lab::new();
    for (name, content) in [
        ("mine.yaml", identity(300)),
        ("identity-0301.yaml", identity(301)),
        ("identity-302.yml", identity(302)),
        (
            "identity-303.json",
            r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}"#.into(),
        ),
        ("identity-304.yaml", identity(305)),
        ("identity-306.yaml", identity(306) + "---\n" + &identity(307)),
        ("identity-308.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n".to_owned()),
        ("identity-web.yaml", identity(309)),
        ("identity-310.yaml.bak", identity(310)),
        (".identity-311.yaml", identity(311)),
        (".weir-taken-mine", identity(312)),
        ("linked", identity(313)),
    ] {
        lab.write(name, content);
    }
    std::os::unix::fs::symlink("linked", lab.path("identity-313.yaml")).expect("making a link");
    fs::create_dir(lab.path("identity-314.yaml")).expect("making a directory");
    let before = fs::read_dir(lab.directory.path()).expect("listing it").count();
    let mut collector = lab.collector("a", Duration::ZERO);
    passes(&mut collector, 5);
    fs::remove_dir(lab.path("identity-314.yaml")).expect("it is there still");
    assert_eq!(lab.files().len(), before - 1);
    assert!(lab.files().values().all(|text| !String::from_utf8_lossy(text).contains(UNUSED_SINCE)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pass_that_cannot_be_made_is_reported_until_one_can() {
    let lab = Lab::new();
    lab.write("endpoints-b.yaml", "kind: [");
    let health = Arc::new(Health::default());
    let collector = Collector::new(lab.directory.path(), "a", Duration::ZERO, health.clone());
    let running = tokio::spawn(collector.expect("the node's name is good").run());
    let reported = async |is_reported: bool| {
        let awaited = async {
            while health.reports().is_empty() == is_reported {
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), awaited).await.expect("a pass, sooner or later");
        health.reports()
    };
    let reports = reported(true).await;
    assert_eq!(reports[0].source, COLLECTION);
    assert!(reports[0].reason.ends_with("; nothing is deleted"), "{reports:?}");
    fs::remove_file(lab.path("endpoints-b.yaml")).expect("removing a file");
    reported(false).await;
    running.abort();
}
