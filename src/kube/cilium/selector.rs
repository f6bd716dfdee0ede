//! Cilium's selectors: labels with their source, `k8s:app` or `app`, in one space with what Weir keeps
//! apart: the namespace's name and labels, the service account, and names that are reserved.

use std::collections::BTreeSet;

use super::Reader;
use crate::identity::NAMESPACE_NAME;
use crate::kube::convert::{Field, Result, items, names};
use crate::kube::kinds::requirement;
use crate::model::{Entity, Peer, Requirement, SERVICE_ACCOUNT_KEY, Selector, Subject};

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const CLUSTER: &str = "io.cilium.k8s.policy.cluster";
/// What a cluster is called that has no name.
const CLUSTER_NAME: &str = "default";

/// What a key asks about.
enum Key {
    /// The namespace: its name, or a label.
    Namespace(String),
    /// The pod.
    Pod(String),
    /// The cluster's name.
    Cluster,
    /// A reserved name.
    Reserved(String),
    /// A source that no pod here has labels of.
    Foreign,
}

impl Key {
    fn of(text: &str) -> Self {
        let (source, key) = text.split_once(':').unwrap_or(("any", text));
        match (source, key) {
            ("reserved", name) => Self::Reserved(name.to_owned()),
            ("k8s" | "any", NAMESPACE) => Self::Namespace(NAMESPACE_NAME.to_owned()),
            ("k8s" | "any", CLUSTER) => Self::Cluster,
            ("k8s" | "any", key) => match key.strip_prefix(NAMESPACE_LABELS) {
                Some(label) => Self::Namespace(label.to_owned()),
                None => Self::Pod(key.to_owned()),
            },
            _ => Self::Foreign,
        }
    }
}

/// A selector, taken apart.
#[derive(Default)]
struct Asked {
    namespaces: Vec<Requirement>,
    pods: Vec<Requirement>,
    reserved: Vec<Requirement>,
}

impl Asked {
    fn add(&mut self, requirement: Requirement) {
        let renamed = |key: String| match requirement.clone() {
            Requirement::In(_, values) => Requirement::In(key, values),
            Requirement::NotIn(_, values) => Requirement::NotIn(key, values),
            Requirement::Exists(_) => Requirement::Exists(key),
            Requirement::DoesNotExist(_) => Requirement::DoesNotExist(key),
        };
        let known = |value: Option<&str>| match &requirement {
            Requirement::In(_, values) => value.is_some_and(|value| values.contains(value)),
            Requirement::NotIn(_, values) => value.is_none_or(|value| !values.contains(value)),
            Requirement::Exists(_) => value.is_some(),
            Requirement::DoesNotExist(_) => value.is_none(),
        };
        match Key::of(requirement.key()) {
            Key::Namespace(key) => self.namespaces.push(renamed(key)),
            Key::Pod(key) => self.pods.push(renamed(key)),
            Key::Reserved(name) => self.reserved.push(renamed(name)),
            Key::Cluster if known(Some(CLUSTER_NAME)) => {}
            Key::Foreign if known(None) => {}
            Key::Cluster | Key::Foreign => self.pods.extend(Selector::nothing().requirements),
        }
    }
}

impl Reader<'_> {
    /// The pods that a policy is about. That of a namespace is never about another's.
    pub(super) fn endpoints(&mut self, selector: &Field) -> Subject {
        let mut asked = Asked::default();
        self.notes.read(selector.only_known(&["matchLabels", "matchExpressions"]));
        let equals = self.notes.read(selector.get("matchLabels"));
        for (key, value) in equals.and_then(|equals| self.notes.read(equals.entries())).unwrap_or_default() {
            let Some(requirement) = self.notes.read(equal(key, &value)) else { continue };
            let is_foreign = self.namespace.as_ref().is_some_and(|own| {
                matches!(Key::of(key), Key::Namespace(label) if label == NAMESPACE_NAME)
                    && requirement != Requirement::In(key.to_owned(), BTreeSet::from([own.to_string()]))
            });
            match is_foreign {
                true => self.notes.doubt(value.error("a policy applies to its own namespace only")),
                false => asked.add(requirement),
            }
        }
        let expressions = selector.get("matchExpressions").and_then(|list| items(&list));
        for expression in self.notes.read(expressions).unwrap_or_default() {
            if let Some(requirement) = self.notes.read(requirement(&expression, check_key)) {
                asked.add(requirement);
            }
        }
        let mut pods = asked.pods;
        // No pod is what a reserved name stands for.
        let is_positive =
            |requirement: &Requirement| matches!(requirement, Requirement::In(..) | Requirement::Exists(_));
        if asked.reserved.iter().any(is_positive) {
            pods.extend(Selector::nothing().requirements);
        }
        Subject::Pods { namespaces: Selector::new(asked.namespaces), pods: Selector::new(pods) }
    }

    /// The peers that a selector of a rule stands for.
    pub(super) fn peer_of(&self, selector: &Field) -> Result<Peer> {
        let asked = asked(selector)?;
        match asked.reserved.as_slice() {
            [] => {}
            [only] if asked.pods.is_empty() && asked.namespaces.is_empty() => {
                return reserved(only)
                    .map(Peer::Entity)
                    .ok_or_else(|| selector.error(format!("reserved:{} is not read so", only.key())));
            }
            _ => return Err(selector.error("a reserved label stands alone")),
        }
        let is_own = self.namespace.is_some() && asked.namespaces.is_empty();
        let namespaces = (!is_own).then(|| Selector::new(asked.namespaces));
        Ok(Peer::Pods { namespaces, pods: Selector::new(asked.pods) })
    }
}

