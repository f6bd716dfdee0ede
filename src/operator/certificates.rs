//! Certificates for Hubble's API: an authority of the cluster's own, a leaf for the agents, one for the relay.
//!
//! They are Secrets of the operator's namespace, renewed when two thirds of their time are over. A new authority is
//! believed by everybody for a day before it signs anything, so nobody is ever refused.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt};
use tracing::info;

use crate::hubble::certs::{Pair, authority, leaf};

/// The authority, whose key the operator alone may read.
const AUTHORITY: &str = "weir-hubble-authority";
/// What agents show.
const AGENTS: &str = "weir-hubble";
/// What the relay shows to agents.
const RELAY: &str = "weir-hubble-relay";
/// Common name of the authority.
const NAME: &str = "Weir Hubble authority";
const AUTHORITY_DAYS: i64 = 3 * 365;
const LEAF_DAYS: i64 = 90;
/// A new authority signs after everybody has had its certificate for so long.
const BELIEVED_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// A Secret's contents.
type Data = BTreeMap<String, String>;

/// Makes and renews what is missing or old.
pub async fn keep(client: &Client, cluster: &str) -> Result<()> {
    let secrets: Api<Secret> = Api::default_namespaced(client.clone());
    let now = Timestamp::now();
    let before = read(&secrets, AUTHORITY).await?;
    let signer = next_authority(before.as_ref().map(|(data, _)| data), now)?;
    write(&secrets, AUTHORITY, before, &signer).await?;
    for (name, dns_names) in leaves(cluster) {
        let before = read(&secrets, name).await?;
        let after = next_leaf(before.as_ref().map(|(data, _)| data), &signer, &dns_names, now)?;
        write(&secrets, name, before, &after).await?;
    }
    Ok(())
}

fn leaves(cluster: &str) -> [(&'static str, Vec<String>); 2] {
    let agents = format!("*.{cluster}.hubble-grpc.cilium.io");
    [(AGENTS, vec![agents]), (RELAY, vec!["*.hubble-relay.cilium.io".to_owned()])]
}

async fn read(secrets: &Api<Secret>, name: &str) -> Result<Option<(Data, Secret)>> {
    let found = secrets.get_opt(name).await.with_context(|| format!("reading Secret {name}"))?;
    Ok(found.map(|secret| {
        let text = |(key, value): (&String, &ByteString)| {
            Some((key.clone(), String::from_utf8(value.0.clone()).ok()?))
        };
        (secret.data.iter().flatten().filter_map(text).collect(), secret)
    }))
}

/// Writes where something has changed. Another version in between is a conflict, and tried again in the next round.
async fn write(
    secrets: &Api<Secret>,
    name: &str,
    before: Option<(Data, Secret)>,
    after: &Data,
) -> Result<()> {
    let version = match &before {
        Some((data, _)) if data == after => return Ok(()),
        Some((_, secret)) => secret.resource_version(),
        None => None,
    };
    let bytes = |(key, value): (&String, &String)| (key.clone(), ByteString(value.clone().into_bytes()));
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: version,
            ..ObjectMeta::default()
        },
        data: Some(after.iter().map(bytes).collect()),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    };
    let parameters = PostParams::default();
    let written = match before {
        Some(_) => secrets.replace(name, &parameters, &secret).await,
        None => secrets.create(&parameters, &secret).await,
    };
    written.with_context(|| format!("writing Secret {name}"))?;
    info!(secret = name, not_after = after.get("not-after"), "wrote certificates");
    Ok(())
}

/// The authority as it should be now: `tls.crt` and `tls.key` sign, everybody believes `ca.crt`.
fn next_authority(before: Option<&Data>, now: Timestamp) -> Result<Data> {
    let lifetime = SignedDuration::from_hours(24 * AUTHORITY_DAYS);
    let Some(before) = before.filter(|data| has(data, &["ca.crt", "tls.crt", "tls.key"])) else {
        let new = authority(NAME, lifetime)?;
        return Ok(signing(&new, new.certificate.clone()));
    };
    let mut data = before.clone();
    if let Some(since) = time_of(before, "next-since") {
        if now.duration_since(since) < BELIEVED_AFTER || !has(before, &["next.crt", "next.key"]) {
            return Ok(data);
        }
        // What the old one signed is still shown until each leaf is made anew: both are believed.
        let new = Pair {
            certificate: before["next.crt"].clone(),
            key: before["next.key"].clone(),
            not_after: now.checked_add(lifetime).context("adding the lifetime")?,
        };
        return Ok(signing(&new, before["ca.crt"].clone()));
    }
    if is_old(before, now, AUTHORITY_DAYS) {
        let new = authority(NAME, lifetime)?;
        data.insert("ca.crt".to_owned(), format!("{}{}", new.certificate, before["tls.crt"]));
        data.insert("next.crt".to_owned(), new.certificate);
        data.insert("next.key".to_owned(), new.key);
        data.insert("next-since".to_owned(), now.to_string());
    }
    Ok(data)
}

