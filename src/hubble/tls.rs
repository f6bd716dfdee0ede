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
    authority: PathBuf,
    /// Certificate and key; a client that has none is nobody.
    leaf: Option<[PathBuf; 2]>,
    current: Mutex<Option<(Stamp, Configs)>>,
}

/// What the files looked like: their sizes and times of change.
type Stamp = [Option<(u64, SystemTime)>; 3];

#[derive(Clone)]
struct Configs {
    server: Option<Arc<ServerConfig>>,
    client: Arc<ClientConfig>,
}

impl Identity {
    /// Of the files in `directory`, which need not be there yet.
    pub fn new(directory: &Path) -> Self {
        let [authority, certificate, key] = FILES.map(|file| directory.join(file));
        Self { authority, leaf: Some([certificate, key]), current: Mutex::default() }
    }

    /// Of a client, from files of any names; `leaf`: certificate and key.
    pub fn of_client(authority: PathBuf, leaf: Option<[PathBuf; 2]>) -> Self {
        Self { authority, leaf, current: Mutex::default() }
    }

    /// For connections that are accepted: the client must have a certificate that the authority signed.
    pub fn server(&self) -> Result<Arc<ServerConfig>> {
        self.configs()?.server.context("a server needs a certificate of its own")
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
        let [certificate, key] = self.leaf.as_ref().map_or([None; 2], |leaf| leaf.each_ref().map(Some));
        [Some(&self.authority), certificate, key].map(|file| {
            let metadata = fs::metadata(file?).ok()?;
            Some((metadata.len(), metadata.modified().ok()?))
        })
    }

    fn read(&self) -> Result<Configs> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
        let mut roots = RootCertStore::empty();
        let what = || format!("reading {}", self.authority.display());
        for root in certificates(&read(&self.authority)?).with_context(what)? {
            roots.add(root).with_context(what)?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(ring::default_provider());
        let Some([certificate, key]) = &self.leaf else {
            return Ok(Configs { server: None, client: Arc::new(client(provider, roots, None)?) });
        };
        let what = |path: &Path| format!("reading {}", path.display());
        let chain = certificates(&read(certificate)?).with_context(|| what(certificate))?;
        let key = PrivateKeyDer::from_pem_slice(&read(key)?).with_context(|| what(key))?;
        let server = server(provider.clone(), roots.clone(), chain.clone(), key.clone_key())?;
        let client = client(provider, roots, Some((chain, key)))?;
        Ok(Configs { server: Some(Arc::new(server)), client: Arc::new(client) })
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
    leaf: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<ClientConfig> {
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .context("choosing TLS 1.3")?
        .with_root_certificates(roots);
    let mut config = match leaf {
        Some((chain, key)) => {
            config.with_client_auth_cert(chain, key).context("using the certificate with its key")?
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
