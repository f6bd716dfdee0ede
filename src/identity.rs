//! Identities from pods: which labels count, and which number they hash to.
//!
//! An identity is everything of a pod that policy can ask for. What differs in every
//! pod of one workload is left out, or each pod would be an identity of its own, unless
//! a policy does ask for it: then pods that have it get identities with it. Pod
//! labels and namespace labels stay in two fields: no pod can claim its namespace's
//! labels, and the namespace's name comes from its key, never from a label.

use std::collections::BTreeSet;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::model::{
    IdentityId, IdentityLabels, Labels, Namespace, Pod, Requirement, SERVICE_ACCOUNT_KEY, Selector,
};

/// The label that every namespace has, with its name as the value.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Pod labels that controllers set anew for every revision or run, and that hardly anybody selects by: left
/// out unless a pattern says otherwise. A StatefulSet's `pod-name` and `pod-index` stay: policies do
/// select by them, there are only as many as pods, and they come back with every pod.
pub const PASSING: [&str; 8] = [
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "batch.kubernetes.io/job-name",
    "controller-revision-hash",
    "controller-uid",
    "job-name",
    "pod-template-generation",
    "pod-template-hash",
];

/// Which pod labels are part of identities. A label that is not becomes part of them where a policy
/// asks for it.
///
/// Patterns decide, as Cilium's setting `labels` has them: a pattern is the beginning of a label's key, `!` in
/// front of it leaves such labels out, the longest pattern that matches decides. Where any
/// pattern takes labels in, those that none matches are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelFilter {
    patterns: Vec<Pattern>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    key: String,
    /// The whole key, not only its beginning.
    is_exact: bool,
    is_excluded: bool,
}

impl Default for LabelFilter {
    fn default() -> Self {
        let dropped = |key: &&str| Pattern { key: (*key).to_owned(), is_exact: true, is_excluded: true };
        Self { patterns: PASSING.iter().map(dropped).collect() }
    }
}

impl FromStr for LabelFilter {
    type Err = String;

    /// Patterns beside the default ones, separated by spaces or commas, as `!statefulset.kubernetes.io/.* app`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut filter = Self::default();
        for word in text.split([' ', ',']).filter(|word| !word.is_empty()) {
            filter.patterns.push(word.parse()?);
        }
        Ok(filter)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut key = text;
        let mut is_excluded = false;
        // `k8s:!app` and `!k8s:app` are the same.
        loop {
            if let Some(rest) = key.strip_prefix('!') {
                (key, is_excluded) = (rest, true);
            } else if let Some(rest) = key.strip_prefix("k8s:").or_else(|| key.strip_prefix("any:")) {
                key = rest;
            } else {
                break;
            }
        }
        let (key, is_exact) = match (key.strip_suffix(".*"), key.strip_suffix('$')) {
            (Some(beginning), _) => (beginning, false),
            (_, Some(whole)) => (whole, true),
            _ => (key, false),
        };
        let key = key.strip_prefix('^').unwrap_or(key).replace("\\.", ".");
        let is_literal = |letter: char| letter.is_ascii_alphanumeric() || "-_./".contains(letter);
        if !key.chars().all(is_literal) || (key.is_empty() && is_exact) {
            return Err(format!(
                "{text:?} is no pattern: it must be the beginning of a label's key, or a whole key and '$'"
            ));
        }
        Ok(Self { key, is_exact, is_excluded })
    }
}

impl LabelFilter {
    /// True for a pod label that is no part of identities unless a policy asks for it.
    pub fn drops(&self, label: &str) -> bool {
        if is_reserved(label) {
            return label != SERVICE_ACCOUNT_KEY;
        }
        let matches = |pattern: &&Pattern| match pattern.is_exact {
            true => pattern.key == label,
            false => label.starts_with(&pattern.key),
        };
        // Of equally long ones the last: what somebody set counts before the default ones.
        match self.patterns.iter().filter(matches).max_by_key(|pattern| pattern.key.len()) {
            Some(longest) => longest.is_excluded,
            None => self.patterns.iter().any(|pattern| !pattern.is_excluded),
        }
    }

