//! Mutual TLS 1.3 between agents and relays, from files that may change while we run.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// The files of a directory, as a Secret of type kubernetes.io/tls is mounted.
const FILES: [&str; 3] = ["ca.crt", "tls.crt", "tls.key"];

/// Both sides' settings, made anew whenever the files have changed.
pub struct Identity {
    directory: PathBuf,
    current: Mutex<Option<(Stamp, Configs)>>,
}

/// What the files looked like: their sizes and times of change.
type Stamp = [Option<(u64, SystemTime)>; 3];

#[derive(Clone)]
struct Configs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Identity {
    /// Of the files in `directory`, which need not be there yet.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), current: Mutex::default() }
    }

    /// For connections that are accepted: the client must have a certificate that the authority signed.
    pub fn server(&self) -> Result<Arc<ServerConfig>> {
        Ok(self.configs()?.server)
    }

    /// For connections that are made.
    pub fn client(&self) -> Result<Arc<ClientConfig>> {
        Ok(self.configs()?.client)
    }

    /// Files that cannot be read are an error only until they could be once: a half-written update changes nothing.
    fn configs(&self) -> Result<Configs> {
        let stamp = self.stamp();
        let mut current = self.current.lock().expect("nobody panics while it holds the settings");
        if let Some((of, configs)) = &*current
            && *of == stamp
        {
            return Ok(configs.clone());
        }
        match (self.read(), &mut *current) {
            (Ok(configs), current) => {
                *current = Some((stamp, configs.clone()));
                Ok(configs)
            }
            (Err(error), Some((of, configs))) => {
                tracing::warn!(error = crate::error::chain(&error), "keeping the certificates of before");
                *of = stamp;
                Ok(configs.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    fn stamp(&self) -> Stamp {
        FILES.map(|file| {
            let metadata = fs::metadata(self.directory.join(file)).ok()?;
            Some((metadata.len(), metadata.modified().ok()?))
        })
    }

    fn read(&self) -> Result<Configs> {
        let read = |file: &str| {
            let path = self.directory.join(file);
            fs::read(&path).with_context(|| format!("reading {}", path.display()))
        };
        let [authority, certificate, key] = FILES.map(read);
        let (authority, certificate, key) = (authority?, certificate?, key?);
        let mut roots = RootCertStore::empty();
        for root in certificates(&authority).context("reading ca.crt")? {
            roots.add(root).context("reading ca.crt")?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&certificate).context("reading tls.crt")?;
        let key = PrivateKeyDer::from_pem_slice(&key).context("reading tls.key")?;
        let provider = Arc::new(ring::default_provider());
        Ok(Configs {
            server: Arc::new(server(provider.clone(), roots.clone(), chain.clone(), key.clone_key())?),
            client: Arc::new(client(provider, roots, chain, key)?),
        })
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>()?;
    if all.is_empty() {
        bail!("there is no certificate");
    }
    Ok(all)
}

fn server(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .context("making the check of clients' certificates")?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .context("choosing TLS 1.3")?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .context("using tls.crt with tls.key")?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn client(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .context("choosing TLS 1.3")?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .context("using tls.crt with tls.key")?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
