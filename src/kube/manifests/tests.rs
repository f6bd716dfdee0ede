//! The life of a directory: most tests look at it themselves, so that nothing depends
//! on time; the last ones have it watched.

use tempfile::TempDir;

use super::*;
use crate::model::ObjectKey;

/// A directory, and the tables that it fills.
struct Lab {
    directory: TempDir,
    tables: Arc<Tables>,
    health: Arc<Health>,
    state: Directory,
}

impl Lab {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("making a directory");
        let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
        let state = Directory::new(directory.path().to_owned(), tables.clone(), health.clone());
        Self { directory, tables, health, state }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).expect("writing a file");
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.path().join(name)).expect("removing a file");
    }

    fn rename(&self, from: &str, to: &str) {
        let path = self.directory.path();
        fs::rename(path.join(from), path.join(to)).expect("renaming a file");
    }

    fn scan(&mut self) {
        self.state.scan(None).expect("the directory is there");
    }

    /// Every pod, with the value of its label `v`.
    fn pods(&self) -> Vec<String> {
        let pods = self.tables.pods.snapshot();
        pods.iter()
            .map(|(key, pod)| format!("{}={}", key.name, pod.labels.get("v").map_or("", |v| v)))
            .collect()
    }

    fn reports(&self) -> Vec<String> {
        let show = |report: Report| {
            let number = report.document.map_or(String::new(), |number| format!("#{number}"));
            let object = report.object.map_or(String::new(), |object| format!(" {object}"));
            format!("{}{number}{object}: {}", report.source, report.reason)
        };
        self.health.reports().into_iter().map(show).collect()
    }
}

fn pod(name: &str, version: &str) -> String {
    format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{v: {version}}}}}\n")
}

const BROKEN_POD_B: &str = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: b}\nspec: {containers: 7}\n";

#[test]
fn files_come_change_and_go() {
    let mut lab = Lab::new();
    lab.scan();
    assert!(lab.tables.all_synced());
    lab.write("1.yaml", &(pod("a", "x1") + &pod("b", "x1")));
    lab.write("2.yml", &pod("c", "x1"));
    lab.write("3.json", r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "d"}}"#);
    lab.write(".hidden.yaml", &pod("no", "x1"));
    lab.write("README.md", "no: [");
    lab.scan();
    assert_eq!(lab.pods(), ["a=x1", "b=x1", "c=x1", "d="]);
    lab.write("1.yaml", &pod("b", "x2"));
    lab.scan();
    assert_eq!(lab.pods(), ["b=x2", "c=x1", "d="]);
    lab.remove("2.yml");
    lab.scan();
    assert_eq!(lab.pods(), ["b=x2", "d="]);
    let revision = lab.tables.pods.subscribe().borrow().revision;
    lab.rename("1.yaml", "9.yaml");
    lab.scan();
    assert_eq!(lab.tables.pods.subscribe().borrow().revision, revision, "a moved object is never away");
    lab.rename("9.yaml", "9.yaml.disabled");
    lab.scan();
    assert_eq!(lab.pods(), ["d="]);
    assert_eq!(lab.reports(), [""; 0]);
}

#[test]
fn only_changed_files_are_read() {
    let mut lab = Lab::new();
    lab.write("1.yaml", &pod("a", "x1"));
    lab.write("2.yaml", &pod("b", "x1"));
    lab.scan();
    lab.scan();
    assert_eq!(lab.state.files_read, 2);
    lab.write("2.yaml", &pod("b", "x22"));
    lab.scan();
    assert_eq!((lab.state.files_read, lab.pods()), (3, vec!["a=x1".to_owned(), "b=x22".to_owned()]));
}

#[test]
fn a_broken_document_keeps_the_last_good_version() {
    let mut lab = Lab::new();
    lab.write("1.yaml", &(pod("a", "x1") + &pod("b", "x1")));
    lab.scan();
    lab.write("1.yaml", &(pod("a", "x2") + BROKEN_POD_B));
    lab.scan();
    assert_eq!(lab.pods(), ["a=x2", "b=x1"]);
    let reason = "spec.containers: is a number, must be a list; the last good version stays";
    assert_eq!(lab.reports(), [format!("1.yaml#2 Pod default/b: {reason}")]);
    lab.write("1.yaml", &(pod("a", "x3") + &pod("b", "x3")));
    lab.scan();
    assert_eq!((lab.pods(), lab.reports()), (vec!["a=x3".to_owned(), "b=x3".to_owned()], vec![]));
}