    /// The labels that it drops and that `selector` asks pods for.
    pub fn dropped<'a>(&self, selector: &'a Selector) -> impl Iterator<Item = &'a str> {
        let keys = selector.requirements.iter().map(|requirement| match requirement {
            Requirement::In(key, _)
            | Requirement::NotIn(key, _)
            | Requirement::Exists(key)
            | Requirement::DoesNotExist(key) => key.as_str(),
        });
        keys.filter(|key| self.drops(key))
    }

    /// Those of them that a pod must not have: that an identity is without one may mean that its pod's node has
    /// yet to give it another identity.
    pub fn undecidable<'a>(&self, selector: &'a Selector) -> impl Iterator<Item = &'a str> {
        let negative = selector.requirements.iter().filter_map(|requirement| match requirement {
            Requirement::NotIn(key, _) | Requirement::DoesNotExist(key) => Some(key.as_str()),
            Requirement::In(..) | Requirement::Exists(_) => None,
        });
        negative.filter(|key| self.drops(key))
    }

    /// Everything of `pod` that policy can ask for; of the labels that are dropped those that are `asked` for.
    pub fn labels_of(
        &self,
        pod: &Pod,
        namespace: Option<&Namespace>,
        asked: &BTreeSet<String>,
    ) -> IdentityLabels {
        let mut namespace_labels = namespace.map_or_else(Labels::new, |namespace| namespace.labels.clone());
        namespace_labels.insert(NAMESPACE_NAME.to_owned(), pod.key.namespace.to_string());
        let mut named_ports = pod.named_ports.clone();
        for ports in named_ports.values_mut() {
            ports.sort_unstable();
            ports.dedup();
        }
        let counts =
            |(key, _): &(&String, &String)| !is_reserved(key) && (asked.contains(*key) || !self.drops(key));
        let pod_labels = pod.labels.iter().filter(counts);
        IdentityLabels {
            namespace: pod.key.namespace.to_string(),
            namespace_labels,
            service_account: pod.service_account.clone(),
            pod_labels: pod_labels.map(|(key, value)| (key.clone(), value.clone())).collect(),
            named_ports,
        }
    }
}

/// True for keys under which flows and Cilium's policies have what is no label of the pod: its namespace, the
/// namespace's labels, its service account. A pod that sets such a label would pass for another.
fn is_reserved(key: &str) -> bool {
    key == "io.kubernetes.pod.namespace" || key.starts_with("io.cilium.k8s.")
}