fn signing(pair: &Pair, believed: String) -> Data {
    [
        ("ca.crt", believed),
        ("tls.crt", pair.certificate.clone()),
        ("tls.key", pair.key.clone()),
        ("not-after", pair.not_after.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// A leaf as it should be now.
fn next_leaf(before: Option<&Data>, signer: &Data, dns_names: &[String], now: Timestamp) -> Result<Data> {
    let names = dns_names.join(",");
    let is_good = |data: &&Data| {
        has(data, &["tls.crt", "tls.key"])
            && data.get("names") == Some(&names)
            && data.get("signed-by") == signer.get("tls.crt")
            && !is_old(data, now, LEAF_DAYS)
    };
    let mut data = match before.filter(is_good) {
        Some(before) => before.clone(),
        None => {
            let lifetime = SignedDuration::from_hours(24 * LEAF_DAYS);
            let pair = leaf(NAME, &signer["tls.key"], dns_names, lifetime)?;
            let mut data = signing(&pair, String::new());
            data.insert("names".to_owned(), names);
            data.insert("signed-by".to_owned(), signer["tls.crt"].clone());
            data
        }
    };
    data.insert("ca.crt".to_owned(), signer["ca.crt"].clone());
    Ok(data)
}

fn has(data: &Data, keys: &[&str]) -> bool {
    keys.iter().all(|key| data.contains_key(*key))
}

fn time_of(data: &Data, key: &str) -> Option<Timestamp> {
    data.get(key)?.parse().ok()
}

/// Less than a third of its time is left. What does not say when it ends counts as old.
fn is_old(data: &Data, now: Timestamp, days: i64) -> bool {
    let left = time_of(data, "not-after").map(|end| end.duration_since(now));
    left.is_none_or(|left| left < SignedDuration::from_hours(24 * days / 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn later(now: Timestamp, days: i64) -> Timestamp {
        now.checked_add(SignedDuration::from_hours(24 * days)).expect("a time")
    }

    #[test]
    fn what_is_good_stays_and_what_is_old_is_made_anew() {
        let now = Timestamp::now();
        let signer = next_authority(None, now).expect("an authority");
        assert_eq!(next_authority(Some(&signer), later(now, 300)).expect("the same"), signer);
        let names = ["*.default.hubble-grpc.cilium.io".to_owned()];
        let first = next_leaf(None, &signer, &names, now).expect("a leaf");
        assert_eq!(next_leaf(Some(&first), &signer, &names, later(now, 50)).expect("the same"), first);
        let renewed = next_leaf(Some(&first), &signer, &names, later(now, 70)).expect("a new one");
        assert_ne!(renewed["tls.crt"], first["tls.crt"]);
        let renamed =
            next_leaf(Some(&first), &signer, &["other.example".to_owned()], now).expect("a new one");
        assert_ne!(renamed["tls.crt"], first["tls.crt"]);
        let damaged = Data::from([("tls.crt".to_owned(), "x".to_owned())]);
        assert!(has(
            &next_leaf(Some(&damaged), &signer, &names, now).expect("a new one"),
            &["tls.key", "ca.crt"]
        ));
    }

    #[test]
    fn a_new_authority_is_believed_before_it_signs() {
        let now = Timestamp::now();
        let names = ["a.example".to_owned()];
        let mut old = next_authority(None, now).expect("an authority");
        let end = now;
        old.insert("not-after".to_owned(), later(now, 300).to_string());
        let both = next_authority(Some(&old), end).expect("a second one");
        assert_eq!(
            (&both["tls.crt"], &both["tls.key"]),
            (&old["tls.crt"], &old["tls.key"]),
            "the old one signs"
        );
        assert_eq!(both["ca.crt"].matches("BEGIN CERTIFICATE").count(), 2);
        let leaf = next_leaf(None, &old, &names, end).expect("a leaf");
        let told = next_leaf(Some(&leaf), &both, &names, end).expect("the same leaf");
        assert_eq!((&told["tls.crt"], &told["ca.crt"]), (&leaf["tls.crt"], &both["ca.crt"]));
        let soon = end.checked_add(SignedDuration::from_hours(23)).expect("a time");
        assert_eq!(next_authority(Some(&both), soon).expect("the same"), both);
        let new = next_authority(Some(&both), later(end, 2)).expect("the second one");
        assert_ne!(new["tls.crt"], old["tls.crt"]);
        assert_eq!(new["tls.crt"], both["next.crt"]);
        assert_ne!(
            next_leaf(Some(&told), &new, &names, later(end, 2)).expect("signed anew")["tls.crt"],
            told["tls.crt"]
        );
    }
}
