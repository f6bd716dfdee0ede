//! The definitions of Weir's own kinds: made, brought up to date, never replaced by older ones. Those of
//! others that Weir reads: made where nobody has made them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::FIELD_MANAGER;
use crate::kube::crd::{SCHEMA_VERSION, SCHEMA_VERSION_ANNOTATION, crds};
use crate::kube::upstream;

/// A definition that is not served within this time never is.
const SERVED_WITHIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

/// Makes the API server know our kinds; returns when it serves all of them.
pub async fn install(client: &Client) -> Result<()> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in crds() {
        let name = definition.name_any();
        let there = definitions.get_opt(&name).await.with_context(|| format!("reading {name}"))?;
        match there.as_ref().map(version) {
            Some(version) if version > SCHEMA_VERSION => {
                warn!(definition = name, version, ours = SCHEMA_VERSION, "a newer definition stays");
                continue;
            }
            Some(version) => {
                info!(definition = name, version, ours = SCHEMA_VERSION, "applying the definition")
            }
            None => info!(definition = name, ours = SCHEMA_VERSION, "making the definition"),
        }
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        definitions
            .patch(&name, &parameters, &Patch::Apply(&definition))
            .await
            .with_context(|| format!("applying {name}"))?;
    }
    let deadline = Instant::now() + SERVED_WITHIN;
    for definition in crds() {
        let name = definition.name_any();
        while !definitions.get_opt(&name).await?.as_ref().is_some_and(is_established) {
            if Instant::now() > deadline {
                bail!("{name} is not established after {SERVED_WITHIN:?}");
            }
            sleep(LOOK).await;
        }
    }
    Ok(())
}

/// Makes the API server know the kinds of others that Weir reads. A definition that somebody else has made or
/// changed stays as it is, and serves as well.
pub async fn install_upstream(client: &Client) -> Result<()> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in upstream::definitions() {
        let name = definition.name_any();
        let there = definitions.get_opt(&name).await.with_context(|| format!("reading {name}"))?;
        match there.as_ref().map(|there| (is_ours(there), version(there))) {
            Some((false, _)) => info!(definition = name, "somebody else's definition is used as it is"),
            Some((true, version)) if version >= upstream::VERSION => {}
            _ => {
                info!(definition = name, ours = upstream::VERSION, "making the definition");
                let parameters = PatchParams::apply(FIELD_MANAGER).force();
                let made = definitions.patch(&name, &parameters, &Patch::Apply(&definition)).await;
                made.with_context(|| format!("applying {name}"))?;
            }
        }
    }
    Ok(())
}

/// Made by an operator, and by nobody else since. The API server writes the status.
fn is_ours(definition: &CustomResourceDefinition) -> bool {
    let mut writers = definition.managed_fields().iter().filter(|fields| fields.subresource.is_none());
    definition.annotations().contains_key(SCHEMA_VERSION_ANNOTATION)
        && writers.all(|fields| fields.manager.as_deref() == Some(FIELD_MANAGER))
}

/// One without the annotation is older than every version.
fn version(definition: &CustomResourceDefinition) -> u32 {
    let version = definition.annotations().get(SCHEMA_VERSION_ANNOTATION);
    version.and_then(|version| version.parse().ok()).unwrap_or(0)
}

fn is_established(definition: &CustomResourceDefinition) -> bool {
    let conditions = definition.status.as_ref().and_then(|status| status.conditions.as_ref());
    let is = |name: &str, status: &str| {
        conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == name && condition.status == status)
    };
    is("Established", "True") && is("NamesAccepted", "True")
}
