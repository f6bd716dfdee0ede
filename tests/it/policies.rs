//! NetworkPolicy, feature by feature: each case is a policy and who then reaches whom.
//!
//! Nine pods: a, b, c in each of the namespaces x, y, z; a and c on node 1, b on node 2,
//! so that both ways of delivery are judged. Every probe is made in both families.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};

use crate::lab::{Lab, OUTSIDE, Pod, Setup, Space, Via};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

/// A policy and its effect. A probe is "x/b > y/a:80/tcp", "outside > x/a:81/udp", "node1 > x/a/ping".
pub struct Case {
    /// For messages.
    pub name: &'static str,
    /// Namespace and `spec`, which may name a pod's addresses as `$x/a.4` and `$x/a.6`. A kind other than
    /// NetworkPolicy stands before the namespace, and a field other than `spec` behind it; @KEY=VALUE is an
    /// annotation.
    pub policies: &'static [(&'static str, &'static str)],
    /// What must be answered.
    pub allowed: &'static [&'static str],
    /// What must not; with a ! behind it it must be refused at once.
    pub denied: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        name: "no policy allows everything",
        policies: &[],
        allowed: &["x/a > y/b:80/tcp", "y/b > x/a:81/udp", "z/c > x/b/ping", "outside > x/a:80/tcp", "x/a > outside:80/tcp"],
        denied: &[],
    },
    Case {
        name: "default deny of ingress",
        policies: &[("x", "{podSelector: {}, policyTypes: [Ingress]}")],
        allowed: &["x/a > y/a:80/tcp", "x/b > z/a/ping", "y/a > z/b:80/udp", "x/a > outside:80/udp"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a:80/udp", "x/c > x/a/ping", "y/b > x/b:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "the own node reaches its pods whatever the policy says",
        policies: &[("x", "{podSelector: {}, policyTypes: [Ingress, Egress]}")],
        allowed: &["node1 > x/a:80/tcp", "node2 > x/b/ping"],
        denied: &["x/c > x/a:80/tcp"],
    },
    Case {
        name: "default deny of egress",
        policies: &[("x", "{podSelector: {}, policyTypes: [Egress]}")],
        allowed: &["y/a > x/a:80/tcp", "y/b > x/a/ping", "y/a > y/b:80/udp"],
        denied: &["x/a > y/a:80/tcp", "x/a > x/b:80/udp", "x/b > y/a/ping", "x/a > outside:80/tcp"],
    },
    Case {
        name: "an empty rule allows everyone",
        policies: &[("x", "{podSelector: {}, ingress: [{}]}"), ("y", "{podSelector: {}, policyTypes: [Ingress]}")],
        allowed: &["y/a > x/a:80/tcp", "z/b > x/a/ping", "outside > x/b:81/udp"],
        denied: &["x/a > y/a:80/tcp"],
    },
    Case {
        name: "an empty from allows everyone on its ports",
        policies: &[("x", "{podSelector: {}, ingress: [{from: [], ports: [{port: 80}]}]}")],
        allowed: &["y/a > x/a:80/tcp", "outside > x/a:80/tcp"],
        denied: &["y/a > x/a:81/tcp", "y/a > x/a/ping"],
    },
    Case {
        name: "podSelector is of the policy's own namespace",
        policies: &[("x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}")],
        allowed: &["x/b > x/a:80/tcp", "x/b > x/a/ping", "x/c > x/b:80/tcp", "y/a > x/c:80/tcp"],
        denied: &["x/c > x/a:80/tcp", "y/b > x/a:80/tcp", "z/b > x/a/ping"],
    },
    Case {
        name: "an empty podSelector is every pod of the namespace",
        policies: &[("x", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}")],
        allowed: &["x/b > x/a:80/tcp", "x/a > x/b:80/udp"],
        denied: &["y/a > x/a:80/tcp", "outside > x/b/ping"],
    },
    Case {
        name: "matchExpressions: In and NotIn",
        policies: &[(
            "x",
            "{podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]},
              ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: NotIn, values: [b]}]}}]}]}",
        )],
        allowed: &["x/c > x/a:80/tcp", "x/a > x/b:80/tcp", "x/b > x/c:80/tcp"],
        denied: &["x/b > x/a:80/tcp", "y/c > x/a:80/tcp"],
    },
    Case {
        name: "matchExpressions: Exists and DoesNotExist",
        policies: &[(
            "x",
            "{podSelector: {matchExpressions: [{key: only-a, operator: Exists}]},
              ingress: [{from: [{podSelector: {matchExpressions: [{key: only-b, operator: DoesNotExist}]}}]}]}",
        )],
        allowed: &["x/c > x/a:80/tcp", "x/b > x/c:80/tcp"],
        denied: &["x/b > x/a:80/tcp", "y/c > x/a:80/tcp"],
    },
    Case {
        name: "namespaceSelector",
        policies: &[("x", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]}")],
        allowed: &["y/a > x/a:80/tcp", "y/b > x/a:80/udp", "y/c > x/b/ping"],
        denied: &["z/a > x/a:80/tcp", "x/b > x/a:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "namespaceSelector by the name of the namespace",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}}]}]}",
        )],
        allowed: &["z/a > x/a:80/tcp", "z/b > x/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "x/c > x/a:80/tcp"],
    },
    Case {
        name: "an empty namespaceSelector is every pod of the cluster, and nobody else",
        policies: &[("x", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")],
        allowed: &["y/a > x/a:80/tcp", "z/b > x/a:80/udp", "x/b > x/a/ping"],
        denied: &["outside > x/a:80/tcp", "outside > x/b/ping"],
    },
    Case {
        name: "namespaceSelector and podSelector in one peer must both match",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [
              {namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {pod: b}}}]}]}",
        )],
        allowed: &["y/b > x/a:80/tcp", "y/b > x/b/ping"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a:80/tcp", "z/b > x/a:80/tcp"],
    },
    Case {
        name: "of two peers one must match",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [
              {namespaceSelector: {matchLabels: {team: red}}}, {podSelector: {matchLabels: {pod: b}}}]}]}",
        )],
        allowed: &["y/a > x/a:80/tcp", "x/b > x/a:80/tcp"],
        denied: &["z/b > x/a:80/tcp", "x/c > x/a:80/tcp"],
    },
    Case {
        name: "namespaceSelector with matchExpressions",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [
              {namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [red, blue]}]}}]}]}",
        )],
        allowed: &["z/a > x/a:80/tcp", "z/b > x/a/ping"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a:80/tcp"],
    },
    Case {
        name: "ports by number, for their protocol only",
        policies: &[("x", "{podSelector: {}, ingress: [{ports: [{protocol: TCP, port: 80}, {protocol: UDP, port: 81}]}]}")],
        allowed: &["y/a > x/a:80/tcp", "y/b > x/a:81/udp", "outside > x/b:80/tcp"],
        denied: &["y/a > x/a:81/tcp", "y/a > x/a:80/udp", "y/b > x/a/ping"],
    },
    Case {
        name: "a port without protocol is TCP",
        policies: &[("x", "{podSelector: {}, ingress: [{ports: [{port: 81}]}]}")],
        allowed: &["y/a > x/a:81/tcp"],
        denied: &["y/a > x/a:81/udp", "y/a > x/a:80/tcp"],
    },
    Case {
        name: "a protocol without port is all its ports",
        policies: &[("x", "{podSelector: {}, ingress: [{ports: [{protocol: UDP}]}]}")],
        allowed: &["y/a > x/a:80/udp", "y/b > x/a:9090/udp"],
        denied: &["y/a > x/a:80/tcp", "y/b > x/a/ping"],
    },
    Case {
        name: "SCTP allows neither TCP nor UDP",
        policies: &[("x", "{podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 80}]}]}")],
        allowed: &["x/a > y/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "y/a > x/a:80/udp"],
    },
    Case {
        name: "named ports are resolved in the destination pod",
        policies: &[("x", "{podSelector: {}, ingress: [{ports: [{port: web}]}]}")],
        allowed: &["y/a > x/a:80/tcp", "y/a > x/b:81/tcp"],
        denied: &["y/a > x/a:81/tcp", "y/a > x/b:80/tcp", "y/a > x/c:80/tcp", "y/a > x/a:80/udp"],
    },
    Case {
        name: "named ports of egress are resolved in the destination pod, too",
        policies: &[("y", "{podSelector: {}, egress: [{ports: [{port: web}]}], policyTypes: [Egress]}")],
        allowed: &["y/a > x/a:80/tcp", "y/a > x/b:81/tcp"],
        denied: &["y/a > x/a:81/tcp", "y/a > x/b:80/tcp", "y/a > x/c:80/tcp", "y/a > outside:80/tcp"],
    },
    Case {
        name: "endPort",
        policies: &[("x", "{podSelector: {}, ingress: [{ports: [{protocol: TCP, port: 81, endPort: 8080}]}]}")],
        allowed: &["y/a > x/a:81/tcp", "y/b > x/a:8080/tcp"],
        denied: &["y/a > x/a:80/tcp", "y/a > x/a:9090/tcp", "y/a > x/a:81/udp"],
    },
    Case {
        name: "every rule has its own peers and ports",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [
              {from: [{namespaceSelector: {matchLabels: {team: red}}}], ports: [{port: 80}]},
              {from: [{podSelector: {}}], ports: [{port: 81}]}]}",
        )],
        allowed: &["y/a > x/a:80/tcp", "x/b > x/a:81/tcp"],
        denied: &["y/a > x/a:81/tcp", "x/b > x/a:80/tcp", "z/a > x/a:80/tcp"],
    },
    Case {
        name: "several policies add up",
        policies: &[
            ("x", "{podSelector: {}, policyTypes: [Ingress]}"),
            ("x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]}"),
            ("x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {}}], ports: [{port: 81}]}]}"),
        ],
        allowed: &["y/a > x/a:80/tcp", "x/b > x/a:81/tcp"],
        denied: &["y/a > x/b:80/tcp", "x/b > x/a:80/tcp", "z/a > x/a:80/tcp", "x/a > x/b:81/tcp"],
    },
    Case {
        name: "egress to pods and ports",
        policies: &[(
            "x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [
              {to: [{namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {pod: b}}}], ports: [{port: 80}]},
              {to: [{podSelector: {}}]}]}",
        )],
        allowed: &["x/a > y/b:80/tcp", "x/a > x/b:81/udp", "x/b > y/a:80/tcp", "y/a > x/a:80/tcp"],
        denied: &["x/a > y/b:81/tcp", "x/a > y/a:80/tcp", "x/a > outside:80/tcp", "x/a > y/b/ping"],
    },
    Case {
        name: "both sides must allow",
        policies: &[
            ("x", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: red}}}]}]}"),
            ("y", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: 80}]}]}"),
        ],
        allowed: &["x/a > y/a:80/tcp", "x/b > y/a:80/tcp", "x/b > y/b:81/tcp"],
        denied: &["x/a > y/a:81/tcp", "x/a > z/a:80/tcp", "z/a > y/a:80/tcp"],
    },
    Case {
        name: "without policyTypes egress counts only where there are egress rules",
        policies: &[("x", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}"), ("y", "{podSelector: {}, egress: [{to: [{podSelector: {}}]}]}")],
        allowed: &["x/a > z/a:80/tcp", "x/b > x/a:80/tcp"],
        denied: &["y/a > z/a:80/tcp", "z/a > y/a:80/tcp", "y/a > y/b:80/tcp"],
    },
    Case {
        name: "policyTypes without Ingress leaves ingress alone, whatever rules there are",
        policies: &[("x", "{podSelector: {}, policyTypes: [Egress], ingress: [{from: [{podSelector: {}}]}], egress: [{ports: [{port: 80}]}]}")],
        allowed: &["y/a > x/a:81/tcp", "x/a > y/a:80/tcp"],
        denied: &["x/a > y/a:81/tcp"],
    },
    Case {
        name: "ipBlock outside the cluster",
        policies: &[(
            "x",
            "{podSelector: {}, policyTypes: [Egress], egress: [{to: [
              {ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: '2001:db8:ffff::/48'}}]}]}",
        )],
        allowed: &["x/a > world:80/tcp", "x/b > world:80/udp", "x/a > world/ping"],
        denied: &["x/a > outside:80/tcp", "x/a > y/a:80/tcp"],
    },
    Case {
        name: "ipBlock with except",
        policies: &[(
            "x",
            "{podSelector: {}, policyTypes: [Egress], egress: [{to: [
              {ipBlock: {cidr: 0.0.0.0/0, except: [203.0.113.0/24]}},
              {ipBlock: {cidr: '::/0', except: ['2001:db8:ffff::/48']}}]}]}",
        )],
        allowed: &["x/a > outside:80/tcp", "x/b > outside/ping", "x/a > y/b:80/tcp", "x/a > y/a:80/udp"],
        denied: &["x/a > world:80/tcp", "x/b > world:80/udp", "x/a > world/ping"],
    },
    Case {
        name: "ipBlock of ingress from outside the cluster",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.200.0.96/28}}, {ipBlock: {cidr: 'fd00:200::100/120'}}]}]}",
        )],
        allowed: &["outside > x/a:80/tcp", "outside > x/b:81/udp"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a/ping"],
    },
    Case {
        name: "ipBlock covers pods' addresses, too",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.1.1.0/24}}, {ipBlock: {cidr: 'fd00:1:0:1::/64'}}]}]}",
        )],
        allowed: &["y/a > x/a:80/tcp", "z/c > x/b:80/udp", "x/c > x/a/ping"],
        denied: &["y/b > x/a:80/tcp", "z/b > x/b:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "ipBlock with except of single pods",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [
              {ipBlock: {cidr: 10.1.0.0/16, except: [$y/a.4/32, $y/b.4/32]}},
              {ipBlock: {cidr: 'fd00:1::/32', except: ['$y/a.6/128', '$y/b.6/128']}}]}]}",
        )],
        allowed: &["z/a > x/a:80/tcp", "z/b > x/a:80/tcp", "y/c > x/b:80/udp"],
        denied: &["y/a > x/a:80/tcp", "y/b > x/a:80/tcp", "y/a > x/b/ping"],
    },
    Case {
        name: "except of one block does not take from a selector beside it",
        policies: &[(
            "x",
            "{podSelector: {}, ingress: [{from: [
              {ipBlock: {cidr: 0.0.0.0/0, except: [10.1.0.0/16]}}, {ipBlock: {cidr: '::/0', except: ['fd00:1::/32']}},
              {podSelector: {matchLabels: {pod: b}}}]}]}",
        )],
        allowed: &["x/b > x/a:80/tcp", "outside > x/a:80/tcp"],
        denied: &["x/c > x/a:80/tcp", "y/b > x/a:80/tcp"],
    },
    Case {
        name: "egress to pods by ipBlock, with ports",
        policies: &[(
            "x",
            "{podSelector: {}, policyTypes: [Egress], egress: [{to: [
              {ipBlock: {cidr: $y/a.4/32}}, {ipBlock: {cidr: '$y/a.6/128'}}, {ipBlock: {cidr: $y/b.4/32}}, {ipBlock: {cidr: '$y/b.6/128'}}],
              ports: [{port: 80}]}]}",
        )],
        allowed: &["x/a > y/a:80/tcp", "x/a > y/b:80/tcp"],
        denied: &["x/a > y/a:81/tcp", "x/a > y/c:80/tcp", "x/a > y/b/ping"],
    },
];

