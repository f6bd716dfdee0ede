//! Objects of the API server, and the logs of Weir's own pods.

use std::time::Instant;

use anyhow::{Context, Result};
use futures::{Stream, StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, ListParams, LogParams, TypeMeta};
use serde_json::{Map, Value};

use super::{Entry, is_ours, within};
use crate::cli::cluster::{Cluster, explained};

const PAGE: u32 = 500;
/// Of one kind.
const OBJECTS_MAX: usize = 20_000;
const LOG_LINES: i64 = 20_000;
const LOG_BYTES: i64 = 5_000_000;
const GROUP: &str = "weir.dev/v1alpha1";

/// A kind, and whether only those of Weir's own namespace are wanted.
struct Wanted {
    resource: ApiResource,
    only_ours: bool,
}

/// Group, version, kind, plural; of all namespaces.
const KINDS: [(&str, &str, &str, &str); 7] = [
    ("", "v1", "Node", "nodes"),
    ("", "v1", "Namespace", "namespaces"),
    ("", "v1", "Pod", "pods"),
    ("", "v1", "Service", "services"),
    ("", "v1", "Event", "events"),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    ("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
];

/// Of Weir's own namespace.
const OWN_KINDS: [(&str, &str, &str, &str); 4] = [
    ("", "v1", "ConfigMap", "configmaps"),
    ("apps", "v1", "DaemonSet", "daemonsets"),
    ("apps", "v1", "Deployment", "deployments"),
    ("coordination.k8s.io", "v1", "Lease", "leases"),
];

/// Everything, one kind after the other.
pub fn collect(cluster: &Cluster, deadline: Instant) -> impl Stream<Item = Entry> {
    let kind = |(group, version, kind, plural): (&str, &str, &str, &str), only_ours| {
        let kind = GroupVersionKind::gvk(group, version, kind);
        Wanted { resource: ApiResource::from_gvk_with_plural(&kind, plural), only_ours }
    };
    let kinds = KINDS.into_iter().map(move |names| kind(names, false));
    let own = OWN_KINDS.into_iter().map(move |names| kind(names, true));
    let fixed = stream::iter(kinds.chain(own).map(Ok));
    let listed = stream::once(own_group(cluster)).flat_map(|kinds| match kinds {
        Ok(kinds) => stream::iter(kinds.into_iter().map(Ok).collect::<Vec<_>>()),
        Err(error) => stream::iter(vec![Err(error)]),
    });
    let objects = fixed.chain(listed).then(move |wanted| async move {
        match wanted {
            Ok(wanted) => {
                let path = format!("objects/{}.yaml", wanted.resource.plural);
                Entry::new(path, within(deadline, list(cluster, &wanted)).await)
            }
            Err(error) => Entry::new(format!("objects/{GROUP}"), Err(error)),
        }
    });
    let logs = stream::once(within(deadline, log_names(cluster))).flat_map(move |names| match names {
        Ok(names) => stream::iter(names).then(move |name| log(cluster, name, deadline)).left_stream(),
        Err(error) => stream::iter([Entry::new("logs", Err(error))]).right_stream(),
    });
    objects.chain(logs)
}

/// Whatever kinds this version of Weir has.
async fn own_group(cluster: &Cluster) -> Result<Vec<Wanted>> {
    let listed = cluster.client.list_api_group_resources(GROUP).await;
    let listed = listed.map_err(explained).context("listing the kinds of Weir")?;
    let (group, version) = GROUP.split_once('/').context("the group has a version")?;
    let kinds = listed.resources.iter().filter(|resource| !resource.name.contains('/'));
    let wanted = kinds.map(|resource| {
        let kind = GroupVersionKind::gvk(group, version, &resource.kind);
        Wanted { resource: ApiResource::from_gvk_with_plural(&kind, &resource.name), only_ours: false }
    });
    Ok(wanted.collect())
}

/// All objects of a kind as YAML, a document each.
async fn list(cluster: &Cluster, wanted: &Wanted) -> Result<Vec<u8>> {
    let client = cluster.client.clone();
    let api: Api<DynamicObject> = match wanted.only_ours {
        true => Api::namespaced_with(client, &cluster.namespace, &wanted.resource),
        false => Api::all_with(client, &wanted.resource),
    };
    let mut params = ListParams::default().limit(PAGE);
    let mut text = Vec::new();
    let mut count = 0;
    loop {
        let page = api.list(&params).await.map_err(explained).context("listing")?;
        for mut object in page.items {
            object.types.get_or_insert_with(|| types_of(&wanted.resource));
            let mut value = serde_json::to_value(&object).context("reading an object")?;
            let is_ours = is_ours(cluster, object.metadata.namespace.as_deref());
            redact(&mut value, is_ours);
            text.extend_from_slice(b"---\n");
            text.extend(crate::yaml::write(&value).context("writing an object")?.into_bytes());
            count += 1;
        }
        match page.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(_) if count >= OBJECTS_MAX => {
                text.extend(format!("# cut after {count} objects\n").into_bytes());
                return Ok(text);
            }
            Some(more) => params = params.continue_token(&more),
            None => return Ok(text),
        }
    }
}

