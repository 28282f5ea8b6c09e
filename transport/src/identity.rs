//! Who a rank is: a cluster authority, certificates bound to ranks, and lists of pinned certificates.
//!
//! A certificate says its rank as the DNS name `rank-N.exflow`; names of hosts and addresses play no part, as
//! ranks move between machines.

use crate::TransportError;
use exflow_placement::Rank;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// SHA-256 of a certificate's DER.
pub type Fingerprint = [u8; 32];

/// How long issued certificates are valid unless told otherwise.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates are valid from this long ago, for clocks that do not agree.
const CLOCK_SKEW: Duration = Duration::from_secs(24 * 3600);

/// The DNS name that stands for a rank in its certificate.
pub fn rank_name(rank: Rank) -> String {
    format!("rank-{rank}.exflow")
}

/// Which certificates a rank trusts.
#[derive(Debug, Clone)]
pub enum Trust {
    /// Those that this authority issued, for the rank that they name.
    Authority(CertificateDer<'static>),
    /// Exactly these, each for its rank.
    Pinned(Vec<(Rank, Fingerprint)>),
}

impl Trust {
    /// Whether `certificate`, already verified as trusted at all, is that of `rank`.
    pub fn is_rank(&self, certificate: &CertificateDer<'_>, rank: Rank) -> bool {
        match self {
            Self::Pinned(pins) => pins.contains(&(rank, fingerprint(certificate))),
            Self::Authority(_) => names_rank(certificate, rank).is_some(),
        }
    }
}

fn names_rank(certificate: &CertificateDer<'_>, rank: Rank) -> Option<()> {
    let parsed = rustls::server::ParsedCertificate::try_from(certificate).ok()?;
    let name = ServerName::try_from(rank_name(rank)).ok()?;
    rustls::client::verify_server_name(&parsed, &name).ok()
}

/// SHA-256 of a certificate's DER.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    Sha256::digest(certificate).into()
}

/// A rank's certificate and key, and whom it trusts.
pub struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) trust: Trust,
}

impl Identity {
    /// Puts an identity together from its parts.
    pub fn new(certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>, trust: Trust) -> Self {
        Self { certificate, key, trust }
    }

    /// An identity of its own making, for peers that pin it; it trusts nobody until [`Identity::pin`] is called.
    pub fn self_signed(rank: Rank) -> Result<Self, TransportError> {
        let key = generate_key()?;
        let certificate = leaf(rank, DEFAULT_VALIDITY)?.self_signed(&key).map_err(|e| broken(&e))?;
        Ok(Self {
            certificate: certificate.der().clone(),
            key: private(&key),
            trust: Trust::Pinned(Vec::new()),
        })
    }

    /// The same identity, trusting exactly the certificates of this list.
    pub fn pin(self, pins: Vec<(Rank, Fingerprint)>) -> Self {
        Self { trust: Trust::Pinned(pins), ..self }
    }

    /// What peers pin.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate)
    }

    /// The same in hexadecimal, as `pins.txt` has it.
    pub fn fingerprint_text(&self) -> String {
        self.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The rank that the certificate names.
    pub fn named_rank(&self) -> Option<Rank> {
        (0..=u16::MAX).map(Rank).find(|rank| names_rank(&self.certificate, *rank).is_some())
    }

    /// Whom this identity trusts.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { certificate: self.certificate.clone(), key: self.key.clone_key(), trust: self.trust.clone() }
    }
}

/// Without the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("trust", &self.trust).finish_non_exhaustive()
    }
}

/// An authority that issues the identities of one cluster.
pub struct ClusterAuthority {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

impl ClusterAuthority {
    /// A new authority, kept in memory only.
    pub fn new() -> Result<Self, TransportError> {
        let key = generate_key()?;
        let certificate = authority_params().self_signed(&key).map_err(|e| broken(&e))?.der().clone();
        Ok(Self::from_parts(certificate, key))
    }

    /// The authority whose certificate and key these are.
    pub(crate) fn from_parts(certificate: CertificateDer<'static>, key: KeyPair) -> Self {
        Self { certificate, issuer: Issuer::new(authority_params(), key) }
    }

    /// An identity for `rank`, valid for `validity` from now.
    pub fn issue(&self, rank: Rank, validity: Duration) -> Result<Identity, TransportError> {
        let key = generate_key()?;
        let certificate = leaf(rank, validity)?.signed_by(&key, &self.issuer).map_err(|e| broken(&e))?;
        Ok(Identity {
            certificate: certificate.der().clone(),
            key: private(&key),
            trust: Trust::Authority(self.certificate.clone()),
        })
    }
}

impl fmt::Debug for ClusterAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterAuthority").finish_non_exhaustive()
    }
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "exflow cluster authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, 10 * DEFAULT_VALIDITY);
    params
}

fn leaf(rank: Rank, validity: Duration) -> Result<CertificateParams, TransportError> {
    let mut params = CertificateParams::new(vec![rank_name(rank)]).map_err(|e| broken(&e))?;
    params.distinguished_name.push(DnType::CommonName, rank_name(rank));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, validity);
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + now + validity;
}

fn generate_key() -> Result<KeyPair, TransportError> {
    KeyPair::generate().map_err(|e| broken(&e))
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

pub(crate) fn broken(error: &dyn fmt::Display) -> TransportError {
    TransportError::Identity {
        path: None,
        what: format!("a certificate cannot be made: {error}"),
        remedy: "check the system's random number source and clock".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_bound_to_its_rank() {
        let authority = ClusterAuthority::new().expect("authority");
        let identity = authority.issue(Rank(3), DEFAULT_VALIDITY).expect("identity");
        assert!(identity.trust.is_rank(&identity.certificate, Rank(3)));
        assert!(!identity.trust.is_rank(&identity.certificate, Rank(2)));
        let pinned = Identity::self_signed(Rank(1)).expect("identity");
        let print = pinned.fingerprint();
        let pinned = pinned.pin(vec![(Rank(1), print)]);
        assert!(pinned.trust.is_rank(&pinned.certificate, Rank(1)));
        assert!(!pinned.trust.is_rank(&pinned.certificate, Rank(0)));
        assert!(!format!("{pinned:?}").to_lowercase().contains("key"));
    }
}