#[test]
fn every_feature_of_network_policy() -> Result<()> {
    require_lab!();
    judge_all(CASES)
}

/// Judges one case after the other; says all that failed.
pub fn judge_all(cases: &[Case]) -> Result<()> {
    let cast = Cast::start()?;
    let mut failed = Vec::new();
    for case in cases {
        if let Err(error) = cast.judge(case) {
            failed.push(format!("{}: {error:#}", case.name));
        }
    }
    if !failed.is_empty() {
        bail!("{} of {} cases:\n{}", failed.len(), cases.len(), failed.join("\n"));
    }
    Ok(())
}

struct Cast {
    pods: Vec<Pod>,
    lab: Lab,
}

impl Cast {
    fn start() -> Result<Self> {
        let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
        let mut pods = Vec::new();
        for (namespace, team) in [("x", "blue"), ("y", "red"), ("z", "green")] {
            lab.manifests().namespace(namespace, &[("team", team)])?;
            for (name, node, web) in [("a", 1, Some(80)), ("b", 2, Some(81)), ("c", 1, None)] {
                let pod = lab.pod(node, &format!("{namespace}/{name}")).label("pod", name);
                let pod = pod.label(&format!("only-{name}"), "yes");
                let pod = if let Some(port) = web { pod.port("web", port) } else { pod };
                pods.push(pod.create()?);
            }
        }
        Ok(Self { pods, lab })
    }