/// Takes out what is nobody's business.
fn redact(object: &mut Value, is_ours: bool) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            // A copy of the whole object.
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    let is_pod = object["kind"] == "Pod";
    let spec = if is_pod { object.get_mut("spec") } else { object.pointer_mut("/spec/template/spec") };
    let Some(spec) = spec.and_then(Value::as_object_mut) else { return };
    if is_pod && !is_ours {
        keep(spec, &POD_FIELDS);
    }
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        let containers = spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten();
        for container in containers.filter_map(Value::as_object_mut) {
            if is_pod && !is_ours {
                keep(container, &CONTAINER_FIELDS);
            }
            let variables = container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten();
            for variable in variables.filter_map(Value::as_object_mut) {
                if let Some(value) = variable.get_mut("value") {
                    *value = "(redacted)".into();
                }
            }
        }
    }
    if is_pod
        && !is_ours
        && let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut)
    {
        metadata.remove("annotations");
    }
}

/// What the network of a pod depends on.
const POD_FIELDS: [&str; 10] = [
    "nodeName",
    "hostNetwork",
    "serviceAccountName",
    "dnsPolicy",
    "dnsConfig",
    "hostAliases",
    "containers",
    "initContainers",
    "priorityClassName",
    "runtimeClassName",
];
const CONTAINER_FIELDS: [&str; 4] = ["name", "image", "ports", "restartPolicy"];

fn keep(fields: &mut Map<String, Value>, wanted: &[&str]) {
    fields.retain(|name, _| wanted.contains(&name.as_str()));
}

/// Pod, container, and whether it is the one before the last restart.
async fn log_names(cluster: &Cluster) -> Result<Vec<(String, String, bool)>> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let pods =
        pods.list(&ListParams::default()).await.map_err(explained).context("listing the pods of Weir")?;
    let mut names = Vec::new();
    for pod in &pods.items {
        let Some(status) = &pod.status else { continue };
        let statuses = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
        for container in statuses {
            names.push((pod.name_any(), container.name.clone(), false));
            if container.restart_count > 0 {
                names.push((pod.name_any(), container.name.clone(), true));
            }
        }
    }
    Ok(names)
}

async fn log(
    cluster: &Cluster,
    (pod, container, previous): (String, String, bool),
    deadline: Instant,
) -> Entry {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let params = LogParams {
        container: Some(container.clone()),
        previous,
        tail_lines: Some(LOG_LINES),
        limit_bytes: Some(LOG_BYTES),
        timestamps: true,
        ..LogParams::default()
    };
    let text = within(deadline, async { pods.logs(&pod, &params).await.map_err(explained) }).await;
    let which = if previous { ".previous" } else { "" };
    Entry::new(format!("logs/{pod}/{container}{which}.log"), text.map(String::into_bytes))
}

/// Lists leave out what every item of them is.
fn types_of(resource: &ApiResource) -> TypeMeta {
    TypeMeta { api_version: resource.api_version.clone(), kind: resource.kind.clone() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "web",
                "managedFields": [{}],
                "annotations": {
                    "kubectl.kubernetes.io/last-applied-configuration": "TOPSECRET",
                    "team": "shop",
                },
            },
            "spec": {
                "nodeName": "a",
                "volumes": [{ "name": "token", "secret": { "secretName": "web" } }],
                "containers": [{
                    "name": "web",
                    "image": "web:1",
                    "command": ["web", "--password=TOPSECRET"],
                    "env": [{ "name": "PASSWORD", "value": "TOPSECRET" }],
                    "livenessProbe": { "httpGet": { "httpHeaders": [{ "value": "TOPSECRET" }] } },
                }],
                "initContainers": [{ "name": "init", "env": [{ "name": "KEY", "value": "TOPSECRET" }] }],
                "ephemeralContainers": [{ "name": "debug", "env": [{ "name": "KEY", "value": "TOPSECRET" }] }],
            },
            "status": { "podIP": "10.0.0.1" },
        })
    }

    #[test]
    fn other_peoples_pods_keep_what_their_network_needs() {
        let mut other = pod();
        redact(&mut other, false);
        let expected = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "web" },
            "spec": {
                "nodeName": "a",
                "containers": [{ "name": "web", "image": "web:1" }],
                "initContainers": [{ "name": "init" }],
            },
            "status": { "podIP": "10.0.0.1" },
        });
        assert_eq!(other, expected);
    }

    #[test]
    fn no_value_of_a_variable_is_kept_anywhere() {
        let mut ours = pod();
        ours["spec"]["containers"][0]["command"] = json!(["weir"]);
        ours["spec"]["containers"][0]["livenessProbe"] = json!({});
        let mut set =
            json!({ "kind": "DaemonSet", "metadata": {}, "spec": { "template": { "spec": ours["spec"] } } });
        for object in [&mut ours, &mut set] {
            redact(object, true);
            let text = object.to_string();
            assert!(!text.contains("TOPSECRET") && text.contains("PASSWORD"), "{text}");
        }
        assert_eq!(ours["metadata"]["annotations"], json!({ "team": "shop" }));
    }
}