fn asked(selector: &Field) -> Result<Asked> {
    let mut asked = Asked::default();
    requirements(selector)?.into_iter().for_each(|requirement| asked.add(requirement));
    Ok(asked)
}

/// A selector of pods: what it asks of the namespace, and what of the pod. No pod is what a reserved name stands for.
pub fn of_pods(selector: &Field) -> Result<(Vec<Requirement>, Vec<Requirement>)> {
    let mut asked = asked(selector)?;
    if !asked.reserved.is_empty() {
        asked.pods.extend(Selector::nothing().requirements);
    }
    Ok((asked.namespaces, asked.pods))
}

/// A selector of nodes, or of Services and groups: their labels have no other source.
pub fn of_nodes(selector: &Field) -> Result<Selector> {
    let mut all = Vec::new();
    for requirement in requirements(selector)? {
        let bare = |key: String| match key.split_once(':') {
            Some(("k8s" | "any" | "node", bare)) => bare.to_owned(),
            _ => key,
        };
        all.push(match requirement {
            Requirement::In(key, values) => Requirement::In(bare(key), values),
            Requirement::NotIn(key, values) => Requirement::NotIn(bare(key), values),
            Requirement::Exists(key) => Requirement::Exists(bare(key)),
            Requirement::DoesNotExist(key) => Requirement::DoesNotExist(bare(key)),
        });
    }
    Ok(Selector::new(all))
}

fn requirements(selector: &Field) -> Result<Vec<Requirement>> {
    if !selector.is_present() {
        return Err(selector.error("is absent, must be a selector"));
    }
    selector.only_known(&["matchLabels", "matchExpressions"])?;
    let equals = selector.get("matchLabels")?.entries()?;
    let equals = equals.iter().map(|(key, value)| equal(key, value));
    let expressions = items(&selector.get("matchExpressions")?)?;
    equals.chain(expressions.iter().map(|expression| requirement(expression, check_key))).collect()
}

fn equal(key: &str, value: &Field) -> Result<Requirement> {
    check_key(key, value)?;
    Ok(Requirement::In(key.to_owned(), BTreeSet::from([label_value(value)?])))
}

fn label_value(field: &Field) -> Result<String> {
    let text = field.string()?.unwrap_or("");
    match names::is_label_value(text) {
        true => Ok(text.to_owned()),
        false => Err(field.error(format!("{text:?} is not a label value"))),
    }
}

/// Cilium's keys may have a source in front, and the labels of namespaces a key within a key.
fn check_key(text: &str, field: &Field) -> Result<()> {
    let key = text.split_once(':').map_or(text, |(_, key)| key);
    let key = key.strip_prefix(NAMESPACE_LABELS).unwrap_or(key);
    match names::is_label_key(key) || key == SERVICE_ACCOUNT_KEY {
        true => Ok(()),
        false => Err(field.error(format!("{text:?} is not a label key"))),
    }
}

/// Whom a label of the source `reserved` stands for.
fn reserved(requirement: &Requirement) -> Option<Entity> {
    let is_there = match requirement {
        Requirement::Exists(_) => true,
        Requirement::In(_, values) => values.contains(""),
        Requirement::NotIn(..) | Requirement::DoesNotExist(_) => false,
    };
    entity(requirement.key()).filter(|_| is_there)
}

/// The name of an entity, other than `all` and the world of one family.
pub fn entity(name: &str) -> Option<Entity> {
    Some(match name {
        "world" => Entity::World,
        "cluster" => Entity::Cluster,
        "host" => Entity::Host,
        "remote-node" => Entity::RemoteNode,
        "kube-apiserver" => Entity::KubeApiServer,
        "init" | "health" | "unmanaged" | "ingress" | "none" => Entity::Nobody,
        _ => return None,
    })
}