    fn judge(&self, case: &Case) -> Result<()> {
        let objects: Vec<serde_json::Value> = case
            .policies
            .iter()
            .enumerate()
            .map(|(number, (namespace, spec))| self.policy(number, namespace, spec))
            .collect::<Result<_>>()?;
        for object in &objects {
            self.lab.manifests().write(object)?;
        }
        let mut rows = Vec::new();
        for (probes, expected) in [(case.allowed, Expected::Answered), (case.denied, Expected::Denied)] {
            for probe in probes {
                // What is told at once.
                let (probe, expected) = match probe.strip_suffix('!') {
                    Some(probe) => (probe, Expected::Refused),
                    None => (*probe, expected),
                };
                rows.extend(self.rows(probe, expected)?);
            }
        }
        let judged = expect_all(&rows);
        for object in &objects {
            self.lab.manifests().remove(object)?;
        }
        judged
    }

    fn policy(&self, number: usize, namespace: &str, spec: &str) -> Result<serde_json::Value> {
        let mut spec = spec.to_owned();
        for pod in &self.pods {
            let variable = format!("${}/{}", pod.namespace(), pod.name());
            spec = spec.replace(&format!("{variable}.4"), &pod.address(true).to_string());
            spec = spec.replace(&format!("{variable}.6"), &pod.address(false).to_string());
        }
        object_of(number, namespace, &spec)
    }

