//! The smallest NetworkPolicy that allows what was seen, as YAML that can be applied as it stands.
//!
//! A pure function over flows: whoever has some, an agent or the relay, makes [`Seen`] of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;

use crate::identity::{NAMESPACE_NAME, PASSING};
use crate::model::{IpProtocol, Labels};

/// Labels that by themselves say what a pod is, the best first; the others of a pod are left out where it has one.
const TELLING: [&[&str]; 4] = [
    &["app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"],
    &["k8s-app"],
    &["app"],
    &["name"],
];

/// Labels of one pod of a StatefulSet.
const OF_ONE_POD: [&str; 2] = ["statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index"];

/// Whom the policy is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Its namespace.
    pub namespace: String,
    /// The pods' labels; none: every pod of the namespace.
    pub labels: Labels,
}

/// Which way a flow went, seen from the subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// It was begun by the other.
    In,
    /// It was begun by the subject.
    Out,
}

/// The other end of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Other {
    /// A pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its labels.
        labels: Labels,
    },
    /// The subject's own node, which may always come in.
    OwnNode,
    /// Any other address.
    Address(IpAddr),
}

/// A flow of the subject's that was let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which way.
    pub way: Way,
    /// With whom.
    pub other: Other,
    /// By what.
    pub protocol: IpProtocol,
    /// The port of who did not begin it.
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    Pods { namespace: Option<String>, labels: Labels },
    Block(IpAddr),
}

/// The ports of each peer, the peers of equal ports together.
type Rules = BTreeMap<BTreeSet<(u8, u16)>, BTreeSet<Peer>>;

/// A NetworkPolicy for `subject` that allows exactly what was seen, in both directions.
pub fn suggest(subject: &Subject, seen: impl IntoIterator<Item = Seen>) -> String {
    let mut ports: BTreeMap<(Way, Peer), BTreeSet<(u8, u16)>> = BTreeMap::new();
    let mut left_out = BTreeSet::new();
    for Seen { way, other, protocol, port } in seen {
        let peer = match (other, way) {
            (Other::OwnNode, Way::In) => continue,
            (Other::OwnNode, Way::Out) => {
                left_out
                    .insert("the own node, which no NetworkPolicy can name; write its address".to_owned());
                continue;
            }
            (Other::Pod { namespace, labels }, _) => Peer::Pods {
                namespace: (namespace != subject.namespace).then_some(namespace),
                labels: telling(&labels),
            },
            (Other::Address(address), _) => Peer::Block(address),
        };
        if !IpProtocol::WITH_PORTS.contains(&protocol) {
            left_out.insert(format!("{protocol}, of which a NetworkPolicy has no ports"));
            continue;
        }
        ports.entry((way, peer)).or_default().insert((protocol.0, port));
    }
    let rules = |wanted: Way| {
        let mut rules = Rules::new();
        for ((_, peer), ports) in ports.iter().filter(|((way, _), _)| *way == wanted) {
            rules.entry(ports.clone()).or_default().insert(peer.clone());
        }
        rules
    };
    let name =
        telling(&subject.labels).values().next().map_or("all-pods", String::as_str).to_ascii_lowercase();
    let both = [Way::In, Way::Out];
    let mut text = String::new();
    for what in left_out {
        let _ = writeln!(text, "# Left out: {what}.");
    }
    write_policy(&mut text, &name.replace('_', "-"), subject, &both.map(|way| (way, rules(way))));
    text
}

