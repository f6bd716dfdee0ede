//! The rule that would allow one thing that a policy denied, as YAML that can be applied as it stands.
//!
//! A NetworkPolicy where that has the words; a CiliumNetworkPolicy for a request and for ICMP.

use std::fmt::Write;
use std::net::IpAddr;

use super::suggest::{Other, Seen, Subject, Way, one_rule, quoted, selector, telling};
use crate::model::IpProtocol;

/// What was denied, seen from the pod whose policies denied it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The pod whose policies denied it.
    pub subject: Subject,
    /// What was tried; the other end is a pod or an address.
    pub seen: Seen,
    /// The type of a message of ICMP.
    pub icmp: Option<u8>,
    /// What was asked inside of the connection, where that was denied.
    pub request: Option<Asked>,
    /// The other end's word for itself, if it is an entity as `remote-node`.
    pub entity: Option<String>,
    /// What people call the two ends, who began it first.
    pub names: [String; 2],
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// HTTP: method, and path with the query.
    Http(String, String),
    /// A name of DNS.
    Dns(String),
    /// Kafka: the API's name and the topics.
    Kafka(String, Vec<String>),
    /// A server's name of TLS.
    ServerName(String),
}

/// A policy, and what to know before it is applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The policy.
    pub yaml: String,
    /// A sentence each.
    pub notes: Vec<String>,
}

/// The namespace's label in a selector of Cilium's kinds.
const NAMESPACE: &str = "k8s:io.kubernetes.pod.namespace";

/// The policy that would allow `denied`; or why there is none.
pub fn allow(denied: &Denied) -> Result<Rule, String> {
    let Denied { subject, seen, .. } = denied;
    if telling(&subject.labels).is_empty() {
        return Err("The pod has no labels that a policy could select it by: give it one, as app.".to_owned());
    }
    let mut notes = Vec::new();
    match &seen.other {
        Other::OwnNode => return Err("The flow does not say which address the other side has.".to_owned()),
        Other::Pod { namespace, labels } if telling(labels).is_empty() => notes.push(format!(
            "The other pod has no labels of its own: the rule allows every pod of {namespace}."
        )),
        Other::Pod { .. } => {}
        Other::Address(address) => notes.push(match &denied.entity {
            Some(_) => format!("{address} is an address of a node: other nodes need a rule of their own."),
            None => format!("{address} is outside of the cluster: if the address changes, so must the rule."),
        }),
    }
    let name = name(denied);
    let is_plain = denied.request.is_none() && IpProtocol::WITH_PORTS.contains(&seen.protocol);
    let yaml = match is_plain {
        true => one_rule(&name, subject, seen),
        false => cilium(&name, denied, &mut notes)?,
    };
    Ok(Rule { yaml, notes })
}

/// A CiliumNetworkPolicy.
fn cilium(name: &str, denied: &Denied, notes: &mut Vec<String>) -> Result<String, String> {
    let Denied { subject, seen, .. } = denied;
    let inside = match &denied.request {
        Some(asked) => request(seen, asked, notes)?,
        None => icmp(denied, notes)?,
    };
    let side = if seen.way == Way::In { "ingress" } else { "egress" };
    let mut text = String::new();
    let _ = write!(
        text,
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {}\n  namespace: {}\nspec:\n  \
         endpointSelector:{}\n  {side}:\n  - {}{inside}",
        quoted(name),
        quoted(&subject.namespace),
        selector(&telling(&subject.labels), "    "),
        peer(denied),
    );
    Ok(text)
}

/// The line of the peers, without its indent.
fn peer(denied: &Denied) -> String {
    let side = if denied.seen.way == Way::In { "from" } else { "to" };
    match (&denied.seen.other, &denied.entity) {
        (Other::Pod { namespace, labels }, _) => {
            let mut labels = telling(labels);
            labels.insert(NAMESPACE.to_owned(), namespace.clone());
            let all = selector(&labels, "      ");
            format!("{side}Endpoints:\n    - {}\n", all.trim_start())
        }
        (_, Some(entity)) => format!("{side}Entities:\n    - {}\n", quoted(entity)),
        (Other::Address(address), None) => format!("{side}CIDR:\n    - {}\n", quoted(&prefix(*address))),
        // `allow` has refused it.
        (Other::OwnNode, None) => format!("{side}Entities:\n    - host\n"),
    }
}

