//! Definitions of kinds that are not ours and that Weir reads, for clusters where nobody else defines them.
//!
//! The types here are the shape of the objects and nothing more: objects are read field by field
//! (`kube::cilium`, `kube::kinds`), because doubt about one field must not cost the rest. Nothing of a
//! policy is pruned: a field that is misspelt reaches the reader, which says so and grants nothing by it.

mod cilium;
mod cluster_policy;
mod egress;
mod redirect;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use super::crd::{CiliumLoadBalancerIPPool, SCHEMA_VERSION_ANNOTATION};

/// The version of the definitions below, raised by every change.
pub const VERSION: u32 = 2;

/// Every such definition, as `crds/upstream` holds them.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let all = [
        with_specs(cilium::CiliumNetworkPolicy::crd()),
        with_specs(cilium::CiliumClusterwideNetworkPolicy::crd()),
        json_of(&cilium::CiliumCIDRGroup::crd()),
        json_of(&redirect::CiliumLocalRedirectPolicy::crd()),
        json_of(&egress::CiliumEgressGatewayPolicy::crd()),
        json_of(&CiliumLoadBalancerIPPool::crd()),
        json_of(&cluster_policy::ClusterNetworkPolicy::crd()),
    ];
    all.into_iter().filter_map(finished).collect()
}

fn json_of(definition: &CustomResourceDefinition) -> Value {
    serde_json::to_value(definition).unwrap_or_default()
}

/// Cilium's policies have `specs` beside or instead of `spec`.
fn with_specs(definition: CustomResourceDefinition) -> Value {
    let mut definition = json_of(&definition);
    let schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let spec = schema["properties"]["spec"].clone();
    schema["properties"]["specs"] = json!({
        "description": "Several specs, each as if it were a policy of its own.", "type": "array", "items": spec,
    });
    if let Some(schema) = schema.as_object_mut() {
        schema.remove("required");
    }
    definition
}

/// With our mark, a status that anybody's controller may have filled, and nothing that is pruned or added.
fn finished(mut definition: Value) -> Option<CustomResourceDefinition> {
    let mut annotations = json!({SCHEMA_VERSION_ANNOTATION: VERSION.to_string()});
    if definition["spec"]["group"] == "policy.networking.k8s.io" {
        // The API server asks for it in the groups of Kubernetes: this is a reading of what is published.
        annotations["api-approved.kubernetes.io"] = "unapproved, as Weir reads the published API".into();
    }
    definition["metadata"]["annotations"] = annotations;
    let version = &mut definition["spec"]["versions"][0];
    version["subresources"] = json!({"status": {}});
    let schema = &mut version["schema"]["openAPIV3Schema"];
    schema["properties"]["status"] = json!({"type": "object"});
    keep_unknown(schema);
    serde_json::from_value(definition).ok()
}

fn keep_unknown(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            // An empty list that the API server adds would name nobody.
            if is_schema(fields) {
                fields.remove("default");
            }
            if fields.get("type").is_some_and(|kind| kind == "object")
                && !fields.contains_key("additionalProperties")
            {
                fields.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
            }
            fields.values_mut().for_each(keep_unknown);
        }
        Value::Array(list) => list.iter_mut().for_each(keep_unknown),
        _ => {}
    }
}

/// A schema, and not a map of names to schemas.
fn is_schema(fields: &Map<String, Value>) -> bool {
    fields.get("default").is_some_and(|default| default.get("type").is_none())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use kube::ResourceExt;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::kube::kinds;

    #[test]
    fn a_changed_definition_has_another_version() {
        let text = serde_json::to_string(&definitions()).expect("definitions are plain data");
        let digest =
            Sha256::digest(text).iter().take(4).map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!((VERSION, digest.as_str()), (2, "02c15f87"), "raise VERSION, then note both here");
    }

    /// `UPDATE=1 cargo test --lib kube::upstream` writes them.
    #[test]
    fn the_files_in_crds_upstream_are_these_types() {
        let all = definitions();
        assert_eq!(all.len(), 7);
        for definition in all {
            let path = Path::new("crds/upstream").join(format!("{}.yaml", definition.spec.names.plural));
            let text = crate::yaml::write(&definition).expect("definitions are plain data");
            if std::env::var_os("UPDATE").is_some() {
                fs::write(&path, &text).expect("writing a definition");
            }
            let there = fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(there, text, "{} is stale: run this test with UPDATE=1", path.display());
        }
    }

    #[test]
    fn every_kind_of_others_that_is_read_is_defined() {
        let defined: Vec<(String, String)> = definitions()
            .iter()
            .map(|definition| (definition.name_any(), definition.spec.versions[0].name.clone()))
            .collect();
        // Announcing is asked for by a kind whose shape is still upstream's alpha.
        let is_stable =
            |kind: &&crate::kube::Kind| kind.group() != "weir.dev" && !kind.version().starts_with("v2alpha");
        for kind in kinds::ALL.iter().filter(|kind| kind.meta().is_optional).filter(is_stable) {
            let name = (format!("{}.{}", kind.plural(), kind.group()), kind.version().to_owned());
            assert!(defined.contains(&name), "{name:?} is not in {defined:?}");
        }
    }

    #[test]
    fn nothing_is_added_to_an_object_and_nothing_is_taken_away() {
        for definition in definitions() {
            let name = definition.name_any();
            let schema = json_of(&definition)["spec"]["versions"][0]["schema"].clone();
            let mut objects = 0;
            let mut open = vec![&schema];
            while let Some(value) = open.pop() {
                if let Some(fields) = value.as_object() {
                    assert!(!is_schema(fields), "{name}: {value}");
                    if fields.get("type").is_some_and(|kind| kind == "object") {
                        let keeps = ["x-kubernetes-preserve-unknown-fields", "additionalProperties"];
                        assert!(keeps.iter().any(|key| fields.contains_key(*key)), "{name}: {value}");
                        objects += 1;
                    }
                    open.extend(fields.values());
                }
                open.extend(value.as_array().into_iter().flatten());
            }
            assert!(objects > 2, "{name} has {objects} objects");
        }
    }
}
