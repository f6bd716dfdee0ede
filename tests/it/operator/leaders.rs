//! Two replicas, one leader; what a new leader does about definitions.

use std::sync::Arc;

use anyhow::{Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use weir::kube::crd::{SCHEMA_VERSION, SCHEMA_VERSION_ANNOTATION};
use weir::kube::{Health, Source, Tables};

use super::*;

/// A definition as an operator of another version would have left it.
async fn redefine(client: &Client, version: &str) -> Result<()> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let patch = Patch::Merge(json!({
        "metadata": {"annotations": {SCHEMA_VERSION_ANNOTATION: version}},
        "spec": {"names": {"shortNames": ["other"]}},
    }));
    definitions.patch("weirnodes.weir.dev", &PatchParams::default(), &patch).await?;
    Ok(())
}

async fn definition(client: &Client) -> Result<(Option<String>, bool)> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = definitions.get("weirnodes.weir.dev").await?;
    let columns = definition.spec.versions[0].additional_printer_columns.iter().flatten().count();
    Ok((definition.annotations().get(SCHEMA_VERSION_ANNOTATION).cloned(), columns > 0))
}

async fn wait_for_leader(client: &Client, name: &str) -> Result<Duration> {
    let started = Instant::now();
    until(&format!("{name} to lead"), || async {
        Ok((leader(client).await?.as_deref() == Some(name)).then_some(()))
    })
    .await?;
    Ok(started.elapsed())
}

#[test]
fn leaders_hand_over_and_bring_definitions_up_to_date() -> Result<()> {
    with_plane("leaders_hand_over_and_bring_definitions_up_to_date", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        // An agent that is there before the definitions waits for them.
        let agent = client_of(&plane.as_account("weir-agent", "a").await?).await?;
        let (tables, health) = (Arc::new(Tables::new()), Arc::new(Health::default()));
        let source = Source::Kubernetes(agent, "a".to_owned());
        let following = tokio::spawn(weir::kube::run(source, tables.clone(), health.clone()));
        until("the agent to look", || async {
            let errors = |kind| {
                health.kinds().into_iter().any(|(of, health)| of.name() == kind && health.errors_total > 1)
            };
            Ok((errors("WeirNode") && errors("Identity")).then_some(()))
        })
        .await?;
        ensure!(!tables.all_synced(), "nothing defines our kinds yet");
        let one = Replica::start(&plane, "one", &[]).await?;
        wait_for_leader(&client, "one").await?;
        tokio::time::timeout(Duration::from_secs(10), tables.wait_synced())
            .await
            .context("the agent still waits")?;
        following.abort();
        // It makes what was not there.
        let current = Some(SCHEMA_VERSION.to_string());
        until("the definitions", || async {
            Ok(definition(&client).await.is_ok_and(|there| there == (current.clone(), true)).then_some(()))
        })
        .await?;
        until("one to look after nodes", || async {
            Ok(one.log().contains("looking after nodes").then_some(()))
        })
        .await?;
        ensure!(one.metric("weir_operator_leader").await? == 1.0, "the leader says so");

        let two = Replica::start(&plane, "two", &[]).await?;
        until("two to take part", || async { two.metric("weir_operator_leader").await.map(Some) }).await?;
        ensure!(two.metric("weir_operator_leader").await? == 0.0, "there is one leader");
        // Meanwhile the definition becomes an old one.
        redefine(&client, "0").await?;
        one.send(Signal::SIGTERM)?;
        let clean = wait_for_leader(&client, "two").await?;
        ensure!(clean < Duration::from_secs(2), "a clean hand-over took {clean:?}");
        until("the upgrade", || async { Ok((definition(&client).await?.0 == current).then_some(())) })
            .await?;

        let three = Replica::start(&plane, "three", &[]).await?;
        until("three to take part", || async { three.metric("weir_operator_leader").await.map(Some) })
            .await?;
        // And then one of the future.
        redefine(&client, "999").await?;
        // It has seen who leads.
        sleep(Duration::from_secs(2)).await;
        let killed = Instant::now();
        two.kill()?;
        wait_for_leader(&client, "three").await?;
        let killed = killed.elapsed();
        let lease = Duration::from_secs(LEASE);
        ensure!(killed > lease / 2 && killed < lease * 3, "a killed leader was replaced after {killed:?}");
        until("three to look after nodes", || async {
            Ok(three.log().contains("looking after nodes").then_some(()))
        })
        .await?;
        ensure!(definition(&client).await?.0.as_deref() == Some("999"), "a newer definition was replaced");
        ensure!(three.log().contains("a newer definition stays"), "{}", three.log());
        println!("hand-over: clean {clean:?}, killed {killed:?} with a lease of {lease:?}");
        Ok(())
    })
}

#[test]
fn a_leader_that_cannot_renew_stops_before_the_lease_ends() -> Result<()> {
    with_plane("a_leader_that_cannot_renew_stops_before_the_lease_ends", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        let one = Replica::start(&plane, "one", &[]).await?;
        wait_for_leader(&client, "one").await?;
        until("one to lead", || async {
            Ok((one.metric("weir_operator_leader").await? == 1.0).then_some(()))
        })
        .await?;
        until("one to be ready", || async { Ok(one.is_ready().await?.then_some(())) }).await?;
        // Without rights no renewal succeeds.
        let bindings: Api<k8s_openapi::api::rbac::v1::RoleBinding> =
            Api::namespaced(client.clone(), "weir-system");
        bindings.delete("weir-operator", &Default::default()).await?;
        let leases: Api<Lease> = Api::namespaced(client.clone(), "weir-system");
        let mut renewed = (None, Instant::now());
        let stopped = until("the leader to stop", || async {
            let time = leases.get("weir-operator").await?.spec.and_then(|spec| spec.renew_time);
            let is_leading = one.metric("weir_operator_leader").await? == 1.0;
            Ok(Some((time, is_leading)))
        });
        let (mut time, mut is_leading) = stopped.await?;
        while is_leading {
            if renewed.0 != time {
                renewed = (time, Instant::now());
            }
            ensure!(renewed.1.elapsed() < Duration::from_secs(LEASE), "it leads on: {}", one.log());
            sleep(Duration::from_millis(50)).await;
            time = leases.get("weir-operator").await?.spec.and_then(|spec| spec.renew_time);
            is_leading = one.metric("weir_operator_leader").await? == 1.0;
        }
        println!("stopped {:?} after the last renewal was seen", renewed.1.elapsed());
        until("one not to be ready", || async { Ok((!one.is_ready().await?).then_some(())) }).await?;
        ensure!(one.get("/readyz").await?.contains("waiting for: the API server's answer about the Lease"));
        ensure!(one.get("/healthz").await?.starts_with("HTTP/1.0 200"), "a restart would not help");
        Ok(())
    })
}
