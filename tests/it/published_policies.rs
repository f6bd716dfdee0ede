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
    // As the recipes for NetworkPolicy are published.
    Case {
        name: "deny all traffic to an application",
        policies: &[("x", "{podSelector: {matchLabels: {pod: a}}, ingress: []}")],
        allowed: &["x/a > x/b:80/tcp", "y/a > x/b:80/tcp"],
        denied: &["x/b > x/a:80/tcp", "y/a > x/a/ping", "outside > x/a:80/tcp"],
    },
    Case {
        name: "deny all traffic from other namespaces, with a null for labels",
        policies: &[("x", "{podSelector: {matchLabels: null}, ingress: [{from: [{podSelector: {}}]}]}")],
        allowed: &["x/b > x/a:80/tcp", "x/a > y/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "z/b > x/b/ping"],
    },
    Case {
        name: "allow traffic from all namespaces to one application, beside a default deny",
        policies: &[
            ("x", "{podSelector: {}, policyTypes: [Ingress]}"),
            ("x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {}}]}]}"),
        ],
        allowed: &["y/a > x/a:80/tcp", "x/b > x/a/ping"],
        denied: &["x/a > x/b:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "allow external clients, on the published port",
        policies: &[(
            "x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{ports: [{port: 80}], from: []}]}",
        )],
        allowed: &["outside > x/a:80/tcp", "y/a > x/a:80/tcp"],
        denied: &["outside > x/a:81/tcp", "x/b > x/a:80/udp"],
    },
    Case {
        name: "a store for several services, each by its labels",
        policies: &[(
            "x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}},
              {podSelector: {matchLabels: {pod: c, only-c: 'yes'}}}]}]}",
        )],
        allowed: &["x/b > x/a:80/tcp", "x/c > x/a:80/tcp"],
        denied: &["y/b > x/a:80/tcp", "z/c > x/a/ping"],
    },
    Case {
        name: "deny egress of an application but for DNS",
        policies: &[(
            "x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress],
              egress: [{ports: [{port: 81, protocol: UDP}, {port: 81, protocol: TCP}]}]}",
        )],
        allowed: &["x/a > z/a:81/udp", "x/a > outside:81/tcp", "y/a > x/a:80/tcp"],
        denied: &["x/a > z/a:80/tcp", "x/a > outside/ping"],
    },
    Case {
        name: "deny egress out of the cluster",
        policies: &[(
            "x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [
              {ports: [{port: 81, protocol: UDP}, {port: 81, protocol: TCP}], to: [{namespaceSelector: {}}]},
              {to: [{namespaceSelector: {}}]}]}",
        )],
        allowed: &["x/a > y/b:80/tcp", "x/b > outside:80/tcp"],
        denied: &["x/a > outside:80/tcp", "x/a > world/ping"],
    },
    Case {
        name: "default deny of all of a namespace, with DNS and its own pods",
        policies: &[
            ("x", "{podSelector: {}, policyTypes: [Ingress, Egress]}"),
            (
                "x",
                "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels:
                  {kubernetes.io/metadata.name: z}}, podSelector: {matchLabels: {pod: a}}}],
                  ports: [{protocol: UDP, port: 81}, {protocol: TCP, port: 81}]}]}",
            ),
            ("x", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}], egress: [{to: [{podSelector: {}}]}]}"),
        ],
        allowed: &["x/a > z/a:81/udp", "x/b > z/a:81/tcp", "x/a > x/b:80/tcp", "x/c > x/b/ping"],
        denied: &["x/a > z/b:81/udp", "x/a > z/a:80/tcp", "y/a > x/a:80/tcp", "x/b > outside:80/tcp"],
    },
    Case {
        name: "the example of the documentation: blocks, namespaces and pods in one rule",
        policies: &[(
            "x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [
              {ipBlock: {cidr: 10.200.0.0/16, except: [10.200.1.0/24]}}, {ipBlock: {cidr: 'fd00:200::/64'}},
              {namespaceSelector: {matchLabels: {team: red}}}, {podSelector: {matchLabels: {pod: b}}}],
              ports: [{protocol: TCP, port: 80}]}],
              egress: [{to: [{ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: '2001:db8:ffff::/48'}}],
              ports: [{protocol: TCP, port: 81}]}]}",
        )],
        allowed: &["outside > x/a:80/tcp", "y/c > x/a:80/tcp", "x/b > x/a:80/tcp", "x/a > world:81/tcp"],
        denied: &["x/c > x/a:80/tcp", "z/b > x/a:80/tcp", "y/a > x/a:81/tcp", "x/a > world:80/tcp", "x/a > outside:81/tcp"],
    },
    Case {
        name: "ingress from the controller's pods, by the name of the port",
        policies: &[(
            "x",
            "{podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}, policyTypes: [Ingress],
              ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}, podSelector: {matchLabels: {pod: a}}}],
              ports: [{port: web, protocol: TCP}]}]}",
        )],
        allowed: &["y/a > x/a:80/tcp", "y/a > x/b:81/tcp", "z/a > x/c:80/tcp"],
        denied: &["y/b > x/a:80/tcp", "y/a > x/a:81/tcp", "z/a > x/a:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "everything outside but the metadata service",
        policies: &[(
            "x",
            "{podSelector: {}, policyTypes: [Egress], egress: [{to: [
              {ipBlock: {cidr: 0.0.0.0/0, except: [203.0.113.7/32]}},
              {ipBlock: {cidr: '::/0', except: ['2001:db8:ffff::7/128']}}]}]}",
        )],
        allowed: &["x/a > outside:80/tcp", "x/a > y/a:80/tcp", "x/b > z/a/ping"],
        denied: &["x/a > world:80/tcp", "x/b > world:81/udp"],
    },
    // As Cilium's documentation has them.
    Case {
        name: "the metadata service is denied to every pod of the cluster",
        policies: &[(
            "CiliumClusterwideNetworkPolicy",
            "{endpointSelector: {}, enableDefaultDeny: {egress: false},
              egressDeny: [{toCIDR: [203.0.113.7/32, '2001:db8:ffff::7/128']}]}",
        )],
        allowed: &["x/a > outside:80/tcp", "y/a > z/a:80/tcp"],
        denied: &["x/a > world:80/tcp", "y/b > world:81/udp", "z/c > world/ping"],
    },
    Case {
        name: "a backend for its frontend",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{description: 'the frontend alone', endpointSelector: {matchLabels: {pod: a}},
              ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}",
        )],
        allowed: &["x/b > x/a:80/tcp", "x/b > x/a/ping"],
        denied: &["x/c > x/a:80/tcp", "y/b > x/a:80/tcp"],
    },
    Case {
        name: "a pod exposed to one of another namespace",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels:
              {'k8s:io.kubernetes.pod.namespace': y, pod: b}}]}]}",
        )],
        allowed: &["y/b > x/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a:80/tcp", "z/b > x/a:80/tcp"],
    },
    Case {
        name: "every namespace, by an expression on the namespace's label",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchExpressions:
              [{key: io.kubernetes.pod.namespace, operator: Exists}]}]}]}",
        )],
        allowed: &["y/b > x/a:80/tcp", "x/b > x/a:80/tcp", "z/a > x/a/ping"],
        denied: &["outside > x/a:80/tcp"],
    },
    Case {
        name: "layer 4 alone: one port to anybody",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {matchLabels: {pod: a}}, egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}",
        )],
        allowed: &["x/a > y/a:80/tcp", "x/a > outside:80/tcp"],
        denied: &["x/a > y/a:81/tcp", "x/a > y/a:80/udp", "x/a > outside/ping"],
    },
    Case {
        name: "a range of ports",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {matchLabels: {pod: a}},
              egress: [{toPorts: [{ports: [{port: '80', endPort: 8080, protocol: TCP}]}]}]}",
        )],
        allowed: &["x/a > y/a:81/tcp", "x/a > y/a:8080/tcp"],
        denied: &["x/a > y/a:9090/tcp", "x/a > y/a:81/udp"],
    },
    Case {
        name: "a prefix with a hole, on one port",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, egress: [{toCIDRSet: [{cidr: 0.0.0.0/0, except: [203.0.113.0/24]},
              {cidr: '::/0', except: ['2001:db8:ffff::/48']}], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}",
        )],
        allowed: &["x/a > outside:80/tcp"],
        denied: &["x/a > outside:81/tcp", "x/a > world:80/tcp", "x/a > y/a:80/tcp"],
    },
    Case {
        name: "nodes of the cluster, and nobody else",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {}, ingress: [{fromEntities: [host, remote-node]}]}",
        )],
        allowed: &["node1 > x/a:80/tcp", "node2 > x/a:80/tcp", "node1 > x/b:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "outside > x/b:80/tcp"],
    },
    Case {
        name: "the world comes in to what is public",
        policies: &[(
            "CiliumNetworkPolicy x",
            "{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEntities: [world]}]}",
        )],
        allowed: &["outside > x/a:80/tcp", "y/a > x/b:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a/ping"],
    },
    Case {
        name: "lockdown against the world, for the whole cluster",
        policies: &[(
            "CiliumClusterwideNetworkPolicy",
            "{endpointSelector: {}, ingressDeny: [{fromEntities: [world]}], ingress: [{fromEntities: [all]}]}",
        )],
        allowed: &["y/a > x/a:80/tcp", "z/b > x/b/ping", "x/a > outside:80/tcp"],
        denied: &["outside > x/a:80/tcp", "outside > z/b:80/udp"],
    },
    Case {
        name: "DNS of the cluster for every pod",
        policies: &[(
            "CiliumClusterwideNetworkPolicy",
            "{endpointSelector: {matchLabels: {'k8s:io.kubernetes.pod.namespace': z, pod: a}},
              ingress: [{fromEndpoints: [{}], toPorts: [{ports: [{port: '81', protocol: UDP}]}]}]}",
        )],
        allowed: &["x/a > z/a:81/udp", "y/b > z/a:81/udp", "y/a > z/b:80/tcp"],
        denied: &["x/a > z/a:80/tcp", "outside > z/a:81/udp"],
    },
    Case {
        name: "a rule that isolates nobody",
        policies: &[(
            "CiliumClusterwideNetworkPolicy",
            "{endpointSelector: {}, enableDefaultDeny: {egress: false, ingress: false},
              egress: [{toEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': z}}]}]}",
        )],
        allowed: &["x/a > y/a:80/tcp", "x/a > outside:80/tcp", "x/b > z/a:81/udp"],
        denied: &[],
    },
    // As the samples of ClusterNetworkPolicy are published.
    Case {
        name: "nobody of the tenants speaks to a namespace that is the cluster's own",
        policies: &[(
            "ClusterNetworkPolicy",
            "{tier: Admin, priority: 20, subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: z}}},
              ingress: [{name: deny-tenants, action: Deny, from: [{namespaces: {matchExpressions:
                [{key: team, operator: NotIn, values: [green]}]}}]}]}",
        )],
        allowed: &["z/a > z/b:80/tcp", "z/a > x/a:80/tcp", "outside > z/a:80/tcp"],
        denied: &["x/a > z/a:80/tcp", "y/b > z/b/ping"],
    },
    Case {
        name: "monitoring reaches every namespace, whatever its policies say",
        policies: &[
            (
                "ClusterNetworkPolicy",
                "{tier: Admin, priority: 30, subject: {namespaces: {}}, ingress: [{name: allow-monitoring, action: Accept,
                  from: [{namespaces: {matchLabels: {kubernetes.io/metadata.name: z}}}]}]}",
            ),
            ("x", "{podSelector: {}, policyTypes: [Ingress]}"),
        ],
        allowed: &["z/a > x/a:80/tcp", "z/b > x/b/ping", "x/a > y/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "x/b > x/a:80/tcp", "outside > x/a:80/tcp"],
    },
    Case {
        name: "tenants are strangers by default, and a namespace may be a host",
        policies: &[
            (
                "ClusterNetworkPolicy",
                "{tier: Baseline, priority: 1, subject: {namespaces: {}}, ingress: [
                  {name: own, action: Accept, from: [{namespaces: {matchLabels: {team: green}}}]},
                  {name: others, action: Deny, from: [{namespaces: {}}]}]}",
            ),
            ("y", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}"),
        ],
        allowed: &["z/a > x/a:80/tcp", "x/a > y/a:80/tcp", "outside > x/a:80/tcp"],
        denied: &["y/a > x/a:80/tcp", "z/a > y/a:80/tcp", "x/b > x/a/ping"],
    },
];

#[test]
fn published_policies_do_what_they_promise() -> Result<()> {
    require_lab!();
    judge_all(CASES)
}