/// The number to claim for `labels`: the same on every node. Where it is taken by
/// other labels, the next attempt gives another.
pub fn number(labels: &IdentityLabels, attempt: u32) -> IdentityId {
    let canonical = serde_json::to_vec(labels).expect("labels are strings and numbers, in sorted maps");
    let digest = Sha256::new().chain_update(&canonical).chain_update(attempt.to_be_bytes()).finalize();
    let bits = u32::from_be_bytes([0, digest[0], digest[1], digest[2]]);
    let first = IdentityId::FIRST_CLUSTER.0;
    IdentityId(first + bits % (IdentityId::LAST_CLUSTER.0 - first + 1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::{NamedPort, ObjectKey, Protocol};

    const NONE: BTreeSet<String> = BTreeSet::new();

    fn labels_of(pod: &Pod, namespace: Option<&Namespace>, asked: &BTreeSet<String>) -> IdentityLabels {
        LabelFilter::default().labels_of(pod, namespace, asked)
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    fn pod(pairs: &[(&str, &str)]) -> Pod {
        Pod {
            key: ObjectKey::new("shop", "web-7d4b-x2x9"),
            uid: "5b3e".to_owned(),
            labels: labels(pairs),
            service_account: "default".to_owned(),
            node: Some("a".to_owned()),
            host_network: false,
            is_terminal: false,
            is_ready: true,
            named_ports: BTreeMap::new(),
            marks: Default::default(),
            workload: None,
        }
    }

    #[test]
    fn a19_which_labels_make_identities_is_a_setting() {
        let asked =
            ["app", "apps.example/x", "statefulset.kubernetes.io/pod-name", "workflow-id", "job-name"];
        for (patterns, kept) in [
            ("", "app apps.example/x statefulset.kubernetes.io/pod-name workflow-id"),
            ("!statefulset.kubernetes.io/.* !workflow", "app apps.example/x"),
            ("k8s:!statefulset\\.kubernetes\\.io, !k8s:workflow-id$", "app apps.example/x"),
            ("app", "app apps.example/x"),
            ("k8s:app$ workflow", "app workflow-id"),
            // The longest decides.
            ("!app apps", "apps.example/x"),
            ("job-name$", "job-name"),
            (".* !app$", "apps.example/x statefulset.kubernetes.io/pod-name workflow-id"),
        ] {
            let filter: LabelFilter = patterns.parse().expect(patterns);
            let left: Vec<&str> = asked.into_iter().filter(|label| !filter.drops(label)).collect();
            assert_eq!(left.join(" "), kept, "{patterns}");
        }
        for wrong in ["a(b|c)", "!$", "app b[0-9]+", "äpp"] {
            assert!(wrong.parse::<LabelFilter>().is_err(), "{wrong}");
        }
    }

    /// A pod that says of itself what Weir says of it: its namespace, the namespace's labels, its service account.
    #[test]
    fn a_pod_cannot_name_itself_another() {
        let own = pod(&[("app", "web")]);
        let keys = [
            "io.kubernetes.pod.namespace",
            "io.cilium.k8s.namespace.labels.team",
            "io.cilium.k8s.policy.serviceaccount",
        ];
        let mut forged = own.clone();
        forged.labels.extend(keys.map(|key| (key.to_owned(), "red".to_owned())));
        for asked in [NONE, keys.map(str::to_owned).into()] {
            assert_eq!(labels_of(&forged, None, &asked), labels_of(&own, None, &asked));
        }
    }

    #[test]
    fn pods_of_one_workload_share_an_identity() {
        let one = pod(&[("app", "web"), ("pod-template-hash", "7d4b"), ("controller-revision-hash", "0")]);
        let two = pod(&[("app", "web"), ("pod-template-hash", "99aa"), ("controller-uid", "1")]);
        assert_eq!(labels_of(&one, None, &NONE), labels_of(&two, None, &NONE));
        assert_eq!(
            labels_of(
                &one,
                Some(&Namespace {
                    labels: labels(&[("team", "red")]),
                    is_partial: false,
                    ..Namespace::default()
                }),
                &NONE
            ),
            IdentityLabels {
                namespace: "shop".to_owned(),
                namespace_labels: labels(&[(NAMESPACE_NAME, "shop"), ("team", "red")]),
                service_account: "default".to_owned(),
                pod_labels: labels(&[("app", "web")]),
                named_ports: BTreeMap::new(),
            }
        );
    }

    #[test]
    fn a_label_of_a_run_counts_where_a_policy_asks_for_it() {
        let job = pod(&[("app", "web"), ("job-name", "night"), ("controller-uid", "1")]);
        let asked = BTreeSet::from(["job-name".to_owned()]);
        let expected = labels(&[("app", "web"), ("job-name", "night")]);
        assert_eq!(labels_of(&job, None, &asked).pod_labels, expected);
        let web = pod(&[("app", "web")]);
        assert_eq!(labels_of(&web, None, &asked), labels_of(&web, None, &NONE));
    }

    #[test]
    fn the_namespace_name_cannot_be_claimed_by_a_label() {
        let liar = Namespace {
            labels: labels(&[(NAMESPACE_NAME, "kube-system")]),
            is_partial: false,
            ..Namespace::default()
        };
        let pod = pod(&[(NAMESPACE_NAME, "kube-system")]);
        let labels_of_liar = labels_of(&pod, Some(&liar), &NONE);
        assert_eq!(labels_of_liar.namespace_labels, labels(&[(NAMESPACE_NAME, "shop")]));
        assert_eq!(labels_of_liar.namespace, "shop");
    }

    #[test]
    fn order_of_named_ports_does_not_matter() {
        let tcp = NamedPort { protocol: Protocol::Tcp, port: 53 };
        let udp = NamedPort { protocol: Protocol::Udp, port: 53 };
        let mut one = pod(&[]);
        one.named_ports.insert("dns".to_owned(), vec![udp, tcp]);
        let mut two = pod(&[]);
        two.named_ports.insert("dns".to_owned(), vec![tcp, udp, tcp]);
        assert_eq!(number(&labels_of(&one, None, &NONE), 0), number(&labels_of(&two, None, &NONE), 0));
    }

    #[test]
    fn numbers_are_the_clusters_and_never_change() {
        let labels = labels_of(&pod(&[("app", "web")]), None, &NONE);
        assert_eq!(number(&labels, 0), IdentityId(8646325));
        assert_ne!(number(&labels, 0), number(&labels, 1));
        for attempt in 0..10_000 {
            let number = number(&labels, attempt);
            assert!(!number.is_reserved() && !number.is_local());
        }
    }
}