fn prefix(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

fn icmp(denied: &Denied, notes: &mut Vec<String>) -> Result<String, String> {
    let family = match denied.seen.protocol {
        IpProtocol::ICMP => "IPv4",
        IpProtocol::ICMPV6 => "IPv6",
        protocol => {
            return Err(format!("No policy has words for {protocol}: allow all between the two ends."));
        }
    };
    let number = denied.icmp.ok_or("The flow does not say of which type the message is.")?;
    notes.push("NetworkPolicy cannot name ICMP, so this is a CiliumNetworkPolicy.".to_owned());
    Ok(format!("    icmps:\n    - fields:\n      - family: {family}\n        type: {number}\n"))
}

/// The port, and what may be asked at it.
fn request(seen: &Seen, asked: &Asked, notes: &mut Vec<String>) -> Result<String, String> {
    notes.push(
        "Rules of layer 7 add up: the policy allows this request beside those that are allowed.".to_owned(),
    );
    let rules = match asked {
        Asked::Http(method, path) => {
            if method.is_empty() || path.is_empty() {
                return Err("The record does not say which request it was.".to_owned());
            }
            notes.push(
                "The path is this request's own: write a pattern, as /cart/[0-9]+, for others like it."
                    .to_owned(),
            );
            let (method, path) = (exactly(method), path_pattern(path));
            format!("      rules:\n        http:\n        - method: {method}\n          path: {path}\n")
        }
        Asked::Dns(name) => {
            let name = name.trim_end_matches('.');
            let is_name = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
            if name.is_empty() || !name.chars().all(is_name) {
                return Err("The question's name cannot be written in a rule.".to_owned());
            }
            format!("      rules:\n        dns:\n        - matchName: {}\n", quoted(name))
        }
        Asked::Kafka(api, topics) => {
            let line = |topic: &String| {
                format!("        - apiKey: {}\n          topic: {}\n", quoted(api), quoted(topic))
            };
            let lines = match topics.is_empty() {
                true => format!("        - apiKey: {}\n", quoted(api)),
                false => topics.iter().map(line).collect(),
            };
            format!("      rules:\n        kafka:\n{lines}")
        }
        Asked::ServerName(name) => format!("      serverNames:\n      - {}\n", quoted(name)),
    };
    let protocol = seen.protocol;
    Ok(format!(
        "    toPorts:\n    - ports:\n      - port: \"{}\"\n        protocol: {protocol}\n{rules}",
        seen.port
    ))
}

/// A pattern that matches this text alone.
fn exactly(text: &str) -> String {
    quoted(&escaped(text))
}

/// Letters that mean something else in a regular expression stand for themselves.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if r".+*?()|[]{}^$\".contains(letter) {
            out.push('\\');
        }
        out.push(letter);
    }
    out
}

/// The path as it is, with whatever query, where there was one: queries are seldom twice the same.
fn path_pattern(path: &str) -> String {
    match path.split_once('?') {
        Some((path, _)) => quoted(&format!(r"{}(\?.*)?", escaped(path))),
        None => exactly(path),
    }
}

