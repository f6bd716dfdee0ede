//! Policies of kinds that Weir does not enforce: whoever has some is to be told.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::backoff::jittered;
use crate::tables::Table;

/// An object that restricts traffic elsewhere, and not here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ForeignPolicy {
    /// `apiVersion/kind`.
    pub kind: String,
    /// Its namespace; empty for the cluster's.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Group, kind and plural of what others call policies of the network.
const KINDS: [(&str, &str, &str); 16] = [
    ("policy.networking.k8s.io", "AdminNetworkPolicy", "adminnetworkpolicies"),
    ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy", "baselineadminnetworkpolicies"),
    ("crd.projectcalico.org", "NetworkPolicy", "networkpolicies"),
    ("crd.projectcalico.org", "GlobalNetworkPolicy", "globalnetworkpolicies"),
    ("projectcalico.org", "NetworkPolicy", "networkpolicies"),
    ("projectcalico.org", "GlobalNetworkPolicy", "globalnetworkpolicies"),
    ("projectcalico.org", "StagedNetworkPolicy", "stagednetworkpolicies"),
    ("security.istio.io", "AuthorizationPolicy", "authorizationpolicies"),
    ("security.istio.io", "PeerAuthentication", "peerauthentications"),
    ("crd.antrea.io", "NetworkPolicy", "networkpolicies"),
    ("crd.antrea.io", "ClusterNetworkPolicy", "clusternetworkpolicies"),
    ("policy.linkerd.io", "AuthorizationPolicy", "authorizationpolicies"),
    ("policy.linkerd.io", "ServerAuthorization", "serverauthorizations"),
    ("networking.gke.io", "FQDNNetworkPolicy", "fqdnnetworkpolicies"),
    ("vpcresources.k8s.aws", "PolicyEndpoint", "policyendpoints"),
    ("k8s.ovn.org", "EgressFirewall", "egressfirewalls"),
];

/// So many objects of one kind are named.
const NAMED_MAX: u32 = 100;
/// The API server is asked again after this.
const AGAIN: Duration = Duration::from_secs(300);

/// Every such object that is known, by where it was found.
pub type ForeignPolicies = Table<Arc<str>, Arc<BTreeSet<ForeignPolicy>>>;

/// True for `apiVersion/kind` of a policy that is not enforced here, in whatever version.
pub fn is_policy(kind: &str) -> bool {
    let (version, kind) = kind.rsplit_once('/').unwrap_or(("", kind));
    let group = version.split_once('/').map_or("", |(group, _)| group);
    let is_listed = |(of, name, _): &(&str, &str, &str)| *of == group && *name == kind;
    // Another version of a group of ours is a policy, too.
    KINDS.iter().any(is_listed) || (group.contains('.') && kind.ends_with("NetworkPolicy"))
}

/// Looks for such objects in a cluster, now and then. Never returns.
pub async fn run(client: Client, found: Arc<ForeignPolicies>) {
    let mut refused = BTreeSet::new();
    loop {
        match look(&client, &mut refused).await {
            Ok(all) => drop(found.apply("kubernetes".into(), Arc::new(all))),
            Err(error) => debug!(%error, "policies of other kinds could not be looked for"),
        }
        tokio::time::sleep(jittered(AGAIN)).await;
    }
}

/// `refused`: the kinds that the agent may not list. Each is said once.
async fn look(
    client: &Client,
    refused: &mut BTreeSet<&'static str>,
) -> Result<BTreeSet<ForeignPolicy>, kube::Error> {
    let groups = client.list_api_groups().await?;
    let mut all = BTreeSet::new();
    for group in groups.groups {
        let kinds = KINDS.iter().filter(|(of, _, _)| *of == group.name);
        for (of, kind, plural) in kinds {
            let versions = group.preferred_version.iter().chain(&group.versions);
            let Some(version) = versions.map(|version| version.version.as_str()).next() else { continue };
            let resource = ApiResource {
                plural: (*plural).to_owned(),
                ..ApiResource::from_gvk(&GroupVersionKind::gvk(of, version, kind))
            };
            let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
            let named = match api.list_metadata(&ListParams::default().limit(NAMED_MAX)).await {
                Ok(list) => list.items,
                Err(kube::Error::Api(error)) if error.code == 403 => {
                    if refused.insert(plural) {
                        warn!(
                            group = of,
                            kind, "objects of this kind may not be listed: nobody is told of them"
                        );
                    }
                    continue;
                }
                // The group has no such kind.
                Err(error) => {
                    debug!(kind, %error, "objects of this kind could not be listed");
                    continue;
                }
            };
            all.extend(named.into_iter().map(|object| ForeignPolicy {
                kind: format!("{of}/{version}/{kind}"),
                namespace: object.metadata.namespace.unwrap_or_default(),
                name: object.metadata.name.unwrap_or_default(),
            }));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::is_policy;

    #[test]
    fn policies_of_others_are_known_as_such() {
        for kind in [
            "policy.networking.k8s.io/v1alpha1/AdminNetworkPolicy",
            "projectcalico.org/v3/GlobalNetworkPolicy",
            "security.istio.io/v1/AuthorizationPolicy",
            "crd.antrea.io/v1beta1/ClusterNetworkPolicy",
            "cilium.io/v3/CiliumLocalNetworkPolicy",
        ] {
            assert!(is_policy(kind), "{kind}");
        }
        for kind in ["apps/v1/Deployment", "v1/Pod", "policy/v1/PodDisruptionBudget"] {
            assert!(!is_policy(kind), "{kind}");
        }
    }
}