/// What tells a workload's pods from others.
pub(super) fn telling(labels: &Labels) -> Labels {
    for keys in TELLING {
        if labels.contains_key(keys[0]) {
            let known = keys.iter().filter_map(|key| labels.get_key_value(*key));
            return known.map(|(key, value)| (key.clone(), value.clone())).collect();
        }
    }
    let lasts =
        |(key, _): &(&String, &String)| !PASSING.iter().chain(&OF_ONE_POD).any(|passing| passing == key);
    labels.iter().filter(lasts).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// A NetworkPolicy with these rules; it isolates its pods in each direction that is listed.
fn write_policy(text: &mut String, name: &str, subject: &Subject, directions: &[(Way, Rules)]) {
    let labels = telling(&subject.labels);
    let _ = write!(
        text,
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: {}\n  namespace: {}\nspec:\n  \
         podSelector:{}\n  policyTypes:\n",
        quoted(name),
        quoted(&subject.namespace),
        selector(&labels, "    "),
    );
    for (way, _) in directions {
        let _ = writeln!(text, "  - {}", if *way == Way::In { "Ingress" } else { "Egress" });
    }
    for (way, rules) in directions {
        let (direction, side) = if *way == Way::In { ("ingress", "from") } else { ("egress", "to") };
        write_rules(text, direction, side, rules);
    }
}

/// A NetworkPolicy called `name` that allows `subject` this one thing, and says nothing of the other direction.
pub(super) fn one_rule(name: &str, subject: &Subject, seen: &Seen) -> String {
    let peer = match &seen.other {
        Other::Pod { namespace, labels } => Peer::Pods {
            namespace: (*namespace != subject.namespace).then(|| namespace.clone()),
            labels: telling(labels),
        },
        Other::Address(address) => Peer::Block(*address),
        // Without a peer the rule would be for everybody.
        Other::OwnNode => return String::new(),
    };
    let rules = Rules::from([(BTreeSet::from([(seen.protocol.0, seen.port)]), BTreeSet::from([peer]))]);
    let mut text = String::new();
    write_policy(&mut text, name, subject, &[(seen.way, rules)]);
    text
}

fn write_rules(text: &mut String, direction: &str, side: &str, rules: &Rules) {
    if rules.is_empty() {
        return;
    }
    let _ = writeln!(text, "  {direction}:");
    for (ports, peers) in rules {
        let _ = writeln!(text, "  - {side}:");
        for peer in peers {
            match peer {
                Peer::Block(address) => {
                    let length = if address.is_ipv4() { 32 } else { 128 };
                    let _ = writeln!(
                        text,
                        "    - ipBlock:\n        cidr: {}",
                        quoted(&format!("{address}/{length}"))
                    );
                }
                Peer::Pods { namespace, labels } => {
                    let _ = writeln!(text, "    - podSelector:{}", selector(labels, "        "));
                    if let Some(namespace) = namespace {
                        let of = Labels::from([(NAMESPACE_NAME.to_owned(), namespace.clone())]);
                        let _ = writeln!(text, "      namespaceSelector:{}", selector(&of, "        "));
                    }
                }
            }
        }
        let _ = writeln!(text, "    ports:");
        for (protocol, port) in ports {
            let _ = writeln!(text, "    - protocol: {}\n      port: {port}", IpProtocol(*protocol));
        }
    }
}

pub(super) fn selector(labels: &Labels, indent: &str) -> String {
    if labels.is_empty() {
        return " {}".to_owned();
    }
    let lines = labels.iter().map(|(key, value)| format!("\n{indent}  {}: {}", quoted(key), quoted(value)));
    format!("\n{indent}matchLabels:{}", lines.collect::<String>())
}

/// Plain where YAML reads it as the same string; every value comes from the cluster and may be anything.
pub(super) fn quoted(text: &str) -> String {
    let is_plain = text.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_./".contains(letter))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    match is_plain {
        true => text.to_owned(),
        false => serde_json::Value::from(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn pod(namespace: &str, pairs: &[(&str, &str)]) -> Other {
        Other::Pod { namespace: namespace.to_owned(), labels: labels(pairs) }
    }

    fn seen(way: Way, other: Other, protocol: u8, port: u16) -> Seen {
        Seen { way, other, protocol: IpProtocol(protocol), port }
    }

    #[test]
    fn what_was_seen_is_allowed_and_nothing_else() {
        let subject = Subject {
            namespace: "shop".to_owned(),
            labels: labels(&[("app", "web"), ("pod-template-hash", "1f")]),
        };
        let flows = [
            seen(Way::In, pod("shop", &[("app", "front"), ("tier", "a")]), 6, 8080),
            seen(Way::In, pod("shop", &[("app", "front"), ("tier", "b")]), 6, 8080),
            seen(Way::In, Other::OwnNode, 6, 8080),
            seen(Way::Out, pod("kube-system", &[("k8s-app", "kube-dns")]), 17, 53),
            seen(Way::Out, pod("kube-system", &[("k8s-app", "kube-dns")]), 6, 53),
            seen(Way::Out, Other::Address("203.0.113.9".parse().expect("an address")), 6, 443),
            seen(Way::Out, Other::Address("203.0.113.9".parse().expect("an address")), 1, 8),
        ];
        let expected = "\
# Left out: ICMP, of which a NetworkPolicy has no ports.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: web
  namespace: shop
spec:
  podSelector:
    matchLabels:
      app: web
  policyTypes:
  - Ingress
  - Egress
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: front
    ports:
    - protocol: TCP
      port: 8080
  egress:
  - to:
    - podSelector:
        matchLabels:
          k8s-app: kube-dns
      namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: kube-system
    ports:
    - protocol: TCP
      port: 53
    - protocol: UDP
      port: 53
  - to:
    - ipBlock:
        cidr: \"203.0.113.9/32\"
    ports:
    - protocol: TCP
      port: 443
";
        assert_eq!(suggest(&subject, flows), expected);
    }

    #[test]
    fn what_the_cluster_says_cannot_break_out_of_its_place() {
        let subject =
            Subject { namespace: "true".to_owned(), labels: labels(&[("a", "x\n  b: c"), ("1", "2")]) };
        let text = suggest(&subject, []);
        let read: serde_json::Value = crate::yaml::read(&text).expect("YAML");
        assert_eq!(read["metadata"]["namespace"], "true");
        assert_eq!(read["spec"]["podSelector"]["matchLabels"]["a"], "x\n  b: c");
        assert_eq!(read["spec"]["podSelector"]["matchLabels"]["1"], "2");
        assert_eq!(read["spec"]["policyTypes"], serde_json::json!(["Ingress", "Egress"]));
    }
}