#[test]
fn a_broken_document_that_never_was_good_is_skipped() {
    let mut lab = Lab::new();
    lab.write("1.yaml", &(BROKEN_POD_B.to_owned() + &pod("a", "x1")));
    lab.scan();
    assert_eq!(lab.pods(), ["a=x1"]);
    assert_eq!(
        lab.reports(),
        ["1.yaml#1 Pod default/b: spec.containers: is a number, must be a list; skipped"]
    );
}

#[test]
fn a_file_that_cannot_be_read_keeps_all_until_it_is_good_or_gone() {
    let mut lab = Lab::new();
    for broken in ["a: [", "", "\n  \n", "\u{0}"] {
        lab.write("1.yaml", &(pod("a", "x1") + &pod("b", "x1")));
        lab.scan();
        lab.write("1.yaml", broken);
        lab.scan();
        assert_eq!(lab.pods(), ["a=x1", "b=x1"], "{broken:?}");
        assert_eq!(lab.reports().len(), 1, "{broken:?}");
        // Which object the unreadable document is nobody knows: b stays too.
        lab.write("1.yaml", &(pod("a", "x2") + "---\na: ["));
        lab.scan();
        assert_eq!(lab.pods(), ["a=x2", "b=x1"]);
        lab.write("1.yaml", "# nothing any more\n");
        lab.scan();
        assert_eq!((lab.pods(), lab.reports()), (vec![], vec![]), "{broken:?}");
    }
    fs::write(lab.directory.path().join("1.yaml"), [0xff, 0xfe]).expect("writing a file");
    lab.scan();
    assert!(lab.reports()[0].starts_with("1.yaml: is not UTF-8"), "{:?}", lab.reports());
    lab.remove("1.yaml");
    lab.scan();
    assert_eq!(lab.reports(), [""; 0]);
}

#[test]
fn a_broken_file_that_goes_takes_its_objects_along() {
    let mut lab = Lab::new();
    lab.write("1.yaml", &pod("a", "x1"));
    lab.scan();
    lab.write("1.yaml", "a: [");
    lab.scan();
    lab.remove("1.yaml");
    lab.scan();
    assert_eq!((lab.pods(), lab.reports()), (vec![], vec![]));
}

#[test]
fn of_two_files_the_first_by_name_counts() {
    let mut lab = Lab::new();
    lab.write("2.yaml", &(pod("a", "x2") + &pod("a", "x3")));
    lab.scan();
    assert_eq!(lab.pods(), ["a=x2"]);
    lab.write("1.yaml", &pod("a", "x1"));
    lab.scan();
    assert_eq!(lab.pods(), ["a=x1"]);
    assert_eq!(
        lab.reports(),
        [
            "2.yaml#2 Pod default/a: is defined above in this file already; the first one counts",
            "2.yaml Pod default/a: is defined in 1.yaml too, which counts",
        ]
    );
    lab.remove("1.yaml");
    lab.scan();
    assert_eq!(lab.pods(), ["a=x2"]);
}

#[test]
fn objects_that_need_no_row_have_none() {
    let mut lab = Lab::new();
    let service =
        |spec: &str| format!("{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {spec}}}");
    lab.write("1.yaml", &service("{clusterIP: 10.0.0.1}"));
    lab.scan();
    assert!(lab.tables.services.get(&ObjectKey::new("default", "a")).is_some());
    lab.write("1.yaml", &service("{type: ExternalName}"));
    lab.scan();
    assert!(lab.tables.services.snapshot().is_empty());
}

#[test]
fn a_node_s_endpoints_are_put_together() {
    let mut lab = Lab::new();
    let part = |number: usize, pods: &[&str]| {
        let pods: Vec<_> = pods
            .iter()
            .map(|pod| format!("{{namespace: n, name: {pod}, addresses: [], identity: 300}}"))
            .collect();
        format!(
            "---\n{{apiVersion: weir.dev/v1alpha1, kind: NodeEndpoints, metadata: {{name: n1-{number}}}, \
             spec: {{node: n1, internalAddresses: [10.0.0.1], endpoints: [{}]}}}}\n",
            pods.join(", ")
        )
    };
    let pods = |lab: &Lab| {
        let row = lab.tables.node_endpoints.get(&Arc::from("n1"));
        row.map(|row| row.endpoints.iter().map(|endpoint| endpoint.pod.name.to_string()).collect::<Vec<_>>())
    };
    lab.write("1.yaml", &(part(0, &["a", "c"]) + &part(1, &["b"])));
    lab.scan();
    assert_eq!(pods(&lab), Some(vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]));
    lab.write("1.yaml", &part(1, &["b"]));
    lab.scan();
    assert_eq!(pods(&lab), Some(vec!["b".to_owned()]));
    lab.remove("1.yaml");
    lab.scan();
    assert_eq!(pods(&lab), None);
}

