//! How platforms lay out their nodes: what of that a network plugin meets, as a table.
//!
//! GKE's facts are from the scripts of Kubernetes that make its nodes (`cluster/gce/gci/configure-helper.sh`:
//! `setup-containerd`, `KUBE_HOME`, `admission_controller_config.yaml`) and its quota
//! (`cluster/gce/addons/admission-resource-quota-critical-pods`); k3s' from its `pkg/agent/config/config.go`,
//! `pkg/agent/templates` and `pkg/agent/proxy/apiproxy.go`; EKS' from `misc/10-aws.conflist` of
//! aws/amazon-vpc-cni-k8s; AKS' from its documentation of "Bring your own CNI".

use std::fmt;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Whose nodes those of the cluster are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Platform {
    Kubeadm,
    K3s,
    Eks,
    Aks,
    Gke,
}

/// What differs between them.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The name of its overlay.
    pub overlay: &'static str,
    /// Nodes, pods and Services have IPv6 addresses, too.
    pub has_ipv6: bool,
    /// The controller manager gives Nodes pod CIDRs.
    pub gives_pod_cidrs: bool,
    /// The containerd of a node looks for plugins there, and these are there.
    pub plugin_directory: &'static str,
    pub plugins: &'static [&'static str],
    /// A network configuration that is there before any other: its name and its text.
    pub configuration: Option<(&'static str, &'static str)>,
    /// containerd makes such a network configuration itself, once the Node has its pod CIDR.
    pub configuration_template: Option<&'static str>,
    /// Nodes have a kube-proxy.
    pub has_kube_proxy: bool,
    /// Pods of system classes are admitted only where a ResourceQuota names these.
    pub limits_critical_pods: bool,
    /// Nodes reach the API server through their own loopback address only.
    pub balancer: Option<&'static str>,
    /// Nodes share a link; else addresses are /32, and the gateway alone is on the link.
    pub is_linked: bool,
    /// Nodes are registered with the taint that the operator takes away.
    pub is_tainted: bool,
    /// What the nodes' devices carry.
    pub mtu: u32,
}

const OPT: &str = "/opt/cni/bin";
const STANDARD: [&str; 5] = ["loopback", "bridge", "host-local", "portmap", "ptp"];

const KUBEADM: Facts = Facts {
    overlay: "kubeadm",
    has_ipv6: true,
    gives_pod_cidrs: true,
    plugin_directory: OPT,
    // As the package kubernetes-cni has them.
    plugins: &STANDARD,
    configuration: None,
    configuration_template: None,
    has_kube_proxy: false,
    limits_critical_pods: false,
    balancer: None,
    is_linked: true,
    is_tainted: true,
    mtu: 1500,
};

/// With `--flannel-backend=none` containerd has its defaults, and nobody puts a plugin there.
const K3S: Facts = Facts { overlay: "k3s", plugins: &[], balancer: Some("127.0.0.1:6444"), ..KUBEADM };

const EKS: Facts = Facts {
    overlay: "eks",
    has_ipv6: false,
    gives_pod_cidrs: false,
    // aws-node has put it there, and is gone.
    configuration: Some(("10-aws.conflist", AWS)),
    mtu: 9001,
    ..KUBEADM
};

const AKS: Facts =
    Facts { overlay: "aks", has_ipv6: false, gives_pod_cidrs: false, has_kube_proxy: true, ..KUBEADM };

/// Without the taint, so that Google's network has pods before Weir comes.
const GKE: Facts = Facts {
    overlay: "gke",
    has_ipv6: false,
    plugin_directory: "/home/kubernetes/bin",
    configuration_template: Some(GOOGLE),
    has_kube_proxy: true,
    limits_critical_pods: true,
    is_linked: false,
    is_tainted: false,
    mtu: 1460,
    ..KUBEADM
};

const AWS: &str = r#"{"cniVersion": "0.4.0", "name": "aws-cni", "disableCheck": true, "plugins": [
  {"name": "aws-cni", "type": "aws-cni", "vethPrefix": "eni", "mtu": "9001"},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
"#;

const GOOGLE: &str = r#"{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
  {"type": "ptp", "mtu": 1460, "ipam": {"type": "host-local", "subnet": "{{.PodCIDR}}", "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
"#;

impl Platform {
    pub const ALL: [Self; 5] = [Self::Kubeadm, Self::K3s, Self::Eks, Self::Aks, Self::Gke];

    /// The platform with an overlay of that name.
    pub fn named(name: &str) -> Result<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|platform| platform.facts().overlay == name).with_context(|| {
            let names = Self::ALL.map(|platform| platform.facts().overlay);
            format!("{name} is none of {}", names.join(", "))
        })
    }

    /// What is particular about it.
    pub const fn facts(self) -> &'static Facts {
        match self {
            Self::Kubeadm => &KUBEADM,
            Self::K3s => &K3S,
            Self::Eks => &EKS,
            Self::Aks => &AKS,
            Self::Gke => &GKE,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.facts().overlay)
    }
}
