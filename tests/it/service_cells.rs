//! Every cell of (kind of address, traffic policies, place of the client, place of the backend, family, protocol).

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::json;

use crate::lab::{Lab, Pod, ServicePort, Setup, Space, Via, backend};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const CLUSTER_IPS: [&str; 2] = ["10.96.0.20", "fd00:96::20"];
const BALANCER_IPS: [&str; 2] = ["203.0.113.20", "2001:db8:cb::20"];
const EXTERNAL_IPS: [&str; 2] = ["203.0.113.21", "2001:db8:cb::21"];
const PORT: u16 = 1080;
const NODE_PORT: u16 = 30090;

/// Where somebody is: on a node, or outside.
type Place = Option<usize>;

/// What a cell asks: an address, and the node that it leads to from outside; `None`: a cluster IP.
struct Frontend {
    target: SocketAddr,
    arrives_at: Place,
}

struct World {
    pods: [Pod; 2],
    /// By the socket hooks, and without them.
    clients: [Pod; 3],
    lab: Lab,
}

impl World {
    fn start(routing: &str) -> Result<Self> {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let pod = |number, name: &str| lab.pod(number, &format!("shop/{name}")).label("app", name);
        let pods = [pod(1, "near").create()?, pod(2, "far").create()?];
        let packets = pod(1, "packets").outside_cgroup().create()?;
        let clients = [pod(1, "client").create()?, packets, pod(2, "far-client").create()?];
        for addresses in [CLUSTER_IPS, BALANCER_IPS, EXTERNAL_IPS] {
            for (address, node) in addresses.iter().zip(lab.node(1).addresses()) {
                lab.outside().ip(&format!("route add {address} via {node}"))?;
            }
        }
        Ok(Self { pods, clients, lab })
    }

    fn serve(&self, external: &str, internal: &str, pods: &[&Pod]) -> Result<()> {
        let ports = [("web", "TCP", PORT, 80), ("query", "UDP", PORT, 8080)];
        let of_service = ports.map(|(name, protocol, port, target)| {
            json!({ "name": name, "protocol": protocol, "port": port, "targetPort": target,
                    "nodePort": NODE_PORT })
        });
        self.lab.manifests().write(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "cells", "namespace": "shop" },
            "spec": {
                "type": "LoadBalancer", "clusterIP": CLUSTER_IPS[0], "clusterIPs": CLUSTER_IPS,
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "externalTrafficPolicy": external, "internalTrafficPolicy": internal,
                "externalIPs": EXTERNAL_IPS, "ports": of_service,
            },
            "status": { "loadBalancer": { "ingress": BALANCER_IPS.map(|ip| json!({ "ip": ip })) } },
        }))?;
        let backends: Vec<_> = pods.iter().map(|pod| backend(pod, true)).collect();
        self.lab.manifests().slices(("shop", "cells"), &ports.map(ServicePort::from), &backends)
    }

    fn frontends(&self) -> Result<Vec<Frontend>> {
        let frontend = |address: IpAddr, port, arrives_at| Frontend {
            target: SocketAddr::new(address, port),
            arrives_at,
        };
        let mut all = Vec::new();
        for address in CLUSTER_IPS {
            all.push(frontend(address.parse()?, PORT, None));
        }
        for address in BALANCER_IPS.iter().chain(&EXTERNAL_IPS) {
            all.push(frontend(address.parse()?, PORT, Some(1)));
        }
        for number in [1, 2] {
            let own = self.lab.node(number).addresses().iter();
            all.extend(own.map(|address| frontend(*address, NODE_PORT, Some(number))));
        }
        Ok(all)
    }

    fn clients(&self) -> [(&Space, &str, Place); 6] {
        let [client, packets, far_client] = &self.clients;
        [
            (self.lab.outside(), "outside", None),
            (client.space(), "client", Some(1)),
            (packets.space(), "packets", Some(1)),
            (far_client.space(), "far-client", Some(2)),
            (self.lab.node(1).space(), "node1", Some(1)),
            (self.lab.node(2).space(), "node2", Some(2)),
        ]
    }
}

/// The rules of the Kubernetes documentation, in as many words.
fn expected(frontend: &Frontend, client: Place, policies: [&str; 2], backend: Place) -> Expected {
    let [external, internal] = policies;
    let Some(client) = client else {
        return match (frontend.arrives_at, backend) {
            // Cluster IPs are the cluster's own.
            (None, _) => Expected::Denied,
            (_, None) => Expected::Refused,
            // Another node serves: load balancers ask there.
            (arrives_at, backend) if external == "Local" && arrives_at != backend => Expected::Denied,
            _ => Expected::Answered,
        };
    };
    let stays = internal == "Local" && frontend.arrives_at.is_none();
    match backend {
        None => Expected::Refused,
        Some(node) if stays && node != client => Expected::Refused,
        Some(_) => Expected::Answered,
    }
}

#[test]
fn every_cell_of_addresses_policies_clients_and_backends_is_as_documented() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        let frontends = world.frontends()?;
        for policies in
            [["Cluster", "Cluster"], ["Local", "Cluster"], ["Cluster", "Local"], ["Local", "Local"]]
        {
            for place in [None, Some(1), Some(2)] {
                let pods: Vec<&Pod> =
                    place.map(|number: usize| &world.pods[number - 1]).into_iter().collect();
                world.serve(policies[0], policies[1], &pods)?;
                let mut table = Vec::new();
                for (space, name, client) in world.clients() {
                    for frontend in &frontends {
                        let expected = expected(frontend, client, policies, place);
                        let row = |via| Row::from_space(space, name, via, frontend.target, expected);
                        table.extend([Via::Tcp, Via::Udp].map(row));
                    }
                }
                expect_all(&table)
                    .with_context(|| format!("{routing}, {policies:?}, backend on {place:?}"))?;
            }
        }
    }
    Ok(())
}
