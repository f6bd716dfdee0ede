//! Claims and endpoints in a directory; the same claims against an API server are a
//! matter for the cluster tests.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::kube::Health;
use crate::kube::kind::ObjectKind;
use crate::kube::kinds;
use crate::model::PublishedEndpoint;

fn labels(app: &str) -> IdentityLabels {
    IdentityLabels {
        namespace: "shop".to_owned(),
        service_account: "default".to_owned(),
        pod_labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        ..IdentityLabels::default()
    }
}

fn publisher(directory: &TempDir, node: &str) -> Arc<Publisher> {
    let source = Source::Manifests(directory.path().to_owned());
    Arc::new(Publisher::new(&source, node, Arc::new(Tables::new())).expect("the node's name is good"))
}

/// One whose labels all hash to the same number.
fn colliding(directory: &TempDir, node: &str) -> Arc<Publisher> {
    let publisher = publisher(directory, node);
    let mut publisher = Arc::into_inner(publisher).expect("nobody else has it");
    publisher.number = |_, attempt| IdentityId(1000 + attempt);
    Arc::new(publisher)
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("making a directory")
}

fn files(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory.path()).expect("listing the directory");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string();
    let mut names: Vec<String> = entries.map(|entry| name(entry).expect("UTF-8")).collect();
    names.sort();
    names
}

fn endpoints(count: usize) -> NodeEndpoints {
    let endpoint = |number: usize| PublishedEndpoint {
        pod: ObjectKey::new("shop", format!("web-{number:04}")),
        addresses: vec![std::net::Ipv4Addr::from(0x0a00_0000 + number as u32).into()],
        identity: IdentityId(4711),
        workload: None,
        host_ports: Vec::new(),
    };
    NodeEndpoints {
        node: "a".to_owned(),
        internal_addresses: vec!["10.1.0.1".parse().expect("an address")],
        endpoints: (0..count).map(endpoint).collect(),
    }
}

