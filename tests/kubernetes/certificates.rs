//! Certificates of the cluster, by openssl, and the kubeconfigs that use them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use crate::lab::output_of;

/// The cluster's certificate authority, and the directory with all that it signed.
#[derive(Debug)]
pub struct Authority(PathBuf);

/// A certificate and its key.
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// Makes it, and the key pair that signs service accounts' tokens.
    pub fn create(directory: &Path) -> Result<Self> {
        fs::create_dir(directory)?;
        let authority = Self(directory.to_owned());
        let extensions =
            ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,digitalSignature"];
        authority.request("ca", "/CN=weir-lab", &extensions, false)?;
        let key = authority.service_account_key();
        openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &text(&key)])?;
        Ok(authority)
    }

    /// The file with the authority's own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.0.join("ca.crt")
    }

    /// The file with the authority's key.
    pub fn key(&self) -> PathBuf {
        self.0.join("ca.key")
    }

    /// The key that signs service accounts' tokens, and verifies them.
    pub fn service_account_key(&self) -> PathBuf {
        self.0.join("service-account.key")
    }

    /// Signs a certificate for `subject`, as client and as the server of `names`.
    pub fn sign(&self, name: &str, subject: &str, names: &[String]) -> Result<Pair> {
        let mut extensions = vec![
            "keyUsage=critical,digitalSignature".to_owned(),
            "extendedKeyUsage=clientAuth,serverAuth".to_owned(),
        ];
        if !names.is_empty() {
            extensions.push(format!("subjectAltName={}", names.join(",")));
        }
        let extensions: Vec<&str> = extensions.iter().map(String::as_str).collect();
        self.request(name, subject, &extensions, true)?;
        let file = |end: &str| self.0.join(format!("{name}.{end}"));
        Ok(Pair { certificate: file("crt"), key: file("key") })
    }

    /// Writes a kubeconfig for `subject` to `path`; its context is `context`.
    pub fn write_kubeconfig(&self, path: &Path, context: &str, server: &str, subject: &str) -> Result<()> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let pair = self.sign(&format!("client-{name}"), subject, &[])?;
        // JSON is YAML.
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": context,
            "clusters": [{"name": context, "cluster": {"server": server, "certificate-authority": self.certificate()}}],
            "users": [{"name": context, "user": {"client-certificate": pair.certificate, "client-key": pair.key}}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": context}}],
        });
        fs::write(path, weir::yaml::write(&config)?)?;
        Ok(())
    }

    fn request(&self, name: &str, subject: &str, extensions: &[&str], is_signed: bool) -> Result<()> {
        let file = |end: &str| text(&self.0.join(format!("{name}.{end}")));
        let (certificate, key, ca, ca_key) =
            (file("crt"), file("key"), text(&self.certificate()), text(&self.key()));
        let mut arguments =
            vec!["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        arguments.extend(["-days", "365", "-subj", subject, "-out", &certificate, "-keyout", &key]);
        if is_signed {
            arguments.extend(["-CA", &ca, "-CAkey", &ca_key]);
            // The default of `req -x509` is an authority.
            arguments.extend(["-addext", "basicConstraints=critical,CA:FALSE"]);
        }
        arguments.extend(extensions.iter().flat_map(|extension| ["-addext", extension]));
        // The machine's own configuration may add extensions, which would then be there twice.
        openssl(&[&arguments[..], &["-config", &self.request_config()?]].concat())
    }

    fn request_config(&self) -> Result<String> {
        let path = self.0.join("openssl.cnf");
        fs::write(&path, "[req]\ndistinguished_name = dn\n[dn]\n")?;
        Ok(text(&path))
    }
}

fn openssl(arguments: &[&str]) -> Result<()> {
    output_of(Command::new("openssl").args(arguments), "").map(drop)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