    /// The probe in both families.
    fn rows(&self, probe: &str, expected: Expected) -> Result<Vec<Row<'_>>> {
        let (from, to) = probe.split_once(" > ").context("a probe without >")?;
        let (to, via) = to.rsplit_once('/').context("a probe without protocol")?;
        let via = match via {
            "tcp" => Via::Tcp,
            "udp" => Via::Udp,
            "ping" => Via::Ping,
            "timestamp" => Via::Timestamp,
            _ => bail!("an unknown protocol in {probe}"),
        };
        let (to, port) = to.split_once(':').unwrap_or((to, "0"));
        let port: u16 = port.parse()?;
        let space = self.space(from)?;
        Ok(self
            .addresses(to)?
            .into_iter()
            .filter(|address| via != Via::Timestamp || address.is_ipv4())
            .map(|address| {
                Row::from_space(space, from, via, SocketAddr::new(address, port), expected)
                    .named(&format!("{probe} (from {from})"))
            })
            .collect())
    }

    fn space(&self, name: &str) -> Result<&Space> {
        Ok(match name {
            "outside" => self.lab.outside(),
            "node1" => self.lab.node(1).space(),
            "node2" => self.lab.node(2).space(),
            _ => self.pod(name)?.space(),
        })
    }

    fn addresses(&self, name: &str) -> Result<Vec<IpAddr>> {
        Ok(match name {
            "outside" => vec![OUTSIDE[0].parse()?, OUTSIDE[1].parse()?],
            "world" => vec![OUTSIDE[2].parse()?, OUTSIDE[3].parse()?],
            _ => self.pod(name)?.addresses().to_vec(),
        })
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        let found = self.pods.iter().find(|pod| format!("{}/{}", pod.namespace(), pod.name()) == name);
        found.with_context(|| format!("no pod {name}"))
    }
}

