//! Certificates for agents and relays: an authority of our own, leaves that it signs.

use anyhow::{Context, Result};
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// Clocks of nodes may differ by so much.
const BACKDATED: SignedDuration = SignedDuration::from_hours(1);

/// A key and its certificate, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
    /// When the certificate ends.
    pub not_after: Timestamp,
}

/// A new authority, which may sign leaves only.
pub fn authority(name: &str, lifetime: SignedDuration) -> Result<Pair> {
    let key = KeyPair::generate().context("making a key")?;
    let not_after = Timestamp::now().checked_add(lifetime).context("adding the lifetime")?;
    let params = authority_params(name, not_after)?;
    let certificate = params.self_signed(&key).context("signing the authority's own certificate")?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem(), not_after })
}

/// A leaf with these DNS names, signed by the authority `name` whose key is `key`. It serves for both ends.
pub fn leaf(name: &str, key: &str, dns_names: &[String], lifetime: SignedDuration) -> Result<Pair> {
    let authority_key = KeyPair::from_pem(key).context("reading the authority's key")?;
    let now = Timestamp::now();
    let not_after = now.checked_add(lifetime).context("adding the lifetime")?;
    let issuer_params = authority_params(name, not_after)?;
    let issuer = Issuer::from_params(&issuer_params, authority_key);
    let mut params = CertificateParams::default();
    for dns_name in dns_names {
        let name = dns_name.as_str().try_into().with_context(|| format!("{dns_name} is no DNS name"))?;
        params.subject_alt_names.push(SanType::DnsName(name));
    }
    let common = dns_names.first().map_or("weir", String::as_str);
    params.distinguished_name.push(DnType::CommonName, common);
    params.not_before = date(now.checked_sub(BACKDATED).context("backdating")?)?;
    params.not_after = date(not_after)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().context("making a key")?;
    let certificate = params.signed_by(&key, &issuer).context("signing a certificate")?;
    Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem(), not_after })
}

fn authority_params(name: &str, not_after: Timestamp) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date(Timestamp::now().checked_sub(BACKDATED).context("backdating")?)?;
    params.not_after = date(not_after)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn date(time: Timestamp) -> Result<time::OffsetDateTime> {
    time::OffsetDateTime::from_unix_timestamp(time.as_second()).context("a date that no certificate can have")
}
