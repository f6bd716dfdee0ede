//! Policies as people publish them, of every kind, applied unchanged but for the names of the lab's
//! namespaces and labels: each case is the policies and who then reaches whom.
//!
//! The pods are those of [`crate::policies`]: a, b, c in each of x, y, z. y has the label team=red.

use anyhow::Result;

use crate::policies::{Case, judge_all};
use crate::require::require_lab;

/// A policy's first word is its kind where it is not NetworkPolicy; the second is its namespace.
pub const CASES: &[Case] = &[
    Case {
        name: "lockdown of a namespace",
        policies: &[("CiliumNetworkPolicy x", "{endpointSelector: {}, ingress: [{fromEndpoints: [{}]}]}")],
        allowed: &["x/b > x/a:80/tcp", "x/a > y/a:80/tcp", "x/c > x/b/ping"],
        denied: &["y/a > x/a:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "a pod that an empty rule isolates",
        policies: &[("CiliumNetworkPolicy x", "{endpointSelector: {matchLabels: {pod: a}}, ingress: [{}]}")],
        allowed: &["x/a > x/b:80/tcp", "x/c > x/b:80/tcp"],
        denied: &["x/b > x/a:80/tcp", "y/a > x/a/ping"],
    },
    Case {
        name: "a database for one label, on one port",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels: {pod: b}}],
              toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}",
        )],
        allowed: &["x/b > x/a:80/tcp"],
        denied: &["x/b > x/a:81/tcp", "x/c > x/a:80/tcp", "y/b > x/a:80/tcp", "x/b > x/a/ping"],
    },
    Case {
        name: "DNS to the pods of another namespace",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, egress: [{toEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': z,
              'k8s:pod': a}}], toPorts: [{ports: [{port: '81', protocol: UDP}]}]}]}",
        )],
        allowed: &["x/a > z/a:81/udp", "x/b > z/a:81/udp", "y/a > x/a:80/tcp"],
        denied: &["x/a > z/a:80/tcp", "x/a > z/b:81/udp", "x/a > x/b:80/tcp", "x/a > outside:80/tcp"],
    },
    Case {
        name: "ingress from the controller's namespace by its label",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, ingress: [{fromEndpoints: [{matchLabels:
              {'k8s:io.cilium.k8s.namespace.labels.team': red}}]}]}",
        )],
        allowed: &["y/a > x/a:80/tcp", "y/b > x/b/ping"],
        denied: &["x/b > x/a:80/tcp", "z/a > x/a:80/tcp"],
    },
    Case {
        name: "from the cluster, and from nobody outside",
        policies: &[("CiliumNetworkPolicy x", "{endpointSelector: {}, ingress: [{fromEntities: [cluster]}]}")],
        allowed: &["y/a > x/a:80/tcp", "z/b > x/a/ping", "node2 > x/a:80/tcp"],
        denied: &["outside > x/a:80/tcp"],
    },
    Case {
        name: "to the world, and to nobody inside",
        policies: &[("CiliumNetworkPolicy x", "{endpointSelector: {}, egress: [{toEntities: [world]}]}")],
        allowed: &["x/a > outside:80/tcp", "x/b > outside:80/tcp", "y/a > x/a:80/tcp"],
        denied: &["x/a > x/b:80/tcp", "x/a > y/a/ping"],
    },
    Case {
        name: "a CIDR is no pod",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, egress: [{toCIDR: [0.0.0.0/0, '::/0']}]}",
        )],
        allowed: &["x/a > outside:80/tcp"],
        denied: &["x/a > y/a:80/tcp", "x/a > x/b/ping"],
    },
    Case {
        name: "a deny beats every allow, and leaves the rest alone",
        policies: &[
            (
                "CiliumNetworkPolicy x",
                "{endpointSelector: {}, enableDefaultDeny: {ingress: false},
                  ingressDeny: [{fromEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': y}}]}]}",
            ),
            ("x", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}"),
        ],
        allowed: &["x/b > x/a:80/tcp", "z/a > x/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "y/b > x/b/ping", "outside > x/a:80/tcp"],
    },
    Case {
        name: "a deny by itself isolates nobody when it says so",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, enableDefaultDeny: {egress: false},
              egressDeny: [{toEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}",
        )],
        allowed: &["x/a > x/b:80/tcp", "x/a > outside:81/tcp", "x/a > y/a:80/tcp"],
        denied: &["x/a > outside:80/tcp", "x/b > outside:80/tcp"],
    },
    Case {
        name: "echo requests and nothing else",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, ingress: [{fromEntities: [all], icmps: [{fields:
              [{type: 8, family: IPv4}, {type: EchoRequest, family: IPv6}]}]}]}",
        )],
        allowed: &["y/a > x/a/ping", "z/b > x/b/ping"],
        denied: &["y/a > x/a:80/tcp", "y/a > x/a:80/udp"],
    },
    Case {
        name: "other messages than echo requests",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, ingress: [{fromEntities: [all], icmps: [{fields: [{type: 13}]}]}]}",
        )],
        allowed: &["x/a > y/a/ping", "y/a > x/a/timestamp", "z/b > x/a/timestamp"],
        denied: &["y/a > x/a/ping"],
    },
    Case {
        name: "a port by its name, in a policy with two specs",
        policies: &[(
            "CiliumNetworkPolicy x specs",
            "[{endpointSelector: {matchLabels: {pod: a}}, ingress: [{toPorts: [{ports: [{port: web}]}]}]},
              {endpointSelector: {matchLabels: {pod: b}}, ingress: [{fromEndpoints: [{matchLabels: {pod: a}}]}]}]",
        )],
        allowed: &["y/a > x/a:80/tcp", "x/a > x/b:80/tcp", "y/a > x/c:80/tcp"],
        denied: &["y/a > x/a:81/tcp", "x/c > x/b:80/tcp"],
    },
    Case {
        name: "default deny of a cluster, with a way for some",
        policies: &[
            ("CiliumClusterwideNetworkPolicy", "{endpointSelector: {}, ingress: [{}]}"),
            ("CiliumNetworkPolicy x", "{endpointSelector: {}, ingress: [{fromEndpoints: [{}]}]}"),
        ],
        allowed: &["x/b > x/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "x/a > y/a:80/tcp", "y/b > y/a/ping", "outside > z/a:80/tcp"],
    },
    Case {
        name: "HTTP is not enforced: nothing is allowed by such a rule",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, ingress: [{fromEntities: [all], toPorts: [{ports: [{port: '80', protocol: TCP}],
              rules: {http: [{method: GET}]}}]}, {fromEndpoints: [{matchLabels: {pod: b}}]}]}",
        )],
        allowed: &["x/b > x/a:80/tcp"],
        denied: &["x/c > x/a:80/tcp", "y/a > x/a:80/tcp"],
    },
    Case {
        name: "an audited policy is in nobody's way, and others are",
        policies: &[
            ("x @weir.dev/audit=true", "{podSelector: {}, policyTypes: [Ingress]}"),
            ("y", "{podSelector: {}, policyTypes: [Ingress]}"),
        ],
        allowed: &["y/a > x/a:80/tcp", "outside > x/b:80/tcp", "z/a > x/a/ping"],
        denied: &["x/a > y/a:80/tcp"],
    },
    Case {
        name: "who is told what he may not send",
        policies: &[("x @weir.dev/deny-response=reject", "{podSelector: {}, policyTypes: [Egress]}")],
        allowed: &["y/a > x/a:80/tcp"],
        denied: &["x/a > y/a:80/tcp!", "x/b > outside:80/tcp!", "x/a > z/b:81/udp!"],
    },
    Case {
        name: "the administrator's deny beats a namespace's allow",
        policies: &[
            (
                "ClusterNetworkPolicy",
                "{tier: Admin, priority: 10, subject: {namespaces: {matchLabels: {team: blue}}},
                  ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: red}}}]}]}",
            ),
            ("x", "{podSelector: {}, ingress: [{}]}"),
        ],
        allowed: &["z/a > x/a:80/tcp", "x/b > x/a:80/tcp", "outside > x/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "y/b > x/b/ping"],
    },
    Case {
        name: "the lower priority counts, and what passes is the namespace's to decide",
        policies: &[
            (
                "ClusterNetworkPolicy",
                "{tier: Admin, priority: 1, subject: {pods: {podSelector: {matchLabels: {pod: a}}, namespaceSelector: {}}},
                  ingress: [{action: Pass, from: [{pods: {podSelector: {matchLabels: {pod: b}}, namespaceSelector: {}}}]},
                            {action: Accept, from: [{namespaces: {matchLabels: {team: red}}}], protocols:
                              [{tcp: {destinationPort: {number: 80}}}]}]}",
            ),
            (
                "ClusterNetworkPolicy",
                "{tier: Admin, priority: 2, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}",
            ),
            ("x", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: green}}}]}]}"),
        ],
        allowed: &["y/a > x/a:80/tcp", "z/b > x/a:80/tcp", "y/b > z/a:80/tcp"],
        denied: &["y/a > x/a:81/tcp", "y/b > x/a:80/tcp", "y/a > x/b:80/tcp", "z/a > x/a:80/tcp"],
    },
    Case {
        name: "a base that a namespace may override",
        policies: &[
            (
                "ClusterNetworkPolicy",
                "{tier: Baseline, priority: 0, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}",
            ),
            ("x", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}"),
        ],
        allowed: &["x/b > x/a:80/tcp", "outside > y/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "y/b > y/a:80/tcp", "x/a > z/a/ping", "outside > x/a:80/tcp"],
    },
    Case {
        name: "networks of the administrator hold pods, too",
        policies: &[(
            "ClusterNetworkPolicy",
            "{tier: Admin, priority: 5, subject: {pods: {podSelector: {matchLabels: {pod: a}},
              namespaceSelector: {matchLabels: {team: blue}}}},
              egress: [{action: Deny, to: [{networks: ['$y/a.4/32', '$y/a.6/128']}]}]}",
        )],
        allowed: &["x/a > y/b:80/tcp", "x/b > y/a:80/tcp", "x/a > outside:80/tcp"],
        denied: &["x/a > y/a:80/tcp", "x/a > y/a/ping"],
    },
];

#[test]
fn published_policies_do_what_they_promise() -> Result<()> {
    require_lab!();
    judge_all(CASES)
}