#[tokio::test]
async fn a_claim_is_a_file_and_a_row_at_once() {
    let directory = directory();
    let publisher = publisher(&directory, "a");
    let id = publisher.claim_identity(&labels("web")).await.expect("claiming");
    assert_eq!(id, identity::number(&labels("web"), 0));
    assert_eq!(publisher.tables.identities.get(&id).as_deref(), Some(&labels("web")));
    assert_eq!(files(&directory), [format!("identity-{id}.yaml")]);
    assert_eq!(publisher.claim_identity(&labels("web")).await.expect("claiming again"), id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_claims_of_the_same_labels_get_the_same_number() {
    let directory = directory();
    let publishers = [colliding(&directory, "a"), colliding(&directory, "b")];
    for round in 0..25 {
        let claims = (0..4).map(|number| {
            let publisher = publishers[number % 2].clone();
            tokio::spawn(async move { publisher.claim_identity(&labels(&format!("web-{round}"))).await })
        });
        let ids = futures::future::join_all(claims.collect::<Vec<_>>()).await;
        let ids: Vec<_> = ids.into_iter().map(|id| id.expect("no panic").expect("claiming").0).collect();
        assert_eq!(ids, [1000 + round; 4]);
    }
    assert_eq!(files(&directory).len(), 25, "no temporary file is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_claims_of_different_labels_with_one_hash_get_different_numbers() {
    let directory = directory();
    let claims = (0..16).map(|number| {
        let publisher = colliding(&directory, &format!("node-{number}"));
        tokio::spawn(async move { publisher.claim_identity(&labels(&format!("web-{number}"))).await })
    });
    let ids = futures::future::join_all(claims.collect::<Vec<_>>()).await;
    let mut ids: Vec<_> = ids.into_iter().map(|id| id.expect("no panic").expect("claiming").0).collect();
    ids.sort();
    assert_eq!(ids, (1000..1016).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_cannot_be_read_belongs_to_somebody_else() {
    let directory = directory();
    fs::write(directory.path().join("identity-1000.yaml"), "").expect("writing a file");
    fs::write(directory.path().join("identity-1001.yaml"), "a: [").expect("writing a file");
    let id = colliding(&directory, "a").claim_identity(&labels("web")).await.expect("claiming");
    assert_eq!(id, IdentityId(1002));
}

#[tokio::test]
async fn claiming_ends_when_every_number_is_taken() {
    let directory = directory();
    let publisher = publisher(&directory, "a");
    let mut publisher = Arc::into_inner(publisher).expect("nobody else has it");
    publisher.number = |_, _| IdentityId(1000);
    publisher.claim_identity(&labels("web")).await.expect("the first claim");
    let error = publisher.claim_identity(&labels("api")).await.expect_err("there is no second number");
    assert_eq!(error.to_string(), "claiming an identity: no free number after 64 attempts");
}

#[tokio::test]
async fn an_older_list_does_not_take_a_claim_away_and_a_newer_one_does() {
    let directory = directory();
    let publisher = publisher(&directory, "a");
    let mut rows = kinds::Identity::rows(&publisher.tables);
    let id = publisher.claim_identity(&labels("web")).await.expect("claiming");
    rows.reset(vec![]);
    assert!(publisher.tables.identities.get(&id).is_some());
    let claimed = kinds::ClaimedIdentity { number: id, labels: Arc::new(labels("web")), is_unused: false };
    rows.apply(&ObjectKey::new("", id.to_string()), Arc::new(claimed));
    rows.reset(vec![]);
    assert!(publisher.tables.identities.get(&id).is_none());
}

#[tokio::test]
async fn endpoints_are_read_back_as_they_were_published() {
    let directory = directory();
    let publisher = publisher(&directory, "a");
    let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
    let reader =
        crate::kube::run(Source::Manifests(directory.path().to_owned()), tables.clone(), health.clone());
    let reader = tokio::spawn(reader);
    for count in [0, 1, 450, 3] {
        publisher.publish_endpoints(&endpoints(count)).await.expect("publishing");
        let mut changes = tables.node_endpoints.subscribe();
        let equal = tokio::time::timeout(Duration::from_secs(20), async {
            while tables.node_endpoints.get(&Arc::from("a")).as_deref() != Some(&endpoints(count)) {
                changes.changed().await.expect("the table lives");
            }
        });
        assert!(equal.await.is_ok(), "{count} endpoints never came");
    }
    assert_eq!((files(&directory), health.reports()), (vec!["endpoints-a.yaml".to_owned()], vec![]));
    reader.abort();
}

#[tokio::test]
async fn endpoints_that_did_not_change_are_not_written() {
    use std::os::unix::fs::MetadataExt;
    let directory = directory();
    let publisher = publisher(&directory, "a");
    let inode = || fs::metadata(directory.path().join("endpoints-a.yaml")).expect("the file is there").ino();
    publisher.publish_endpoints(&endpoints(3)).await.expect("publishing");
    let before = inode();
    publisher.publish_endpoints(&endpoints(3)).await.expect("publishing");
    assert_eq!(inode(), before);
    assert!(
        publisher.publish_endpoints(&NodeEndpoints { node: "b".to_owned(), ..endpoints(3) }).await.is_err()
    );
}

#[test]
fn a_pod_stays_in_its_object() {
    let sizes =
        |parts: &[NodeEndpointsSpec]| parts.iter().map(|part| part.endpoints.len()).collect::<Vec<_>>();
    let mut packing = Packing::default();
    assert_eq!(sizes(&packing.pack(&endpoints(0))), [0]);
    let before = packing.pack(&endpoints(450));
    assert_eq!(sizes(&before), [200, 200, 50]);
    let mut fewer = endpoints(450);
    fewer.endpoints.remove(10);
    let after = packing.pack(&fewer);
    assert_eq!(sizes(&after), [199, 200, 50]);
    assert_eq!(after[1..], before[1..]);
    let back = packing.pack(&endpoints(450));
    assert_eq!(back, before);
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let source = Source::Manifests(PathBuf::from("/nowhere"));
    for name in ["", "..", "../a", "a/b", "A", "a\n", &"a".repeat(254), &"a".repeat(201)] {
        assert!(Publisher::new(&source, name, Arc::new(Tables::new())).is_err(), "{name:?}");
    }
}