/// The object of a policy as a case has it: its words, and what it says.
pub fn object_of(number: usize, words: &str, spec: &str) -> Result<serde_json::Value> {
    let spec: serde_json::Value = weir::yaml::read(spec).with_context(|| spec.to_owned())?;
    let (annotations, words): (Vec<&str>, Vec<&str>) =
        words.split(' ').partition(|word| word.starts_with('@'));
    let annotations: BTreeMap<&str, &str> =
        annotations.iter().filter_map(|word| word.trim_start_matches('@').split_once('=')).collect();
    let (version, kind, namespace, field) = match words.as_slice() {
        [kind @ "ClusterNetworkPolicy"] => ("policy.networking.k8s.io/v1alpha2", *kind, None, "spec"),
        [kind @ "CiliumClusterwideNetworkPolicy"] => ("cilium.io/v2", *kind, None, "spec"),
        ["CiliumNetworkPolicy", namespace] => ("cilium.io/v2", words[0], Some(*namespace), "spec"),
        ["CiliumNetworkPolicy", namespace, field] => ("cilium.io/v2", words[0], Some(*namespace), *field),
        [namespace] => ("networking.k8s.io/v1", "NetworkPolicy", Some(*namespace), "spec"),
        _ => bail!("no kind and namespace: {words:?}"),
    };
    Ok(serde_json::json!({
        "apiVersion": version, "kind": kind,
        "metadata": {"name": format!("policy-{number}"), "namespace": namespace, "annotations": annotations},
        field: spec,
    }))
}