#[test]
fn a_directory_that_goes_changes_nothing() {
    let mut lab = Lab::new();
    lab.write("1.yaml", &pod("a", "x1"));
    lab.scan();
    let away = lab.directory.path().with_extension("away");
    fs::rename(lab.directory.path(), &away).expect("renaming the directory");
    assert!(lab.state.scan(None).is_err());
    assert_eq!(lab.pods(), ["a=x1"]);
    assert!(lab.health.kinds().iter().all(|(_, health)| !health.is_connected && health.errors_total == 1));
    fs::rename(&away, lab.directory.path()).expect("renaming the directory back");
    lab.scan();
    assert!(lab.health.kinds().iter().all(|(_, health)| health.is_connected && health.is_synced));
    assert_eq!(lab.reports(), [""; 0]);
}

/// Waits until the pods are these.
async fn wait_for_pods(lab: &Lab, expected: &[&str]) {
    let mut changes = lab.tables.pods.subscribe();
    let equal = tokio::time::timeout(Duration::from_secs(20), async {
        while lab.pods() != expected {
            changes.changed().await.expect("the table lives");
        }
    });
    assert!(equal.await.is_ok(), "{:?} never became {expected:?}", lab.pods());
}

#[tokio::test]
async fn a_watched_directory_is_followed() {
    let lab = Lab::new();
    let running = tokio::spawn(run(lab.directory.path().to_owned(), lab.tables.clone(), lab.health.clone()));
    lab.tables.wait_synced().await;
    lab.write("1.yaml", &pod("a", "x1"));
    wait_for_pods(&lab, &["a=x1"]).await;
    lab.write("1.yaml", &pod("a", "x2"));
    wait_for_pods(&lab, &["a=x2"]).await;
    lab.write("temporary", &pod("a", "x3"));
    lab.rename("temporary", "1.yaml");
    wait_for_pods(&lab, &["a=x3"]).await;
    lab.rename("1.yaml", "2.yaml");
    lab.write("1.yaml", &pod("b", "x1"));
    wait_for_pods(&lab, &["a=x3", "b=x1"]).await;
    lab.remove("2.yaml");
    wait_for_pods(&lab, &["b=x1"]).await;
    running.abort();
}

#[tokio::test]
async fn a_watched_directory_may_come_late_and_be_replaced() {
    let lab = Lab::new();
    let path = lab.directory.path().join("manifests");
    let running = tokio::spawn(run(path.clone(), lab.tables.clone(), lab.health.clone()));
    fs::create_dir(&path).expect("making a directory");
    lab.write("manifests/1.yaml", &pod("a", "x1"));
    wait_for_pods(&lab, &["a=x1"]).await;
    lab.rename("manifests", "old");
    fs::create_dir(&path).expect("making a directory");
    lab.write("manifests/1.yaml", &pod("b", "x1"));
    wait_for_pods(&lab, &["b=x1"]).await;
    running.abort();
}

/// A mounted ConfigMap: the files are links through a link that is swapped.
#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let lab = Lab::new();
    let path = lab.directory.path();
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, path.join(name)).expect("making a link");
    for version in ["x1", "x2"] {
        fs::create_dir(path.join(format!("..{version}"))).expect("making a directory");
        lab.write(&format!("..{version}/1.yaml"), &pod("a", version));
    }
    link("..x1", "..data");
    link("..data/1.yaml", "1.yaml");
    let running = tokio::spawn(run(path.to_owned(), lab.tables.clone(), lab.health.clone()));
    wait_for_pods(&lab, &["a=x1"]).await;
    link("..x2", "..next");
    lab.rename("..next", "..data");
    wait_for_pods(&lab, &["a=x2"]).await;
    running.abort();
}