/// A DNS label of at most 63 characters that says what the rule is for.
fn name(denied: &Denied) -> String {
    let [from, to] = &denied.names;
    let what = match denied.seen.protocol {
        IpProtocol::ICMP => "icmp".to_owned(),
        IpProtocol::ICMPV6 => "icmpv6".to_owned(),
        _ => denied.seen.port.to_string(),
    };
    let text: String = format!("allow-{from}-to-{to}")
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' })
        .collect();
    let words: Vec<&str> = text.split('-').filter(|word| !word.is_empty()).collect();
    let short: String = words.join("-").chars().take(55).collect();
    format!("{}-{what}", short.trim_end_matches('-'))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::Labels;

    fn labels(app: &str) -> Labels {
        [("app", app), ("pod-template-hash", "1")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    fn pod(namespace: &str, app: &str) -> Other {
        Other::Pod { namespace: namespace.to_owned(), labels: labels(app) }
    }

    fn denied(way: Way, other: Other, protocol: u8, port: u16) -> Denied {
        Denied {
            subject: Subject { namespace: "data".to_owned(), labels: labels("database") },
            seen: Seen { way, other, protocol: IpProtocol(protocol), port },
            icmp: None,
            request: None,
            entity: None,
            names: ["frontend".to_owned(), "database".to_owned()],
        }
    }

    fn read(denied: &Denied) -> Value {
        let rule = allow(denied).expect("a rule");
        crate::yaml::read(&rule.yaml).unwrap_or_else(|error| panic!("{error}\n{}", rule.yaml))
    }

    #[test]
    fn a_connection_needs_a_network_policy_of_one_direction() {
        let rule = allow(&denied(Way::In, pod("shop", "frontend"), 6, 5432)).expect("a rule");
        let expected = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: allow-frontend-to-database-5432
  namespace: data
spec:
  podSelector:
    matchLabels:
      app: database
  policyTypes:
  - Ingress
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: frontend
      namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: shop
    ports:
    - protocol: TCP
      port: 5432
";
        assert_eq!(rule.yaml, expected);
        let address = Other::Address("2001:db8::9".parse().expect("an address"));
        let out = read(&denied(Way::Out, address, 17, 53));
        assert_eq!(out["spec"]["policyTypes"], json!(["Egress"]));
        assert_eq!(
            out["spec"]["egress"],
            json!([{"to": [{"ipBlock": {"cidr": "2001:db8::9/128"}}], "ports": [{"protocol": "UDP", "port": 53}]}])
        );
    }

    #[test]
    fn a_request_needs_rules_of_layer_7() {
        let base = denied(Way::In, pod("shop", "frontend"), 6, 8080);
        let ports = |asked| {
            let policy = read(&Denied { request: Some(asked), ..base.clone() });
            assert_eq!(policy["kind"], "CiliumNetworkPolicy");
            let rule = &policy["spec"]["ingress"][0];
            assert_eq!(
                rule["fromEndpoints"],
                json!([{"matchLabels": {"app": "frontend", NAMESPACE: "shop"}}])
            );
            assert_eq!(rule["toPorts"][0]["ports"], json!([{"port": "8080", "protocol": "TCP"}]));
            rule["toPorts"][0].clone()
        };
        let http = |method: &str, path: &str| ports(Asked::Http(method.to_owned(), path.to_owned()));
        assert_eq!(http("GET", "/cart/7")["rules"], json!({"http": [{"method": "GET", "path": "/cart/7"}]}));
        assert_eq!(http("GET", "/a.b?x=(1")["rules"]["http"][0]["path"], r"/a\.b(\?.*)?");
        let dns = ports(Asked::Dns("db.example.".to_owned()));
        assert_eq!(dns["rules"], json!({"dns": [{"matchName": "db.example"}]}));
        let kafka = ports(Asked::Kafka("produce".to_owned(), vec!["orders".to_owned()]));
        assert_eq!(kafka["rules"], json!({"kafka": [{"apiKey": "produce", "topic": "orders"}]}));
        assert_eq!(ports(Asked::ServerName("a.example".to_owned()))["serverNames"], json!(["a.example"]));
    }

    /// What a client wrote is matched and never obeyed.
    #[test]
    fn the_pattern_of_a_request_matches_it_and_nothing_else() {
        for path in ["/", "/a+b", "/(x)", "/[a]{2}", "/a|b", "/^$", "/\\", "/a b: c\n- d", "/'\""] {
            let asked = Asked::Http("GET".to_owned(), path.to_owned());
            let policy = read(&Denied { request: Some(asked), ..denied(Way::In, pod("a", "b"), 6, 80) });
            let pattern = policy["spec"]["ingress"][0]["toPorts"][0]["rules"]["http"][0]["path"].as_str();
            let pattern = pattern.expect("a text").to_owned();
            let matcher = crate::model::l7::full_match(&pattern).expect("a pattern");
            assert!(matcher.is_match(path.as_bytes()), "{pattern} for {path:?}");
            assert!(!matcher.is_match(format!("{path}x").as_bytes()), "{pattern} for {path:?} and more");
        }
    }

    #[test]
    fn icmp_and_nodes_have_words_of_their_own() {
        let ping = Denied { icmp: Some(8), ..denied(Way::In, pod("shop", "frontend"), 1, 0) };
        assert_eq!(
            read(&ping)["spec"]["ingress"][0]["icmps"],
            json!([{"fields": [{"family": "IPv4", "type": 8}]}])
        );
        let node = Other::Address("192.0.2.1".parse().expect("an address"));
        let from_node = Denied {
            entity: Some("remote-node".to_owned()),
            seen: Seen { other: node, ..ping.seen.clone() },
            ..ping
        };
        assert_eq!(read(&from_node)["spec"]["ingress"][0]["fromEntities"], json!(["remote-node"]));
    }

    #[test]
    fn there_is_no_rule_where_none_could_be_right() {
        let base = denied(Way::In, pod("shop", "frontend"), 6, 80);
        let bare = Subject { labels: Labels::new(), ..base.subject.clone() };
        assert!(allow(&Denied { subject: bare, ..base.clone() }).is_err_and(|why| why.contains("no labels")));
        let other = Other::Pod { namespace: "shop".to_owned(), labels: Labels::new() };
        let to_all =
            allow(&Denied { seen: Seen { other, ..base.seen.clone() }, ..base.clone() }).expect("a rule");
        assert!(to_all.notes[0].contains("every pod of shop"), "{:?}", to_all.notes);
        let asked = Some(Asked::Dns("a b".to_owned()));
        assert!(allow(&Denied { request: asked, ..base.clone() }).is_err());
        let other = Seen { protocol: IpProtocol(47), ..base.seen.clone() };
        assert!(allow(&Denied { seen: other, ..base }).is_err());
    }

    #[test]
    fn a_name_is_a_dns_label() {
        let long = Denied {
            names: ["x".repeat(200), "Über_Ding!".to_owned()],
            ..denied(Way::In, pod("a", "b"), 6, 65535)
        };
        let policy = read(&long);
        let name = policy["metadata"]["name"].as_str().expect("a name");
        assert!(name.len() <= 63 && name.ends_with("-65535"), "{name}");
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'));
    }
}
