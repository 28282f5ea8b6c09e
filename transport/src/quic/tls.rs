//! TLS 1.3 both ways, from an identity.

use crate::identity::{Identity, Trust, fingerprint};
use crate::{Refusal, TransportError};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};
use std::sync::Arc;

/// Protocol name of the secure handshake; another version fails there.
pub(crate) const ALPN: &[u8] = b"exflow/1";

/// Alert `no_application_protocol` as a QUIC error code.
const ALERT_NO_PROTOCOL: u64 = 0x100 + 120;

/// Both halves of a rank's TLS configuration.
pub(crate) struct Tls {
    pub(crate) client: Arc<QuicClientConfig>,
    pub(crate) server: Arc<QuicServerConfig>,
}

impl Tls {
    pub(crate) fn new(identity: &Identity) -> Result<Self, TransportError> {
        Self::with_alpn(identity, ALPN)
    }

    pub(crate) fn with_alpn(identity: &Identity, alpn: &[u8]) -> Result<Self, TransportError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut client = client_config(identity, &provider).map_err(|e| unusable(&e))?;
        client.alpn_protocols = vec![alpn.to_vec()];
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = server_config(identity, &provider).map_err(|e| unusable(&e))?;
        server.alpn_protocols = vec![alpn.to_vec()];
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(QuicClientConfig::try_from(client).map_err(|e| unusable(&e))?),
            server: Arc::new(QuicServerConfig::try_from(server).map_err(|e| unusable(&e))?),
        })
    }
}

fn unusable(error: &dyn std::fmt::Display) -> TransportError {
    TransportError::Identity {
        path: None,
        what: format!("the identity cannot be used: {error}"),
        remedy: "issue it again with `exflow cert issue`".into(),
    }
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

fn client_config(identity: &Identity, provider: &Arc<CryptoProvider>) -> Result<rustls::ClientConfig, Error> {
    let builder = rustls::ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match &identity.trust {
        Trust::Authority(authority) => builder.with_root_certificates(roots(authority)?),
        Trust::Pinned(_) => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Pins::new(identity, provider)))
        }
    };
    builder.with_client_auth_cert(vec![identity.certificate.clone()], identity.key.clone_key())
}

fn server_config(identity: &Identity, provider: &Arc<CryptoProvider>) -> Result<rustls::ServerConfig, Error> {
    let verifier: Arc<dyn ClientCertVerifier> = match &identity.trust {
        Trust::Authority(authority) => {
            WebPkiClientVerifier::builder_with_provider(roots(authority)?, Arc::clone(provider))
                .build()
                .map_err(|error| Error::General(error.to_string()))?
        }
        Trust::Pinned(_) => Arc::new(Pins::new(identity, provider)),
    };
    rustls::ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())
}

/// Trusts exactly the pinned certificates. That the peer holds the key is still verified by its signature.
#[derive(Debug)]
struct Pins {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pins {
    fn new(identity: &Identity, provider: &Arc<CryptoProvider>) -> Self {
        Self { trust: identity.trust.clone(), algorithms: provider.signature_verification_algorithms }
    }

    fn check(&self, certificate: &CertificateDer<'_>, name: Option<&ServerName<'_>>) -> Result<(), Error> {
        let Trust::Pinned(pins) = &self.trust else { return Err(unknown()) };
        let print = fingerprint(certificate);
        let fits = |rank| name.is_none_or(|name| name.to_str() == crate::identity::rank_name(rank));
        if pins.iter().any(|(rank, pin)| *pin == print && fits(*rank)) { Ok(()) } else { Err(unknown()) }
    }
}

fn unknown() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// The half that both verifiers share: signatures of TLS 1.3, and none of TLS 1.2, which is not spoken.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, certificate, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Pins {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, Some(server_name)).map(|()| ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

impl ClientCertVerifier for Pins {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, None).map(|()| ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

/// What a failed connection says about trust.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Certificates do not fit: trying again cannot help.
    Untrusted(String),
    /// The peer speaks another version of the protocol.
    Refused(Refusal),
    /// Nothing about trust.
    Other,
}

/// Sorts out why a connection ended.
pub(crate) fn verdict(error: &quinn::ConnectionError) -> Verdict {
    let (code, reason) = match error {
        quinn::ConnectionError::TransportError(error) => (u64::from(error.code), error.reason.clone()),
        quinn::ConnectionError::ConnectionClosed(close) => {
            (u64::from(close.error_code), String::from_utf8_lossy(&close.reason).into_owned())
        }
        _ => return Verdict::Other,
    };
    match code {
        ALERT_NO_PROTOCOL => {
            Verdict::Refused(Refusal::ProtocolName { name: String::from_utf8_lossy(ALPN).into_owned() })
        }
        0x100..0x200 => Verdict::Untrusted(format!("{reason} (TLS alert {})", code - 0x100)),
        _ => Verdict::Other,
    }
}
