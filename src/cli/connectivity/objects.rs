//! What the test makes in its namespace. The pods meet the `restricted` Pod Security Standard, so
//! that they may run wherever a person may run anything.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Namespaces of tests have this label.
pub const LABEL: &str = "weir.dev/connectivity-test";
/// Where the pods answer.
pub const PORT: u16 = 8080;
/// Where their services answer.
pub const SERVICE_PORT: u16 = 80;

pub const CLIENT: &str = "client";
pub const STRANGER: &str = "stranger";
pub const CONFINED: &str = "confined";

/// The policies' names.
pub const GUARD: &str = "guard";
pub const CONFINE: &str = "confine";

/// The server on the node of this number, counted from 1.
pub fn server(number: usize) -> String {
    format!("server-{number}")
}

/// The server behind a policy on the node of this number.
pub fn guarded(number: usize) -> String {
    format!("guarded-{number}")
}

/// The image that the agents run.
#[derive(Clone, Debug)]
pub struct Image {
    pub name: String,
    pub pull_policy: Option<String>,
}

pub fn namespace(name: &str) -> Result<Namespace> {
    object(json!({
        "metadata": {
            "name": name,
            "labels": { LABEL: "true", "pod-security.kubernetes.io/enforce": "restricted" },
        },
    }))
}

pub fn pod(name: &str, node: &str, image: &Image) -> Result<Pod> {
    let mut labels = json!({ LABEL: "true", "app": name });
    match name {
        CLIENT => labels["friend"] = "yes".into(),
        name if name.starts_with("guarded") => labels["role"] = "guarded".into(),
        _ => {}
    }
    object(json!({
        "metadata": { "name": name, "labels": labels },
        "spec": {
            "nodeName": node,
            "tolerations": [{ "operator": "Exists" }],
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "weir",
                "image": image.name,
                "imagePullPolicy": image.pull_policy,
                "args": ["connectivity", "serve", "--name", name, "--port", PORT.to_string()],
                "ports": [{ "containerPort": PORT }],
                "resources": { "requests": { "cpu": "5m", "memory": "16Mi" }, "limits": { "memory": "128Mi" } },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"] },
                },
            }],
        },
    }))
}

/// The service of a server; of both families where the cluster has both.
pub fn service(name: &str) -> Result<Service> {
    object(json!({
        "metadata": { "name": name, "labels": { LABEL: "true" } },
        "spec": {
            "selector": { "app": name },
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                { "name": "tcp", "protocol": "TCP", "port": SERVICE_PORT, "targetPort": PORT },
                { "name": "udp", "protocol": "UDP", "port": SERVICE_PORT, "targetPort": PORT },
            ],
        },
    }))
}

/// Friends may connect to the guarded servers by TCP; the confined pod may reach the first server.
pub fn policies() -> Result<[NetworkPolicy; 2]> {
    let policy = |name: &str, spec: Value| {
        object(json!({ "metadata": { "name": name, "labels": { LABEL: "true" } }, "spec": spec }))
    };
    Ok([
        policy(
            GUARD,
            json!({
                "podSelector": { "matchLabels": { "role": "guarded" } },
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{ "podSelector": { "matchLabels": { "friend": "yes" } } }],
                    "ports": [{ "protocol": "TCP", "port": PORT }],
                }],
            }),
        )?,
        policy(
            CONFINE,
            json!({
                "podSelector": { "matchLabels": { "app": CONFINED } },
                "policyTypes": ["Egress"],
                "egress": [{ "to": [{ "podSelector": { "matchLabels": { "app": server(1) } } }] }],
            }),
        )?,
    ])
}

fn object<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).context("making an object of the test")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_object_is_what_kubernetes_calls_so() {
        let image = Image { name: "weir:1".to_owned(), pull_policy: None };
        let made = pod(&guarded(2), "a", &image).expect("a pod");
        assert_eq!(made.metadata.labels.expect("labels")["role"], "guarded");
        assert_eq!(made.spec.expect("a spec").node_name.as_deref(), Some("a"));
        let ports = service("server-1").expect("a service").spec.and_then(|spec| spec.ports);
        assert_eq!(ports.map(|ports| ports.len()), Some(2));
        let [guard, confine] = policies().expect("policies");
        assert!(guard.spec.is_some_and(|spec| spec.ingress.is_some() && spec.egress.is_none()));
        assert!(confine.spec.is_some_and(|spec| spec.egress.is_some() && spec.ingress.is_none()));
        assert!(namespace("a").is_ok());
    }
}
