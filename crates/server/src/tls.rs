//! TLS, by rustls: TLS 1.2 and 1.3, HTTP/1.1 only.

use std::{fs, path::Path, sync::Arc};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring::default_provider,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

/// A certificate and its key, ready to use.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

impl Tls {
    /// Reads a chain of certificates and a private key, both PEM.
    ///
    /// # Errors
    /// Which file is wrong, and how.
    pub fn from_files(certificates: &Path, key: &Path) -> Result<Self, String> {
        let read = |path: &Path| fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let chain = CertificateDer::pem_slice_iter(&read(certificates)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| format!("{}: {e}", certificates.display()))?;
        if chain.is_empty() {
            return Err(format!("{}: holds no certificate in PEM form", certificates.display()));
        }
        // The key's bytes are never shown, only what kind of thing is missing.
        let key_der = PrivateKeyDer::from_pem_slice(&read(key)?)
            .map_err(|_| format!("{}: holds no private key in PEM form", key.display()))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_no_client_auth()
            .with_single_cert(chain, key_der)
            .map_err(|e| format!("{} and {}: {e}", certificates.display(), key.display()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    pub(crate) fn acceptor(&self) -> &TlsAcceptor {
        &self.0
    }
}
